"""What a run must know of an encoder before it is made. No torch: a plan reads this.

Legend: D adapter values, K code values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from drencoder.encoders.code_sizes import AdapterShape, size_by_ratio

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
