"""What a promise lets the best possible attacker do, and one sentence about it for a data protection officer.

For an (epsilon(delta), delta) curve the power of a test at a false positive rate a is at most min over delta of e^epsilon(delta) a + delta
(Wasserman and Zhou 2010, https://arxiv.org/abs/0811.2501; the curve as a whole is the trade-off function, Dong, Roth and Su 2019,
https://arxiv.org/abs/1905.02383, proposition 2.12). Where nothing is sub-sampled the curve is Gaussian and the closed form is
Phi(Phi^-1(a) + mu).
"""

import math
from statistics import NormalDist

from drencoder.privacy.accounting import Event, Relation, epsilon_pld, gdp_mu

FALSE_ALARMS = 0.01

_NORMAL = NormalDist()
_DELTAS = tuple(10.0 ** (-exponent / 2) for exponent in range(1, 17))


def largest_power(events: tuple[Event, ...], relation: Relation) -> float:
    """The largest true positive rate of any test of these releases whose false positive rate is `FALSE_ALARMS`."""
    mu = gdp_mu(events, relation)
    if mu is not None:
        return 1.0 if math.isinf(mu) else _NORMAL.cdf(_NORMAL.inv_cdf(FALSE_ALARMS) + mu)
    bounds = []
    for delta in _DELTAS:
        epsilon = epsilon_pld(events, delta, relation)
        bounds += [
            math.exp(min(700.0, epsilon)) * FALSE_ALARMS + delta,
            1 - math.exp(-epsilon) * (1 - delta - FALSE_ALARMS),
        ]
    return min(1.0, *bounds)


def protection_sentence(epsilon: float, delta: float, power: float, unit: str = "client") -> str:
    """What this epsilon means for one person, in one sentence. `power` as `largest_power` gives it."""
    return (
        f"epsilon = {epsilon:.3g} at delta = {delta:g} means: an attacker who knows everything but whether one {unit} took part, and who "
        f"wrongly suspects 1 of 100 {unit}s that did not, can find at most {_of_hundred(power)} of 100 that did; without any "
        "information it would be 1."
    )


def _of_hundred(power: float) -> str:
    return "100" if power > 0.995 else f"{100 * power:.0f}" if power >= 0.095 else f"{100 * power:.1f}"
