"""Whoever edits a finished run, and mends every hash afterwards, is found out by `verify` and by the independent script."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forgeries import (
    CERTIFICATE,
    FILES,
    LEDGER,
    key_in_the_header,
    less_noise,
    more_bytes,
    no_charge_at_all,
    no_longer_marked,
    one_charge_less,
    private_after_all,
    replayed_as_secure,
    sampled_less,
    sampled_less_everywhere,
    size_of_a_secret_cohort,
)

from conftest import tiny_overrides
from drencoder.errors import ArtifactError
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.report import remake_report
from drencoder.runs.verify import verify_run
from tampering import Forgery, reaccount, verdict

KINDS = {
    "local": [],
    "central": ["privacy.trust=central", "privacy.noise_multiplier=1.0"],
    "replay": ["privacy.noise=replay"],
}


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for kind, overrides in KINDS.items():
        recipe = load_recipe("quickstart", [*tiny_overrides(tiny_folder), "evaluation.examples=4", *overrides])
        experiment.run(recipe, folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_run_holds_and_so_does_one_whose_hashes_were_only_made_again(
    runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    assert verdict(runs[kind]) == ""
    assert reaccount(runs[kind]) == 0
    forged = Forgery(runs[kind], tmp_path / "run")
    forged.recertify()
    assert verdict(forged.mend()) == ""
    assert reaccount(forged.path) == 0


@pytest.mark.parametrize("tamper", [*LEDGER, *CERTIFICATE, *FILES], ids=lambda change: change.__name__)
def test_an_edit_whose_hashes_were_all_mended_is_found(
    runs: dict[str, Path], tmp_path: Path, tamper: Callable[[Forgery], None]
) -> None:
    forged = Forgery(runs["local"], tmp_path / "run")
    tamper(forged)
    assert verdict(forged.mend()) != ""
    assert reaccount(forged.path) == 1


@pytest.mark.parametrize(
    ("kind", "tamper"),
    [
        *(("central", change) for change in (size_of_a_secret_cohort, sampled_less, sampled_less_everywhere, key_in_the_header,
          less_noise, one_charge_less, no_charge_at_all, more_bytes, CERTIFICATE[0], CERTIFICATE[16], CERTIFICATE[20])),
        *(("replay", change) for change in (private_after_all, replayed_as_secure, no_longer_marked)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_so_is_one_of_another_trust(
    runs: dict[str, Path], tmp_path: Path, kind: str, tamper: Callable[[Forgery], None]
) -> None:
    forged = Forgery(runs[kind], tmp_path / "run")
    tamper(forged)
    assert verdict(forged.mend()) != ""
    assert reaccount(forged.path) == 1


@pytest.mark.parametrize(
    "name",
    ["recipe.resolved.toml", "metrics.jsonl", "outcomes.json", "certificate.json", "report.html", "ledger.jsonl",
     "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "checkpoints/latest.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["longer", "missing", "empty"])
def test_a_file_that_is_not_the_one_the_run_left_is_named(
    runs: dict[str, Path], tmp_path: Path, name: str, how: str
) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["local"], path)
    if how == "longer":
        (path / name).write_bytes((path / name).read_bytes() + b" ")
    elif how == "empty":
        (path / name).write_bytes(b"")
    else:
        (path / name).unlink()
    found = verdict(path)
    assert Path(name).name in found or "ledger" in found or "not a run folder" in found
    assert reaccount(path) == 1


def test_a_file_that_the_run_did_not_leave_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["local"], tmp_path / "run")
    (tmp_path / "run" / "adapter" / "more.safetensors").write_bytes(b"")
    assert "more.safetensors is not one of the files" in verdict(tmp_path / "run")
    assert reaccount(tmp_path / "run") == 1


def test_what_does_not_hold_is_named_by_its_field(runs: dict[str, Path], tmp_path: Path) -> None:
    forged = Forgery(runs["local"], tmp_path / "run")
    forged.certificate["delta"], forged.certificate["run_id"] = 1e-9, "x"
    forged.certificate["plan"]["noise_multiplier"] = 7.0
    found = verify_run(forged.mend()).troubles
    assert len(found) == 3
    assert "certificate's delta is 1e-09, and ledger and recipe give 0.001" in " ".join(found)
    assert "certificate's run_id" in " ".join(found)
    assert "certificate's plan's noise_multiplier is 7.0" in " ".join(found)


def test_a_report_that_is_made_again_stays_the_runs_own(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["local"], path)
    before = (path / "ledger.jsonl").read_bytes()
    remake_report(path)
    assert (path / "ledger.jsonl").read_bytes() == before  # the same page
    (path / "report.html").write_text("an older version's page")
    assert "report.html was changed" in verdict(path)
    remake_report(path)
    assert verdict(path) == ""
    certificate = json.loads((path / "certificate.json").read_text())
    (path / "certificate.json").write_text(json.dumps(certificate | {"statement": "perfectly private"}))
    with pytest.raises(ArtifactError, match=r"certificate\.json .* was changed after the run closed its ledger"):
        remake_report(path)


# --- the recipe of a run that goes on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [("seed = 0", "seed = 1"), ("clip_l2 = 1.0", "clip_l2 = 2.0"), ('name = "random"', 'name = "identity"'),
     ('noise_in = "code"', 'noise_in = "update"'), ("momentum = 0.5", "momentum = 0.6"), ("epsilon = 8.0", "epsilon = 9.0")],
)  # fmt: skip
def test_an_edited_recipe_does_not_resume(runs: dict[str, Path], tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["local"], path)
    text = (path / "recipe.resolved.toml").read_text()
    assert old in text
    (path / "recipe.resolved.toml").write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match="the recipe is not the one with which"):
        experiment.resume(path)


def test_speed_may_change_in_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["local"], path)
    text = (path / "recipe.resolved.toml").read_text()
    (path / "recipe.resolved.toml").write_text(text.replace("parallel_clients = 32", "parallel_clients = 2"))
    experiment.resume(path)
    assert verdict(path) == ""


def test_another_last_digit_of_the_calibrated_noise_is_the_same_plan(runs: dict[str, Path], tmp_path: Path) -> None:
    forged = Forgery(runs["local"], tmp_path / "run")
    for record in forged.records:
        if record["kind"] == "charge":
            record["event"]["noise_multiplier"] *= 1 + 1e-13
    for key in ("noise_multiplier", "stage1_noise_multiplier"):
        forged.records[0]["plan"][key] *= 1 + 1e-13
    forged.recertify()
    assert verdict(forged.mend()) == ""
    assert reaccount(forged.path) == 0
    experiment.resume(forged.path)
