"""What the tests of damaged documents share: a finished run, what it is made of, and what a reader is."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drencoder.federated.query import update_query
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.federated.remote.site import Site
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.runs.build import Components
from drencoder.runs.checkpoint import load_checkpoint
from drencoder.runs.run_folder import RunFolder
from mutations import mutations_of

CANARY = "Mustermann"


PERSON = f"Erika {CANARY} has a rare disease"


Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """A reader, the document that it is tried with, and the place where the document lies. `share`: of the mutations."""

    seed: bytes
    read: Callable[[Path], object]
    path: Path
    mutate: Mutate = mutations_of
    share: float = 1.0


class ZeroTrainer:
    """Trains nobody: what a reader lets through need not cost a training."""

    batch_clients = 8

    def __init__(self, size: int) -> None:
        self._size = size

    def train_clients(self, adapter_D: torch.Tensor, clients: Any, slot: int, epochs: int) -> torch.Tensor:
        return torch.zeros(len(clients), epochs * self._size)


@dataclass(frozen=True)
class World:
    """A finished run, what it is made of, and keys; `folder` is a test's own copy of the run."""

    run: Path
    components: Components
    certificates: Path
    folder: Path = Path()

    def site(self, said: list[str]) -> Site:
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        clients = ClientSet.parse("0-29", self.components.recipe.federation.population)
        ledger = SiteLedger.open(
            self.folder / "state" / "site.jsonl", agreement(self.components.recipe).hex(), self.components.plan
        )
        return Site(self.components, clients, ledger, say=said.append)

    def query(self) -> Any:
        """The question of the first round."""
        folder = RunFolder(self.run)
        with Ledger.open(folder.ledger, read_only=True) as ledger:
            lora = self.components.lora
            progress = load_checkpoint(folder, ledger, lora.initial_D, lora.layout.segments)
        encoder = self.components.encoder(progress.prior, dict(progress.encoder_state or {}))
        return update_query(encoder, self.components.recipe, 1, None, progress.prior)
