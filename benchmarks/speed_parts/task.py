"""What every way computes: one round of a cohort, as a file that needs nothing of drencoder to be read.

A client's update is minus its mean gradient over its predicted tokens, in one pass. It is scaled down to length `CLIP_L2` if
it is longer. A round is the mean over the cohort's clients. There is no noise and no code: no other way has them.

Legend: K clients, D adapter values.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLIP_L2 = 0.3  # about the length of an update of the embedded model, so that some are clipped
RANK, SCALING = 8, 16.0


@dataclass(frozen=True)
class Task:
    """One cohort's work.

    `model` is a folder that transformers loads; `targets` are PEFT's target modules; `initial` maps PEFT's names to the
    adapter's tensors, in the order of the D values; `clients` has for each client a list of (tokens, prompt length).
    """

    model: str
    targets: list[str]
    initial: dict[str, Tensor]
    clients: list[list[tuple[list[int], int]]]
    pad_id: int
    recipe: list[str]  # ours alone: the same clients as a recipe's

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for client in self.clients for tokens, _ in client)

    @property
    def values(self) -> int:
        return sum(tensor.numel() for tensor in self.initial.values())

    def save(self, path: Path) -> None:
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> "Task":
        return cls(**torch.load(path, weights_only=True))

    def flat(self, tensors: dict[str, Tensor]) -> Tensor:
        """(D,) float32 in the order of `initial`."""
        return torch.cat([tensors[name].detach().reshape(-1).float() for name in self.initial])


def overrides(model: str, clients: int, records: int) -> list[str]:
    """The recipe of a cohort of `clients` clients that hold `records` records each. Embedded clients, whatever the model."""
    return [
        f"model.source={model}", "model.dtype=float32", f"federation.population={max(100, clients)}", "encoder.name=random",
        f"data.examples_per_client={records}", f"local.batch_size={records}", f"adapter.rank={RANK}", f"adapter.alpha={SCALING}",
        "adapter.start=peft", "prior.public=", "evaluation.data=none", "evaluation.benchmarks=[]",
    ]  # fmt: skip


def make_task(model: str, clients: int, records: int) -> Task:
    """Builds the cohort with drencoder. A client without as many records as the others is no problem for any way."""
    from drencoder.models.place import embedded_folder
    from drencoder.recipe.recipe import load_recipe
    from drencoder.runs.build import build

    settings = overrides(model, clients, records)
    components = build(load_recipe("quickstart", settings))
    lora = components.lora
    texts = [components.texts.client(number, 1) for number in range(clients)]
    folder = str(embedded_folder()) if model == "embedded" else model
    targets = sorted({segment.name.split(".lora_")[0].rpartition(".")[2] for segment in lora.layout.segments})
    return Task(
        folder,
        targets,
        {name: tensor.clone() for name, tensor in lora.layout.unflatten(lora.initial_D).items()},
        [[(list(example.tokens), example.prompt_length) for example in text] for text in texts],
        lora.base.pad_id,
        settings,
    )


def padded(task: Task, client: int) -> tuple[Tensor, Tensor]:
    """A client's batch."""
    return as_batch(task, task.clients[client])


def as_batch(task: Task, records: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Records as one batch: input ids and labels, (records, length), padded on the right."""
    length = max(len(tokens) for tokens, _ in records)
    input_ids = torch.full((len(records), length), task.pad_id)
    labels = torch.full((len(records), length), -100)
    for row, (tokens, prompt) in enumerate(records):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return input_ids, labels


def clipped(update: Tensor) -> Tensor:
    """The update, or its direction at length `CLIP_L2` if it is longer. Works on rows, too."""
    norm = torch.linalg.vector_norm(update, dim=-1, keepdim=True)
    return update * (CLIP_L2 / norm).clamp(max=1.0)


def peft_model(task: Task) -> Any:
    """The base with the adapter, of transformers and peft alone."""
    import warnings

    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=SCALING, target_modules=task.targets, bias="none", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, task.initial)
    return model


def trainable(model: Any) -> dict[str, Tensor]:
    """PEFT's state-dict name -> the parameter, of the adapter."""
    return {name.replace(".default", ""): parameter for name, parameter in model.named_parameters() if ".lora_" in name}
