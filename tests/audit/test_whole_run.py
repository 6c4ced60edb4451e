"""Whole runs in the public's view, under every trust: what published states tell, and what it is promised."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from audit_parts.sites_and_shares import every_round
from test_faults import SMALL

from conftest import tiny_overrides
from drencoder.audit.canaries import Planted, crafted, draw_coins
from drencoder.audit.noise_checks import check_shares
from drencoder.audit.released_states import PublishedRun, code_of
from drencoder.audit.trials import Trial, Trials
from drencoder.audit.unit_checks import check_observers
from drencoder.audit.whole_run import _few_of_each, audit_run, follows_runs
from drencoder.encoders.planning import load_checked_recipe
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.query import Query, update_query
from drencoder.federated.server_optimizer import ServerState
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.observers import epsilons_by_observer
from drencoder.runs.build import Components, build
from drencoder.runs.checkpoint import Progress
from drencoder.runs.stage1 import fit_encoder

pytestmark = pytest.mark.usefixtures("known_noise")

SECURE = ["privacy.trust=secure-aggregation", "federation.rounds=3", "federation.sampling_rate=0.3"]
SITES = ["privacy.unit=owner", "federation.population=6", "federation.nodes=6", "federation.units_per_site=20"]


def built(folder: Path, *overrides: str) -> Components:
    return build(load_checked_recipe("quickstart", [*tiny_overrides(folder), *SMALL, *SECURE, *overrides]))


def queries_of(components: Components) -> dict[int, Query]:
    start = Progress(ServerState.start(components.lora.initial_D))
    progress, encoder = fit_encoder(components, start, None, lambda _text: None)
    adaptive = AdaptiveClip(1.0) if components.recipe.privacy.clip == "adaptive" else None
    return {
        slot: update_query(encoder, components.recipe, slot, adaptive, progress.prior, 1.0)
        for slot in components.plan.slots
    }


def some_canaries(query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
    return crafted(cohort[:20], draw_coins(0, 20, query.spec.slot), cohort)


@pytest.mark.parametrize(
    "overrides",
    [
        ["server.optimizer=fedavg", "server.final_share=0.1", "server.learning_rate=24"],
        ["server.optimizer=fedavgm", "server.momentum=0.5"],
        ["server.optimizer=fedadam", "encoder.name=hybrid", "prior.public=self"],
        ["server.optimizer=fedadam", "privacy.clip=adaptive"],
        ["server.optimizer=fedadam", "privacy.trust=local"],
        ["server.optimizer=fedavgm", "privacy.trust=local", "privacy.clip=adaptive"],
        ["server.optimizer=fedadam", "privacy.trust=central"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_published_states_tell_the_released_sum_of_every_round(overrides: list[str], tiny_folder: Path) -> None:
    components = built(tiny_folder, *overrides)
    queries, trials = queries_of(components), Trials(components, components.lora.initial_D)
    published = PublishedRun(components.recipe.server, components.plan, components.lora.initial_D)
    for trial in trials.of_one_run(queries.__getitem__, components.plan.slots, some_canaries):
        told_K, released_K = published.next_sum(trial), trial.released.release.value
        assert torch.equal(told_K, released_K)
        sum_D = trial.query.decode(released_K[None])[0]
        codes = trial.query.spec.wire.code_size - (trial.query.spec.adaptive_clip is not None)
        solved_K = code_of(trial.query, sum_D)
        assert float((solved_K - released_K)[:codes].norm()) < 1e-4 * float(released_K[:codes].norm())


def test_states_that_come_from_something_else_than_the_release_tell_that(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = built(tiny_folder)
    queries, trials = queries_of(components), Trials(components, components.lora.initial_D)
    trial = next(trials.of_one_run(queries.__getitem__, components.plan.slots, some_canaries))
    other_D = trial.query.decode(trial.own_NV[:1])[0]
    monkeypatch.setattr("drencoder.audit.released_states.released_update", lambda *_: other_D)
    published = PublishedRun(components.recipe.server, components.plan, components.lora.initial_D)
    told_K = published.next_sum(trial) / trial.expected_cohort
    assert float((told_K - trial.own_NV[0]).norm()) < 1e-4 * float(trial.own_NV[0].norm())


@pytest.mark.parametrize("unit", [[], SITES], ids=["clients", "owners of sites"])
def test_the_public_sees_what_the_server_sees_and_is_promised_what_a_certificate_states(
    unit: list[str], tiny_folder: Path
) -> None:
    components = built(tiny_folder, *unit)
    plan, queries = components.plan, queries_of(components)
    assert follows_runs(plan)
    trials = Trials(components, components.lora.initial_D)
    views, checks = audit_run(trials, queries.__getitem__, plan, canaries=64, seed=0)
    view_of = {view.observer: view for view in views}
    assert set(view_of) == {"server", "public"} | ({"clients"} if unit else set())
    public, server = view_of["public"], view_of["server"]
    assert "computed back from what it publishes" in public.sees
    assert public.promised == server.promised
    assert public.bounds["gaussian"]["95"] == pytest.approx(server.bounds["gaussian"]["95"], rel=1e-3)
    assert public.bounds["gaussian"]["95"] > 0.3 * public.promised
    if unit:
        due = epsilons_by_observer(plan, {slot: (1, 6) for slot in plan.slots}, "add_remove")
        assert public.promised == pytest.approx(due["public"], rel=1e-6)
    else:  # as many contributors as came, and these are more than the plan's least
        assert public.promised < epsilons_by_observer(plan, plan.schedule(), "add_remove")["public"]
    assert all(check.passed for check in checks)
    names = {check.name for check in checks}
    assert ("clients are asked no more often than was charged" in names) == (not unit)
    assert "noise does not cancel over a run" in names


@pytest.mark.parametrize(("rounds", "cap"), [(3, 1), (4, 2)])
def test_under_local_trust_the_public_is_promised_the_noise_of_those_who_came(
    rounds: int, cap: int, tiny_folder: Path
) -> None:
    settings = [f"federation.rounds={rounds}", "federation.sampling_rate=0.3", f"privacy.participation_cap={cap}"]
    components = built(tiny_folder, "privacy.trust=local", *settings)
    plan, queries = components.plan, queries_of(components)
    trials = Trials(components, components.lora.initial_D)
    views, checks = audit_run(trials, queries.__getitem__, plan, canaries=200, seed=0)
    view_of = {view.observer: view for view in views}
    assert set(view_of) == {"server", "public"}
    public, server = view_of["public"], view_of["server"]
    assert public.inside + public.outside == server.inside + server.outside >= 200
    due = epsilons_by_observer(plan, {slot: (1, 4) for slot in plan.slots}, "add_remove")
    assert public.promised == pytest.approx(due["public"], rel=1e-6)
    assert server.promised == pytest.approx(due["server"], rel=1e-6)
    for view in views:
        assert not view.exceeded
        assert view.bounds["gaussian"]["95"] > 0.4 * view.promised
    assert all(check.passed for check in checks)


def test_where_codes_are_decoded_one_by_one_the_public_is_promised_no_more_than_the_server(tiny_folder: Path) -> None:
    components = built(tiny_folder, "privacy.trust=local", "privacy.noise_in=update", "privacy.clip_l2=1")
    trials = Trials(components, components.lora.initial_D)
    views, _ = audit_run(trials, queries_of(components).__getitem__, components.plan, canaries=60, seed=0)
    view_of = {view.observer: view for view in views}
    assert view_of["public"].promised == view_of["server"].promised
    assert not any(view.exceeded for view in views)


def test_few_of_a_cohort_are_followed_together() -> None:
    cohorts = [[1, 2, 3, 4], [5, 6], [1, 3, 5, 7], []]
    assert _few_of_each([1, 3, 5], cohorts, 1) == [1]
    assert _few_of_each([1, 3, 5], cohorts, 2) == [1, 3]
    assert _few_of_each([2, 4, 6, 7], cohorts, 1) == [2, 6, 7]


@pytest.mark.parametrize("trust", ["local", "secure-aggregation"])
def test_the_public_finds_out_that_a_cap_is_not_kept_though_every_release_is_as_promised(
    trust: str, tiny_folder: Path
) -> None:
    settings = ["federation.rounds=8", "federation.sampling_rate=0.125", "encoder.ratio=1", f"privacy.trust={trust}"]
    components = built(tiny_folder, *settings)
    queries, trials = queries_of(components), Trials(components, components.lora.initial_D)
    assert len(components.plan.blocks) == 1
    with every_round():  # the clients of the first round are in all
        views, checks = audit_run(trials, queries.__getitem__, components.plan, canaries=200, seed=0)
    assert {view.observer for view in views if view.failure} == {"server", "public"}
    failed = [check.found for check in checks if not check.passed]
    assert failed == ["Nobody was asked in more than 8 of 8 releases of a run, and each pays for 1."]


def silent_trial(folder: Path) -> Trial:
    components = built(folder, *SITES)
    query, trials = queries_of(components)[1], Trials(components, components.lora.initial_D)

    def nobody(_query: Query, cohort: Sequence[int], _permit: Permit) -> Planted:
        return Planted((), draw_coins(0, 0), lambda _query, _places: torch.zeros(0), cohort)

    return next(trials.without_end(lambda _slot: query, (1,), nobody))


def test_a_sum_that_is_not_to_the_last_bit_its_contributors_shares_is_named(tiny_folder: Path) -> None:
    trial = silent_trial(tiny_folder)
    assert check_shares([trial], "a round").passed
    assert trial.heard is not None
    assert trial.heard.drew == list(range(6))
    trial.heard.total_V[3] += 1  # one step in one value
    assert "in 1 of 96 values" in check_shares([trial], "a round").found
    trial.heard.total_V[3] -= 1
    trial.heard.drew.remove(4)
    found = check_shares([trial], "a round")
    assert not found.passed
    assert "1 of 6 contributors to a round drew no share of noise" in found.found


@pytest.mark.parametrize("observer", ["server", "clients", "public"])
def test_a_certificate_that_understates_what_an_observer_learned_is_named(
    observer: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with Ledger.create(tmp_path / "ledger.jsonl", built(tiny_folder).plan, run_id="run") as ledger:
        ledger.record_contributors(1, len(ledger.charge(1).cohort))
        certificate = json.loads(json.dumps(ledger.certificate()))
        assert check_observers(ledger, certificate).passed
        certificate["observers"][observer]["by_relation"]["add_remove"]["epsilon_pld"] *= 0.9
        found = check_observers(ledger, certificate)
    assert not found.passed
    assert f"is due against the {observer}" in found.found
