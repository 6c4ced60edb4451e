"""Is the noise of the recipe's own releases what was promised: on every value, in every message, and never twice?

Legend: R rows of noise (messages or released sums, less what the canaries put into them), K values.

A canary cannot see a value without noise if it points elsewhere. These tests look at all values. Each has a chance of a false alarm of
one in a million.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from drencoder.audit.trials import Trial
from drencoder.errors import EngineError
from drencoder.federated.round import SecureSum
from drencoder.privacy.mechanism import NoiseSource, quantiser_for

_ALARM = 1e-6
_LOUDEST = 0.98  # of the promised spread: rounding to a wire format may take a little
_PAIRS = 256  # rows that are compared with each other


@final
@dataclass(frozen=True)
class Check:
    """A fact about the run that must hold. `found` says in one sentence what was seen.

    `of_records`: whether it compares clients' records, so that what was seen is about them and has no noise.
    """

    name: str
    passed: bool
    found: str
    of_records: bool = False


def check_noise(rest_RK: Tensor, where: str) -> list[Check]:
    """Tests rows of noise, in units of what was promised: float64 (R, K), R at least 2."""
    rows, size = rest_RK.shape
    return [
        _check_scale(rest_RK, where),
        _check_each_value(rest_RK, where),
        _check_pairs(rest_RK[:_PAIRS], where, rows, size),
    ]


def check_run_noise(total_RK: Tensor, slots: int) -> Check:
    """Tests the noise of all `slots` rounds of R runs, added up, in units of what was promised of such a sum: float64 (R, K).

    Noise that takes back in one round what it added in another is loud in each of them, and hides nobody who is in all.
    """
    low, found = _too_quiet(total_RK, f"all {slots} rounds of a run together")
    return Check("noise does not cancel over a run", not low, found)


def check_shares(trials: Sequence[Trial], where: str) -> Check:
    """Secure aggregation: tests releases of nobody's data, which must be, to the last bit, the shares that contributors drew."""
    name = "every contributor's share of noise is in the sum"
    for trial in trials:
        (secure,), heard, contributors = trial.received, trial.heard, len(trial.planted.answering)
        assert isinstance(secure, SecureSum)
        assert heard is not None
        if few := len(set(trial.planted.answering) - set(heard.drew)):
            found = f"{few} of {contributors} contributors to {where} drew no share of noise from the run's source, or not all of it."
            return Check(name, False, found)
        quantiser = quantiser_for(trial.permit, secure.sum_V.size, trial.query.spec.clip_l2)
        rest_V = quantiser.to_steps(quantiser.to_residues(secure.sum_V.astype(np.int64) - heard.total_V))
        if rest_V.any():
            share = math.sqrt(float(np.square(rest_V.astype(np.float64)).mean())) / quantiser.std_steps
            found = (
                f"A sum of {where} has not all the noise that its {contributors} contributors drew: what differs, in {np.count_nonzero(rest_V)} of "
                f"{rest_V.size} values, is {share:.2f} times as loud as the share of one."
            )
            return Check(name, False, found)
    return Check(
        name,
        True,
        f"{len(trials)} sums of {where}, of nobody's data, are to the last bit the noise that their contributors drew.",
    )


def _check_scale(rest_RK: Tensor, where: str) -> Check:
    low, found = _too_quiet(rest_RK, where)
    return Check("noise is as loud as promised", not low, found)


def _too_quiet(rest_RK: Tensor, where: str) -> tuple[bool, str]:
    """The sum of squares of all values against chi-square with as many degrees of freedom: whether it is too small, and what was found."""
    count, power = rest_RK.numel(), float(rest_RK.square().mean())
    low = _chi2_below(power * count, count) < _ALARM and power < _LOUDEST**2
    found = f"The noise of {where} has {math.sqrt(power):.3f} times the promised spread ({count:,} values)"
    return low, found + (", which is too little." if low else ".")


def _check_each_value(rest_RK: Tensor, where: str) -> Check:
    """The same for each value by itself, over all rows; a value without noise has no spread at all."""
    rows, size = rest_RK.shape
    power_K = rest_RK.square().mean(0)
    place = int(power_K.argmin())
    least = float(power_K[place])
    low = _chi2_below(least * rows, rows) < _ALARM / size and least < _LOUDEST**2
    found = f"The least noise of any value of {where} is {math.sqrt(least):.3f} times the promised one ({size:,} values in {rows} releases)"
    return Check("every value has noise", not low, found + (f": value {place} has too little." if low else "."))


def _check_pairs(rest_RK: Tensor, where: str, rows: int, size: int) -> Check:
    """Student's t of the correlation of every pair of rows."""
    name, found = "no noise comes twice", f"The noise of no two of {rows} releases of {where} is alike."
    if len(rest_RK) < 2 or size < 8:
        return Check(name, True, found)
    unit_RK = rest_RK / rest_RK.norm(dim=1, keepdim=True).clamp(min=1e-30)
    likeness = (unit_RK @ unit_RK.T).fill_diagonal_(0.0).abs()
    pairs = len(rest_RK) * (len(rest_RK) - 1) / 2
    silent = bool((rest_RK.norm(dim=1) < 1e-9 * math.sqrt(size)).any())
    worst = float(likeness.max())
    alike = silent or worst > _unlikely_correlation(size, _ALARM / pairs)
    if alike:
        found = f"Two releases of {where} have the same noise, or a part of it in common (correlation {worst:.2f}): who sees both takes it off."
    return Check(name, not alike, found)


@final
class RestartCheck:
    """Whether the same noise comes again: from two sources of one process, and from two processes.

    A generator with a constant seed gives the same. The processes start at once and are read when the rest of an audit is done.
    """

    def __init__(self, make_noise: Callable[[], NoiseSource]) -> None:
        first, second = make_noise(), make_noise()
        self._kind = first.kind
        self._twice = bool((first.words(1, 0)(32) == second.words(1, 0)(32)).all())
        started = 2 if self._kind == "secure" and not self._twice else 0
        self._processes = [
            subprocess.Popen([sys.executable, "-c", _DRAW], stdout=subprocess.PIPE) for _ in range(started)
        ]

    def result(self) -> Check:
        """Waits for both."""
        name = "noise cannot be computed again"
        if self._kind != "secure":
            found = f"The recipe's noise is {self._kind!r}: whoever knows the seed computes it again. Such a run is for tests."
            return Check(name, False, found)
        draws = [process.communicate()[0] for process in self._processes]
        if any(process.returncode for process in self._processes):
            raise EngineError(
                "A process that draws noise could not be started: see the message above, and audit again."
            )
        if self._twice or draws[0] == draws[1]:
            where = "Two sources of one process" if self._twice else "Two processes"
            return Check(name, False, f"{where} drew the same noise: whoever starts the program can take it off.")
        return Check(name, True, "Two sources of one process, and two processes, drew different noise.")

    def stop(self) -> None:
        """Ends what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


_DRAW = (
    "import sys; from drencoder.privacy.noise_source import SecureNoise; "
    "sys.stdout.buffer.write(SecureNoise().words(1, 0)(32).tobytes())"
)


def _chi2_below(value: float, degrees: int) -> float:
    from scipy.stats import chi2

    return float(chi2.cdf(value, degrees))


def _unlikely_correlation(size: int, tail: float) -> float:
    """The correlation of two independent Gaussian rows that is passed with the chance `tail`, in either direction."""
    from scipy.stats import t

    far = float(t.isf(tail / 2, size - 1))
    return far / math.sqrt(far * far + size - 1)
