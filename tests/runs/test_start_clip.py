"""The first clip where a recipe names none: measured on public text, at the model's own scale, and the same for all who need it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_overrides
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.errors import PrivacyError, ViabilityError
from drencoder.federated.query import update_query
from drencoder.models.adapter_layout import Segment
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import asking
from drencoder.runs import run as experiment
from drencoder.runs.build import build
from drencoder.runs.plan_overview import privacy_plan
from drencoder.runs.start_clip import measured_clip
from drencoder.runs.verify import verify_run

SEGMENTS = (Segment("a", 0, (2, 3)),)
OPEN = ["privacy.clip_l2=0", "privacy.trust=central"]


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [*tiny_overrides(folder), *OPEN, *overrides])


def public(*norms: float) -> PublicUpdates:
    return PublicUpdates(torch.tensor(norms)[:, None] * torch.eye(6)[:1], "made for a test")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_the_clip_is_the_median_norm_whatever_the_models_scale(scale: float) -> None:
    recipe = Recipe().changed({"encoder.name": "identity"})
    clip = measured_clip(recipe, IdentityEncoder(SEGMENTS), public(1 * scale, 2 * scale, 70 * scale))
    assert clip == pytest.approx(2 * scale, rel=1e-3)


@pytest.mark.parametrize("norms", [(0.0, 0.0, 1.0), (1.0, float("nan"), float("nan")), (float("inf"),)])
def test_updates_that_give_no_clip_are_one_sentence(norms: tuple[float, ...]) -> None:
    with pytest.raises(ViabilityError, match=r"name one in privacy.clip_l2"):
        measured_clip(Recipe(), IdentityEncoder(SEGMENTS), public(*norms))


def test_a_query_has_the_recipes_clip_or_the_one_that_was_measured() -> None:
    encoder, named = IdentityEncoder(SEGMENTS), Recipe().changed({"privacy.clip_l2": 0.25})
    assert update_query(encoder, named, 1).spec.clip_l2 == 0.25
    assert update_query(encoder, named, 1, clip_l2=9.0).spec.clip_l2 == 0.25
    assert update_query(encoder, Recipe(), 1, clip_l2=9.0).spec.clip_l2 == 9.0
    with pytest.raises(PrivacyError, match="leaves the clip to be measured"):
        update_query(encoder, Recipe(), 1)


@pytest.mark.parametrize("encoder", ["random", "identity"])
def test_clients_are_clipped_to_it_and_the_noise_follows(
    encoder: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds a client, what the noise is scaled by and what the certificate says are one number in every round."""
    release, clips = asking.server_release, []

    def released(query: Any, answers: Any, permit: Any, noise: Any) -> Any:
        result = release(query, answers, permit, noise)
        if query.spec.slot:
            clips.append(
                (query.spec.clip_l2, result.release.clip_l2, result.release.noise_std / permit.noise_multiplier)
            )
        return result

    monkeypatch.setattr(asking, "server_release", released)
    ratio = {"random": 16, "identity": 0}[encoder]
    recipe = recipe_of(tiny_folder, f"encoder.name={encoder}", f"encoder.ratio={ratio}")
    result = experiment.run(recipe, tmp_path / "run")
    facts = result.certificate["clip"]
    assert facts["kind"] == "fixed"
    assert "public text (written by the base model itself)" in facts["start"]
    assert [asked for asked, _, _ in clips] == [facts["clip_l2"]] * recipe.federation.rounds
    for asked, bounded, noised in clips:  # rounding to integers adds a little to what the noise has to cover
        assert bounded == asked
        assert asked <= noised <= 1.02 * asked
    assert not verify_run(result.folder).trouble

    live = build(recipe)
    updates = live.updates_of_public_text(live.lora.initial_D, 1)
    assert updates is not None
    median = float(torch.linalg.vector_norm(updates.update_ND, dim=1).median())
    if encoder == "identity":
        assert facts["clip_l2"] == pytest.approx(median, rel=1e-2)
    else:  # a sketch that the noised prior lays out
        assert median / 20 < facts["clip_l2"] < 20 * median


def test_a_models_scale_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """With alpha / 100 every gradient is a hundredth and every step has to be a hundred times as long: the run is the same run.

    With a clip of 1, which nobody's update reaches then, the noise is a hundred times what the clients say.
    """
    common = ["encoder.name=ffa", "encoder.ratio=0", "prior.source=none", "privacy.noise=replay", "server.optimizer=fedadam", "server.final_share=1"]  # fmt: skip
    small = ["adapter.alpha=0.04", "server.learning_rate=5"]
    losses = {}
    for name, more in {"as it is": ["adapter.alpha=4", "server.learning_rate=0.05"], "small": small, "fixed": [*small, "privacy.clip_l2=1"]}.items():  # fmt: skip
        result = experiment.run(recipe_of(tiny_folder, *common, *more), tmp_path / name)
        losses[name] = result.certificate["results"]["this run"]["loss"]["value"]
        losses[f"{name}, clip"] = result.certificate["clip"]["clip_l2"]
    assert losses["small, clip"] == pytest.approx(losses["as it is, clip"] / 100, rel=1e-2)
    assert losses["small"] == pytest.approx(losses["as it is"], abs=1e-3)
    assert abs(losses["fixed"] - losses["as it is"]) > 1e-2


def test_a_recipe_of_five_lines_runs_and_two_accountants_agree(tiny_folder: Path, tmp_path: Path) -> None:
    """Model, data, owner, epsilon, trust. 40 owners: 32 of them a round, and a clip that nobody named."""
    rows = [{"instruction": f"ask {n}", "response": f"say {n % 5}", "who": f"p{n % 40}"} for n in range(160)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.toml").write_text(
        f'model.source = "{tiny_folder}"\ndata.source = "{tmp_path / "notes.jsonl"}"\ndata.client_field = "who"\n'
        'privacy.epsilon = 8\nprivacy.trust = "central"\n'
    )
    few = ["federation.rounds=2", "data.max_tokens=24"]  # for speed only
    result = experiment.run(load_recipe(tmp_path / "mine.toml", few), tmp_path / "run")
    header = json.loads(result.ledger.read_text().splitlines()[0])["plan"]
    assert (header["population"], header["sampling_rate"], header["stage1_rate"]) == (40, 0.8, 0.8)
    assert not verify_run(result.folder).trouble
    tool = Path(__file__).parents[2] / "tools" / "reaccount.py"
    done = subprocess.run([sys.executable, str(tool), str(result.folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("population", "rate"), [(10, 1.0), (32, 1.0), (64, 0.5), (1_600, 0.02), (10**9, 0.02)])
def test_a_round_has_two_percent_or_thirty_two_clients(population: int, rate: float) -> None:
    recipe = Recipe().changed({"federation.population": population, "privacy.trust": "central"})
    assert (recipe.sampling_rate, recipe.stage1_rate) == (rate, rate)
    assert recipe.changed({"federation.sampling_rate": 0.25}).sampling_rate == 0.25


def test_units_of_sites_are_counted_in_all() -> None:
    knobs = {
        "federation.population": 8,
        "privacy.unit": "record",
        "federation.units_per_site": 100,
        "privacy.trust": "local",
    }
    recipe = Recipe().changed(knobs)
    assert recipe.sampling_rate == pytest.approx(32 / 800)
    assert privacy_plan(recipe).sampling_rate == recipe.sampling_rate


@pytest.mark.parametrize("trust", ["local", "secure-aggregation"])
@pytest.mark.parametrize(("rounds", "cap"), [(1, 1), (20, 1), (6, 2), (7, 3), (30, 1), (48, 1)])
@pytest.mark.parametrize("stage1", ["moments", "none"])
def test_it_leaves_room_for_the_cap(trust: str, rounds: int, cap: int, stage1: str) -> None:
    """Of 40 clients, 32 in each of 20 rounds would be asked 16 times each."""
    knobs = {"federation.population": 40, "federation.rounds": rounds, "privacy.participation_cap": cap}
    recipe = Recipe().changed({**knobs, "privacy.trust": trust, "prior.source": stage1, "privacy.delta": 1e-3})
    plan = privacy_plan(recipe)  # which refuses a plan that would pass the cap
    longest = -(-(rounds + (stage1 != "none")) // cap)
    assert plan.sampling_rate == pytest.approx(min(0.8, 1 / longest))


def test_a_resumed_run_keeps_the_clip(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, asked = experiment.update_query, []

    def killed(*arguments: Any) -> Any:
        asked.append(original(*arguments).spec.clip_l2)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(experiment, "update_query", killed)
    recipe = recipe_of(tiny_folder, "encoder.name=random", "encoder.ratio=16")
    with pytest.raises(KeyboardInterrupt):
        experiment.run(recipe, tmp_path / "run")
    result = experiment.resume(tmp_path / "run")
    assert set(asked) == {result.certificate["clip"]["clip_l2"]}
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["clip"] == result.certificate["clip"]


def test_a_named_clip_asks_for_no_public_text(tiny_folder: Path) -> None:
    named = build(load_recipe("quickstart", [*tiny_overrides(tiny_folder), "privacy.clip_l2=3"]))
    assert named.texts.public is None
