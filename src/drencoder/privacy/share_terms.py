"""What a slot of secure aggregation has to keep to: shares of noise, numbers of contributors, and how codes become integers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drencoder.privacy.plan_checks import refuse

if TYPE_CHECKING:  # numpy's distributions take their time, and only a run needs them
    from drencoder.secure_aggregation.quantise import Quantiser

__all__ = ["ShareTerms"]


@dataclass(frozen=True)
class ShareTerms:
    """What secure aggregation has to keep to in one slot, for the epsilon of the plan to hold.

    Args:
      multiplier: noise std of one client's share, over the sensitivity of its rounded code.
      least_contributors: of fewer nothing may be unmasked.
      most_contributors: there are no more than so many, and so many shares.
      honest: how many of the least contributors are assumed honest.
      slack: how far, in total variation, the released sum may be from one with Gaussian noise.
      most_codes: how many codes the modulus must hold. A sum of more may wrap around, which spoils it and tells nothing more.
    """

    multiplier: float
    least_contributors: int
    most_contributors: int
    honest: int
    slack: float
    most_codes: int

    def quantiser(self, values: int, clip_l2: float) -> "Quantiser":
        """How codes of this size and clip become integers: the same object for whoever asks.

        Raises PrivacyError when they do not fit, or when discrete noise is not near enough to Gaussian noise for the plan.
        """
        from drencoder.secure_aggregation.quantise import Quantiser

        quantiser = Quantiser.plan(
            values=values, clip_l2=clip_l2, share_multiplier=self.multiplier, most_clients=self.most_codes
        )
        distance = quantiser.distance(self.most_contributors)
        if distance > self.slack:
            refuse(
                f"Discrete noise is within {distance:.1e} of Gaussian noise",
                f"this plan's largest epsilon needs {self.slack:.1e}",
                "choose a smaller epsilon",
            )
        return quantiser
