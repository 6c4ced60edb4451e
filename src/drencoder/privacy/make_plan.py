"""The one place where a run's sampler, noise and events are decided: from a target epsilon, or from a noise multiplier."""

from collections.abc import Iterable
from typing import get_args

from drencoder.privacy.accounting import Relation
from drencoder.privacy.calibration import calibrate
from drencoder.privacy.plan import PrivacyPlan
from drencoder.privacy.plan_checks import Noise, Stage, Trust, Unit, check_noise, refuse


def make_plan(
    *,
    trust: Trust,
    population: int,
    sampling_rate: float,
    rounds: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    stage1_rate: float = 0.0,
    stage1_noise_ratio: float = 1.0,
    participation_cap: int = 1,
    relation: Relation = "add_remove",
    noise: Noise = "secure",
    non_private: Iterable[Stage] = (),
    nonlinear_decoding: bool = False,
    dropout_share: float = 0.0,
    honest_share: float = 1.0,
    unit: Unit = "client",
    site_units: int = 0,
) -> PrivacyPlan:
    """Plans a run.

    Give `epsilon` (then the smallest sigma with PLD epsilon <= `epsilon` is found, over stage 1 and all
    rounds; capped cohorts: over the `participation_cap` releases of one client; local trust: against the server), or
    `noise_multiplier`, or both (then it is checked), or neither if every stage is in `non_private`.
    Stage 1 has `stage1_noise_ratio` times the noise multiplier of the rounds. `nonlinear_decoding` must be set when the
    encoder's decoder is not linear (see `PrivacyPlan`). Sites (a `unit` that is no client) take part in every slot, whatever
    the `participation_cap`.
    Raises PrivacyError with the value, the bound and the cure.
    """
    silent = tuple(stage for stage in get_args(Stage) if stage in set(non_private))
    if unknown := sorted(set(non_private) - set(silent)):
        refuse(f"non_private names {unknown}", "stages are stage1 and round", "name one of these")
    check_noise(epsilon, noise_multiplier, stage1_noise_ratio)

    def plan(sigma: float) -> PrivacyPlan:
        return PrivacyPlan(
            trust=trust, population=population, sampling_rate=sampling_rate, rounds=rounds,
            stage1_rate=stage1_rate, delta=delta, relation=relation,
            participation_cap=participation_cap if unit == "client" else rounds + (stage1_rate > 0),
            noise_multiplier=0.0 if "round" in silent else sigma,
            stage1_noise_multiplier=0.0 if "stage1" in silent or stage1_rate == 0 else sigma * stage1_noise_ratio,
            target_epsilon=epsilon, noise=noise, non_private=silent, nonlinear_decoding=nonlinear_decoding,
            dropout_share=dropout_share, honest_share=honest_share, unit=unit, site_units=site_units,
        )  # fmt: skip

    return calibrate(plan, epsilon, noise_multiplier)
