"""Layouts and easy distributions for the encoders' tests.

Legend: N updates, D adapter values, S segments.
"""

from pathlib import Path

import torch
from torch import Tensor

from conftest import tiny_overrides
from drencoder.encoders import gaussian_prior as prior_module
from drencoder.encoders.gaussian_prior import SyntheticGradients
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.make_plan import make_plan
from drencoder.recipe.recipe import Recipe, load_recipe


def tile(*shapes: tuple[int, ...]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for number, shape in enumerate(shapes):
        segments.append(Segment(f"tensor{number}", segments[-1].stop if segments else 0, shape))
    return tuple(segments)


# 12 x 100 and 37 x 3 are no powers of two; 1 x 1 cannot be mixed at all.
SEGMENTS = tile((8, 640), (12, 100), (37, 3), (1, 1), (64, 8))
SIZE = SEGMENTS[-1].stop
FLAT = tile((64, 64))


def lora_tile(rank: int, *matrices: tuple[int, int]) -> tuple[Segment, ...]:
    """The adapter of linear layers of these shapes (out, in), named and ordered as a real one."""
    segments, at = [], 0
    for number, (out, width) in enumerate(matrices):
        for side, shape in (("A", (rank, width)), ("B", (out, rank))):
            segments.append(Segment(f"layers.{number}.q_proj.lora_{side}.weight", at, shape))
            at = segments[-1].stop
    return tuple(segments)


# The second B is wider than high, the third square.
LORA = lora_tile(4, (40, 24), (3, 20), (4, 36))
LORA_SIZE = LORA[-1].stop


def noise_updates(segments: tuple[Segment, ...], seed: int = 0) -> PublicUpdates:
    size = segments[-1].stop
    return PublicUpdates(torch.randn(6, size, generator=torch.Generator().manual_seed(seed)), "noise")


def recipe_of(folder: Path, name: str, *more: str) -> Recipe:
    """A run of a few seconds with this encoder."""
    public = ["prior.public=embedded"]
    base = load_recipe(
        "quickstart", [*tiny_overrides(folder), "prior.source=none", "encoder.gate=warn", *public, *more]
    )
    return base.changed({"encoder.name": name})


def levels(count: int, seed: int) -> Tensor:
    """One random level per update (count, 4096): the easiest correlated distribution there is."""
    generator = torch.Generator().manual_seed(seed)
    level_N1 = 2.0 * torch.rand(count, 1, generator=generator) - 1.0
    return level_N1.expand(count, FLAT[-1].stop).contiguous()


def as_synthetic(values_ND: Tensor, segments: tuple[Segment, ...]) -> SyntheticGradients:
    """A prior whose draws are these rows; only tests can have one."""
    parts = (values_ND[:, segment.start : segment.stop] for segment in segments)
    energies = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]
    energy_S = torch.stack(energies) / len(values_ND)
    return SyntheticGradients(
        segments, len(values_ND), energy_S, lambda row: values_ND[row], token=prior_module._ONLY_PRIORS
    )


def permit_of(folder: Path, slot: int = 0, non_private: tuple[str, ...] = ("stage1", "round")) -> Permit:
    """A charge of this slot; by default in a run that promises nothing, as FedCG's."""
    plan = make_plan(
        trust="central",
        population=100,
        sampling_rate=0.1,
        rounds=2,
        stage1_rate=0.1,
        delta=1e-4,
        noise_multiplier=None if len(non_private) == 2 else 1.5,
        non_private=non_private,
    )
    with Ledger.create(folder / f"ledger-{slot}-{len(non_private)}.jsonl", plan) as ledger:
        return ledger.charge(slot)


def pack(code_K: Tensor, wire_format: WireFormat, round_index: int) -> bytes:
    """One code as a message."""
    return pack_rows(code_K[None], wire_format, round_index)[0]


def unpack(data: bytes, wire_format: WireFormat, round_index: int) -> Tensor | None:
    """The code (K,) of one message; None if it is rejected."""
    rows = unpack_rows([data], wire_format, round_index)
    assert (len(rows.code_NK), rows.rejected) in ((1, 0), (0, 1))
    return None if rows.rejected else rows.code_NK[0]
