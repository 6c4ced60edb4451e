"""The encoders by name, and what a run must know of each before it is made: the only list of them. No torch: an encoder's file is
imported when one is made.

Legend: D adapter values, K code values.

To add an encoder, write its file and add its row here. The table is closed, so that no string of a recipe becomes an import.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, final

from drencoder.encoders import code_sizes
from drencoder.encoders.code_sizes import AdapterShape, size_by_ratio
from drencoder.errors import EncoderError

if TYPE_CHECKING:
    from drencoder.encoders.contract import Encoder
    from drencoder.encoders.request import EncoderRequest, SavedState


SizeRule = Callable[[AdapterShape, float], int]
"""(adapter, D / K that the recipe or the plan asks for) -> K."""


@final
@dataclass(frozen=True)
class EncoderDeclaration:
    """The public facts of an encoder on which planning, accounting and refreshing rest.

    `registry.build_encoder` refuses an encoder that is not linear as declared or has another code size; the contract test holds
    the rest.

    Args:
      code_size: how many values a code has.
      sized_by_ratio: whether `encoder.ratio` (or, if that is 0, the plan) changes the code size.
      linear: whether a sum of codes decodes to the sum of the updates. Secure aggregation and the adaptive clip need this, and
        so does a noise multiplier that clients share: without it every code is decoded by itself.
      public_text: "required": the encoder is made from updates of public text; "optional": it uses them if the recipe names
        public text; "unused".
      refreshed: whether the encoder is made anew in every round of a run, from public text or from
        aggregates that were released before.
      trained: whether the encoder is trained on gradients: synthetic ones of stage 1's prior, or real ones (FedCG).
      trusted_wire_dtype: the wire type that `encoder.wire_dtype = "auto"` means with a trusted server and noise in the code.
      starts_from_public_text: whether `adapter.start = "auto"` takes LoRA's A from public text where noise lets a round
        learn few coordinates.
      expected_viable: whether the encoder is expected to pass the viability gate.
    """

    code_size: SizeRule = size_by_ratio
    sized_by_ratio: bool = True
    linear: bool = True
    public_text: Literal["required", "optional", "unused"] = "unused"
    refreshed: bool = False
    trained: bool = False
    trusted_wire_dtype: Literal["float32", "rotated4"] = "float32"
    starts_from_public_text: bool = False
    expected_viable: bool = True


@final
@dataclass(frozen=True)
class EncoderRow:
    """One encoder: where it is made, as `module:function`, and what it declares.

    The function takes an `EncoderRequest` and a `SavedState` and returns the `Encoder`, new or restored.
    """

    maker: str
    declaration: EncoderDeclaration

    def load(self) -> "Callable[[EncoderRequest, SavedState], Encoder]":
        """Imports the function."""
        module, _, function = self.maker.partition(":")
        maker: Callable[[EncoderRequest, SavedState], Encoder] = getattr(importlib.import_module(module), function)
        return maker


_Declared = EncoderDeclaration
# fmt: off
ENCODERS: Mapping[str, EncoderRow] = MappingProxyType({
    "identity": EncoderRow("drencoder.encoders.identity:make_identity", _Declared(lambda adapter, _: adapter.update_size, sized_by_ratio=False)),
    "random": EncoderRow("drencoder.encoders.random_sketch:make_random", _Declared()),
    **{name: EncoderRow("drencoder.published.autoencoder:make_autoencoder", _Declared(partial(code_sizes.size_of_autoencoder, name), sized_by_ratio=False, linear=False, public_text="optional", trained=True, expected_viable=False)) for name in code_sizes.AUTOENCODERS},
    "kronecker": EncoderRow("drencoder.encoders.kronecker:make_kronecker", _Declared(public_text="required", refreshed=True)),
    "hybrid": EncoderRow("drencoder.encoders.hybrid:make_hybrid", _Declared(lambda adapter, ratio: min(size_by_ratio(adapter, ratio), adapter.lora_b_size), public_text="required", refreshed=True, trusted_wire_dtype="rotated4", starts_from_public_text=True)),
    "ffa": EncoderRow("drencoder.published.subset:make_ffa", _Declared(lambda adapter, _: adapter.lora_b_size, sized_by_ratio=False)),
    "top-k": EncoderRow("drencoder.published.subset:make_top_k", _Declared(public_text="required", refreshed=True)),
    "core": EncoderRow("drencoder.published.lowrank:make_core", _Declared(code_sizes.size_of_cores, sized_by_ratio=False, public_text="required", refreshed=True)),
    "power": EncoderRow("drencoder.published.lowrank:make_power", _Declared(code_sizes.size_of_power, refreshed=True)),
})
# fmt: on


def declaration_of(name: str) -> EncoderDeclaration:
    """What the encoder of this name declares.

    Raises:
      EncoderError: there is no such encoder.
    """
    return _row(name).declaration


def build_encoder(name: str, request: "EncoderRequest", state: "SavedState" = None) -> "Encoder":
    """The encoder of this name, or the saved one if `state` holds its tensors. Deterministic in its arguments.

    Raises:
      EncoderError: there is no such encoder, it cannot have the requested code size, it is given real gradients and is not
        trained, or what was made is not what its row declares.
    """
    row = _row(name)
    if request.real is not None and not row.declaration.trained:
        raise EncoderError(f"real gradients train an autoencoder only, not {name!r}; set encoder.name = 'autoencoder'")
    request = replace(request, name=name)
    encoder = row.load()(request, state)
    if (encoder.name, encoder.linear) != (name, row.declaration.linear):
        raise EncoderError(
            f"the {name} encoder came out as {encoder.name!r} with linear = {encoder.linear}, but declares linear = "
            f"{row.declaration.linear}, on which the privacy plan rests; correct its row in the registry"
        )
    if not row.declaration.sized_by_ratio:
        request.check_fixed_size(encoder.code_size)
    if request.code_size not in (None, encoder.code_size):
        raise EncoderError(
            f"the {name} encoder has {encoder.code_size} code values where {request.code_size} were planned; restore the encoder of this run, "
            "or correct the code size in its row in the registry"
        )
    return encoder


def _row(name: str) -> EncoderRow:
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise EncoderError(f"there is no encoder {name!r}: {hint}choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name]
