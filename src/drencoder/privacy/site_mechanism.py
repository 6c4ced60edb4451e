"""What leaves a site whose own records or owners are the units of privacy: one noised sum a slot, or one share of one.

Legend: N units (rows), V values of the joint vector. The site is the trusted curator of its units. It runs the central mechanism on
those that its secret draw put into the slot; the sum of none is zero, and gets the same noise.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import BoundedCodes, check_kind_of_noise, quantiser_for
from drencoder.privacy.noise_source import NoiseSource


def release_site_sum(
    batches: Iterable[tuple[Sequence[int], BoundedCodes]],
    size: int,
    clip_l2: float,
    site: int,
    permit: Permit,
    noise: NoiseSource,
) -> npt.NDArray[np.uint32]:
    """(V,) the sum modulo 2^b of a site's rounded codes and of its noise: all that was charged (local trust), or a share of it.

    A share (secure aggregation) must not leave unmasked. `batches` yields units with their codes, `size` values each, of clip
    `clip_l2`. Each code is rounded by itself, so that a unit moves the sum by no more than `Quantiser.bound_l2`. How many units
    are in it is not told. Raises PrivacyError when the permit does not cover the site, or has, and for another kind of noise.
    """
    check_kind_of_noise(permit, noise)
    quantiser = quantiser_for(permit, size, clip_l2)
    permit.spend_clients([site])
    total_V = quantiser.noise(noise.words(permit.slot, site))
    for units, codes in batches:
        for row, unit in zip(codes.values_NV.cpu().numpy(), units, strict=True):
            total_V += quantiser.round_code(row, noise.words(permit.slot, site, unit))
    return quantiser.to_residues(total_V)
