"""Attacks on what is in a client's message, and on who is in a release, with the recipe's own clients, encoder and noise.

Legend: N victims, K values of a message.

Here the canaries are real records, not the worst case: what is measured is a fact about these attacks on these texts, not a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from drencoder.audit.auc import Auc, estimate_auc, estimate_clustered_auc, gaussian_max_auc
from drencoder.audit.canaries import Planted, contributions, draw_coins, record_canaries
from drencoder.audit.inversion import CodeReader, present_tokens, share_of_tokens_found
from drencoder.audit.residual import score_by_residual
from drencoder.audit.span import SpanAttack
from drencoder.audit.trials import QueryMaker, Trial, Trials, known_cohort, promised_std, trial_values
from drencoder.audit.victims import Victims
from drencoder.errors import DataError, ModelError
from drencoder.federated.query import Query
from drencoder.models.lora import LoraModel
from drencoder.privacy.accounting import gdp_mu
from drencoder.privacy.ledger import Permit
from drencoder.privacy.plan import PrivacyPlan

_ALONE = 16  # victims under secure aggregation, with a round for each


@final
@dataclass(frozen=True)
class Attack:
    """An attack on real records: its AUC beside the largest that the promise allows for one release; None where nothing is promised.

    `found`: attacks on text only: the share of a text's tokens among as many best guesses; `blind`: the same for guesses without
    any message, the most frequent tokens.
    """

    name: str
    sees: str
    auc: Auc
    max_auc: float | None
    found: float | None = None
    blind: float | None = None

    @property
    def exposed(self) -> bool:
        """Whether the promise was measured not to hold; by chance once in 2,000."""
        return self.max_auc is not None and self.auc.floor > self.max_auc


def attack_content(
    trials: Trials, queries: QueryMaker, plan: PrivacyPlan, victims: Victims, lora: LoraModel, *, seed: int
) -> tuple[list[Attack], list[str]]:
    """Reads tokens of the victims' texts from what the server sees of them: their messages, or the sum that only one of them is in.

    Returns the attacks, and in words those that could not be tried.
    """
    trial_list, order = _everybody_in(trials, queries, plan, victims)
    query, vocabulary = trial_list[0].query, lora.base.vocabulary
    seen, sees = (
        ("messages", f"a message with one {plan.unit}'s text in it" if plan.curated else "a message")
        if plan.trust != "secure-aggregation"
        else ("sum", f"a sum with one {plan.unit}'s text in it")
    )
    values = torch.cat([rows if (rows := trial_values(trial, seen)).dim() == 2 else rows[None] for trial in trial_list])  # type: ignore[arg-type]
    present_NV = present_tokens([victims.texts[victim] for victim in order], vocabulary)
    events = known_cohort(plan, "server", query.spec.slot, trial_list[0].contributors)
    mu = None if events is None else gdp_mu(events, "replace_one")
    bound = None if mu is None else gaussian_max_auc(mu)
    noise = promised_std(trial_list[0], seen) if bound is not None else 0.0  # type: ignore[arg-type]
    attacks: list[Attack] = []
    notes: list[str] = []
    shadow_MV = present_tokens(victims.shadow_texts, vocabulary)
    blind = share_of_tokens_found(shadow_MV.sum(0).float().expand(len(values), -1), present_NV)

    def add(name: str, score_NV: Tensor) -> None:
        auc = estimate_clustered_auc(score_NV, present_NV, seed)
        attacks.append(Attack(name, sees, auc, bound, share_of_tokens_found(score_NV, present_NV), blind))

    reader = CodeReader(contributions(query, victims.shadow_MD), shadow_MV, noise, seed=seed)
    add("network that learned to read codes", reader.scores(values))
    try:
        span = SpanAttack.of(lora)
        add("span of LoRA's first layer", span.scores(query.decode(values)))
    except ModelError as error:
        notes.append(f"The span attack was not tried: {error}")
    return attacks, notes


def _everybody_in(
    trials: Trials, queries: QueryMaker, plan: PrivacyPlan, victims: Victims
) -> tuple[list[Trial], list[int]]:
    """Releases with the victims in them, all in one round where the server sees messages, one in each where it sees sums; and who was in."""
    slots = [slot for slot in plan.slots if slot > 0]
    alone = plan.trust == "secure-aggregation"
    most = _ALONE if alone else len(victims.texts)
    done: list[Trial] = []
    order: list[int] = []

    def plant(query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
        rows = victims.update_ND[len(order) :][: 1 if alone else None]
        return record_canaries(plan, cohort, rows, np.ones(len(rows), dtype=bool), everybody_answers=alone)

    for trial in trials.without_end(queries, slots, plant):
        if trial.planted.clients:
            done.append(trial)
        drawn = trial.planted.clients if plan.curated else range(len(trial.planted.clients))
        first = len(order)
        order += [first + victim for victim in drawn]
        if len(order) >= most:
            return done, order
    return done, order


def attack_membership(
    trials: Trials, queries: QueryMaker, plan: PrivacyPlan, victims: Victims, *, seed: int
) -> list[Attack]:
    """Who of the victims is in a released sum, by projection residual. Half of them are, by a coin each."""
    slots = [slot for slot in plan.slots if slot > 0]
    scores: list[Tensor] = []
    coins: list[Tensor] = []
    mus: list[float | None] = []

    def plant(query: Query, cohort: Sequence[int], permit: Permit) -> Planted:
        coin_N = draw_coins(seed, len(victims.texts), -2, len(scores))
        everybody_answers = permit.shares is not None
        return record_canaries(
            plan, cohort, victims.update_ND, coin_N, everybody_answers=everybody_answers, alone=False
        )

    for trial in trials.without_end(queries, slots, plant):
        if len(trial.planted.clients) < 4:
            if len(scores) > 64:
                raise DataError(
                    "The cohorts of this recipe are too small for an attack on membership: raise federation.sampling_rate."
                )
            scores.append(torch.zeros(0))
            coins.append(torch.zeros(0, dtype=torch.bool))
            continue
        observer = "server" if plan.trust == "secure-aggregation" else "public"
        events = known_cohort(plan, observer, trial.query.spec.slot, trial.contributors)
        mus.append(None if events is None else gdp_mu(events, "add_remove"))
        scores.append(score_by_residual(trial.own_NV, trial_values(trial, "sum")[None]))
        coins.append(torch.from_numpy(trial.planted.coin_N))
        if sum(map(len, scores)) >= 4 * len(victims.texts):
            break
    score, coin = torch.cat(scores), torch.cat(coins)
    known = [mu for mu in mus if mu is not None]
    bound = gaussian_max_auc(max(known)) if len(known) == len(mus) else None
    return [Attack("projection residual", "the released sum", estimate_auc(score[coin], score[~coin]), bound)]
