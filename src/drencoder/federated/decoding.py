"""What the server makes of a noised mean before its step, knowing how much noise is in it: post-processing, which costs no privacy.

Legend: K code values, G places of a group, D adapter values.

* "precondition": coordinate k is divided by sqrt(1 + snr_k), snr_k = a C^2 share_k / noise^2, where share_k is what the encoder's prior
  expects of a unit update's energy there and a the aligned share of the clip that plans assume. Where curvature follows energy
  (METHOD 2.6) the best step of a coordinate is flat in those that noise rules and falls with its energy in the
  others; the square root is the cautious half of that, as in Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), but from
  public facts alone instead of noisy squares.
* "wiener": the posterior mean of a Gaussian signal under known Gaussian noise, energy / (energy + noise), for coordinates in groups of
  rising size, in the order of the prior: the James-Stein estimator of each group (Stein 1981,
  https://doi.org/10.1214/aos/1176345632; groups as in Cai 1999, https://doi.org/10.1214/aos/1018031262).
* "singular": the best shrinkage of each LoRA tensor's singular values under even noise of known size (Gavish and Donoho
  2017, https://arxiv.org/abs/1405.7511, Frobenius loss), for an encoder that sends tensors as they are.

docs/log.md has each measured. None is the default: shrinkage throws small signals away before momentum can add them up.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.matrix_normal_prior import matrix_shape
from drencoder.errors import EncoderError
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.plan import ALIGNMENT

__all__ = ["Filter", "Informed", "filter_of", "precondition", "shrink_groups", "shrink_singular_values"]

# (mean_K, noise std of each of its values) -> the same, filtered.
Filter = Callable[[Tensor, float], Tensor]

# Without noise every coordinate would be damped without bound: no signal is taken for more than this many times the noise.
_LARGEST_SNR = 1e8


@runtime_checkable
class Informed(Protocol):
    """An encoder whose prior says how much energy to expect in each code value."""

    @property
    def share_K(self) -> Tensor:
        """Share of an update's expected energy in each code value, float64 (K,)."""
        ...

    @property
    def groups(self) -> tuple[Tensor, ...]:
        """Disjoint int64 places of code values of like expected energy."""
        ...


def filter_of(name: str, encoder: Encoder, clip_l2: float) -> Filter | None:
    """The filter of a recipe's `server.decoding`; None for "plain".

    Raises:
      EncoderError: the encoder has no prior of its code ("precondition", "wiener"), or sends no whole tensors ("singular").
    """
    if name == "plain":
        return None
    if name == "singular":
        if encoder.name != "identity":
            raise EncoderError(
                f"server.decoding = 'singular' shrinks the singular values of whole tensors and the {encoder.name} encoder "
                "sends none: set server.decoding = 'plain', or encoder.name = 'identity'"
            )
        segments = encoder.segments
        return lambda mean_D, noise_std: shrink_singular_values(mean_D, segments, noise_std)
    if not isinstance(encoder, Informed):
        raise EncoderError(
            f"server.decoding = {name!r} needs a prior of the code and the {encoder.name} encoder has none: set "
            "server.decoding = 'plain', or encoder.name = 'hybrid'"
        )
    if name == "wiener":
        groups = encoder.groups
        return lambda mean_K, noise_std: shrink_groups(mean_K, groups, noise_std)
    share_K = encoder.share_K
    return lambda mean_K, noise_std: precondition(mean_K, share_K, clip_l2, noise_std)


def precondition(mean_K: Tensor, share_K: Tensor, clip_l2: float, noise_std: float) -> Tensor:
    """mean_k / sqrt(1 + snr_k) with snr_k = clip_l2^2 share_k / (2 noise_std^2), at most 1e8 (also without noise)."""
    signal_K = ALIGNMENT * clip_l2**2 * share_K.to(mean_K.device)
    least = float(signal_K.max()) / _LARGEST_SNR
    damping_K = (1.0 + signal_K / max(noise_std**2, least)).sqrt()
    return (mean_K / damping_K).to(mean_K.dtype)


def shrink_groups(mean_K: Tensor, groups: Sequence[Tensor], noise_std: float) -> Tensor:
    """Each group of values times max(0, 1 - G noise_std^2 / its energy); values of no group stay as they are.

    Without noise nothing changes; a group of zeros stays zero.
    """
    out_K = mean_K.clone()
    for group_G in groups:
        energy = float(mean_K[group_G].double().square().sum())
        noise = len(group_G) * noise_std**2
        out_K[group_G] *= max(0.0, 1.0 - noise / energy) if energy > 0 else 0.0
    return out_K


def shrink_singular_values(mean_D: Tensor, segments: Sequence[Segment], noise_std: float) -> Tensor:
    """Every tensor with its singular values y shrunk to sqrt((y^2 - b - 1)^2 - 4 b) / y, zero below 1 + sqrt(b).

    y is in units of noise_std sqrt(longer side), b the ratio of the sides (at most 1). Without noise nothing changes.
    """
    if noise_std == 0:
        return mean_D
    out_D = torch.empty_like(mean_D)
    for segment in segments:
        height, width = matrix_shape(segment)
        values_AB = mean_D[segment.start : segment.stop].view(height, width)
        left, singular, right = torch.linalg.svd(values_AB, full_matrices=False)
        beta = min(height, width) / max(height, width)
        unit = noise_std * math.sqrt(max(height, width))
        y = singular.double() / unit
        kept = ((y.square() - beta - 1).square() - 4 * beta).clamp(min=0).sqrt() / y.clamp(min=1e-30)
        kept = torch.where(y > 1 + math.sqrt(beta), kept * unit, 0.0).to(singular.dtype)
        out_D[segment.start : segment.stop] = ((left * kept) @ right).flatten()
    return out_D
