"""Which tokens a client's text holds, by the algebra of LoRA's first layer.

Legend: N clients, D adapter values, V vocabulary, H hidden size, R rows.

The gradient of a linear layer is a sum of outer products with its inputs, so the rows of A's gradient in the first layer's q, k and v
lie in the span of the text's normalised token embeddings. A token's score is the share of its own input inside that span. It is the
span check of DAGER (Petrov et al., NeurIPS 2024, https://arxiv.org/abs/2405.15586), taken from full weights to LoRA's A, where 3 r rows
are all there is.
"""

import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from drencoder.errors import ModelError
from drencoder.models.adapter_layout import Segment
from drencoder.models.lora import LoraModel

_FIRST_INPUT = re.compile(r"(?P<module>.*\.layers\.0\.\w+\.(q|k|v)_proj)\.lora_A\.weight")
_RANK_TOLERANCE = 1e-5  # singular values below this share of the largest are rounding
_PEFT_PREFIX = "base_model.model."


@final
@dataclass(frozen=True)
class SpanAttack:
    """What the span attack needs of the model: where A's first rows lie, and every token's first input (V, H)."""

    segments: tuple[Segment, ...]
    input_VH: Tensor

    @classmethod
    def of(cls, lora: LoraModel) -> "SpanAttack":
        """Prepares the attack on this model.

        Raises:
          ModelError: no first-layer q, k or v is adapted, or its input is not a function of the token alone.
        """
        segments = tuple(segment for segment in lora.layout.segments if _FIRST_INPUT.fullmatch(segment.name))
        if not segments:
            raise ModelError(
                "The token attack reads the first layer's q, k or v and the adapter has none of them: add q_proj, k_proj or "
                "v_proj to adapter.targets."
            )
        return cls(segments, functional.normalize(_compute_first_inputs(lora, segments[0]), dim=1))

    def scores(self, update_ND: Tensor) -> Tensor:
        """Returns the share of each token's input inside the span of the update's rows, (N, V)."""
        rows_NRH = torch.cat(
            [update_ND[:, one.start : one.stop].reshape(-1, *one.shape) for one in self.segments], dim=1
        )
        _, strength_NR, basis_NRH = torch.linalg.svd(rows_NRH.float(), full_matrices=False)
        keep_NR = strength_NR > _RANK_TOLERANCE * strength_NR[:, :1]
        return torch.stack(
            [
                (self.input_VH @ basis_RH[keep_R].T).square().sum(1)
                for basis_RH, keep_R in zip(basis_NRH, keep_NR, strict=True)
            ]
        )


@torch.no_grad()
def _compute_first_inputs(lora: LoraModel, segment: Segment) -> Tensor:
    """Computes every token's input (V, H) to the first layer's projections: its embedding after the layer's own norm.

    The result is checked against what the layer is really given: a model that adds positions or scales is refused.
    """
    base, match = lora.base.model, _FIRST_INPUT.fullmatch(segment.name)
    assert match is not None
    layer = base.get_submodule(match["module"].removeprefix(_PEFT_PREFIX).rsplit(".", 2)[0])
    projection = base.get_submodule(match["module"].removeprefix(_PEFT_PREFIX))
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        raise _unsupported_model(lora)
    input_VH = norm(base.get_input_embeddings().weight)
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    probe = torch.arange(8, device=lora.device).remainder(len(input_VH))
    try:
        base(input_ids=probe[None], use_cache=False)
    finally:
        handle.remove()
    if not torch.allclose(seen[0][0].float(), input_VH[probe].float(), rtol=1e-2, atol=1e-2):
        raise _unsupported_model(lora)
    return input_VH.float().cpu()


def _unsupported_model(lora: LoraModel) -> ModelError:
    kind = lora.base.model.config.model_type
    return ModelError(
        f"The token attack knows models whose first layer is given the normalised token embedding alone (Llama, Qwen, "
        f"Mistral), and {lora.base.source!r} is of type {kind!r}: audit one of those."
    )
