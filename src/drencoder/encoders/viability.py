"""The viability gate: does the encoder carry anything? Asked before any privacy budget is spent.

Legend: N updates, D adapter values.

Benchmarks do not notice an encoder that carries nothing (a zero update "ties" on MMLU), so the gate looks at
the updates themselves: synthetic ones from the prior, or real ones of *public* text. Never at clients' updates:
that answer would have to be charged.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from scipy.special import stdtrit
from torch import Tensor

from drencoder.encoders.contract import Encoder, check_update
from drencoder.errors import EncoderError, ViabilityError
from drencoder.rng import derive_seed

_CONFIDENCE = 0.99
# An encoder has to reach this share of the random sketch's cosine. The sketch costs nothing, needs no
# training and is always at hand; a quarter of its energy is the least that can be called working.
_SHARE_OF_RANDOM = 0.5


@final
@dataclass(frozen=True)
class GateResult:
    """What an encoder carries, averaged over `samples` updates. Public, if the updates were.

    With u an update and r what its code adds to the decoding, r = decode(encode(u)) - decode(encode(0)):

    * cosine: mean of cos(u, r). Taking the decoding of a zero update away matters for trained encoders: one
      that ignores its input and always answers the prior's mean would otherwise look useful. Linear: no change.
    * cosine_low: one-sided 99 % lower confidence bound (Student) on the mean cosine of such updates.
    * captured_energy: mean of max(0, cos)^2, the share of |u|^2 that the best non-negative multiple of r explains; for
      an orthogonal projection exactly |P u|^2 / |u|^2.
    * raw_cosine: mean of cos(u, decode(encode(u))), as published work reports it.
    * random_cosine: sqrt(K / D), what a uniform random sketch of as many values gives.
    * viable: cosine_low reaches half of random_cosine, hence is above zero.
    """

    encoder: str
    samples: int
    cosine: float
    cosine_low: float
    captured_energy: float
    raw_cosine: float
    random_cosine: float
    viable: bool

    @property
    def needed(self) -> float:
        """The bound that `cosine_low` has to reach."""
        return _SHARE_OF_RANDOM * self.random_cosine

    @property
    def sentence(self) -> str:
        """One line for people."""
        verdict = "carries the update" if self.viable else "carries (nearly) nothing"
        return (
            f"the {self.encoder} encoder {verdict}: update cosine {self.cosine:.3f} "
            f"(at least {self.cosine_low:.3f} with 99 % confidence, {self.needed:.3f} needed), "
            f"{self.captured_energy:.2%} of the energy; "
            f"a random sketch of the same size has cosine {self.random_cosine:.3f}"
        )


@torch.no_grad()
def measure_viability(encoder: Encoder, update_ND: Tensor, seed: int) -> GateResult:
    """Sends each update through the encoder, each with a sketch seed of its own so that samples are independent.

    Zero updates say nothing and are left out. EncoderError if fewer than 2 others are left or one is not finite.
    """
    update_ND = check_update(encoder, update_ND)
    if not bool(update_ND.isfinite().all()):
        raise EncoderError("the viability gate got an update that is not finite; give it finite ones")
    cosines, raw_cosines = [], []
    for row, update_D in enumerate(update_ND):
        if not bool(update_D.any()):
            continue
        sketch_seed = derive_seed(seed, "gate", row)
        pair_2D = torch.stack([update_D, torch.zeros_like(update_D)])
        decoded_2D = encoder.decode(encoder.encode(pair_2D, sketch_seed), sketch_seed)
        cosines.append(_cosine(update_D, decoded_2D[0] - decoded_2D[1]))
        raw_cosines.append(_cosine(update_D, decoded_2D[0]))
    if len(cosines) < 2:
        raise EncoderError(
            f"the viability gate needs at least 2 updates other than zero, got {len(cosines)}; draw more"
        )
    cosine_N = torch.tensor(cosines, dtype=torch.float64)
    error = float(cosine_N.std()) / math.sqrt(len(cosines))
    low = float(cosine_N.mean()) - float(stdtrit(len(cosines) - 1, _CONFIDENCE)) * error
    random_cosine = math.sqrt(encoder.code_size / encoder.update_size)
    return GateResult(
        encoder=encoder.name, samples=len(cosines), cosine=float(cosine_N.mean()), cosine_low=low,
        captured_energy=float(cosine_N.clamp(min=0.0).square().mean()), raw_cosine=sum(raw_cosines) / len(raw_cosines),
        random_cosine=random_cosine, viable=low >= _SHARE_OF_RANDOM * random_cosine,
    )  # fmt: skip


def _cosine(a_D: Tensor, b_D: Tensor) -> float:
    """Cosine in float64; 0 if either is zero or not finite (an encoder that breaks carries nothing)."""
    a_D, b_D = a_D.to(torch.float64), b_D.to(torch.float64)
    cosine = float(a_D @ b_D / (a_D.norm() * b_D.norm()))
    return cosine if math.isfinite(cosine) else 0.0


def require_viable(result: GateResult, *, allow: bool = False) -> None:
    """ViabilityError unless the encoder is viable or the user said to go on regardless (`allow`)."""
    if not result.viable and not allow:
        raise ViabilityError(
            f"{result.sentence}; set encoder.name=random or a smaller encoder.ratio, or go on regardless with encoder.gate=warn"
        )
