"""What a query frame says, and what its answer says: plain facts, checked as they are read.

Legend: D adapter values.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.errors import CodeError
from drencoder.federated.query import Query, QuerySpec
from drencoder.models.adapter_layout import Segment
from drencoder.reading import parse_json


@final
@dataclass(frozen=True)
class Instruction:
    """A query frame's head: which question, to which clients, under which charge.

    `nonce` names this message; its answer repeats it. `spec` is the question, which the site compares with its own recipe's.
    `encoder` is the fingerprint of the second part, which is left out where the site has it. `model` and `tokenizer` are the
    digests of what the server computes with.

    Secure aggregation only: `counts` is how many clients of the cohort each node of the roster hosts, `roster` the digest of the
    nodes' keys, `request` the first stage's in hex.
    """

    nonce: str
    run: str
    attempt: int
    trust: str
    noise: str
    noise_multiplier: float
    spec: QuerySpec
    clients: tuple[int, ...]
    encoder: str
    model: str
    tokenizer: str
    counts: tuple[int, ...] = ()
    roster: str = ""
    request: str = ""

    @property
    def asks(self) -> bool:
        """Whether it is a question; else the server asks only whether the site is there."""
        return bool(self.clients or self.counts)

    def head(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.to_dict()}

    @classmethod
    def of(cls, head: Mapping[str, Any]) -> "Instruction":
        """Raises CodeError unless the head has exactly these fields with values of these types."""
        clients, counts = head.get("clients"), head.get("counts")
        if set(head) != {field.name for field in fields(cls)}:
            raise CodeError("a query's head lacks fields or has others")
        texts = [
            head[key]
            for key in ("nonce", "run", "trust", "noise", "encoder", "model", "tokenizer", "roster", "request")
        ]
        scale = head["noise_multiplier"]
        if not (
            all(isinstance(text, str) and len(text) <= 128 for text in texts)
            and _is_count(head["attempt"])
            and isinstance(scale, int | float)
            and not isinstance(scale, bool)
            and isinstance(clients, list)
            and all(map(_is_count, clients))
            and len(set(clients)) == len(clients)
            and isinstance(counts, list)
            and all(map(_is_count, counts))
        ):
            raise CodeError("a query's head has a field of the wrong type")
        spec = QuerySpec.from_dict(head["spec"])
        return cls(**{**head, "spec": spec, "clients": tuple(clients), "counts": tuple(counts)})


@final
@dataclass(frozen=True)
class Answer:
    """A query answer's head. The messages are the frame's first part, one after the other, as many as clients; under secure
    aggregation the first part is the node's answer to a stage.

    `nonfinite` is 0 under local trust, where the server must not learn it.
    """

    nonce: str
    refusal: int
    clients: tuple[int, ...] = ()
    nonfinite: int = 0

    def head(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, head: Mapping[str, Any]) -> "Answer":
        """Raises CodeError unless the head has exactly these fields with values of these types."""
        clients = head.get("clients")
        if (
            set(head) != {field.name for field in fields(cls)}
            or not isinstance(head["nonce"], str)
            or not isinstance(clients, list)
            or not all(map(_is_count, [head["refusal"], head["nonfinite"], *clients]))
        ):
            raise CodeError("an answer's head lacks fields or has one of the wrong type")
        return cls(head["nonce"], head["refusal"], tuple(clients), head["nonfinite"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def adapter_bytes(adapter_D: Tensor) -> bytes:
    """(D,) as float32, little-endian."""
    return adapter_D.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()


def adapter_of(data: bytes, size: int) -> Tensor:
    """(D,) float32; CodeError unless there are `size` values, all finite."""
    if len(data) != 4 * size:
        raise CodeError(f"an adapter of {len(data)} bytes where {4 * size} were expected")
    values_D = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(values_D).all():
        raise CodeError("an adapter that is not finite")
    return torch.from_numpy(values_D)


def encoder_bytes(query: Query) -> bytes:
    """What the encoder of a round is made from: its tensors, and the prior as JSON in the file's header."""
    prior = json.dumps(query.prior.to_dict() if query.prior else None)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in query.encoder.state().items()}
    return save(tensors, metadata={"prior": prior})


def encoder_of(data: bytes, segments: tuple[Segment, ...]) -> tuple[GaussianPrior | None, dict[str, Tensor]]:
    """The inverse; CodeError if the bytes are nothing of the kind, or hold values that are not finite."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        prior = parse_json(parse_json(data[8 : 8 + length])["__metadata__"]["prior"])
        gaussian = None if prior is None else GaussianPrior.from_dict(prior, segments)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        raise CodeError("an encoder that cannot be read") from None
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors.values()):
        raise CodeError("an encoder that is not finite")
    return gaussian, tensors


def fingerprint(data: bytes) -> str:
    """SHA-256 in hex; "" of nothing."""
    return hashlib.sha256(data).hexdigest() if data else ""
