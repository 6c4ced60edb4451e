"""What plain PEFT computes: one client's update, for comparison with cohort training, and the loss of a saved adapter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from drencoder.data.tokenization import Example, collate
from drencoder.models.cohort_training import Steps, _as_update, _grad, _optimizer, _schedule
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.rng import derive_seed


def client_update(
    lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example], local: config.Local, seed: int
) -> Tensor:
    """Update (D,), float32, of one client through PEFT's own forward: the reference for `cohort_updates`."""
    if local.upload == "zero":
        return torch.zeros(lora.layout.size, device=lora.device)
    steps = _schedule(examples, local, seed)
    with torch.random.fork_rng(devices=[lora.device] if lora.device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "dropout"))  # PEFT's dropout knows no generator of its own
        return _train_through_peft(lora, adapter_D, examples, steps, local)


def _train_through_peft(
    lora: LoraModel, adapter_D: Tensor, examples: Sequence[Example], steps: Steps, local: config.Local
) -> Tensor:
    adapter_D = adapter_D.to(lora.device)
    with lora.peft(adapter_D) as model:
        named = {name.replace(".default", ""): one for name, one in model.named_parameters()}
        parameters = {segment.name: named[segment.name] for segment in lora.layout.segments}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        if local.upload == "gradient":
            total = sum(example.targets for example in examples)
            for batch in steps:
                (_summed_loss(model, batch, lora) / total).backward()
            return -lora.layout.flatten({name: _grad(parameter) for name, parameter in parameters.items()})
        optimizer = _optimizer(local, list(parameters.values()))
        for batch in steps:
            optimizer.zero_grad()
            (_summed_loss(model, batch, lora) / sum(example.targets for example in batch)).backward()
            optimizer.step()
        end_D = lora.layout.flatten({name: parameter.detach() for name, parameter in parameters.items()})
    return _as_update(local, adapter_D, end_D, len(steps))


def _summed_loss(model: torch.nn.Module, examples: Sequence[Example], lora: LoraModel) -> Tensor:
    batch = collate([examples], lora.base.pad_id).to(lora.device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
    labels = batch.input_ids.masked_fill(~batch.predicted, -100)[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def plain_loss(folder: Path, adapter: Path, examples: Sequence[Example]) -> float:
    """Mean loss of the predicted tokens by nothing but transformers and peft, one text at a time."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter)).eval()
    total, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([example.tokens])).logits[0].float().log_softmax(-1)
        for place in range(example.prompt_length, len(example.tokens)):
            total, count = total - float(chances[place - 1, example.tokens[place]]), count + 1
    return total / count
