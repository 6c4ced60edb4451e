"""Releases with canaries in them, asked for as a run asks, and the scores of the canaries in each observer's view.

Legend: N canaries, K values of a message, V values of a release.

A trial is one slot of the recipe's own plan: charged to a ledger, asked of the cohort that was drawn, released. When a ledger's slots are
used up the next one is opened, which is another run of the same recipe. A canary's score is the inner product of what the
observer sees with the canary's own contribution b, scaled so that the noise has the same spread whatever b: (2 <x, b> / |b| - |b|) / C, and
2 <x, b> / |b| C where a client is replaced. For Gaussian noise no score is better. Nothing is used that depends on the other canaries'
coins: contributions are orthogonal, or nearly so.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from drencoder.audit.canaries import CanaryEngine, Plant, Planted, contributions
from drencoder.audit.overheard import Overheard
from drencoder.audit.scores import Floats
from drencoder.encoders.wire import unpack_rows
from drencoder.federated.query import Query
from drencoder.federated.round import CohortRelease, SecureSum, Upload, code_values, message_wire, released_update
from drencoder.federated.server_optimizer import ServerState, server_step
from drencoder.federated.server_rate import learning_rate
from drencoder.privacy.accounting import Event, GaussianEvent, NonPrivateEvent, PoissonGaussianEvent
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.mechanism import clip_rows
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Recipe
from drencoder.runs.asking import ask_cohort
from drencoder.runs.build import Components

Seen = Literal["messages", "sum", "sum of others", "adapter", "states"]
"""What is scored. "states": the sums of a whole run, as its published states tell them (`released_states`)."""

QueryMaker = Callable[[int], Query]
"""The query of a slot."""

_ROWS = 1 << 22  # values of contributions at a time


@final
@dataclass(frozen=True, eq=False)
class Trial:
    """One slot with canaries: what was planted, what the server received, what it released, and what it did with that."""

    query: Query
    planted: Planted
    permit: Permit
    received: Sequence[Upload | SecureSum]
    released: CohortRelease
    expected_cohort: float
    step_D: Tensor | None  # the adapter's change; None in stage 1
    joined: Sequence[int] = ()  # the canaries that sites drew, where they curate: a secret of theirs
    heard: Overheard | None = (
        None  # secure aggregation: the share of noise of a site that looks on, or all shares where nobody is planted
    )

    @cached_property
    def own_NV(self) -> Tensor:
        """What each canary adds to what is seen when it is in, float32 (N, V)."""
        count, size = len(self.planted.clients), max(1, _ROWS // max(1, self.query.encoder.update_size))
        parts = [
            _in_the_sum(
                self,
                contributions(self.query, self.planted.own_updates(self.query, range(start, min(count, start + size)))),
            )
            for start in range(0, count, size)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.released.release.value.numel())

    @property
    def contributors(self) -> int:
        """How many clients' messages are in the sum."""
        return len(self.planted.answering)

    @property
    def sums_codes(self) -> bool:
        """Whether what is released is a sum of messages, and not one of decoded messages."""
        return self.released.release.value.numel() == self.query.spec.wire.code_size


@final
class Trials:
    """Slots of a recipe's plan, one after the other, each with the canaries that a `Plant` puts into its cohort."""

    def __init__(self, components: Components, adapter_D: Tensor) -> None:
        self._components, self.adapter_D = components, adapter_D

    @property
    def recipe(self) -> Recipe:
        return self._components.recipe

    def without_end(self, queries: QueryMaker, slots: Sequence[int], plant: Plant) -> Iterator[Trial]:
        """These slots of one run, then of the next, and so on."""
        while True:
            yield from self.of_one_run(queries, slots, plant)

    def of_one_run(
        self,
        queries: QueryMaker,
        slots: Sequence[int],
        plant: Plant,
        begun: Callable[[Ledger], None] = lambda _ledger: None,
    ) -> Iterator[Trial]:
        """These slots of one new ledger, which lies in a temporary folder; `begun` is shown it before the first."""
        recipe, plan = self.recipe, self._components.plan
        replayed = plan.noise == "replay"
        key = hashlib.sha256(f"replay/{recipe.seed}".encode()).digest() if replayed else None
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="drencoder-audit-"))
            ledger = stack.enter_context(Ledger.create(Path(folder) / "ledger.jsonl", plan, run_id="audit", key=key))
            begun(ledger)
            for slot in slots:
                yield self._ask(queries(slot), ledger, plant)

    def _ask(self, query: Query, ledger: Ledger, plant: Plant) -> Trial:
        recipe, plan = self.recipe, self._components.plan
        engine = CanaryEngine(plant, recipe.federation.nodes, recipe.threshold, plan.curated)
        components = replace(self._components, engine=engine)
        released, permit = ask_cohort(components, ledger, query, self.adapter_D)
        assert engine.planted is not None
        slot, step_D = query.spec.slot, None
        if query.spec.kind == "update":
            direction_D = released_update(query, released.release, permit, plan.expected_cohort)
            rate = learning_rate(recipe.server, plan, slot)
            step_D = server_step(ServerState.start(self.adapter_D), direction_D, recipe.server, rate).adapter_D
            step_D = step_D - self.adapter_D.cpu()
        return Trial(
            query,
            engine.planted,
            permit,
            engine.seen,
            released,
            plan.denominator(slot),
            step_D,
            engine.joined,
            engine.heard,
        )


# --- what an observer sees, as values ----------------------------------------------------------------


def score_trial(trial: Trial, seen: Seen) -> Floats:
    """The score (N,) of each canary of a trial in what this observer sees, float64."""
    values, own_NV = trial_values(trial, seen), telling_values(trial, seen)
    length_N = torch.linalg.vector_norm(own_NV, dim=1, dtype=torch.float64).clamp(min=1e-30)
    products_N = (values * own_NV).sum(1, dtype=torch.float64) if values.dim() == 2 else own_NV @ values
    along_N = products_N.double() / length_N
    score_N = 2 * along_N if trial.planted.replace_one else 2 * along_N - length_N
    return np.asarray(score_N.numpy() / trial.query.spec.clip_l2)


def telling_values(trial: Trial, seen: Seen) -> Tensor:
    """What each canary adds to what is seen (N, V), without the value that tells of its norm where that is summed over canaries.

    It is common to all of them there, and says nothing about one.
    """
    together = seen != "messages" or bool(trial.planted.site_of)
    if trial.query.spec.adaptive_clip is None or not together:
        return trial.own_NV
    return torch.cat([trial.own_NV[:, :-1], torch.zeros(len(trial.own_NV), 1)], dim=1)


def trial_values(trial: Trial, seen: Seen) -> Tensor:
    """What is seen, decoded from what left: messages (N, K) in the order of the canaries, a sum (V,), or the adapter's step as a sum (V,)."""
    if seen == "messages":
        row_of = received_messages(trial)
        rows = [row_of[sender] for sender in trial.planted.senders]
        return torch.stack(rows) if rows else torch.zeros(0, trial.query.spec.wire.code_size)
    if seen == "sum":
        return trial.released.release.value
    if seen == "sum of others":
        own_K = received_messages(trial)[trial.planted.answering[-1]] if trial.heard is None else trial.heard.total_K
        return (trial.released.release.value.double() - own_K.double()).float()
    assert trial.step_D is not None
    step_D, mean_D = (
        trial.step_D.double(),
        released_update(trial.query, trial.released.release, trial.permit, 1.0).double(),
    )
    scale = float(step_D @ mean_D) / max(1e-300, float(mean_D @ mean_D))  # the optimiser is public
    sum_D = (step_D / (scale or 1.0)).float()
    return encoded_sum(trial.query, sum_D) if trial.sums_codes else sum_D


def encoded_sum(query: Query, sum_D: Tensor) -> Tensor:
    """The code (K,) of a sum of updates. It is encoded as a short update, and lengthened again: an encoder may clip what is long."""
    short = 1e-3 * query.spec.clip_l2 / max(1e-30, float(sum_D.norm()))
    return query.encode((sum_D * short)[None])[0] / short


def received_messages(trial: Trial) -> dict[int, Tensor]:
    """Local trust: sender -> its message (K,), decoded from the bytes that left."""
    rows: dict[int, Tensor] = {}
    wire = message_wire(trial.query, trial.permit)
    for upload in trial.received:
        assert isinstance(upload, Upload)
        got = unpack_rows(upload.messages, wire, trial.query.spec.slot)
        values_NK = code_values(trial.query, trial.permit, got.code_NK)
        rows |= {upload.clients[place]: row for place, row in zip(got.accepted, values_NK, strict=True)}
    return rows


def _in_the_sum(trial: Trial, code_NK: Tensor) -> Tensor:
    if trial.sums_codes:
        return code_NK
    decoded_ND = trial.query.decode(code_NK)
    return clip_rows(decoded_ND, trial.query.spec.clip_l2).values_NV if trial.permit.trust == "central" else decoded_ND


def noise_left(trial: Trial, seen: Seen) -> Tensor:
    """What is seen less what the canaries put into it, in units of the noise that was promised, float64: (N, K), or a sum as (1, V).

    Of messages of sites there is one row for each site.
    """
    if seen == "messages" and trial.planted.site_of:
        rest_of = {site: row.double() for site, row in received_messages(trial).items()}
        signs = trial.planted.signs(range(len(trial.own_NV)))
        for site, own_V, sign in zip(trial.planted.site_of, trial.own_NV.double(), signs, strict=True):
            rest_of[site] = rest_of[site] - sign * own_V
        return torch.stack(list(rest_of.values())) / promised_std(trial, seen)
    values, std = trial_values(trial, seen).double(), promised_std(trial, seen)
    rest = (values if values.dim() == 2 else values[None]).clone()
    sent_NV = trial.own_NV.double() * trial.planted.signs(range(len(trial.own_NV)))[:, None]
    return (rest - (sent_NV if values.dim() == 2 else sent_NV.sum(0))) / std


def promised_std(trial: Trial, seen: Seen) -> float:
    """The least standard deviation of the noise on each value that is seen, as the permit has it."""
    permit, clip = trial.permit, trial.query.spec.clip_l2
    together = trial.contributors - (seen == "sum of others")
    if permit.shares is not None:
        return permit.shares.multiplier * clip * together**0.5
    many = together if permit.trust == "local" and seen != "messages" else 1
    return permit.noise_multiplier * clip * many**0.5


def known_cohort(plan: PrivacyPlan, observer: str, slot: int, contributors: int) -> tuple[Event, ...] | None:
    """The events of one release for an observer who knows who was asked, or drawn by a site; None where nothing is promised."""
    event = plan.event(slot)
    if plan.trust == "central":
        if observer == "server" or isinstance(event, NonPrivateEvent):
            return None
        assert isinstance(event, PoissonGaussianEvent)
        return (GaussianEvent(event.noise_multiplier),)
    events = plan.composition(observer, {slot: (1, contributors)})
    if not events or any(isinstance(one, NonPrivateEvent) for one in events):
        return None
    return tuple(
        GaussianEvent(one.noise_multiplier, one.count) for one in events if not isinstance(one, NonPrivateEvent)
    )
