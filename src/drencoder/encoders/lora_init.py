"""Where LoRA's A starts: at directions that public text fills (EVA: Paischer et al. 2024, https://arxiv.org/abs/2410.07170).

A random A of rank r looks at r random directions of a layer's input. Where noise lets a round learn few coordinates, those had
better be the directions in which inputs are large, and any text that the server may look at shows them: nothing is charged.

Legend: T tokens, I inputs of a layer, r rank, Q directions known so far.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drencoder.data.tokenization import Example, collate
from drencoder.encoders.matrix_normal_prior import top_directions
from drencoder.errors import ModelError
from drencoder.models.lora import LoraModel
from drencoder.models.peft_adapter import orthonormal_rows

START_TEXTS = 64
_AT_ONCE = 16  # texts in one pass of the model
_SPARE = 4  # directions kept between two passes, per row of A: one that is weak so far may grow


def public_start(lora: LoraModel, examples: Sequence[Example]) -> Tensor:
    """The adapter (D,) with `lora`'s B and, as rows of every A, the r leading directions of that layer's inputs over these texts.

    The rows are orthonormal but for one factor, which keeps the length of A: learning rates stay comparable. A layer whose inputs
    have fewer than r directions keeps some of its random rows, made orthogonal. PEFT's own EVA is not used: it centres the inputs,
    and their mean is a direction that matters to B's gradient.

    Raises:
      ModelError: an activation is not finite.
    """
    known: dict[str, Tensor] = {}
    for start in range(0, len(examples), _AT_ONCE):
        group = examples[start : start + _AT_ONCE]
        batch = collate([group], lora.base.pad_id).to(lora.device)
        length_R1 = torch.tensor([[len(example.tokens)] for example in group], device=lora.device)
        real_RL = torch.arange(batch.input_ids.shape[1], device=lora.device) < length_R1
        with torch.no_grad(), lora.watched() as inputs:
            lora.logits_before(batch.input_ids, batch.predicted)
        found: dict[tuple[int, ...], Tensor] = {}  # query, key and value get one tensor: its directions are taken once
        for name, values in inputs.items():  # values (R, L, I), or (R * L, I) of some layers
            same = (id(known.get(name)), values.data_ptr(), *values.shape, *values.stride())
            if same not in found:
                row_TI = values.reshape(*real_RL.shape, -1)[real_RL]
                found[same] = _leading(known.get(name), row_TI.float().cpu(), lora.rank)
            known[name] = found[same]
    tensors = dict(lora.layout.unflatten(lora.initial_D.cpu()))
    for name, direction_QI in known.items():
        A_rI = tensors[name]
        unit_QI = direction_QI / direction_QI.norm(dim=1, keepdim=True)
        tensors[name] = orthonormal_rows(torch.cat([unit_QI, A_rI])[: lora.rank], float(A_rI.norm()))
    return lora.layout.flatten(tensors).to(lora.initial_D)


def _leading(known_QI: Tensor | None, row_TI: Tensor, rank: int) -> Tensor:
    """The leading directions so far, each as long as the rows along it: an incremental singular value decomposition."""
    if not bool(row_TI.isfinite().all()):
        raise ModelError("the base model's activations on public text are not finite: set model.dtype = 'float32'.")
    rows_XI = row_TI if known_QI is None else torch.cat([known_QI, row_TI])
    vectors_IQ, second_Q = top_directions(rows_XI, _SPARE * rank)
    return second_Q.sqrt().float()[:, None] * vectors_IQ.T
