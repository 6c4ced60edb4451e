"""What a resumed run cannot recompute, and the one file that keeps it: post-processing of releases, all of it.

Legend: D adapter values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.errors import ArtifactError
from drencoder.federated.server_optimizer import ServerState
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.ledger import Ledger
from drencoder.reading import parse_json
from drencoder.runs.run_folder import RunFolder

_NAME = "latest.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run is. `slot` is the last one that is done; -1 before stage 1."""

    state: ServerState
    slot: int = -1
    bytes_up: int = 0
    prior: GaussianPrior | None = None
    encoder_state: Mapping[str, Tensor] | None = None
    gate: Mapping[str, Any] | None = None
    stage1: Mapping[str, Any] | None = None
    clip_l2: float | None = None  # of the next round, where it was measured or follows the codes' norms
    bytes_down: int = 0


def float32_bytes(values_V: Tensor) -> bytes:
    """The values as little-endian float32, as a checkpoint has them and as the ledger's digests are of."""
    return values_V.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()


def save_checkpoint(
    folder: RunFolder, ledger: Ledger, progress: Progress, stated: Mapping[str, Any] | None = None
) -> None:
    """One file, replaced atomically: tensors, and the rest as JSON in its header; at the end of a run also what it `stated`."""
    tensors = {f"state.{name}": tensor.contiguous() for name, tensor in progress.state.tensors().items()}
    tensors |= {f"encoder.{name}": tensor.contiguous() for name, tensor in (progress.encoder_state or {}).items()}
    facts = {
        "slot": progress.slot,
        "steps": progress.state.steps,
        "bytes_up": progress.bytes_up,
        "prior": progress.prior.to_dict() if progress.prior else None,
        "gate": progress.gate,
        "stage1": progress.stage1,
        "clip_l2": progress.clip_l2,
        "bytes_down": progress.bytes_down,
        "ledger_head": ledger.head,
        **({"stated": stated} if stated else {}),
    }
    folder.write(folder.checkpoints / _NAME, save(tensors, metadata={"drencoder": json.dumps(facts)}))


def load_checkpoint(folder: RunFolder, ledger: Ledger, initial_D: Tensor, segments: tuple[Segment, ...]) -> Progress:
    """The last checkpoint, or the start if there is none.

    Raises:
      ArtifactError: the checkpoint knows of charges that the ledger lacks, or is of another adapter.
    """
    path = folder.checkpoints / _NAME
    if not path.exists():
        return Progress(ServerState.start(initial_D))
    try:
        return _progress(folder, ledger, path.read_bytes(), initial_D, segments)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}): restore it from a copy of the run.") from None


def _progress(
    folder: RunFolder, ledger: Ledger, data: bytes, initial_D: Tensor, segments: tuple[Segment, ...]
) -> Progress:
    """What a checkpoint's bytes say; any error of a reader means damage."""
    path = folder.checkpoints / _NAME
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    facts = parse_json(parse_json(data[8 : 8 + length])["__metadata__"]["drencoder"])
    seq, digest = facts["ledger_head"]
    if not ledger.contains((seq, digest)):
        raise ArtifactError(
            f"{folder.ledger} lacks charges that {path.name} knows of: restore the whole ledger from a copy. A run "
            "without it has no guarantee."
        )
    if tensors["state.adapter"].shape != initial_D.shape:
        raise ArtifactError(f"{path} is of another adapter: restore the run's own recipe.")
    slot, shapes = facts["slot"], {tensor.shape for name, tensor in tensors.items() if name.startswith("state.")}
    if type(slot) is not int or not -1 <= slot <= ledger.plan.rounds or len(shapes) != 1:
        raise ArtifactError(f"{path} is damaged: restore it from a copy of the run.")
    if ledger.released_adapter(slot) not in (None, sha256(float32_bytes(tensors["state.adapter"])).hexdigest()):
        raise ArtifactError(
            f"{path} has another adapter than the one that {folder.ledger} says was released: restore it."
        )
    prior = facts["prior"]
    return Progress(
        state=ServerState.of(_named("state.", tensors), facts["steps"]),
        slot=slot,
        bytes_up=facts["bytes_up"],
        prior=GaussianPrior.from_dict(prior, segments) if prior else None,
        encoder_state=_named("encoder.", tensors),
        gate=facts["gate"],
        stage1=facts["stage1"],
        clip_l2=facts.get("clip_l2"),
        bytes_down=facts.get("bytes_down", 0),
    )


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
