"""One question to a cohort, as data: what is asked, how an answer is bounded, and how it travels.

Legend: N clients, D adapter values, K values of a message.

Stage 1 asks for statistics of the update (slot 0), stage 2 for the encoded update (slots 1 to T). Both are a `Query`:
a serialisable `QuerySpec` and the public encoder that the spec is answered with. `round` has the functions that answer
a query and release the sum of the answers. A machine that has the recipe makes the same query with the same function
here, and compares its spec with the one that it was sent.

Source: DR-Encoder (Wu et al., AAAI-25, https://arxiv.org/abs/2412.17053), stages 1 and 2; noise in the code is this
project's choice (docs/guarantee.md, docs/log.md).
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.planning import wire_dtype
from drencoder.encoders.wire import WireFormat
from drencoder.errors import CodeError, PrivacyError
from drencoder.federated.adaptive_clip import AdaptiveClip, AdaptiveClipEncoder
from drencoder.federated.query_encoders import MomentsEncoder, RelativeEncoder, UpdatesEncoder
from drencoder.federated.row_encoding import encode_rows, rows_at_once
from drencoder.models.adapter_layout import Segment
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed

QueryKind = Literal["moments", "gradients", "update"]

_NOT_CLIPPED = 1e20  # the mechanism's largest bound
_SAME = 1e-6  # relative: two machines compute one clip norm up to rounding


@final
@dataclass(frozen=True)
class QuerySpec:
    """What is asked of a cohort. Every field is public, and the whole can be sent as JSON.

    Args:
      kind: "moments" or "gradients" (stage 1), or "update" (a round).
      slot: 0 for stage 1, the number of the round for stage 2.
      noise_in: "code" (encode, clip, noise), or "update" (clip, noise, encode: as published).
      clip_l2: L2 bound of one client's contribution, in the space where noise is added.
      seed: the round's public sketch seed.
      epochs: how many updates, one after the other, a client computes for its message; only stage 1 asks for several.
      summable: whether the decoding of a sum is the sum of the decodings, so that the server may add up messages.
      update_size: values of a decoded message.
      wire: how a message travels.
      adaptive_clip: the norm that an adaptive clip stands at in this round; None where the clip is fixed.
    """

    kind: QueryKind
    slot: int
    noise_in: str
    clip_l2: float
    seed: int
    epochs: int
    summable: bool
    update_size: int
    wire: WireFormat
    adaptive_clip: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Any) -> "QuerySpec":
        """Raises CodeError unless these are exactly the fields of a spec, with values of their types."""
        try:
            spec = cls(**{**facts, "wire": WireFormat(**facts["wire"])})
        except (KeyError, TypeError, ValueError):
            raise CodeError("a query's spec lacks fields or has others") from None
        counts = (spec.slot, spec.seed, spec.epochs, spec.update_size, spec.wire.code_size, spec.wire.encoder_tag)
        norms = (spec.clip_l2,) if spec.adaptive_clip is None else (spec.clip_l2, spec.adaptive_clip)
        if not (
            spec.kind in get_args(QueryKind)
            and spec.noise_in in ("code", "update")
            and isinstance(spec.summable, bool)
            and all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
            and all(isinstance(norm, int | float) and not isinstance(norm, bool) for norm in norms)
        ):
            raise CodeError("a query's spec has a field of the wrong type")
        return spec

    @property
    def has_possible_clip(self) -> bool:
        """Whether its norms are numbers that a clip can have: a machine checks this before it uses them."""
        norms = (self.clip_l2,) if self.adaptive_clip is None else (self.clip_l2, self.adaptive_clip)
        return all(0 < norm < math.inf for norm in norms)

    def same_clip(self, other: "QuerySpec") -> bool:
        """Whether both bound a contribution alike, up to rounding."""
        return math.isclose(self.clip_l2, other.clip_l2, rel_tol=_SAME)

    def same_but_for_clip(self, other: "QuerySpec") -> bool:
        """Whether all other fields are equal."""
        return replace(self, clip_l2=0.0, adaptive_clip=None) == replace(other, clip_l2=0.0, adaptive_clip=None)


@final
@dataclass(frozen=True, eq=False)
class Query:
    """A spec and the public encoder that it is answered with. Updates, permits and noise arrive per call.

    `prior` is what the encoder was made from, for machines that have to make it again.
    """

    spec: QuerySpec
    encoder: Encoder
    prior: GaussianPrior | None = None

    def encode(self, update_ND: Tensor) -> Tensor:
        """What clients computed, (N, epochs * D), as messages (N, K), neither clipped nor noised.

        On the device of the updates, and so that no bit of a client's message depends on who is encoded with it.
        """
        device = update_ND.device
        if device not in self._rows:
            self._rows[device] = rows_at_once(self.encoder, self.spec.seed, device)
        return encode_rows(self.encoder, update_ND, self.spec.seed, self._rows[device])

    @cached_property
    def _rows(self) -> dict[torch.device, int]:
        return {}  # device -> how many rows are encoded at a time

    def decode(self, code_NK: Tensor) -> Tensor:
        """Messages (N, K), or a sum of them, as updates (N, D)."""
        return self.encoder.decode(code_NK, self.spec.seed)


def moment_query(segments: tuple[Segment, ...], recipe: config.Recipe, clip_l2: float | None = None) -> Query:
    """Stage 1: two moments per LoRA tensor of each epoch's update, all clipped as one vector.

    The clip is that of the rounds, since the statistics of an update are about as long as the update (at most sqrt(2) times).
    `clip_l2` is the one that was measured, where the recipe names none; PrivacyError if nothing says what it is.
    """
    epochs = recipe.stage1_epochs
    return _stage1_query("moments", MomentsEncoder(segments, epochs), _known_clip(recipe, clip_l2), epochs)


def gradient_query(update_size: int, epochs: int) -> Query:
    """FedCG's stage 1 (arXiv 2405.13746): the updates of all epochs as they are, neither clipped nor noised.

    Only a permit for a non-private slot 0 answers it; see `round.message_rows`.
    """
    return _stage1_query("gradients", UpdatesEncoder(epochs * update_size), _NOT_CLIPPED, epochs)


def _known_clip(recipe: config.Recipe, measured: float | None) -> float:
    clip_l2 = recipe.privacy.clip_l2 or measured
    if not clip_l2:
        raise PrivacyError("privacy.clip_l2 = 0 leaves the clip to be measured at the start of a run: name one.")
    return clip_l2


def _stage1_query(kind: QueryKind, encoder: MomentsEncoder | UpdatesEncoder, clip_l2: float, epochs: int) -> Query:
    size = encoder.code_size
    wire = WireFormat(size, derive_seed(kind, "wire", size) % 2**32, "float32")
    return Query(QuerySpec(kind, 0, "code", clip_l2, 0, epochs, True, size, wire), encoder)


def update_query(
    encoder: Encoder,
    recipe: config.Recipe,
    slot: int,
    adaptive_clip: AdaptiveClip | None = None,
    prior: GaussianPrior | None = None,
    clip_l2: float | None = None,
) -> Query:
    """Stage 2, round `slot`: the encoded update. The sketch seed is public and new in every round.

    With an `adaptive_clip`, whose norm takes the place of the recipe's, a message has one more value. `prior` is the one
    that the encoder was made from. `clip_l2` is the clip that was measured, where the recipe names none.

    With noise in the code of an encoder that is not linear, a code is taken relative to the code of a zero update: then a
    client that has nothing to say contributes the zero vector, which is what add/remove adjacency compares with.

    Raises:
      PrivacyError: nothing says what the clip is.
    """
    seed = derive_seed(recipe.seed, "sketch", slot)
    wire = WireFormat.of(encoder, wire_dtype(recipe))  # type: ignore[arg-type]  # checked by the recipe
    summable = encoder.linear
    if not encoder.linear and recipe.privacy.noise_in == "code":
        encoder = RelativeEncoder(encoder)
    if adaptive_clip is not None:
        encoder, bound = AdaptiveClipEncoder(encoder, adaptive_clip.clip_l2), adaptive_clip.bound
        wire = replace(wire, code_size=encoder.code_size)
    else:
        bound = _known_clip(recipe, clip_l2)
    spec = QuerySpec(
        kind="update", slot=slot, noise_in=recipe.privacy.noise_in, clip_l2=bound, seed=seed, epochs=1, summable=summable,
        update_size=encoder.update_size, wire=wire, adaptive_clip=adaptive_clip.clip_l2 if adaptive_clip else None,
    )  # fmt: skip
    return Query(spec, encoder, prior)
