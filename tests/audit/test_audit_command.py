"""`drencoder audit` on a recipe and on a run: what it leaves, how it ends, what it refuses."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_faults import SMALL

from conftest import tiny_overrides
from drencoder.audit.audit import audit_recipe, audit_run_folder
from drencoder.audit.noise_checks import Check
from drencoder.audit.result import WITHOUT_RECORDS
from drencoder.cli import main as cli
from drencoder.encoders.planning import load_checked_recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run

pytestmark = pytest.mark.usefixtures("known_noise")


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["drencoder", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def finished(tiny_folder: Path, tmp_path: Path) -> Path:
    recipe = load_checked_recipe("quickstart", [*tiny_overrides(tiny_folder), *SMALL])
    return experiment.run(recipe, tmp_path / "run").folder


def test_a_run_is_audited_and_its_report_says_so(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = ended(
        ["audit", str(finished), "--canaries", "64", "--json", "-q", "--out", str(finished.parent / "found.json")],
        monkeypatch,
    )
    printed = json.loads(capfd.readouterr().out)
    stored = json.loads((finished / "audit.json").read_text())
    assert printed == json.loads((finished.parent / "found.json").read_text())
    # What stays with the run has nothing that was measured on clients' records, and all else.
    assert printed["attacks"]
    assert stored["attacks"] == []
    assert "real records" in {view["canary"] for view in printed["views"]}
    assert stored["views"] == [view for view in printed["views"] if view["canary"] != "real records"]
    assert stored["checks"] == [check for check in printed["checks"] if not check["of_records"]]
    of_records = {check["name"] for check in printed["checks"] if check["of_records"]}
    assert of_records == {"evaluation text is no client's", "no client's text is in the run folder"}
    assert stored["notes"] == [WITHOUT_RECORDS]
    kept = {"format", "facts", "sentence", "assumptions"}
    assert {name: stored[name] for name in kept} == {name: printed[name] for name in kept}
    assert code == 0, stored["failures"]
    assert {view["observer"] for view in stored["views"]} == {"server", "public"}
    assert {view["relation"] for view in stored["views"]} == {"add_remove", "replace_one"}
    assert {view["canary"] for view in stored["views"]} >= {"worst case"}
    assert all(check["passed"] for check in stored["checks"])
    assert "the certificate is about this recipe" in {check["name"] for check in stored["checks"]}
    page = (finished / "report.html").read_text()
    assert "Audit: what an attacker can really tell" in page
    assert "of 100 that did" in page
    assert "real records," not in page
    assert "replies of clients" not in page
    assert not verify_run(finished, {}).trouble


def test_a_certificate_of_another_plan_is_named(finished: Path) -> None:
    path = finished / "certificate.json"
    certificate = json.loads(path.read_text())
    certificate["plan"]["noise_multiplier"] *= 2
    path.write_text(json.dumps(certificate))

    class Silent:
        def say(self, text: str) -> None: ...

    found = audit_run_folder(finished, Silent(), canaries=32, records=False)
    assert any("certificate's plan" in failure for failure in found.failures)


@pytest.fixture
def sites(tiny_folder: Path, tmp_path: Path) -> Path:
    settings = [
        "privacy.unit=owner", "federation.population=6", "federation.nodes=6", "federation.units_per_site=8", "federation.rounds=2",
    ]  # fmt: skip
    recipe = load_checked_recipe("quickstart", [*tiny_overrides(tiny_folder), *SMALL, *settings])
    return experiment.run(recipe, tmp_path / "sites").folder


def test_units_of_a_run_are_audited_against_what_its_certificate_says_of_the_worst_site(
    sites: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(["audit", str(sites), "--canaries", "64", "--json", "-q"], monkeypatch) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["facts"]["unit"] == "owner"
    assert "whether one owner took part" in found["sentence"]
    whole = {view["observer"]: view for view in found["views"] if view["sees"].startswith("all 2 releases")}
    stated = json.loads((sites / "certificate.json").read_text())["unit_terms"]["by_site"][0]["epsilon"]["add_remove"]
    assert set(whole) == {"server", "clients", "public"}
    for observer, view in whole.items():
        assert view["promised"] == pytest.approx(stated[observer], rel=1e-3)
        assert {"gaussian", "gdp", "one_run", "any"} == set(view["bounds"])
    assert {view["relation"] for view in found["views"]} == {"add_remove", "replace_one"}
    names = {check["name"] for check in found["checks"]}
    assert names >= {
        "sites draw no more often than was charged", "no draw of a site comes twice", "a unit counts once, whoever else takes part",
        "the certificate's epsilon of the worst site", "nothing but releases depends on an owner's data",
    }  # fmt: skip
    assert not verify_run(sites, {}).trouble


def test_a_certificate_that_understates_its_worst_site_is_named(sites: Path) -> None:
    path = sites / "certificate.json"
    certificate = json.loads(path.read_text())
    certificate["unit_terms"]["by_site"][0]["epsilon"]["add_remove"]["server"] *= 0.9
    path.write_text(json.dumps(certificate))

    class Silent:
        def say(self, text: str) -> None: ...

    found = audit_run_folder(sites, Silent(), canaries=32, records=False)
    assert any("too small an epsilon of its worst site against the server" in failure for failure in found.failures)


def test_a_fault_that_only_real_records_show_is_kept_without_their_numbers(finished: Path) -> None:
    class Silent:
        def say(self, text: str) -> None: ...

    found = audit_run_folder(finished, Silent(), canaries=32, records=False)
    assert found.without_records().failures == found.failures == ()
    quoted = Check("no client's text is in the run folder", False, "notes.md quotes 17 clients.", of_records=True)
    kept = replace(found, checks=(*found.checks, quoted)).without_records()
    assert kept.verdict.startswith("THE PROMISE DOES NOT HOLD: 1 of")
    assert "17" not in json.dumps(kept.to_dict()["failures"])


def test_interrupting_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drencoder.audit.audit.audit_recipe", interrupt)
    assert ended(["audit", "--out", "found.json"], monkeypatch) == 130
    assert "Interrupted" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "--set", "privacy.epsilon=2"], "leave --set out"),
        (["EMPTY"], "not a run folder"),
        (["--out", "nowhere/found.json"], "a folder that is not there"),
        (["--set", "privacy.trust=non-private"], "no promise to audit"),
    ],
)
def test_what_cannot_be_audited_is_one_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "recipe.resolved.toml").write_text("")
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ended(["audit", *arguments], monkeypatch) == 2
    shown = capfd.readouterr().err
    assert words in shown
    assert len(shown.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("extra", "near"),
    [
        (["privacy.trust=central", "privacy.clip=adaptive"], 0.5),
        (["privacy.noise_in=update"], 0.0),  # the encoder drops most of such noise's directions, and of the canary
        (["privacy.trust=central", "encoder.name=kronecker", "prior.public=self"], 0.5),
        (
            [
                "privacy.unit=record",
                "federation.population=4",
                "federation.units_per_site=9",
                "prior.source=moments",
                "privacy.clip=adaptive",
                "encoder.name=hybrid",
                "prior.public=self",
            ],
            0.4,
        ),
    ],
    ids=[
        "adaptive clip",
        "noise in the update",
        "rotated codes of four bits",
        "records, stage 1, adaptive clip, hybrid",
    ],
)
def test_other_parts_of_a_recipe_are_audited(extra: list[str], near: float, tiny_folder: Path) -> None:
    class Silent:
        def say(self, text: str) -> None: ...

    recipe = load_checked_recipe("quickstart", [*tiny_overrides(tiny_folder), *SMALL, *extra])
    found = audit_recipe(recipe, Silent(), canaries=128, records=False)
    assert found.failures == ()
    best = max(view.bounds["gaussian"]["95"] / view.promised for view in found.views if view.relation == "add_remove")
    assert best >= near
