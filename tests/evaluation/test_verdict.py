"""The verdict on a run: what the losses of single texts, base model against run, let one say."""

import math

import pytest

from drencoder.evaluation.verdict import is_uniform_loss, verdict

NONE = "nothing was measured."


def said(before: list[float], after: list[float], targets: list[int] | None = None) -> str:
    tokens = targets or [2] * len(before)
    outcomes = {
        "base model": {"losses": before, "targets": tokens, "right": {}},
        "this run": {"losses": after, "targets": tokens, "right": {}},
    }
    return verdict(outcomes, math.log(100), NONE)


def test_a_clear_change_is_told_with_its_numbers() -> None:
    before = [8.0, 8.4, 7.9, 8.1, 8.0, 8.2, 8.3, 7.8, 8.1, 8.2]
    # Losses are sums over two tokens each; the differences are -4 but for the last, which is -3.
    after = [loss - 4 for loss in before[:-1]] + [before[-1] - 3]
    mean, error = -39 / 20, 1.959964 * math.sqrt(9 * 0.1**2 + 0.9**2) / 20
    numbers = f"difference {mean - error:+.3f} to {mean + error:+.3f}; guessing uniformly gives 4.605)."
    assert said(before, after) == f"The adapter learned: held-out loss 4.050 -> 2.100 (95 % interval of the {numbers}"
    assert said(after, before).startswith("The adapter did not learn: held-out loss 2.100 -> 4.050 (")


def test_paired_texts_tell_more_than_the_two_means() -> None:
    """The texts differ by far more than the models do, and every one gets better."""
    before = [float(10 * number + 5) for number in range(20)]
    assert said(before, [loss - 0.2 for loss in before]).startswith("The adapter learned:")


def test_what_may_be_chance_is_called_so() -> None:
    before = [5.0] * 20
    assert said(before, [5.0 + 0.1 * (-1) ** n for n in range(20)]).startswith(
        "Whether the adapter learned cannot be told: "
    )
    assert said(before, before).startswith("The adapter did not learn: held-out loss 2.500 -> 2.500 (")
    assert said(before[:7], [1.0] * 7).startswith("Whether the adapter learned cannot be told from 7 texts: ")
    assert said(before[:8], [1.0] * 8).startswith("The adapter learned: ")
    assert said([], []) == NONE


def test_long_texts_weigh_more() -> None:
    before, targets = [2.0] * 10 + [200.0] * 10, [2] * 10 + [200] * 10
    after = [1.0] * 10 + [240.0] * 10
    assert said(before, after, targets).startswith("The adapter did not learn: held-out loss 1.000 -> 1.193 (")


@pytest.mark.parametrize("size", [2, 97, 32_000, 262_144])
def test_the_loss_of_guessing_uniformly_belongs_to_a_vocabulary(size: int) -> None:
    assert is_uniform_loss(math.log(size))
    assert not is_uniform_loss(math.log(size + 0.5))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e300, 3, "3.0", None, True, [1.0]])
def test_no_vocabulary_has_such_a_loss(value: object) -> None:
    assert not is_uniform_loss(value)
