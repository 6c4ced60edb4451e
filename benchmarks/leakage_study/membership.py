"""Leakage 3: is this client in the release?

Legend: T trials, N candidate clients, D adapter values, K values of a message or of a release.

The attacker holds a candidate's true update (the strongest knowledge of one client there is) and asks whether it is in.
Three attacks; a score is an inner product with the candidate's expected message, in units of that one's length:

* `server`: the server sees the candidate's own message, which holds its update or nothing (a zero update). For Gaussian
  noise this score is the likelihood ratio, and its AUC is Phi(|c| / (sigma C sqrt 2)) for a message of length |c|.
* `all others known`: of a cohort's release the attacker knows every other contribution, takes them off, and does the
  same. It is the adversary that differential privacy is defined by.
* `realistic`: of a cohort's release the attacker knows the cohort's size and the population's mean only.

A zero update is nothing to a network's code as well, since `federated.query.update_query` takes codes relative to its code.

"full clip" means updates so long that each fills the clip: the worst client that the guarantee covers, for whom the
first two attacks reach the bound. There they test the mechanism itself, and an audit that takes noise away must see it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from drencoder.audit.auc import Auc, estimate_auc, estimate_clustered_auc, gaussian_max_auc, gaussian_mu_from_auc
from drencoder.federated.round import released_update
from drencoder.privacy.accounting import epsilon_gaussian
from drencoder.recipe.recipe import Recipe
from drencoder.rng import derive_seed
from leakage_study.arms import Arm, expected_messages, open_channel
from leakage_study.findings import Finding
from leakage_study.setup import AuditSetup

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(release_K, expected_NK, present_N) -> score_N."""

_LONG = 1e3  # clips
_MORE_TRIALS = 6  # times: perfect separation in few trials proves little


def release_findings(setup: AuditSetup, arms: Sequence[Arm]) -> list[Finding]:
    """Runs all three attacks on every arm, on central trust, and on three arms whose noise is not what was promised."""
    recipe, target_ND, seed, trials = setup.components.recipe, setup.subjects.target_ND, setup.seed, setup.trials
    full_ND = functional.normalize(target_ND, dim=1) * (_LONG * recipe.privacy.clip_l2)
    findings: list[Finding] = []

    def add(arm: Arm, sees: str, attack: str, auc: Auc, mu: float | None) -> None:
        bound = None if mu is None else gaussian_max_auc(mu)
        note = _epsilon_lower_bound(auc, recipe.privacy.delta) if "full clip" in attack else ""
        findings.append(Finding("release", arm.name, sees, attack, auc, bound, note=note, sabotaged=arm.sabotaged))

    for arm in (*arms, *_make_sabotaged_arms(setup, arms[-1])):
        linear, promise = arm.encoder.linear, arm.max_mu("add_remove")
        few = trials if linear else max(8, trials // 2)  # networks are slow
        many = _MORE_TRIALS * trials if arm.sabotaged else few
        sizes = (smallest_cohort(count, len(target_ND), seed) for count in (few, many))
        # Messages that are decoded one by one do not hide behind each other's noise (`PrivacyPlan.nonlinear_decoding`).
        (some, mu_few), (least, mu_many) = (
            (size, arm.max_mu("add_remove", size) if linear else promise) for size in sizes
        )
        worst_ND, words = (target_ND, "") if promise is None else (full_ND, ", full clip")
        if arm.trust == "local":
            add(arm, arm.sees, "server" + words, server_attack(arm, recipe, worst_ND, few, seed), promise)
        if not arm.sabotaged:
            auc = cohort_attack(arm, recipe, target_ND, few, seed, score_against_mean)
            add(arm, f"sum of {some} clients or more", "realistic", auc, mu_few)
        if linear:  # else what the others add to the sum is not known, even to one who knows them
            auc = cohort_attack(arm, recipe, worst_ND, many, seed, score_knowing_others)
            add(arm, f"sum of {least} clients or more", "all others known" + words, auc, mu_many)
    return findings


def _make_sabotaged_arms(setup: AuditSetup, default: Arm) -> tuple[Arm, ...]:
    local, sigma = setup.sigma, setup.central.noise_multiplier
    central = replace(default, name="drencoder, central trust", sees="release", noise_multiplier=sigma, trust="central")
    return (
        central,
        replace(default, name="sabotage: no noise", noise_multiplier=0.0, promised=local),
        replace(default, name="sabotage: a tenth of the noise", noise_multiplier=local / 10, promised=local),
        replace(central, name="sabotage: a tenth, central", noise_multiplier=sigma / 10, promised=sigma),
    )


def _epsilon_lower_bound(auc: Auc, delta: float) -> str:
    """Returns an AUC as a lower bound on the epsilon of one release, were it Gaussian, with 97.5 % confidence."""
    return f"epsilon >= {epsilon_gaussian(gaussian_mu_from_auc(auc.low), delta):.2f}"


# --- the attacks -----------------------------------------------------------------------------------


def server_attack(arm: Arm, recipe: Recipe, update_ND: Tensor, trials: int, seed: int) -> Auc:
    """Lets the server attack single messages under local trust; half of them, at random, hold nothing.

    The clients are fixed and every message has noise of its own, so all scores are independent.
    """
    present_TN = _draw_cohorts(trials, len(update_ND), seed)
    score_TN = torch.empty(present_TN.shape, dtype=torch.float64)
    with open_channel(arm.plan(len(update_ND), trials), seed, arm.noise_share) as channel:
        for trial, present_N in enumerate(present_TN):
            query = arm.query(recipe, trial + 1)  # a new round: a new sketch
            if trial == 0 or arm.fresh:
                expected_NK = expected_messages(query, update_ND) - expected_messages(
                    query, torch.zeros_like(update_ND[:1])
                )
            message_NK = channel.messages(query, update_ND * present_N[:, None])
            score_TN[trial] = _project(message_NK, expected_NK)
    return estimate_auc(score_TN[present_TN], score_TN[~present_TN])


def cohort_attack(arm: Arm, recipe: Recipe, update_ND: Tensor, trials: int, seed: int, score: Score) -> Auc:
    """Lets an attacker see the released sum over cohorts that each client joins with chance 1/2.

    One release's scores share its noise, so trials are resampled, and a candidate meets only itself.
    """
    present_TN = _draw_cohorts(trials, len(update_ND), seed)
    score_TN = torch.empty(present_TN.shape, dtype=torch.float64)
    with open_channel(arm.plan(len(update_ND), trials), seed, arm.noise_share) as channel:
        for trial, present_N in enumerate(present_TN):
            query = arm.query(recipe, trial + 1)
            release, permit = channel.release(query, update_ND, present_N.nonzero()[:, 0].tolist())
            # A linear code is attacked where its noise is white, before it is decoded.
            value_K = release.value if query.spec.summable else released_update(query, release, permit, 1.0)
            if trial == 0 or arm.fresh:
                expected_NK = expected_messages(query, update_ND)
                expected_NK = expected_NK if query.spec.summable else query.decode(expected_NK)
            score_TN[trial] = score(value_K.double(), expected_NK.double(), present_N)
    return estimate_clustered_auc(score_TN, present_TN, seed)


def score_against_mean(release_K: Tensor, expected_NK: Tensor, present_N: Tensor) -> Tensor:
    """Scores what is special about a candidate, after the mean of a cohort of this size is taken off."""
    mean_K = expected_NK.mean(0)
    rest_K = release_K - present_N.sum() * mean_K
    return _project(rest_K[None], expected_NK - mean_K)


def score_knowing_others(release_K: Tensor, expected_NK: Tensor, present_N: Tensor) -> Tensor:
    """Scores a candidate against what is left of the sum when all other members are taken off."""
    member_NK = expected_NK * present_N[:, None]
    return _project(release_K - (member_NK.sum(0) - member_NK), expected_NK)


def smallest_cohort(trials: int, clients: int, seed: int) -> int:
    """Returns the size of the smallest cohort that `cohort_attack` draws: so many noises hide a client at least."""
    return max(1, int(_draw_cohorts(trials, clients, seed).sum(1).min()))


def _draw_cohorts(trials: int, clients: int, seed: int) -> Tensor:
    """Returns who is in each cohort, (T, N) bool, by fair coins."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "audit-cohorts", trials))
    return torch.rand(trials, clients, generator=generator) < 0.5


def _project(value_NK: Tensor, expected_NK: Tensor) -> Tensor:
    """Returns the inner products of rows, (N,) float64, in units of the expected row's length."""
    length_N = torch.linalg.vector_norm(expected_NK.double(), dim=1).clamp(min=1e-30)
    return (value_NK.double() * expected_NK.double()).sum(1) / length_N
