"""What both sides must have alike before a site answers, and which clients a site answers for. No torch."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from drencoder.data.chat_template import TEMPLATES, read_template
from drencoder.errors import RecipeError
from drencoder.reading import shown
from drencoder.recipe.recipe import Recipe

# Where a machine keeps things, how fast it is, and what the server alone does: free on each side.
_FREE_SECTIONS = ("name", "server", "evaluation", "speed")
_FREE_KNOBS = {
    "model": ("source", "revision", "device"),
    "data": ("source", "client_field", "owner_field", "fields", "held_out_share"),
    "prior": ("public", "provenance"),
}
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_EVERY = re.compile(r"(\d{1,9})/(\d{1,9})")


def agreement(recipe: Recipe) -> bytes:
    """SHA-256 (32 bytes) over all knobs that decide what a client computes, how it is noised and how often it is asked.

    Raises:
      DataError: `data.template` names a file that cannot be read.
    """
    tables = {key: value for key, value in recipe.to_dict().items() if key not in _FREE_SECTIONS}
    for section, free in _FREE_KNOBS.items():
        tables[section] = {key: value for key, value in tables[section].items() if key not in free}
    template = recipe.data.template
    if template not in TEMPLATES:  # a file, wherever a side keeps it
        tables["data"]["template"] = hashlib.sha256(read_template(Path(template)).encode()).hexdigest()
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).digest()


@final
@dataclass(frozen=True)
class ClientSet:
    """Clients of a population 0..N-1, as people write them: `0-9,12`, or `1/3` for 1, 4, 7, ... (every third from 1)."""

    clients: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, population: int) -> "ClientSet":
        """Raises RecipeError for anything else, for numbers outside the population, and for no client at all."""
        every = _EVERY.fullmatch(text.strip())
        if every:
            first, step = int(every[1]), int(every[2])
            if first >= step:
                raise RecipeError(
                    f"--clients {shown(text)}: the first number must be below the second: write, say, 0/3."
                )
            numbers: Iterable[int] = range(first, population, step)
        else:
            chosen: set[int] = set()
            named = 0
            for part in text.split(","):
                pair = _RANGE.fullmatch(part.strip())
                if not pair:
                    raise RecipeError(f"--clients {shown(text)}: {shown(part)} is no range: write, say, 0-9,12 or 0/3.")
                low, high = int(pair[1]), int(pair[2] or pair[1])
                if not low <= high < population:
                    raise RecipeError(
                        f"--clients {shown(text)}: {shown(part)} is not inside 0-{population - 1}, the recipe's population."
                    )
                named += high - low + 1
                if named > population:  # else a line from another machine could name everybody a million times
                    raise RecipeError(
                        f"--clients {shown(text)} names more clients than the recipe's {population}: name each once."
                    )
                chosen |= set(range(low, high + 1))
            numbers = sorted(chosen)
        clients = tuple(numbers)
        if not clients:
            raise RecipeError(f"--clients {shown(text)} names none of the {population} clients of the recipe.")
        return cls(clients)

    def __str__(self) -> str:
        """Ranges, as `parse` reads them."""
        parts, start = [], self.clients[0]
        for client, after in zip(self.clients, [*self.clients[1:], -1], strict=True):
            if after != client + 1:
                parts.append(str(client) if start == client else f"{start}-{client}")
                start = after
        return ",".join(parts)
