"""What leaves a site whose own records or owners are the units of privacy: one noised sum a slot, or one share of one.

Legend: N units (rows), V values of the joint vector. The site is the trusted curator of its units. It runs the central mechanism on
those that its secret draw put into the slot; the sum of none is zero, and gets the same noise.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import (
    _TOKEN,
    BoundedCodes,
    BoundedSum,
    NoiseSource,
    Releases,
    _check_noise,
    quantiser_for,
)

__all__ = ["release_site_share", "release_site_sum"]


def release_site_sum(bounded: BoundedSum, site: int, permit: Permit, noise: NoiseSource) -> Releases:
    """Local trust: the sum over a site's units plus N(0, (permit.noise_multiplier * clip)^2) on every value, as one row (1, V).

    How many units are in the sum is not told: neither the row's size nor anything beside it depends on that.
    Raises PrivacyError when the permit does not cover the site, or has, and for another kind of noise.
    """
    _check_noise(permit, noise)
    permit.spend_clients([site])
    noise_std = permit.noise_multiplier * bounded.clip_l2
    noise_V = noise.normal(bounded.sum_V.numel(), permit.slot, site).to(bounded.sum_V.device)
    value_1V = (bounded.sum_V + noise_std * noise_V).to(torch.float32)[None]
    return Releases(value_1V, (site,), noise_std, permit.slot, bounded.clip_l2, token=_TOKEN)


def release_site_share(
    batches: Iterable[tuple[list[int], BoundedCodes]],
    size: int,
    clip_l2: float,
    site: int,
    permit: Permit,
    noise: NoiseSource,
) -> npt.NDArray[np.uint32]:
    """Secure aggregation: (V,) the sum modulo 2^b of a site's rounded codes and one share of noise. It must not leave unmasked.

    `batches` yields units with their codes, `size` values each, of clip `clip_l2`. Each code is rounded by itself, so that a unit
    moves the sum by no more than `Quantiser.bound_l2`. Raises PrivacyError as `release_site_sum`.
    """
    _check_noise(permit, noise)
    quantiser = quantiser_for(permit, size, clip_l2)
    permit.spend_clients([site])
    total_V = quantiser.noise(noise.words(permit.slot, site))
    for units, codes in batches:
        for row, unit in zip(codes.values_NV.cpu().numpy(), units, strict=True):
            total_V += quantiser.round_code(row, noise.words(permit.slot, site, unit))
    return quantiser.to_residues(total_V)
