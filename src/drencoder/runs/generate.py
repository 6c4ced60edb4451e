"""Asks a finished run's model: base and adapter, prompted as the clients' records were."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drencoder.data.chat_template import TEMPLATES
from drencoder.errors import DataError, ModelError
from drencoder.models.base_model import load_base, open_tokenizer
from drencoder.models.lora import LoraModel
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.assess import read_adapter
from drencoder.runs.run_folder import RunFolder

__all__ = ["Answer", "generate"]


@dataclass(frozen=True)
class Answer:
    """`ended`: whether the model ended its answer itself; if not, it was cut at the most tokens that were asked for."""

    text: str
    tokens: int
    prompt_tokens: int
    ended: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    path: Path,
    text: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
) -> Answer:
    """What the adapted model answers to an instruction.

    Args:
      path: a run folder.
      text: the instruction, as `instruction` of a record.
      max_tokens: of the answer.
      temperature: 0 = always the most likely token; else tokens are drawn, by `seed`.
      device: "auto", "cpu" or "cuda"; None = as the run's recipe says.

    Raises:
      DrencoderError: the run is not finished, its model cannot be had, or the text cannot be asked.
    """
    if not text.strip():
        raise DataError("there is nothing to ask: give a text.")
    folder = RunFolder.open(path)
    recipe, adapter = load_recipe(folder.recipe), read_adapter(folder)
    base = load_base(replace(recipe.model, device=device or recipe.model.device))
    lora = LoraModel(base, recipe.adapter, seed=recipe.seed)
    adapter_D = lora.layout.flatten(adapter).to(lora.device)
    template = recipe.data.template
    if template not in TEMPLATES:  # a file at the time of the run; its text is the saved tokenizer's
        template = str(folder.adapter / "chat_template.jinja")
    tokenizer = open_tokenizer(base, replace(recipe.data, template=template))
    prompt_ids = tokenizer.prompt({"instruction": text, "response": ""})
    most = len(prompt_ids) + max_tokens
    if base.positions:
        most = min(most, base.positions)
    if most <= len(prompt_ids):
        raise ModelError(
            f"the prompt has {len(prompt_ids)} tokens and the model {base.positions} positions: ask with a shorter text."
        )
    generator = torch.Generator().manual_seed(seed) if temperature else None
    with lora.peft(adapter_D):
        stop = tokenizer.stop_id
        whole = base.complete(torch.tensor([prompt_ids]), most, generator, temperature or 1.0, stop=stop)[0].tolist()
    answer = whole[len(prompt_ids) :]
    ended = bool({base.end_id, stop} & set(answer))
    words = base.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return Answer(words, len(answer) - ended, len(prompt_ids), ended)
