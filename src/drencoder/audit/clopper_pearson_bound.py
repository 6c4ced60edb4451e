"""Lower bounds from how often a fixed threshold is wrong: exact binomial intervals of Clopper and Pearson 1934
(https://doi.org/10.1093/biomet/26.4.404).

The attacker says "in" where a score is above zero, the middle between the two cases, which is fixed before a score is seen. Let alpha
and beta be upper bounds on its false positive and false negative rates, each at half of the allowed error.

* `gdp_mu_from_errors`: mu >= Phi^-1(1 - alpha) - Phi^-1(beta), by the trade-off function of Gaussian differential privacy (Dong, Roth and Su
  2019, https://arxiv.org/abs/1905.02383, definition 2.6; used for audits by Nasr et al. 2023, https://arxiv.org/abs/2302.07956).
  Assumes: scores are independent; the mechanism is Gaussian differentially private, with an unknown mu. Scores need not be Gaussian.
* `epsilon_from_errors`: epsilon >= log((1 - beta - delta) / alpha), and the same with the roles exchanged (Kairouz, Oh and Viswanath 2015,
  https://arxiv.org/abs/1311.0776, theorem 2.1). Assumes: scores are independent; any (epsilon, delta) mechanism. It is used where
  cohorts are sub-sampled, since a composition of sub-sampled Gaussians is not mu-GDP for any useful mu.
"""

import math
from statistics import NormalDist

from drencoder.audit.scores import CanaryScores


def gdp_mu_from_errors(scores: CanaryScores, significance: float) -> float:
    """The largest mu that these errors reject with an error of at most `significance`; 0 where they reject none."""
    alpha, beta = error_bounds(scores, significance)
    if max(alpha, beta) >= 1:
        return 0.0
    normal = NormalDist()
    return max(0.0, normal.inv_cdf(1 - alpha) - normal.inv_cdf(beta))


def epsilon_from_errors(scores: CanaryScores, delta: float, significance: float) -> float:
    """The largest epsilon at `delta` that these errors reject with an error of at most `significance`; 0 where they reject none."""
    alpha, beta = error_bounds(scores, significance)
    ratios = [(1 - beta - delta) / alpha, (1 - alpha - delta) / beta]
    return math.log(max(1.0, *ratios))


def error_bounds(scores: CanaryScores, significance: float) -> tuple[float, float]:
    """Upper bounds on the false positive and the false negative rate, which hold together but for a chance of `significance`."""
    false_positives, false_negatives = int((scores.outside >= 0).sum()), int((scores.inside < 0).sum())
    return (
        _upper_rate(false_positives, scores.outside.size, significance / 2),
        _upper_rate(false_negatives, scores.inside.size, significance / 2),
    )


def _upper_rate(events: int, trials: int, tail: float) -> float:
    """Clopper and Pearson's one-sided upper bound on the rate of `events` among `trials`."""
    from scipy.stats import beta

    return 1.0 if events >= trials else float(beta.ppf(1 - tail, events + 1, trials - events))
