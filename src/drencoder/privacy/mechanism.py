"""Clip, noise, release: the only code that turns a client's values into something that may leave.

Shapes: N clients (rows), V values of the joint vector. The types carry trust, and outside code cannot
make one: `clip_rows` makes `BoundedCodes`, these make a `BoundedSum`, and `release_sum`, `release_codes` or
`release_shares` with `unmasked_sum` make a `Release` against a `Permit`, which the ledger wrote down before.

Under every trust codes become integers (`secure_aggregation.quantise`) and the noise is a discrete Gaussian on them. Its
standard deviation is `permit.noise_multiplier` times the bound of a rounded code, both read from the objects that guarantee
them, and a little more. It is one scale for the joint vector. docs/guarantee.md has the theorem.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import Relation
from drencoder.privacy.ledger import Permit
from drencoder.privacy.noise_source import NoiseSource
from drencoder.secure_aggregation.quantise import Quantiser

_TOKEN = object()
_CLIP_RANGE = (1e-20, 1e20)  # float32 keeps seven digits of every clipped value inside it
_CHUNK_VALUES = 1 << 22  # float64 temporaries of 32 MiB


def _guard(token: object, maker: str) -> None:
    if token is not _TOKEN:
        raise TypeError(f"only privacy.mechanism makes this object: call {maker}")


@dataclass(frozen=True, eq=False)
class BoundedCodes:
    """Rows of norm at most `clip_l2`, float32; `nonfinite` rows held NaN or infinity and are zero now."""

    values_NV: torch.Tensor = field(repr=False)
    clip_l2: float
    nonfinite: int
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        _guard(token, "clip_rows")


@dataclass(frozen=True, eq=False)
class BoundedSum:
    """The un-noised sum of clipped rows, rounded to integers: private, refuses to be pickled, prints no values.

    `steps_V` (V,) int64 is exact: it depends neither on the order of the rows nor on their batches.
    """

    steps_V: torch.Tensor = field(repr=False)
    quantiser: Quantiser = field(repr=False)
    contributors: int = field(repr=False)
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        _guard(token, "BoundedSum.zero")

    @classmethod
    def zero(cls, size: int, clip_l2: float) -> "BoundedSum":
        """The sum over nobody, of `size` values, for rows of norm at most `clip_l2`."""
        _check_clip(clip_l2)
        quantiser = Quantiser.fine(values=size, clip_l2=clip_l2, noise_multiplier=1.0)
        return cls(torch.zeros(size, dtype=torch.int64), quantiser, 0, token=_TOKEN)

    def add(self, codes: BoundedCodes) -> "BoundedSum":
        """This sum plus all rows of `codes`, each with weight one. Raises PrivacyError on another clip or size."""
        _check_same("clip norm", self.clip_l2, codes.clip_l2)
        _check_same("size", self.steps_V.numel(), codes.values_NV.shape[1])
        total_V, scale = self.steps_V.to(codes.values_NV.device, copy=True), self.quantiser.nearest_scale
        for values_V in codes.values_NV:
            total_V += torch.round(values_V.to(torch.float64) * scale).to(torch.int64)
        return BoundedSum(total_V, self.quantiser, self.contributors + codes.values_NV.shape[0], token=_TOKEN)

    @property
    def clip_l2(self) -> float:
        """The L2 bound of a row before it was rounded."""
        return self.quantiser.clip_l2

    @property
    def sum_V(self) -> torch.Tensor:
        """The sum in units of the codes, (V,) float64."""
        return self.steps_V.to(torch.float64) * self.quantiser.step

    def sensitivity(self, relation: Relation) -> float:
        """The most that one client can move the sum, in L2: the bound of a rounded row, or twice that for `replace_one`."""
        return self.quantiser.bound_l2 * (1 if relation == "add_remove" else 2)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an un-noised sum is never saved or sent")


@dataclass(frozen=True, eq=False)
class Release:
    """A noised value that may leave: float32 of V values, with total noise `noise_std` on each.

    `contributors` is None under central trust, where it is secret, and public otherwise.
    """

    value: torch.Tensor = field(repr=False)
    noise_std: float
    slot: int
    clip_l2: float
    contributors: int | None = None
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        _guard(token, "release_sum or sum_releases")


@dataclass(frozen=True, eq=False)
class Releases:
    """Local trust: row i is the release of client `client_ids[i]`, with noise `noise_std` of its own.

    Rows are integers (N, V) int64 that count `step`; floats with a step of 1 where there was no noise, or they were decoded.
    `modulus`: what a sum of the rows is taken by, so that it is a function of the sum before any of them wrapped around; 0: by none.
    """

    values_NV: torch.Tensor = field(repr=False)
    client_ids: tuple[int, ...]
    noise_std: float
    slot: int
    clip_l2: float
    step: float = 1.0
    modulus: int = 0
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        _guard(token, "release_codes")

    @property
    def codes_NV(self) -> torch.Tensor:
        """The rows in units of the codes, float32."""
        return (self.values_NV.to(torch.float64) * self.step).to(torch.float32)


def clip_rows(values_NV: torch.Tensor, clip_l2: float) -> BoundedCodes:
    """Scales every row to L2 norm at most `clip_l2`; shorter rows stay as they are.

    values_NV: (N, V), any float type, N = 0 allowed; taken to float32. A row with a NaN or infinity (also one
    too large for float32) becomes zero and is counted. The bound holds in exact arithmetic on the
    float32 values: norms are taken in float64, and what rounding to float32 pushed over is shrunk by 1e-6.
    """
    _check_clip(clip_l2)
    if values_NV.ndim != 2 or not values_NV.dtype.is_floating_point:
        raise PrivacyError(
            f"Codes have shape {tuple(values_NV.shape)} and {values_NV.dtype}; (N, V) floats are needed."
        )
    out_NV = torch.empty(values_NV.shape, dtype=torch.float32, device=values_NV.device)
    nonfinite = 0
    rows = max(1, _CHUNK_VALUES // max(1, values_NV.shape[1]))
    for start in range(0, values_NV.shape[0], rows):
        single_NV = values_NV[start : start + rows].detach().to(torch.float32)
        finite_N = torch.isfinite(single_NV).all(dim=1)
        nonfinite += int((~finite_N).sum())
        double_NV = torch.where(finite_N[:, None], single_NV, 0.0).to(torch.float64)
        norm_N = torch.linalg.vector_norm(double_NV, dim=1)
        scale_N = torch.where(norm_N > clip_l2, clip_l2 / norm_N, 1.0)
        clipped_NV = (double_NV * scale_N[:, None]).to(torch.float32)
        over_N = torch.linalg.vector_norm(clipped_NV, dim=1, dtype=torch.float64) > clip_l2 * (1 - 1e-12)
        shrunk_NV = (double_NV * (scale_N * (1 - 1e-6))[:, None]).to(torch.float32)
        out_NV[start : start + rows] = torch.where(over_N[:, None], shrunk_NV, clipped_NV)
    return BoundedCodes(out_NV, float(clip_l2), nonfinite, token=_TOKEN)


def _add_rows(total_V: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """A new sum, one row after the other, so that a sum of floats does not depend on the batches that the rows came in."""
    total_V = total_V.to(values_NV.device, copy=True)
    for values_V in values_NV:
        total_V += values_V.to(total_V.dtype)
    return total_V


def quantiser_for(permit: Permit, size: int, clip_l2: float) -> Quantiser:
    """How codes of `size` values and this clip become integers under a permit: `NoiseTerms.quantiser`.

    Raises PrivacyError for a slot without noise.
    """
    _check_clip(clip_l2)
    if permit.terms is None:
        raise PrivacyError(f"Slot {permit.slot} has no noise, so its codes stay floats: drop this call.")
    return permit.terms.quantiser(size, clip_l2)


def release_sum(bounded: BoundedSum, permit: Permit, noise: NoiseSource) -> Release:
    """Whoever is trusted with codes (central trust: the server): the integer sum plus discrete Gaussian noise on every value.

    Raises PrivacyError when the permit is used up, is for local trust or without noise, or for another kind of noise.
    """
    check_kind_of_noise(permit, noise)
    quantiser = quantiser_for(permit, bounded.steps_V.numel(), bounded.clip_l2)
    permit.spend_sum()
    noise_V = torch.from_numpy(quantiser.noise(noise.words(permit.slot)))
    value_V = (bounded.steps_V + noise_V.to(bounded.steps_V.device)).to(torch.float64) * quantiser.step
    return Release(value_V.to(torch.float32), quantiser.noise_std, permit.slot, bounded.clip_l2, token=_TOKEN)


def release_unnoised(parts: Iterable[BoundedCodes], permit: Permit) -> Release:
    """A baseline under central trust: the sum of all rows as they are, in floats; `parts` may be empty batches, not nothing.

    Raises PrivacyError when the slot was charged for noise, or the permit is used up.
    """
    if permit.terms is not None:
        raise PrivacyError(f"Slot {permit.slot} was charged for noise: release its sum with noise.")
    permit.spend_sum()
    total_V: torch.Tensor | None = None
    for part in parts:
        size, clip_l2 = part.values_NV.shape[1], part.clip_l2
        total_V = _add_rows(torch.zeros(size, dtype=torch.float64) if total_V is None else total_V, part.values_NV)
    if total_V is None:
        raise PrivacyError("There is nothing to sum: give at least one part, which may have zero rows.")
    return Release(total_V.to(torch.float32), 0.0, permit.slot, clip_l2, token=_TOKEN)


def release_codes(codes: BoundedCodes, client_ids: Sequence[int], permit: Permit, noise: NoiseSource) -> Releases:
    """Local trust: every row as integers, with all of its noise.

    Row i is client `client_ids[i]`, which must be in the permit's cohort and not have released in it before.
    A replayable source is asked by (slot, client), so the split into chunks changes no value. A slot that was charged as
    non-private keeps its rows as they are.
    """
    check_kind_of_noise(permit, noise)
    clients = [int(client) for client in client_ids]
    _check_same("number of clients", len(clients), codes.values_NV.shape[0])
    size, facts = codes.values_NV.shape[1], (permit.slot, codes.clip_l2)
    if permit.terms is None:
        permit.spend_clients(clients)
        return Releases(codes.values_NV.clone(), tuple(clients), 0.0, *facts, token=_TOKEN)
    quantiser = quantiser_for(permit, size, codes.clip_l2)
    permit.spend_clients(clients)
    steps_NV = np.zeros((len(clients), size), dtype=np.int64)
    for steps_V, code_V, client in zip(steps_NV, codes.values_NV.cpu().numpy(), clients, strict=True):
        steps_V[:] = quantiser.to_steps(quantiser.round_and_noise(code_V, noise.words(permit.slot, client)))
    rows_NV = torch.from_numpy(steps_NV)
    return Releases(rows_NV, tuple(clients), quantiser.noise_std, *facts, quantiser.step, token=_TOKEN)


def received_codes(
    values_NV: torch.Tensor,
    client_ids: Sequence[int],
    permit: Permit,
    *,
    clip_l2: float,
    noise_std: float,
    step: float = 1.0,
    modulus: int = 0,
) -> Releases:
    """Local trust, the server's side: rows that arrived from `client_ids`, perhaps decoded: post-processing, free.

    Nothing is made private here. Each row left its client as a release of `release_codes`, under this permit;
    `noise_std` is the noise of a value as it stands now, nan where a decoder made it unknown; `step` is what integers count,
    `modulus` what their sum is taken by.
    Raises PrivacyError for a client that is not in the permit's cohort.
    """
    if permit.trust == "central":
        raise PrivacyError("Under central trust what arrives is not a release: add it up as BoundedCodes.")
    if strangers := set(client_ids) - set(permit.cohort):
        raise PrivacyError(f"Client {min(strangers)} is not in the cohort of slot {permit.slot}.")
    return Releases(values_NV, tuple(client_ids), noise_std, permit.slot, clip_l2, step, modulus, token=_TOKEN)


def sum_releases(parts: Iterable[Releases]) -> Release:
    """The sum of local releases of one slot, n rows in all: noise of std * sqrt(n). Post-processing, free.

    A sum of integers is exact, and so a function of nothing but the sum: those who see only it see no more. Takes a generator,
    so that a cohort need not be held at once. Raises PrivacyError when there is no part, when parts of different slots or clips
    meet, or a client comes twice.
    """
    total_V: torch.Tensor | None = None
    first: Releases | None = None
    seen: set[int] = set()
    for part in parts:
        if first is None or total_V is None:
            dtype = torch.float64 if part.values_NV.dtype.is_floating_point else torch.int64
            first, total_V = part, torch.zeros(part.values_NV.shape[1], dtype=dtype)
        _check_same("slot", first.slot, part.slot)
        _check_same("clip norm", first.clip_l2, part.clip_l2)
        _check_same("noise", first.noise_std, part.noise_std)
        _check_same("step", first.step, part.step)
        if twice := seen & set(part.client_ids):
            raise PrivacyError(f"Client {min(twice)} is in the sum of slot {part.slot} twice.")
        seen |= set(part.client_ids)
        total_V = _add_rows(total_V, part.values_NV)
    if first is None or total_V is None:
        raise PrivacyError("There are no releases to sum: give at least one part, which may have zero rows.")
    noise_std = first.noise_std * len(seen) ** 0.5
    if first.modulus:
        half = first.modulus // 2
        total_V = torch.remainder(total_V + half, first.modulus) - half
    value_V = (total_V.to(torch.float64) * first.step).to(torch.float32)
    return Release(value_V, noise_std, first.slot, first.clip_l2, len(seen), token=_TOKEN)


# Secure aggregation: clients make shares, an engine adds them up under masks, the server gets the sum.


def release_shares(
    codes: BoundedCodes, client_ids: Sequence[int], permit: Permit, noise: NoiseSource
) -> npt.NDArray[np.uint32]:
    """Secure aggregation, a node's side: (V,) the sum modulo 2^b of its clients' rounded codes and shares of noise.

    It is private only inside the sum over enough nodes, so it leaves its node under masks and never as it is. Row i is
    client `client_ids[i]`, which must be in the permit's cohort and not have contributed in it before.
    Raises PrivacyError under another trust.
    """
    check_kind_of_noise(permit, noise)
    if permit.shares is None:
        raise PrivacyError(f"Under {permit.trust} trust there are no shares to add up: drop this call.")
    clients = [int(client) for client in client_ids]
    _check_same("number of clients", len(clients), codes.values_NV.shape[0])
    quantiser = quantiser_for(permit, codes.values_NV.shape[1], codes.clip_l2)
    permit.spend_clients(clients)
    total_V = np.zeros(quantiser.values, dtype=np.uint32)
    for row, client in zip(codes.values_NV.cpu().numpy(), clients, strict=True):
        total_V += quantiser.round_and_noise(row, noise.words(permit.slot, client))
    return total_V & np.uint32((1 << quantiser.bits) - 1)


def unmasked_sum(sum_V: npt.NDArray[np.uint32], client_ids: Sequence[int], permit: Permit, clip_l2: float) -> Release:
    """Secure aggregation, the server's side: the sum modulo 2^b over these clients, as it came out of the protocol.

    Nothing is made private here: each contributor has added its share. Raises PrivacyError when there are fewer of them
    than the plan's least, for one who is not in the cohort or comes twice, and when the permit's sum was taken before.
    """
    terms = permit.shares
    if terms is None:
        raise PrivacyError(f"Under {permit.trust} trust there is no modular sum: drop this call.")
    quantiser = quantiser_for(permit, sum_V.size, clip_l2)
    if strangers := set(client_ids) - set(permit.cohort):
        raise PrivacyError(f"Client {min(strangers)} is not in the cohort of slot {permit.slot}.")
    count = len(set(client_ids))
    if not terms.least_contributors <= count == len(client_ids):
        raise PrivacyError(
            f"A sum of {count} clients was unmasked in slot {permit.slot} and the plan needs {terms.least_contributors}, "
            "each once: such a round is void."
        )
    permit.spend_sum()
    value_V = torch.from_numpy(quantiser.to_values(sum_V)).to(torch.float32)
    noise_std = quantiser.noise_std * count**0.5
    return Release(value_V, noise_std, permit.slot, clip_l2, count, token=_TOKEN)


def check_kind_of_noise(permit: Permit, noise: NoiseSource) -> None:
    """Raises PrivacyError if the source's noise is of another kind, secure or replay, than the plan says."""
    if noise.kind != permit.noise:
        raise PrivacyError(f"The plan says {permit.noise} noise and the source is {noise.kind}: use the plan's kind.")


def _check_clip(clip_l2: float) -> None:
    low, high = _CLIP_RANGE
    if not low <= clip_l2 <= high:
        raise PrivacyError(f"The clip norm is {clip_l2}; it must lie between {low:g} and {high:g}: 1 is usual.")


def _check_same(what: str, expected: float, got: float) -> None:
    both_unknown = math.isnan(expected) and math.isnan(got)
    if expected != got and not both_unknown:
        raise PrivacyError(f"The {what} differs: {got} meets {expected}.")
