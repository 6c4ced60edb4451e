"""What a slot has to keep to: how codes become integers and get noise, and, for secure aggregation, shares and contributors."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drencoder.privacy.plan_checks import Trust, refuse

if TYPE_CHECKING:  # numpy's distributions take their time, and only a run needs them
    from drencoder.privacy.plan import PrivacyPlan
    from drencoder.secure_aggregation.quantise import Quantiser

DISCRETE_SHARE = 1e-6  # of delta, set aside for all that keeps discrete noise from being Gaussian noise
_MOST_RELEASES = 1e6  # that share it
_LARGEST_RATIO = 1e-30  # what log probabilities may differ by: it adds to epsilon, where no digit shows it


@dataclass(frozen=True)
class NoiseTerms:
    """How the codes of one slot become integers and get their noise, under any trust.

    Args:
      trust: who adds the noise, and whether codes travel as integers.
      multiplier: noise std over the sensitivity of a rounded code: of a sum (central), a code (local) or a share of noise.
      most_contributors: how many noises a sum has at most.
      most_codes: how many codes; more than noises where sites add up their own units' codes.
      log_slack: how far, in total variation, the released sum may be from one with Gaussian noise; a natural logarithm.
      site_sums: whether sites add up their own units' codes before the noise, so that one modulus holds the sum of all sites.
    """

    trust: Trust
    multiplier: float
    most_contributors: int
    most_codes: int
    log_slack: float
    site_sums: bool

    def quantiser(self, values: int, clip_l2: float) -> "Quantiser":
        """How codes of this size and clip become integers: the same object for whoever asks.

        Raises PrivacyError when they do not fit, or when discrete noise is not near enough to Gaussian noise for the plan.
        """
        from drencoder.secure_aggregation.quantise import Quantiser

        half = self.log_slack - math.log(2)  # for sampling; the other half for a modulus that wraps around
        noises = 1 if self.trust == "central" else self.most_contributors
        if self.trust == "central":
            quantiser = Quantiser.fine(values=values, clip_l2=clip_l2, noise_multiplier=self.multiplier)
        elif self.trust == "local" and not self.site_sums:
            risk = half - math.log(noises)
            quantiser = Quantiser.alone(
                values=values, clip_l2=clip_l2, noise_multiplier=self.multiplier, log_wrap_risk=risk
            )
        else:
            quantiser = Quantiser.shared(
                values=values, clip_l2=clip_l2, share_multiplier=self.multiplier, most_clients=self.most_codes
            )
        if quantiser.log_distance(noises) > half or quantiser.log_ratio(noises) > _LARGEST_RATIO:
            excess = quantiser.log_distance(noises) - half
            refuse(
                f"The largest epsilon of this plan, under replace-one and over all slots, is about {max(1.0, excess):,.0f} too large",
                "the proof that discrete noise is as good as Gaussian noise ends at about 1,100",
                "choose a smaller epsilon, or more noise",
            )
        return quantiser


@dataclass(frozen=True)
class ShareTerms:
    """What secure aggregation has to keep to in one slot, for the epsilon of the plan to hold.

    Args:
      multiplier: noise std of one client's share, over the sensitivity of its rounded code.
      least_contributors: of fewer nothing may be unmasked.
      most_contributors: what the modulus must hold.
      honest: how many of the least contributors are assumed honest.
    """

    multiplier: float
    least_contributors: int
    most_contributors: int
    honest: int


def noise_terms(plan: "PrivacyPlan", slot: int) -> NoiseTerms | None:
    """How codes of `slot` become integers and get their noise; None for a slot without noise, whose codes stay floats.

    The slack is what (1 + e^epsilon) TV <= a millionth of delta leaves to one of a million releases, at the largest epsilon
    that the plan states.
    """
    if plan.stage(slot) in plan.non_private:
        return None
    shared = plan.trust == "secure-aggregation"
    multiplier = plan.share_terms(slot).multiplier if shared else plan.sigma(slot)
    worst = plan.largest_epsilon
    slack = math.log(DISCRETE_SHARE / _MOST_RELEASES * plan.delta) - worst - math.log1p(math.exp(-worst))
    most = plan.most_contributors(slot)
    return NoiseTerms(plan.trust, multiplier, most, plan.most_codes(slot), slack, plan.curated)
