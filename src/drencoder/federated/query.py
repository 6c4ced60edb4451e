"""The algorithm: what a client sends, and what the server does with it.

Legend: N clients, D adapter values, K values of a message, V values of a bounded sum.

Both stages are the same thing, a bounded query over a cohort (`CohortQuery`), and differ in what is asked: two
moments per LoRA tensor in stage 1 (slot 0), the encoded update in stage 2 (slots 1 to T). One round of stage 2 is

    client   update = train(adapter, own text)
             message = noise(clip(encode(update)))      local trust, noise in the code
             message = encode(noise(clip(update)))      local trust, noise in the update (as published)
             message = clip(encode(update))             central trust: the server adds the noise
             share = round(clip(encode(update))) + noise share, modulo 2^b      secure aggregation: only sums leave
    server   release = sum of messages (+ noise)        nothing un-noised goes beyond this line
             direction = decode(release) / (q N)        post-processing
             adapter, slots = optimiser(adapter, direction)

Source: DR-Encoder (Wu et al., AAAI-25, https://arxiv.org/abs/2412.17053), stages 1 and 2; noise in the code and the
server's optimisers are this project's choices (docs/guarantee.md, docs/log.md).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior, MomentQuery
from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.errors import PrivacyError
from drencoder.federated.adaptive_clip import ClipFollower
from drencoder.federated.decoding import Filter, filter_of
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.accounting import NonPrivateEvent
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import (
    BoundedSum,
    NoiseSource,
    Release,
    clip_rows,
    quantiser_for,
    received_codes,
    release_codes,
    release_shares,
    release_sum,
    sum_releases,
    unmasked_sum,
)
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed

__all__ = [
    "CohortQuery",
    "Origin",
    "Outcome",
    "ServerState",
    "Summed",
    "Upload",
    "gradient_query",
    "learning_rate",
    "moment_query",
    "server_step",
    "update_query",
]

_NOT_CLIPPED = 1e20  # the mechanism's largest bound


@dataclass(frozen=True)
class Upload:
    """What some clients sent: message i is from `clients[i]`.

    `nonfinite` updates went as zero; it is always 0 under local trust, where the server must not learn it.
    """

    clients: tuple[int, ...]
    messages: list[bytes]
    nonfinite: int


@dataclass(frozen=True, eq=False)
class Summed:
    """What secure aggregation gives the server: the sum (V,) uint32 modulo 2^b over `clients`, and what it took.

    Bytes are those of all messages of all nodes; `rejected` counts answers that were malformed or forged.
    """

    clients: tuple[int, ...]
    sum_V: npt.NDArray[np.uint32] = field(repr=False)
    bytes_up: int
    bytes_down: int
    rejected: int


@dataclass(frozen=True)
class Outcome:
    """A cohort's answer. Under central trust the counts are the server's secret: never published.

    `bytes_down` is what a protocol sends down beside the adapter; only secure aggregation has one.
    """

    release: Release
    bytes_up: int
    rejected: int
    nonfinite: int
    bytes_down: int = 0


@final
@dataclass(frozen=True)
class Origin:
    """What another machine that has the recipe needs to make the same query: its functions cannot travel. All public.

    `follower_clip` is the norm that a `ClipFollower` stands at, None where the clip is fixed.
    """

    kind: Literal["moments", "gradients", "update"]
    prior: GaussianPrior | None = None
    encoder_state: Mapping[str, Tensor] = field(default_factory=dict)
    follower_clip: float | None = None


@final
@dataclass(frozen=True)
class CohortQuery:
    """One question to a cohort. Holds public facts only; updates, permits and noise arrive per call.

    Args:
      slot: 0 for stage 1, the round's number for stage 2.
      noise_in: `code`, or `update` (clip before `encode`, as published).
      clip_l2: L2 bound of a client's contribution, in the space where it is noised.
      encode: what clients computed (N, epochs * D) -> messages (N, K).
      decode: messages (N, K) -> updates (N, D).
      linear: whether the decoding of a sum is the sum of the decodings, so that the server may add up messages.
      update_size: D.
      wire: how a message travels.
      origin: what it was made from, for engines whose clients are on other machines.
      epochs: how many updates, one after the other, a client computes for its message; only stage 1 asks for several.
      filter: what the server does to the released mean of the messages before it decodes it; None: nothing.
    """

    slot: int
    noise_in: str
    clip_l2: float
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    linear: bool
    update_size: int
    wire: WireFormat
    origin: Origin
    epochs: int = 1
    filter: Filter | None = None

    # --- the client's side --------------------------------------------------------------------

    def upload(self, update_ND: Tensor, clients: Sequence[int], permit: Permit, noise: NoiseSource) -> Upload:
        """The messages of some clients.

        Under local trust each message is a release of its own, which `permit` has charged; under central trust
        it is bounded only, and nobody but the trusted server may see it. An update with a NaN or an infinity is
        sent as zero and counted.
        """
        if permit.shares is not None:
            raise PrivacyError("Under secure aggregation a client has no message of its own: its node sums shares.")
        update_ND = update_ND.cpu()
        clipped = clip_rows(self.encode(update_ND) if self.noise_in == "code" else update_ND, self.clip_l2)
        values = clipped.values_NV
        if permit.trust == "local":
            values = release_codes(clipped, clients, permit, noise).values_NV
        if self.noise_in == "update":
            values = self.encode(values)
        # Under local trust a count of broken updates would be an uncharged answer about the clients' data.
        nonfinite = 0 if permit.trust == "local" else clipped.nonfinite
        return Upload(tuple(clients), pack_rows(values, self.wire, self.slot, clients), nonfinite)

    def share(
        self, update_ND: Tensor, clients: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> npt.NDArray[np.uint32]:
        """Secure aggregation: what a node adds up of some clients, (K,) uint32 modulo 2^b. It must not leave unmasked."""
        if self.noise_in != "code" or not self.linear:
            raise PrivacyError("Secure aggregation sums codes: it needs noise_in = 'code' and a linear encoder.")
        return release_shares(clip_rows(self.encode(update_ND.cpu()), self.clip_l2), clients, permit, noise)

    def bits(self, permit: Permit) -> int:
        """Secure aggregation: b."""
        return quantiser_for(permit, self.wire.code_size, self.clip_l2).bits

    # --- the server's side --------------------------------------------------------------------

    def release(self, uploads: Iterable[Upload | Summed], permit: Permit, noise: NoiseSource) -> Outcome:
        """The sum over a cohort, private from here on. Malformed messages are left out and counted.

        Under secure aggregation there is one `Summed` and no `Upload`.
        """
        tally = _Tally()
        if permit.shares is not None:
            (summed,) = uploads
            assert isinstance(summed, Summed)
            released = unmasked_sum(summed.sum_V, summed.clients, permit, self.clip_l2)
            return Outcome(released, summed.bytes_up, summed.rejected, 0, summed.bytes_down)
        if permit.trust == "local":
            noise_std = permit.noise_multiplier * self.clip_l2
            same_space = self._adds_messages(permit) and self.noise_in == "code"
            released = sum_releases(
                received_codes(
                    values, senders, permit, clip_l2=self.clip_l2, noise_std=noise_std if same_space else math.nan
                )
                for values, senders in self._received(uploads, permit, tally)
            )
        else:
            total = BoundedSum.zero(self._sum_size(permit), self.clip_l2)
            for values, _ in self._received(uploads, permit, tally):
                # Clipped again by the party that adds the noise: the bound must not rest on what a client sent.
                total = total.add(clip_rows(values, self.clip_l2))
            released = release_sum(total, permit, noise)
        return Outcome(released, tally.bytes_up, tally.rejected, tally.nonfinite)

    def rows(self, uploads: Iterable[Upload | Summed], permit: Permit) -> tuple[Tensor, int]:
        """Every message by itself (N, K), and the bytes they took: for a stage that was charged as non-private.

        Raises:
          PrivacyError: the permit paid for noise, so messages may be noised or summed and nothing else.
        """
        if not isinstance(permit.event, NonPrivateEvent):
            raise PrivacyError(f"Slot {permit.slot} is private: its messages cannot be looked at one by one.")
        tally = _Tally()
        batches = [values for values, _ in self._received(uploads, permit, tally)]
        return torch.cat(batches), tally.bytes_up

    def direction(self, released: Release, permit: Permit, expected_cohort: float) -> Tensor:
        """The released mean as an update (D,): post-processing. The denominator is fixed, q N."""
        mean = released.value / expected_cohort
        if not self._adds_messages(permit):
            return mean
        if self.filter is not None:
            mean = self.filter(mean, released.noise_std / expected_cohort)
        return self.decode(mean[None])[0]

    def _adds_messages(self, permit: Permit) -> bool:
        """Whether the server sums messages and decodes once, or decodes each and sums updates.

        Central trust with noise in the update sums decoded updates, since that is the space it clips in.
        """
        return self.linear and (permit.trust != "central" or self.noise_in == "code")

    def _sum_size(self, permit: Permit) -> int:
        return self.wire.code_size if self._adds_messages(permit) else self.update_size

    def _received(
        self, uploads: Iterable[Upload | Summed], permit: Permit, tally: "_Tally"
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """The values that are summed and who sent them, batch by batch; an empty batch first."""
        yield torch.zeros(0, self._sum_size(permit)), []
        for upload in uploads:
            assert isinstance(upload, Upload)
            received = unpack_rows(upload.messages, self.wire, self.slot)
            tally.bytes_up += sum(map(len, upload.messages))
            tally.rejected += received.rejected
            tally.nonfinite += upload.nonfinite
            values = received.code_NK if self._adds_messages(permit) else self.decode(received.code_NK)
            yield values, [upload.clients[position] for position in received.accepted]


@dataclass
class _Tally:
    bytes_up: int = 0
    rejected: int = 0
    nonfinite: int = 0


def moment_query(segments: tuple[Segment, ...], prior: config.Prior) -> CohortQuery:
    """Stage 1: two moments per LoRA tensor of each epoch's update, all clipped as one vector."""
    moments = MomentQuery(segments, prior.epochs)
    return CohortQuery(
        slot=0,
        noise_in="code",
        clip_l2=prior.clip_l2,
        encode=moments.statistics,
        decode=lambda statistics: statistics,
        linear=True,
        update_size=moments.size,
        wire=_plain_wire("moments", moments.size),
        origin=Origin("moments"),
        epochs=prior.epochs,
    )


def gradient_query(update_size: int, prior: config.Prior) -> CohortQuery:
    """FedCG's stage 1 (arXiv 2405.13746): the updates of all epochs as they are, neither clipped nor noised.

    Only a permit for a non-private slot 0 answers it; see `CohortQuery.rows`. Federated collection asks each client
    for one update, since its epochs are rounds of the server's.
    """
    epochs = prior.epochs if prior.collection == "local" else 1
    return CohortQuery(
        slot=0,
        noise_in="code",
        clip_l2=_NOT_CLIPPED,
        encode=lambda update: update,
        decode=lambda update: update,
        linear=True,
        update_size=epochs * update_size,
        wire=_plain_wire("gradients", epochs * update_size),
        origin=Origin("gradients"),
        epochs=epochs,
    )


def _plain_wire(purpose: str, size: int) -> WireFormat:
    return WireFormat(size, derive_seed(purpose, "wire", size) % 2**32, "float32")


def update_query(
    encoder: Encoder,
    recipe: config.Recipe,
    slot: int,
    follower: ClipFollower | None = None,
    prior: GaussianPrior | None = None,
) -> CohortQuery:
    """Stage 2, round `slot`: the encoded update. The sketch seed is public and new in every round.

    With a `follower`, whose clip takes the place of the recipe's, a message has one more value (`adaptive_clip`). `prior` is the
    one the encoder was made from.

    With noise in the code of an encoder that is not linear, a code is taken relative to the code of a zero update: then a
    client that has nothing to say contributes the zero vector, which is what add/remove adjacency compares with.
    """
    seed = derive_seed(recipe.seed, "sketch", slot)

    def encode(update_ND: Tensor) -> Tensor:
        return encoder.encode(update_ND, seed)

    def decode(code_NK: Tensor) -> Tensor:
        return encoder.decode(code_NK, seed)

    relative = not encoder.linear and recipe.privacy.noise_in == "code"
    origin_1K = encode(torch.zeros(1, encoder.update_size)) if relative else None
    query = CohortQuery(
        slot=slot,
        noise_in=recipe.privacy.noise_in,
        clip_l2=recipe.privacy.clip_l2,
        encode=encode if origin_1K is None else lambda update_ND: encode(update_ND) - origin_1K,
        decode=decode if origin_1K is None else lambda code_NK: decode(code_NK + origin_1K),
        linear=encoder.linear,
        update_size=encoder.update_size,
        wire=WireFormat.of(encoder, recipe.wire_dtype),  # type: ignore[arg-type]  # checked by the recipe
        origin=Origin("update", prior, encoder.state(), follower.clip_l2 if follower else None),
        filter=filter_of(recipe.server.decoding, encoder, follower.clip_l2 if follower else recipe.privacy.clip_l2),
    )
    if follower is None:
        return query
    known = query.filter
    return replace(
        query,
        clip_l2=follower.bound,
        encode=lambda update_ND: follower.join(encode(update_ND)),
        decode=lambda joint_NV: decode(joint_NV[:, :-1]),
        wire=replace(query.wire, code_size=encoder.code_size + 1),
        filter=known and (lambda mean_V, noise_std: torch.cat([known(mean_V[:-1], noise_std), mean_V[-1:]])),
    )


@final
@dataclass(frozen=True)
class ServerState:
    """The shared adapter (D,), the optimiser's two slots (D,), and how many steps were taken. All public."""

    adapter_D: Tensor
    first_D: Tensor
    second_D: Tensor
    steps: int

    @classmethod
    def start(cls, adapter_D: Tensor) -> "ServerState":
        return cls(adapter_D.cpu(), torch.zeros_like(adapter_D.cpu()), torch.zeros_like(adapter_D.cpu()), 0)

    def tensors(self) -> dict[str, Tensor]:
        return {"adapter": self.adapter_D, "first": self.first_D, "second": self.second_D}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], steps: int) -> "ServerState":
        """The state of `tensors()`."""
        return cls(tensors["adapter"], tensors["first"], tensors["second"], steps)


def learning_rate(server: config.Server, slot: int, rounds: int) -> float:
    """The server's learning rate in round `slot` of 1..rounds: linear, from its value to `final_share` of it.

    A falling rate averages the last rounds' noise away, which a private run needs more than others (docs/log.md).
    """
    done = (slot - 1) / max(1, rounds - 1)
    return server.learning_rate * (1.0 + (server.final_share - 1.0) * done)


def server_step(state: ServerState, direction_D: Tensor, server: config.Server, lr: float) -> ServerState:
    """One step of the server's optimiser along a released direction (post-processing).

    fedavg: w += lr g. fedavgm: m = b m + g, w += lr m. fedadam: Adam on -g with bias correction (Kingma and Ba 2015,
    https://arxiv.org/abs/1412.6980), where Reddi et al. 2021 (https://arxiv.org/abs/2003.00295) leave the correction
    out: private runs have few rounds, and without it the first ones are ten times too long.
    """
    steps, beta = state.steps + 1, server.momentum
    if server.optimizer == "fedavg":
        return ServerState(state.adapter_D + lr * direction_D, state.first_D, state.second_D, steps)
    if server.optimizer == "fedavgm":
        first_D = beta * state.first_D + direction_D
        return ServerState(state.adapter_D + lr * first_D, first_D, state.second_D, steps)
    first_D = beta * state.first_D + (1 - beta) * direction_D
    second_D = server.beta2 * state.second_D + (1 - server.beta2) * direction_D.square()
    first_hat_D = first_D / (1 - beta**steps)
    second_hat_D = second_D / (1 - server.beta2**steps)
    step_D = lr * first_hat_D / (second_hat_D.sqrt() + server.tau)
    return ServerState(state.adapter_D + step_D, first_D, second_D, steps)
