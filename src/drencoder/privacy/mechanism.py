"""Clip, noise, release: the only code that turns a client's values into something that may leave.

Shapes: N clients (rows), V values of the joint vector. The types carry trust, and outside code cannot
make one: `clip_rows` makes `BoundedCodes`, these make a `BoundedSum`, and `release_sum`, `release_codes` or
`release_shares` with `unmasked_sum` make a `Release` against a `Permit`, which the ledger wrote down before.

The noise's standard deviation is `permit.noise_multiplier * clip_l2`, both read from the objects that
guarantee them. It is one scale for the joint vector.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch

from drencoder.errors import PrivacyError
from drencoder.privacy.accounting import Relation
from drencoder.privacy.ledger import Permit
from drencoder.privacy.plan import Noise
from drencoder.rng import derive_seed
from drencoder.secure_aggregation.discrete import Words
from drencoder.secure_aggregation.quantise import Quantiser

__all__ = [
    "BoundedCodes",
    "BoundedSum",
    "NoiseSource",
    "Release",
    "Releases",
    "ReplayNoise",
    "SecureNoise",
    "clip_rows",
    "quantiser_for",
    "received_codes",
    "release_codes",
    "release_shares",
    "release_sum",
    "sum_releases",
    "unmasked_sum",
]

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
    """The un-noised sum (float64) of clipped rows: private, refuses to be pickled, prints no values."""

    sum_V: torch.Tensor = field(repr=False)
    clip_l2: float
    contributors: int = field(repr=False)
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        _guard(token, "BoundedSum.zero")

    @classmethod
    def zero(cls, size: int, clip_l2: float) -> "BoundedSum":
        """The sum over nobody, of `size` values, for rows of norm at most `clip_l2`."""
        _check_clip(clip_l2)
        return cls(torch.zeros(size, dtype=torch.float64), clip_l2, 0, token=_TOKEN)

    def add(self, codes: BoundedCodes) -> "BoundedSum":
        """This sum plus all rows of `codes`, each with weight one. Raises PrivacyError on another clip or size."""
        _check_same("clip norm", self.clip_l2, codes.clip_l2)
        _check_same("size", self.sum_V.numel(), codes.values_NV.shape[1])
        total_V = _add_rows(self.sum_V, codes.values_NV)
        return BoundedSum(total_V, self.clip_l2, self.contributors + codes.values_NV.shape[0], token=_TOKEN)

    def sensitivity(self, relation: Relation) -> float:
        """The most that one client can move the sum, in L2: C for `add_remove`, 2C for `replace_one`."""
        return self.clip_l2 if relation == "add_remove" else 2 * self.clip_l2

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
    """Local trust: row i is the release of client `client_ids[i]`, with noise `noise_std` of its own."""

    values_NV: torch.Tensor = field(repr=False)
    client_ids: tuple[int, ...]
    noise_std: float
    slot: int
    clip_l2: float
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        _guard(token, "release_codes")


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
    """A new sum, float64: one row after the other, so that it does not depend on the batches that the rows came in."""
    total_V = total_V.to(values_NV.device, copy=True)
    for values_V in values_NV:
        total_V += values_V.to(torch.float64)
    return total_V


class NoiseSource(Protocol):
    """Standard normal numbers; `kind` says whether anybody could compute them again."""

    kind: Noise

    def normal(self, size: int, *indices: int) -> torch.Tensor:
        """`size` float64 values. `indices` (slot, client) name the stream of a replayable source."""
        ...

    def words(self, *indices: int) -> Words:
        """A stream of uniform 64-bit words, for noise on integers."""
        ...


class SecureNoise:
    """Noise from the operating system's generator, never the same twice.

    Each value is the sum of four independent normals, halved: after that the gaps of floating point
    numbers, from which the least digits of a single draw give the noise away (Mironov 2012,
    doi 10.1145/2382196.2382264), cannot be searched any more (Holohan & Braghin 2021, arXiv 2107.10138).
    """

    kind: Noise = "secure"

    def normal(self, size: int, *indices: int) -> torch.Tensor:
        out = np.empty(size)
        step = _CHUNK_VALUES // 4
        for start in range(0, size, step):
            count = min(step, size - start)
            words = np.frombuffer(os.urandom(32 * count), dtype="<u8").reshape(4, count)
            out[start : start + count] = _normal(words).sum(0) / 2
        return torch.from_numpy(out)

    def words(self, *indices: int) -> Words:
        return lambda count: np.frombuffer(os.urandom(8 * count), dtype="<u8").astype(np.uint64, copy=False)


class ReplayNoise:
    """Noise that the seed gives again, stream by stream: for tests. A run with it has NO guarantee."""

    kind: Noise = "replay"

    def __init__(self, run_seed: int | str) -> None:
        self._run_seed = run_seed

    def normal(self, size: int, *indices: int) -> torch.Tensor:
        generator = np.random.Philox(derive_seed(self._run_seed, "release-noise", *indices))
        return torch.from_numpy(_normal(np.atleast_1d(generator.random_raw(size))))

    def words(self, *indices: int) -> Words:
        generator = np.random.Philox(derive_seed(self._run_seed, "discrete-noise", *indices))
        return lambda count: np.atleast_1d(generator.random_raw(count))


def _normal(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    from scipy.special import ndtri

    # 52 bits and a half are exact in float64 and lie strictly inside (0, 1); 53 could round up to 1.
    return ndtri(((words >> np.uint64(12)) + 0.5) * 2.0**-52)


def release_sum(bounded: BoundedSum, permit: Permit, noise: NoiseSource) -> Release:
    """Central trust: the sum plus N(0, (permit.noise_multiplier * clip)^2) on every value.

    Raises PrivacyError when the permit is used up, is for local trust, or for another kind of noise.
    """
    _check_noise(permit, noise)
    permit.spend_sum()
    noise_std = permit.noise_multiplier * bounded.clip_l2
    value_V = bounded.sum_V
    if noise_std:
        value_V = value_V + noise_std * noise.normal(value_V.numel(), permit.slot).to(value_V.device)
    return Release(value_V.to(torch.float32), noise_std, permit.slot, bounded.clip_l2, token=_TOKEN)


def release_codes(codes: BoundedCodes, client_ids: Sequence[int], permit: Permit, noise: NoiseSource) -> Releases:
    """Local trust: every row plus N(0, (permit.noise_multiplier * clip)^2) of its own.

    Row i is client `client_ids[i]`, which must be in the permit's cohort and not have released in it before.
    A replayable source is asked by (slot, client), so the split into chunks changes no value.
    """
    _check_noise(permit, noise)
    clients = [int(client) for client in client_ids]
    _check_same("number of clients", len(clients), codes.values_NV.shape[0])
    permit.spend_clients(clients)
    noise_std = permit.noise_multiplier * codes.clip_l2
    values_NV = codes.values_NV.clone()
    if noise_std:
        size = values_NV.shape[1]
        for row, client in enumerate(clients):
            noise_V = noise.normal(size, permit.slot, client).to(values_NV.device)
            values_NV[row] = (codes.values_NV[row].to(torch.float64) + noise_std * noise_V).to(torch.float32)
    return Releases(values_NV, tuple(clients), noise_std, permit.slot, codes.clip_l2, token=_TOKEN)


def received_codes(
    values_NV: torch.Tensor, client_ids: Sequence[int], permit: Permit, *, clip_l2: float, noise_std: float
) -> Releases:
    """Local trust, the server's side: rows that arrived from `client_ids`, perhaps decoded: post-processing, free.

    Nothing is made private here. Each row left its client as a release of `release_codes`, under this permit;
    `noise_std` is the noise of a value as it stands now, nan where a decoder made it unknown.
    Raises PrivacyError for a client that is not in the permit's cohort.
    """
    if permit.trust == "central":
        raise PrivacyError("Under central trust what arrives is not a release: add it up as BoundedCodes.")
    if strangers := set(client_ids) - set(permit.cohort):
        raise PrivacyError(f"Client {min(strangers)} is not in the cohort of slot {permit.slot}.")
    return Releases(values_NV, tuple(client_ids), noise_std, permit.slot, clip_l2, token=_TOKEN)


def sum_releases(parts: Iterable[Releases]) -> Release:
    """The sum of local releases of one slot, n rows in all: noise of std * sqrt(n). Post-processing, free.

    Takes a generator, so that a cohort need not be held at once. Raises PrivacyError when there is no part,
    when parts of different slots or clips meet, or a client comes twice.
    """
    total_V: torch.Tensor | None = None
    first: Releases | None = None
    seen: set[int] = set()
    for part in parts:
        if first is None or total_V is None:
            first, total_V = part, torch.zeros(part.values_NV.shape[1], dtype=torch.float64)
        _check_same("slot", first.slot, part.slot)
        _check_same("clip norm", first.clip_l2, part.clip_l2)
        _check_same("noise", first.noise_std, part.noise_std)
        if twice := seen & set(part.client_ids):
            raise PrivacyError(f"Client {min(twice)} is in the sum of slot {part.slot} twice.")
        seen |= set(part.client_ids)
        total_V = _add_rows(total_V, part.values_NV)
    if first is None or total_V is None:
        raise PrivacyError("There are no releases to sum: give at least one part, which may have zero rows.")
    noise_std = first.noise_std * len(seen) ** 0.5
    return Release(total_V.to(torch.float32), noise_std, first.slot, first.clip_l2, len(seen), token=_TOKEN)


# Secure aggregation: clients make shares, an engine adds them up under masks, the server gets the sum.


def quantiser_for(permit: Permit, size: int, clip_l2: float) -> Quantiser:
    """How codes of `size` values and this clip become integers under a permit: `ShareTerms.quantiser`.

    Raises PrivacyError under another trust.
    """
    _check_clip(clip_l2)
    terms = permit.shares
    if terms is None:
        raise PrivacyError(f"Under {permit.trust} trust codes are not quantised for a modular sum: drop this call.")
    return terms.quantiser(size, clip_l2)


def release_shares(
    codes: BoundedCodes, client_ids: Sequence[int], permit: Permit, noise: NoiseSource
) -> npt.NDArray[np.uint32]:
    """Secure aggregation, a node's side: (V,) the sum modulo 2^b of its clients' rounded codes and shares of noise.

    It is private only inside the sum over enough nodes, so it leaves its node under masks and never as it is. Row i is
    client `client_ids[i]`, which must be in the permit's cohort and not have contributed in it before.
    """
    _check_noise(permit, noise)
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
    quantiser, terms = quantiser_for(permit, sum_V.size, clip_l2), permit.shares
    assert terms is not None
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
    noise_std = quantiser.share_std * count**0.5
    return Release(value_V, noise_std, permit.slot, clip_l2, count, token=_TOKEN)


def _check_noise(permit: Permit, noise: NoiseSource) -> None:
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
