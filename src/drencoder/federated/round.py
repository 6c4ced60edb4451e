"""One round: what a client sends, and what the server does with it.

Legend: N clients, D adapter values, K values of a message, V values of a bounded sum.

    client   update = train(adapter, own text)
             message = round(clip(encode(update))) + noise, modulo 2^b      local trust, noise in the code
             message = encode(round(clip(update)) + noise)                  local trust, noise in the update (as published)
             message = clip(encode(update))                                 central trust: the server rounds and adds the noise
             share = round(clip(encode(update))) + noise share, modulo 2^b  secure aggregation: only sums leave
    server   release = sum of messages (+ noise)        nothing un-noised goes beyond this line
             direction = decode(release) / (q N)        post-processing
             adapter, slots = optimiser(adapter, direction)      `server_optimizer`

Source: DR-Encoder (Wu et al., AAAI-25, https://arxiv.org/abs/2412.17053), stages 1 and 2; noise in the code is this
project's choice (docs/guarantee.md, docs/log.md).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.errors import PrivacyError
from drencoder.federated.query import Query
from drencoder.models.client_training import ClientTrainer
from drencoder.privacy import mechanism
from drencoder.privacy.accounting import NonPrivateEvent
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import BoundedSum, NoiseSource, Release, release_shares


@dataclass(frozen=True)
class Upload:
    """What some clients sent: message i is from `clients[i]`.

    `nonfinite` updates went as zero; it is always 0 under local trust, where the server must not learn it.
    """

    clients: tuple[int, ...]
    messages: list[bytes]
    nonfinite: int


@dataclass(frozen=True, eq=False)
class SecureSum:
    """What secure aggregation gives the server: the sum (V,) uint32 modulo 2^b over `clients`, and what it took.

    Bytes are those of all messages of all nodes; `rejected` counts answers that were malformed or forged.
    """

    clients: tuple[int, ...]
    sum_V: npt.NDArray[np.uint32] = field(repr=False)
    bytes_up: int
    bytes_down: int
    rejected: int


@dataclass(frozen=True)
class CohortRelease:
    """The release of one slot, and what it took. Under central trust the counts are the server's secret: never published.

    `bytes_down` is what a protocol sends down beside the adapter; only secure aggregation has one.
    """

    release: Release
    bytes_up: int
    rejected: int
    nonfinite: int
    bytes_down: int = 0


# --- the client's side ------------------------------------------------------------------------


def trained_batches(
    trainer: ClientTrainer, query: Query, adapter_D: Tensor, clients: Sequence[int]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """As many clients at a time as train together well, and what each of them computed, (N, epochs * D)."""
    for start in range(0, len(clients), trainer.batch_clients):
        batch = clients[start : start + trainer.batch_clients]
        yield batch, trainer.train_clients(adapter_D, batch, query.spec.slot, query.spec.epochs)


def client_message(
    query: Query, update_ND: Tensor, clients: Sequence[int], permit: Permit, noise: NoiseSource
) -> Upload:
    """The messages of some clients; `update_ND` is what each computed, (N, epochs * D).

    Under local trust each message is a release of its own, which `permit` has charged; under central trust
    it is bounded only, and nobody but the trusted server may see it. An update with a NaN or an infinity is
    sent as zero and counted.

    Raises:
      PrivacyError: under secure aggregation, where a client has no message of its own, or if the permit does not cover it.
    """
    if permit.shares is not None:
        raise PrivacyError("Under secure aggregation a client has no message of its own: its node sums shares.")
    spec = query.spec  # encoded and clipped where the updates are: what goes to the CPU is small
    clipped = mechanism.clip_rows(query.encode(update_ND) if spec.noise_in == "code" else update_ND, spec.clip_l2)
    values, wire = clipped.values_NV, message_wire(query, permit)
    if permit.trust == "local":
        released = mechanism.release_codes(clipped, clients, permit, noise)
        values = released.values_NV if wire.integers else released.codes_NV
    if spec.noise_in == "update":
        values = query.encode(values)
    # Under local trust a count of broken updates would be an uncharged answer about the clients' data.
    nonfinite = 0 if permit.trust == "local" else clipped.nonfinite
    return Upload(tuple(clients), pack_rows(values, wire, spec.slot), nonfinite)


def client_share(
    query: Query, update_ND: Tensor, clients: Sequence[int], permit: Permit, noise: NoiseSource
) -> npt.NDArray[np.uint32]:
    """Secure aggregation: what a node adds up of some clients, (K,) uint32 modulo 2^b. It must not leave unmasked.

    Raises:
      PrivacyError: the query's codes cannot be summed, or the permit does not cover these clients.
    """
    spec = query.spec
    if spec.noise_in != "code" or not spec.summable:
        raise PrivacyError("Secure aggregation sums codes: it needs noise_in = 'code' and a linear encoder.")
    return release_shares(mechanism.clip_rows(query.encode(update_ND), spec.clip_l2), clients, permit, noise)


def message_wire(query: Query, permit: Permit) -> WireFormat:
    """How one client's message travels: under local trust codes that carry their noise are integers, in the bits that the plan needs.

    Elsewhere, and where `encoder.wire_dtype` asks for fewer bits, as the spec says.
    """
    wire = query.spec.wire
    if permit.trust != "local" or permit.terms is None or query.spec.noise_in != "code" or wire.rotated:
        return wire
    bits = mechanism.quantiser_for(permit, wire.code_size, query.spec.clip_l2).bits
    return replace(wire, dtype=f"integer{bits}")  # type: ignore[arg-type]  # 16, 24 or 32


def modulus_bits(query: Query, permit: Permit) -> int:
    """Secure aggregation: b, the bits of the modulus that shares are added under."""
    return mechanism.quantiser_for(permit, query.spec.wire.code_size, query.spec.clip_l2).bits


# --- the server's side ------------------------------------------------------------------------


def server_release(
    query: Query, answers: Iterable[Upload | SecureSum], permit: Permit, noise: NoiseSource
) -> CohortRelease:
    """The sum over a cohort, private from here on. Malformed messages are left out and counted.

    Under secure aggregation there is one `SecureSum` and no `Upload`.
    """
    counts, clip_l2 = _Counts(), query.spec.clip_l2
    if permit.shares is not None:
        (masked,) = answers
        assert isinstance(masked, SecureSum)
        released = mechanism.unmasked_sum(masked.sum_V, masked.clients, permit, clip_l2)
        return CohortRelease(released, masked.bytes_up, masked.rejected, 0, masked.bytes_down)
    if permit.trust == "local":
        noise_std, step, modulus = _local_noise(query, permit)
        released = mechanism.sum_releases(
            mechanism.received_codes(
                values, senders, permit, clip_l2=clip_l2, noise_std=noise_std, step=step, modulus=modulus
            )
            for values, senders in _received(query, answers, permit, counts)
        )
    elif permit.terms is None:
        received = _received(query, answers, permit, counts)
        released = mechanism.release_unnoised((mechanism.clip_rows(values, clip_l2) for values, _ in received), permit)
    else:
        total = BoundedSum.zero(_sum_size(query, permit), clip_l2)
        for values, _ in _received(query, answers, permit, counts):
            # Clipped again by the party that adds the noise: the bound must not rest on what a client sent.
            total = total.add(mechanism.clip_rows(values, clip_l2))
        released = mechanism.release_sum(total, permit, noise)
    return CohortRelease(released, counts.bytes_up, counts.rejected, counts.nonfinite)


def code_values(query: Query, permit: Permit, code_NK: Tensor) -> Tensor:
    """Unpacked messages (N, K) in units of the code, float32: integers count the step of the plan."""
    if code_NK.dtype.is_floating_point:
        return code_NK
    step = mechanism.quantiser_for(permit, query.spec.wire.code_size, query.spec.clip_l2).step
    return (code_NK.to(torch.float64) * step).to(torch.float32)


def message_rows(query: Query, answers: Iterable[Upload | SecureSum], permit: Permit) -> tuple[Tensor, int]:
    """Every message by itself (N, K), and the bytes they took: for a stage that was charged as non-private.

    Raises:
      PrivacyError: the permit paid for noise, so messages may be noised or summed and nothing else.
    """
    if not isinstance(permit.event, NonPrivateEvent):
        raise PrivacyError(f"Slot {permit.slot} is private: its messages cannot be looked at one by one.")
    counts = _Counts()
    batches = [values for values, _ in _received(query, answers, permit, counts)]
    return torch.cat(batches), counts.bytes_up


def released_update(query: Query, released: Release, permit: Permit, expected_cohort: float) -> Tensor:
    """The released mean as an update (D,): post-processing. The denominator is fixed, q N."""
    mean = released.value / expected_cohort
    if not _adds_messages(query, permit):
        return mean
    return query.decode(mean[None])[0]


def _adds_messages(query: Query, permit: Permit) -> bool:
    """Whether the server sums messages and decodes once, or decodes each and sums updates.

    Central trust with noise in the update sums decoded updates, since that is the space it clips in.
    """
    return query.spec.summable and (permit.trust != "central" or query.spec.noise_in == "code")


def _sum_size(query: Query, permit: Permit) -> int:
    return query.spec.wire.code_size if _adds_messages(query, permit) else query.spec.update_size


def _local_noise(query: Query, permit: Permit) -> tuple[float, float, int]:
    """The noise of a value as it is summed, nan where a decoder or another space made it unknown; what integers count; and what their
    sum is taken by: sites' sums by the modulus that each was sent under, which holds all of them, else by none (0)."""
    wire = message_wire(query, permit)
    if permit.terms is None or query.spec.noise_in != "code":
        return 0.0 if permit.terms is None else math.nan, 1.0, 0
    quantiser = mechanism.quantiser_for(permit, wire.code_size, query.spec.clip_l2)
    if not _adds_messages(query, permit):
        return math.nan, 1.0, 0
    if not wire.integers:
        return quantiser.noise_std, 1.0, 0
    return quantiser.noise_std, quantiser.step, 1 << quantiser.bits if permit.terms.site_sums else 0


@final
@dataclass
class _Counts:
    bytes_up: int = 0
    rejected: int = 0
    nonfinite: int = 0


def _received(
    query: Query, answers: Iterable[Upload | SecureSum], permit: Permit, counts: _Counts
) -> Iterator[tuple[Tensor, list[int]]]:
    """The values that are summed and who sent them, batch by batch; an empty batch first."""
    spec, wire = query.spec, message_wire(query, permit)
    summed = _adds_messages(query, permit)
    dtype = torch.int64 if wire.integers and summed else torch.float32
    yield torch.zeros(0, _sum_size(query, permit), dtype=dtype), []
    for upload in answers:
        assert isinstance(upload, Upload)
        received = unpack_rows(upload.messages, wire, spec.slot)
        counts.bytes_up += sum(map(len, upload.messages))
        counts.rejected += received.rejected
        counts.nonfinite += upload.nonfinite
        values = received.code_NK
        if not summed:
            values = query.decode(code_values(query, permit, values))
        yield values, [upload.clients[position] for position in received.accepted]
