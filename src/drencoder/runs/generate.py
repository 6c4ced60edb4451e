"""Asks a finished run's model: base and adapter, prompted as the clients' records were."""

from dataclasses import replace
from pathlib import Path

from drencoder.data.chat_template import TEMPLATES
from drencoder.errors import DataError
from drencoder.evaluation.samples import Answer, answer
from drencoder.models.base_model import load_base, open_tokenizer
from drencoder.models.sharded import open_lora
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.assess import read_adapter
from drencoder.runs.run_folder import RunFolder


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
    lora = open_lora(base, recipe)
    adapter_D = lora.layout.flatten(adapter).to(lora.device)
    template = recipe.data.template
    if template not in TEMPLATES:  # a file at the time of the run; its text is the saved tokenizer's
        template = str(folder.adapter / "chat_template.jinja")
    tokenizer = open_tokenizer(base, replace(recipe.data, template=template))
    return answer(
        lora, adapter_D, tokenizer, {"instruction": text}, max_tokens=max_tokens, temperature=temperature, seed=seed
    )
