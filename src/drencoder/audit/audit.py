"""An audit of a user's own recipe or run, from the plan to one verdict.

Order: what is promised; canaries in stage 1 and in the rounds, in every observer's view; the whole run; the noise itself; secure
aggregation's masks; real records; and what else a run tells or leaves. Everything is asked of the run's own code on its own ledger, with the
run's own noise source. Nothing of it is charged to a run that exists.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from drencoder.audit.canaries import Planted, contributions
from drencoder.audit.masks import check_masks
from drencoder.audit.noise_checks import Check, RestartCheck, check_noise, check_shares
from drencoder.audit.observers import Release, View, audit_records, audit_releases
from drencoder.audit.record_attacks import Attack, attack_content, attack_membership
from drencoder.audit.result import RunAudit
from drencoder.audit.secrecy import check_evaluation_text, check_secrecy
from drencoder.audit.trade_off import largest_power, protection_sentence
from drencoder.audit.trials import Seen, Trial, Trials, noise_left
from drencoder.audit.unit_checks import check_observers, check_units, check_worst_site
from drencoder.audit.victims import gather_victims
from drencoder.audit.warm_start import warm_adapter
from drencoder.audit.whole_run import audit_run, follows_runs
from drencoder.data.units import everyone
from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.errors import PrivacyError
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.query import Query, moment_query, update_query
from drencoder.federated.round import released_update
from drencoder.federated.server_optimizer import ServerState
from drencoder.privacy.accounting import epsilon_pld
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.rng import derive_seed
from drencoder.runs.build import Components, build
from drencoder.runs.checkpoint import Progress, load_checkpoint
from drencoder.runs.plan_overview import integer_bits
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.stage1 import fit_encoder
from drencoder.runs.start_clip import stage1_clip
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.messages import RoundSettings

_VICTIMS, _SHADOWS = 64, 512
_SILENT_RELEASES = 12  # of which nothing but noise is looked at
_MASKED_VALUES = 1 << 14


class Listener(Protocol):
    """Is told what happens."""

    def say(self, text: str) -> None: ...


@final
@dataclass(frozen=True)
class _Subject:
    """What is audited: the run's objects, the adapter that clients are asked at, and the encoder of the rounds."""

    components: Components
    adapter_D: Tensor
    encoder: Encoder
    prior: GaussianPrior | None
    clip_l2: float | None

    def query(self, slot: int) -> Query:
        """The query of a slot, as the run makes it."""
        recipe = self.components.recipe
        if slot == 0:
            return moment_query(self.components.lora.layout.segments, recipe, stage1_clip(self.components))
        adaptive = AdaptiveClip(self.clip_l2 or recipe.privacy.clip_l2) if recipe.privacy.clip == "adaptive" else None
        return update_query(self.encoder, recipe, slot, adaptive, self.prior, self.clip_l2)


def audit_recipe(
    recipe: Recipe, listener: Listener, *, canaries: int = 1000, seed: int = 0, records: bool = True
) -> RunAudit:
    """Audits a recipe as it would start. `records`: also attack real records and what a run leaves, which trains.

    Raises:
      DrencoderError: the recipe cannot be built, or promises nothing.
    """
    components = build(recipe)
    _require_promise(components)
    progress, encoder = fit_encoder(
        components, Progress(ServerState.start(components.lora.initial_D)), None, lambda _text: None
    )
    subject = _Subject(components, components.lora.initial_D, encoder, progress.prior, progress.clip_l2)
    return _audit(subject, listener, canaries, seed, records, {"recipe": recipe.name}, [])


def audit_run_folder(
    path: Path, listener: Listener, *, canaries: int = 1000, seed: int = 0, records: bool = True
) -> RunAudit:
    """Audits a run with its own recipe, adapter, encoder and adaptive clip, against what its certificate promises.

    Raises:
      DrencoderError: it is no run folder, or the recipe cannot be built, or promises nothing.
    """
    folder = RunFolder.open(path)
    certificate = folder.read_json(folder.certificate)
    components = build(load_recipe(folder.recipe))
    _require_promise(components)
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        progress = load_checkpoint(folder, ledger, components.lora.initial_D, components.lora.layout.segments)
        stated = check_observers(ledger, certificate)
    encoder = components.encoder(progress.prior, dict(progress.encoder_state or {}))
    subject = _Subject(components, progress.state.adapter_D, encoder, progress.prior, progress.clip_l2)
    same = certificate.get("plan") == components.plan.to_dict()
    found = "The certificate's plan is that of the recipe" + (
        "." if same else " no longer: it promises something else than what this recipe's run does, or it was edited."
    )
    checks = [
        Check("the certificate is about this recipe", same, found),
        stated,
        _check_published(components, folder),
    ]
    if components.plan.curated:
        checks.append(check_worst_site(components.plan, certificate))
    return _audit(
        subject, listener, canaries, seed, records, {"recipe": components.recipe.name, "run": str(path)}, checks
    )


def _require_promise(components: Components) -> None:
    plan = components.plan
    if set(plan.non_private) >= {"round"}:
        raise PrivacyError(
            f"privacy.trust = {components.recipe.privacy.trust!r} promises nothing, so there is no promise to audit: choose another trust."
        )


def _audit(
    subject: _Subject,
    listener: Listener,
    canaries: int,
    seed: int,
    records: bool,
    facts: dict[str, Any],
    checks: list[Check],
) -> RunAudit:
    components, plan = subject.components, subject.components.plan
    restart = RestartCheck(components.noise)
    try:
        listener.say(_estimate(subject, canaries, records))
        views: list[View] = []
        attacks: list[Attack] = []
        notes: list[str] = []
        trials = Trials(components, subject.adapter_D)
        for release in _stages(subject):
            listener.say(f"canaries in {release.words}")
            found, done = audit_releases(trials, release, plan, canaries=canaries, seed=seed)
            views += found
            if release.slots[0] > 0:  # stage 1's statistics of an update and of its opposite are no opposites
                views += audit_releases(trials, release, plan, canaries=canaries // 2, seed=seed, replace_one=True)[0]
            checks += _noise_of(trials, release, done)
            if release.slots[0] > 0:
                checks.append(_check_denominator(done))
            if plan.curated:
                checks += check_units(done, "messages" if plan.trust == "local" else "sum", plan.rate(release.slots[0]))
        if follows_runs(plan):
            listener.say("canaries that are followed through whole runs")
            found, of_runs = audit_run(trials, subject.query, plan, canaries=canaries, seed=seed)
            views += found
            checks += of_runs
        if plan.trust == "secure-aggregation":
            listener.say("masks of secure aggregation")
            checks += _masks(subject, seed)
        if records:
            listener.say("attacks on real records")
            attacks, notes, more = _real_records(subject, seed)
            views += more
            checks.append(check_evaluation_text(components))
            listener.say("what a run tells and leaves, with and without a canary's data")
            checks += check_secrecy(components.recipe)
        checks.append(restart.result())
    finally:
        restart.stop()
    return RunAudit(
        _facts(subject, canaries, seed) | facts,
        _protection(subject),
        tuple(views),
        tuple(checks),
        tuple(attacks),
        tuple(notes),
    )


def _stages(subject: _Subject) -> Iterator[Release]:
    plan = subject.components.plan
    if plan.slots[0] == 0 and "stage1" not in plan.non_private:
        yield Release((0,), subject.query, "stage 1")
    yield Release(tuple(slot for slot in plan.slots if slot > 0), subject.query, "a round")


def _noise_of(trials: Trials, release: Release, done: Sequence[Trial]) -> list[Check]:
    """Tests the noise itself: of messages under local trust, of sums otherwise, also of releases that nobody put anything into."""
    seen: Seen = "messages" if done[0].permit.trust == "local" else "sum"
    where = f"{'messages' if seen == 'messages' else 'the released sums'} of {release.words}"
    if done[0].query.spec.noise_in == "update" and seen == "messages":  # the noise passed the encoder
        return []
    parts, shares = [noise_left(trial, seen) for trial in done], list[Check]()
    if seen == "sum":

        def nobody(query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
            answering = cohort if permit.shares is not None else ()
            return Planted((), np.zeros(0, dtype=bool), lambda _query, _places: torch.zeros(0), answering)

        silent = [*islice(trials.without_end(release.queries, release.slots, nobody), _SILENT_RELEASES)]
        parts += [noise_left(trial, seen) for trial in silent]
        shares = [check_shares(silent, release.words)] if silent[0].permit.shares is not None else []
    return check_noise(torch.cat(parts), where) + shares


def _check_denominator(done: Sequence[Trial]) -> Check:
    """What the server applies is the decoded release, divided by a number that was fixed before the run."""
    worst = 0.0
    for trial in done:
        query, release = trial.query, trial.released.release
        applied_D = released_update(query, release, trial.permit, trial.expected_cohort)
        value = release.value / trial.expected_cohort
        fixed_D = query.decode(value[None])[0] if trial.sums_codes else value
        worst = max(worst, float((applied_D - fixed_D).norm() / fixed_D.norm().clamp(min=1e-30)))
    fixed = worst < 1e-4
    found = "A round's sum is divided by the expected cohort, which is fixed" + (
        "." if fixed else f" in the plan; what is applied differs by {worst:.1%}, as if the cohort that came decided."
    )
    return Check("a sum is divided by a fixed number", fixed, found)


def _masks(subject: _Subject, seed: int) -> list[Check]:
    """The protocol among the recipe's number of nodes, on canaries' shares, of 2^14 values at most."""
    components, recipe = subject.components, subject.components.recipe
    slot = next(slot for slot in components.plan.slots if slot > 0)
    terms = components.plan.share_terms(slot)
    values = min(_MASKED_VALUES, subject.query(slot).spec.wire.code_size)
    bits = integer_bits(components.plan, slot, values)
    keys = [NodeKey.generate() for _ in range(recipe.federation.nodes)]
    each = -(-terms.least_contributors // len(keys))
    settings = RoundSettings(
        "audit",
        slot,
        0,
        values,
        bits,
        recipe.threshold,
        terms.least_contributors,
        (each,) * len(keys),
        tuple(key.public for key in keys),
    )
    generator = np.random.Generator(np.random.Philox(derive_seed(seed, "audit-shares")))
    vectors = [generator.integers(0, 50, values).astype(np.uint32) for _ in keys]
    return check_masks(settings, keys, vectors)


def _real_records(subject: _Subject, seed: int) -> tuple[list[Attack], list[str], list[View]]:
    components = subject.components
    warm = bool((subject.adapter_D == components.lora.initial_D.cpu()).all())
    adapter_D = warm_adapter(components) if warm else subject.adapter_D
    victims = gather_victims(components, adapter_D, victims=_VICTIMS, shadows=_SHADOWS, seed=seed)
    if victims is None:
        return (
            [],
            [
                "Real records were not attacked: the recipe has no evaluation text and no public text that an attacker could learn from."
            ],
            [],
        )
    trials = Trials(components, adapter_D)
    attacks, notes = attack_content(trials, subject.query, components.plan, victims, components.lora, seed=seed)
    attacks += attack_membership(trials, subject.query, components.plan, victims, seed=seed)
    return attacks, notes, [*audit_records(trials, subject.query, components.plan, victims.update_ND, seed=seed)]


def _check_published(components: Components, folder: RunFolder) -> Check:
    """Whether a client's reply stands in a text file of the run folder."""
    name, long = "no client's text is in the run folder", 40
    everybody = everyone(components.texts.source, components.plan.population)
    step = max(1, len(everybody) // 512)
    replies = {
        record["response"].strip()
        for client in everybody[::step]
        for record in components.texts.source.client(client)
        if len(record["response"].strip()) >= long
    }
    for path in sorted(
        path for path in folder.path.rglob("*") if path.suffix in (".json", ".jsonl", ".html", ".md", ".toml")
    ):
        text = path.read_text("utf-8", errors="replace")
        if any(reply in text for reply in replies):
            found = f"{path.relative_to(folder.path)} quotes a client's text: do not hand this folder on."
            return Check(name, False, found, of_records=True)
    return Check(
        name, True, f"None of {len(replies)} replies of clients stands in a file of the run folder.", of_records=True
    )


# --- words -------------------------------------------------------------------------------------------


def _facts(subject: _Subject, canaries: int, seed: int) -> dict[str, Any]:
    components, plan = subject.components, subject.components.plan
    return {
        "model": components.recipe.model.source,
        "trust": plan.trust,
        "unit": plan.unit,
        "epsilon": epsilon_pld(
            plan.composition(plan.budget_observer, plan.schedule()) or (), plan.gaussian_delta, plan.relation
        ),
        "observer": plan.budget_observer,
        "delta": plan.delta,
        "relation": plan.relation,
        "noise_multiplier": plan.noise_multiplier,
        "encoder": subject.encoder.name,
        "code_size": subject.encoder.code_size,
        "adapter_size": subject.encoder.update_size,
        "canaries": canaries,
        "seed": seed,
    }


def _protection(subject: _Subject) -> str:
    plan = subject.components.plan
    events = plan.composition(plan.budget_observer, plan.schedule()) or ()
    epsilon = epsilon_pld(events, plan.gaussian_delta, plan.relation)
    return protection_sentence(epsilon, plan.delta, largest_power(events, plan.relation), plan.unit)


def _estimate(subject: _Subject, canaries: int, records: bool) -> str:
    """How long it will take, from the time of a few of the canaries' codes."""
    query = subject.query(1)
    update_ND = torch.randn(4, query.encoder.update_size)
    started = time.perf_counter()
    contributions(query, update_ND)
    each = (time.perf_counter() - started) / len(update_ND)
    plan = subject.components.plan
    seconds = 10 + 4 * canaries * each
    if plan.trust == "secure-aggregation":
        seconds += 60 + canaries * each
    if follows_runs(plan):
        seconds += 20
        if plan.trust == "local" and not plan.curated:  # a few clients together, in more slots
            seconds += 5 * canaries * each
    if records:
        seconds += 75
    return f"audit: {canaries:,} canaries, about {max(1, round(seconds / 60))} minutes on this machine; Ctrl-C ends it, and nothing of a run is touched"
