"""The study of the paper's three leakages (benchmarks/leakages.py): its attacks where the answer is known."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from leakage_study import membership, subjects
from leakage_study.arms import Arm, open_channel
from leakage_study.findings import Audit, Finding
from leakage_study.leakages import audit_leakages
from leakage_study.membership import (
    cohort_attack,
    score_against_mean,
    score_knowing_others,
    server_attack,
    smallest_cohort,
)
from leakage_study.setup import AuditSetup, plan_under
from leakage_study.tokens import score_by_shadow_clients
from leakage_study.training_set import attack_training_set
from torch import Tensor
from torch.nn import functional

from conftest import tiny_base, tiny_overrides
from drencoder.audit.auc import Auc, estimate_auc, estimate_clustered_auc, gaussian_max_auc
from drencoder.audit.inversion import present_tokens, share_of_tokens_found
from drencoder.audit.span import SpanAttack
from drencoder.data.tokenization import Example
from drencoder.encoders.code_sizes import auto_ratio
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.planning import wire_dtype
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.errors import DataError, ModelError
from drencoder.models.adapter_layout import Segment
from drencoder.models.lora import LoraModel
from drencoder.published.fitting import AutoencoderOptions
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.build import Components, build

SEGMENTS = (Segment("a", 0, (4, 32)), Segment("b", 128, (32, 4)))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- leakage 3: the bound holds, and sabotage is seen ------------------------------------------------


def long_updates(count: int) -> Tensor:
    return functional.normalize(normal(count, 256, seed=8).float(), dim=1) * 1e3


@pytest.mark.parametrize("name", ["identity", "random"])
@pytest.mark.parametrize("noise_in", ["code", "update"])
def test_the_server_meets_the_bound_exactly(name: str, noise_in: str) -> None:
    encoder = IdentityEncoder(SEGMENTS) if name == "identity" else RandomSketch.build(SEGMENTS, 64)
    arm = Arm("x", "x", encoder, noise_in=noise_in, noise_multiplier=0.8)
    auc = server_attack(arm, load_recipe(), long_updates(64), 32, 0)
    bound = gaussian_max_auc(1 / 0.8)
    assert arm.max_mu("add_remove") == pytest.approx(1 / 0.8)
    assert auc.floor < bound
    if (name, noise_in) == ("identity", "update") or noise_in == "code":
        assert abs(auc.value - bound) < 6 * (auc.value - auc.floor) / 3.29
    else:
        assert auc.value < bound - 0.05  # noise of 256 values on an update of which a quarter is sent


@pytest.mark.parametrize("trust", ["local", "central"])
def test_the_strongest_adversary_of_a_sum_meets_the_bound(trust: str) -> None:
    arm = Arm("x", "x", RandomSketch.build(SEGMENTS, 64), noise_multiplier=0.8, trust=trust)  # type: ignore[arg-type]
    smallest = smallest_cohort(64, 24, 0)
    bound = gaussian_max_auc(arm.max_mu("add_remove", smallest) or math.nan)
    auc = cohort_attack(arm, load_recipe(), long_updates(24), 64, 0, score_knowing_others)
    assert auc.floor < bound < auc.value + 6 * (auc.value - auc.floor) / 3.29 + 0.02  # cohorts larger than the smallest
    weaker = cohort_attack(arm, load_recipe(), long_updates(24), 64, 0, score_against_mean)
    assert weaker.floor < bound


@pytest.mark.parametrize("runs", [0.0, 0.08])
@pytest.mark.parametrize("trust", ["local", "central"])
def test_noise_below_the_promise_is_found(trust: str, runs: float) -> None:
    arm = Arm("x", "x", RandomSketch.build(SEGMENTS, 64), noise_multiplier=runs, promised=0.8, trust=trust)  # type: ignore[arg-type]
    assert arm.sabotaged
    bound = gaussian_max_auc(arm.max_mu("add_remove", 1) or math.nan)
    if trust == "local":
        auc = server_attack(arm, load_recipe(), long_updates(24), 32, 0)
    else:
        auc = cohort_attack(arm, load_recipe(), long_updates(24), 128, 0, score_knowing_others)
    assert bound == gaussian_max_auc(1 / 0.8)
    assert Finding("release", "x", "x", "x", auc, bound, sabotaged=True).exposed


# --- leakage 2 ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rote:
    """Reconstructs the rows it has learnt, up to an error, and nothing else."""

    known_ND: Tensor

    def encode(self, update_ND: Tensor, seed: int) -> Tensor:
        return update_ND

    def decode(self, code_NK: Tensor, seed: int) -> Tensor:
        seen_N = (code_NK[:, None] == self.known_ND).all(2).any(1)
        return torch.where(seen_N[:, None], 0.9 * code_NK, 0.0)


def test_an_encoder_that_learnt_by_heart_is_found_and_one_that_did_not_is_not() -> None:
    member, other, third = normal(60, 8, seed=9).float().split(20)
    found = attack_training_set(Rote(member), Rote(third), member, other)  # type: ignore[arg-type]
    assert found.error.value == found.calibrated.value == 1.0
    assert found.member_error == pytest.approx(0.01, abs=1e-4)
    assert found.other_error == 1.0
    blind = attack_training_set(Rote(third), Rote(third), member, other)  # type: ignore[arg-type]
    assert blind.error.value == blind.calibrated.value == 0.5


# --- leakage 1, on the embedded model ---------------------------------------------------------------


QUICK = [
    "adapter.targets=['layers.0.self_attn.q_proj', 'layers.0.self_attn.k_proj', 'layers.0.self_attn.v_proj', 'layers.0.self_attn.o_proj']",
    "privacy.noise=replay",
    "evaluation.examples=8",
]


@pytest.fixture(scope="module")
def live() -> Iterator[Components]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "_SHADOWS", 128)
        yield build(load_recipe("quickstart", QUICK))


def test_tokens_are_read_from_a_raw_update_and_not_from_a_noised_code(live: Components) -> None:
    scene = subjects.gather_subjects(live, 24, 0)
    span, segments = SpanAttack.of(live.lora), live.lora.layout.segments
    present = present_tokens(scene.target_texts, len(span.input_VH))
    shadows = present_tokens(scene.shadow_texts, len(span.input_VH))
    measured: dict[str, tuple[Auc, float, Auc]] = {}
    for arm in (
        Arm("raw", "x", IdentityEncoder(segments)),
        Arm("bare", "x", RandomSketch.build(segments, 512)),
        Arm("noised", "x", RandomSketch.build(segments, 512), noise_multiplier=2.0),
    ):
        query = arm.query(live.recipe, 1)
        with open_channel(arm.plan(24, 1), 0) as channel:
            message = channel.messages(query, scene.target_ND)
        scores = span.scores(query.decode(message))
        shadow = estimate_clustered_auc(score_by_shadow_clients(query, message, scene.shadow_MD, shadows), present, 0)
        measured[arm.name] = estimate_clustered_auc(scores, present, 0), share_of_tokens_found(scores, present), shadow
    assert measured["raw"][0].low > 0.9
    assert measured["raw"][1] > 0.8
    assert measured["bare"][2].low > 0.65  # encoding alone hides little
    assert measured["noised"][0].low < 0.55
    assert measured["noised"][1] < 0.1
    assert measured["noised"][2].low < 0.55


@pytest.mark.slow
def test_an_audit_is_whole_and_the_same_for_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "_SHADOWS", 64)
    monkeypatch.setattr(membership, "_MORE_TRIALS", 1)
    live = build(
        load_recipe(
            "quickstart",
            [*QUICK, "adapter.rank=2", "adapter.targets=['layers.0.self_attn.q_proj', 'layers.0.self_attn.v_proj']"],
        )
    )
    said: list[str] = []
    listener = type("Listener", (), {"say": lambda self, text: said.append(text)})()
    first = audit_leakages(live, clients=8, seed=3, listener=listener, trials=8, train_steps=2)
    again = audit_leakages(live, clients=8, seed=3, trials=8, train_steps=2)
    assert json.dumps(first.to_dict()) == json.dumps(again.to_dict())
    assert {finding.leakage for finding in first.findings} == {"tokens", "training set", "release"}
    assert len(said) == 5
    assert not first.broken
    assert first.example["num_tokens"] > first.example["right"] >= 0


@pytest.mark.parametrize("encoder", ["hybrid", "random"])
def test_a_recipe_whose_plan_chooses_the_code_size_is_audited(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`encoder.ratio = 0` is the default: the plan chooses. An own recipe with nothing but that ended in a division by 0."""
    monkeypatch.setattr(subjects, "_SHADOWS", 64)
    small = ["adapter.rank=2", "adapter.targets=['q_proj', 'v_proj']", f"encoder.name={encoder}", "encoder.ratio=0"]
    components = build(load_recipe("quickstart", [*QUICK, *small]))
    assert components.recipe.encoder.ratio == 0
    setup = AuditSetup(
        components=components,
        subjects=subjects.gather_subjects(components, 8, 0),
        seed=0,
        trials=8,
        options=AutoencoderOptions(steps=2, name="autoencoder-cnn1d"),
        local=plan_under(components, "local"),
        central=plan_under(components, "central"),
    )
    prior = setup.fit_prior(setup.subjects.collected_ND, setup.segments, setup.stage1_sigma)
    size = setup.segments[-1].stop
    ratio = auto_ratio(size, setup.local.k_star(), wire_dtype(components.recipe))
    assert setup.build_sketch(prior).code_size == round(size / ratio)
    arm = setup.make_arms()[-1]
    assert server_attack(arm, components.recipe, setup.subjects.target_ND, 8, 0).floor < 1


def test_findings_sort_themselves() -> None:
    sure = estimate_auc(torch.ones(500), torch.zeros(500))
    honest, broken = Finding("release", "a", "s", "t", sure), Finding("release", "b", "s", "t", sure, 0.8)
    noticed, missed = (dataclasses.replace(broken, sabotaged=True, max_auc=bound) for bound in (0.8, 1.0))
    audit = Audit((honest, broken, noticed, missed), {}, {})
    assert audit.broken == (broken,)
    assert audit.unnoticed == (missed,)


# --- bad input ---------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(live: Components, tiny_folder: Path) -> None:
    with pytest.raises(DataError, match=r"7 clients.*at least 8"):
        audit_leakages(live, clients=7)
    with pytest.raises(DataError, match=r"7 trials.*at least 8"):
        audit_leakages(live, clients=8, trials=7)
    with pytest.raises(DataError, match=r"3,334 clients.*10,000: ask for 3,333"):
        audit_leakages(live, clients=3334)
    tiny = build(load_recipe("quickstart", [*tiny_overrides(tiny_folder), "adapter.targets=['o_proj']"]))
    with pytest.raises(ModelError, match="first layer's q, k or v"):
        audit_leakages(tiny, clients=8)


def test_a_model_whose_first_input_is_not_its_token_is_refused() -> None:
    base = tiny_base()
    lora = LoraModel(base, config.Adapter(rank=2), seed=0)
    assert SpanAttack.of(lora).input_VH.shape == (97, 24)
    layer = base.model.model.layers[0]
    layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1.0, *inputs[1:]))
    with pytest.raises(ModelError, match=r"audit one of those"):
        SpanAttack.of(lora)


def test_tokens_before_the_last_place_count() -> None:
    texts = [Example((5, 6, 7), 2), Example((5, 8, 8, 1), 2)]
    present = present_tokens(texts, 10)
    assert [row.nonzero()[:, 0].tolist() for row in present] == [[5, 6], [5, 8]]
    score = torch.zeros(2, 10)
    score[0, 6] = score[1, 3] = 1.0
    assert share_of_tokens_found(score, present) == 0.5  # token 5 is in both and counts for neither
