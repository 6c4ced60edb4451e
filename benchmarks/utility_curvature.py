"""How curved the mean loss of held-out examples is at an adapter, in three ways.

The Hessian, which has negative directions, and the Gauss-Newton matrix, J' (diag(p) - pp') J over the logits, which has none, both by
central differences; and "finite", the loss's second difference over noise as long as a run's, FINITE in every value.

Legend: D adapter values, K code values, M predicted tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import torch
from torch import Tensor

from drencoder.data.tokenization import collate
from drencoder.encoders.contract import Encoder
from drencoder.models.cohort_training import cohort_updates
from drencoder.published.subset import is_lora_b
from drencoder.runs.build import Live

HELD_OUT, HESSIAN_PROBES, POWER_STEPS = 64, 8, 10
STEP = 1e-3  # length of a finite difference, over the length of the adapter
FINITE = 0.05  # rms of the noise that a run's rounds add up to in a value, of the order that DP-LoRA's tuned runs have at n = 8
KINDS = ("hessian", "gauss-newton", "finite")


class Curvature:
    """d'Hd and d'Gd of the mean held-out loss at one adapter, by central differences."""

    def __init__(self, live: Live, adapter_D: Tensor) -> None:
        self.lora, self.adapter_D = live.lora, adapter_D
        self.examples, self.local = live.held_out[:HELD_OUT], replace(live.recipe.local, batch_size=HELD_OUT)
        self.batch = collate([self.examples], live.lora.base.pad_id).to(live.lora.device)
        self.chance_MV = self._logits(adapter_D).softmax(dim=1)
        self.wanted_M1 = self.batch.input_ids[self.batch.predicted][:, None].cpu()
        self.at_rest = self._loss(adapter_D)
        self.sign_D = torch.ones_like(adapter_D)
        for segment in live.lora.layout.segments:
            if is_lora_b(segment):
                self.sign_D[segment.start : segment.stop] = -1

    def both_signs(self, direction_D: Tensor) -> list[Tensor]:
        """The direction, and with the sign of LoRA's B turned: the mean of both forms is free of what A and B do to each other,
        which has no part in a trace but most of its variance (at B = 0 all of the Hessian's)."""
        return [direction_D, direction_D * self.sign_D]

    def mean(self, directions: Sequence[Tensor]) -> dict[str, float]:
        """Kind of curvature -> mean of d'Cd; the Hessian's over the first directions only, for it needs gradients."""
        hessian = mean(self._hessian(direction_D) for direction_D in directions[:HESSIAN_PROBES])
        return dict(
            zip(
                KINDS,
                (hessian, mean(map(self._gauss_newton, directions)), mean(map(self._finite, directions))),
                strict=True,
            )
        )

    def sharpest(self, encoder: Encoder | None, seed: int) -> float:
        """The largest eigenvalue of the Gauss-Newton matrix G, or of P'GP in an encoder's code, by power iteration. A step that is
        longer than 2 / this goes up along that direction, whatever the noise."""
        size = len(self.adapter_D) if encoder is None else encoder.code_size
        value, at_K = 0.0, torch.randn(size, generator=torch.Generator().manual_seed(seed))
        for _ in range(POWER_STEPS):
            unit_K = at_K / at_K.norm().clamp(min=1e-30)
            turned_D = self._gauss_newton_times(unit_K if encoder is None else encoder.decode(unit_K[None], 0)[0])
            at_K = turned_D if encoder is None else encoder.encode(turned_D[None], 0)[0]
            value = float(unit_K @ at_K)
        return value

    def _ends(self, direction_D: Tensor) -> tuple[Tensor, Tensor, float]:
        step = STEP * float(self.adapter_D.norm()) / float(direction_D.norm())
        return self.adapter_D - step * direction_D, self.adapter_D + step * direction_D, 2 * step

    def _hessian(self, direction_D: Tensor) -> float:
        low_D, high_D, width = self._ends(direction_D)
        return float(direction_D @ (self._downhill(low_D) - self._downhill(high_D))) / width

    def _gauss_newton(self, direction_D: Tensor) -> float:
        change_MV = self._change(direction_D)
        return float((self.chance_MV * change_MV.square()).sum(dim=1).mean())

    def _gauss_newton_times(self, direction_D: Tensor) -> Tensor:
        """G d: how the logits change along d, weighted by the softmax's curvature, pulled back through the model."""
        weight_MV = self.chance_MV * self._change(direction_D) / len(self.chance_MV)
        at_D = self.adapter_D.to(self.lora.device).clone().requires_grad_()
        stack = {name: tensor[None] for name, tensor in self.lora.layout.unflatten(at_D).items()}
        with self.lora.stacked(stack):
            logits_MV = self.lora.logits_before(self.batch.input_ids, self.batch.predicted)
        (found_D,) = torch.autograd.grad(logits_MV, at_D, weight_MV.to(logits_MV))
        return found_D.cpu()

    def _change(self, direction_D: Tensor) -> Tensor:
        """How the logits (M, V) change along a direction, without the part that softmax does not see."""
        low_D, high_D, width = self._ends(direction_D)
        change_MV = (self._logits(high_D) - self._logits(low_D)) / width
        return change_MV - (self.chance_MV * change_MV).sum(dim=1, keepdim=True)

    def _finite(self, direction_D: Tensor) -> float:
        ends = (self._loss(self.adapter_D + sign * FINITE * direction_D) for sign in (-1, 1))
        return (sum(ends) - 2 * self.at_rest) / FINITE**2

    def _loss(self, at_D: Tensor) -> float:
        log_MV = self._logits(at_D).log_softmax(dim=1)
        return -float(log_MV.gather(1, self.wanted_M1).mean())

    def _downhill(self, at_D: Tensor) -> Tensor:
        return cohort_updates(self.lora, at_D, [self.examples], self.local, [0])[0].cpu()

    @torch.no_grad()
    def _logits(self, at_D: Tensor) -> Tensor:
        stack = {name: tensor[None] for name, tensor in self.lora.layout.unflatten(at_D.to(self.lora.device)).items()}
        with self.lora.stacked(stack):
            return self.lora.logits_before(self.batch.input_ids, self.batch.predicted).double().cpu()


def signs(size: int, count: int, seed: int) -> list[Tensor]:
    """Random vectors of +1 and -1: E[v v'] = I, with the least variance of v'Cv (Hutchinson 1990,
    https://doi.org/10.1080/03610919008812866)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1 for _ in range(count)]
