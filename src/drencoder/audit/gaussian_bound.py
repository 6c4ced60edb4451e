"""A lower bound on mu, and so on epsilon, from the mean and the spread of canary scores.

Idea: Agrawal, Wei, Singh, Magdon-Ismail and Zikas 2026, "Let's Ask Gauss" (https://arxiv.org/abs/2606.12733): do not make guesses of the
scores, which throws information away; use that they are Gaussian.

Let x_i be the score of canary i, mirrored where the canary was out, so that E x_i = 1 in both cases (`scores.CanaryScores`). With noise
of standard deviation s the two hypotheses are N(+1, s^2) and N(-1, s^2), which is mu-Gaussian differential privacy with mu = 2 / s.
sqrt(n) mean(x) / std(x) then has a non-central t distribution with n - 1 degrees of freedom and non-centrality sqrt(n) mu / 2; the
bound inverts its distribution function.

Assumes: scores are independent and Gaussian, with one variance. It is the tightest of the three bounds, and the one that assumes most.
"""

import math
from statistics import NormalDist

from drencoder.audit.scores import CanaryScores

_FAR = (
    37.0  # beyond it the non-central t is not computed reliably; its normal approximation is within a thousandth there
)


def gaussian_mu(scores: CanaryScores, significance: float) -> float:
    """The largest mu that these scores reject with an error of at most `significance`; 0 where they reject none."""
    x_N = scores.mirrored
    spread = float(x_N.std(ddof=1))
    if spread == 0:
        return math.inf if float(x_N.mean()) > 0 else 0.0
    n = x_N.size
    observed = math.sqrt(n) * float(x_N.mean()) / spread
    return max(0.0, 2 * _least_centre(observed, n - 1, significance) / math.sqrt(n))


def _least_centre(observed: float, degrees: int, significance: float) -> float:
    """The non-centrality under which a t statistic of `observed` or more has the chance `significance`."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    deviation = NormalDist().inv_cdf(1 - significance)
    near = observed - deviation * math.sqrt(1 + observed * observed / (2 * degrees))
    if observed > _FAR or degrees > 1e6:
        return near
    reach = 3.0 + abs(deviation)

    def excess(centre: float) -> float:
        return float(nct.sf(observed, degrees, centre)) - significance

    low, high = near - reach, near + reach
    if excess(low) >= 0 or excess(high) <= 0:
        return near
    return float(brentq(excess, low, high, xtol=1e-6))
