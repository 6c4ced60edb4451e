"""The table of docs/sparse-graph.md follows from its theorem: the smallest even k, and a t with it, by exact hypergeometric tails."""

import pytest
from scipy.stats import hypergeom

_NODES, _LEAK, _FAIL = 10_000, 2.0**-40, 2.0**-20


def _holds(colluding: float, dropping: float, k: int, t: int, *, lies: bool) -> bool:
    others, c, d = _NODES - 1, round(colluding * _NODES), round(dropping * _NODES)
    leak = _NODES * hypergeom.sf(t - 1, others, c, k)
    if lies:
        leak = max(leak, _NODES * hypergeom.sf(2 * t - k - 1, others, c, k))
    parts = _NODES * ((c + d) / _NODES) ** (k / 2)
    unfinished = _NODES * hypergeom.cdf(t - 1, others, others - d, k)
    return bool(leak <= _LEAK and parts <= _LEAK and unfinished <= _FAIL)


@pytest.mark.parametrize(
    ("colluding", "dropping", "k", "t", "lies"),
    [
        (0.05, 0.05, 34, 20, False), (0.05, 0.05, 62, 44, True), (0.10, 0.10, 54, 30, False), (0.10, 0.10, 122, 85, True),
        (0.20, 0.10, 80, 51, False), (0.20, 0.10, 182, 134, True), (0.20, 0.25, 146, 74, False), (0.33, 0.25, 266, 153, False),
    ],
)  # fmt: skip
def test_rows_of_the_table(colluding: float, dropping: float, k: int, t: int, lies: bool) -> None:
    assert _holds(colluding, dropping, k, t, lies=lies)
    assert not any(_holds(colluding, dropping, k - 2, fewer, lies=lies) for fewer in range(k // 2, k - 1))
