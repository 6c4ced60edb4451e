"""Recipe -> live objects. Everything that can be refused is refused here, before a run folder exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from drencoder import config
from drencoder.config import Recipe
from drencoder.data.source import Record, Source, benchmark, open_source
from drencoder.data.template import render
from drencoder.encoders.autoencoder import AutoencoderOptions
from drencoder.encoders.contract import Encoder
from drencoder.encoders.registry import EncoderRequest, build_encoder
from drencoder.encoders.sizes import code_size
from drencoder.engines.local import LocalEngine
from drencoder.evaluation import question_examples
from drencoder.examples import Example, make_examples
from drencoder.model import BaseModel, LoraModel, load_base, resolve_device
from drencoder.overview import Overview, survey
from drencoder.prior import GaussianPrior
from drencoder.privacy.mechanism import NoiseSource, ReplayNoise, SecureNoise
from drencoder.rng import derive_seed

__all__ = ["Live", "build"]


@dataclass(frozen=True)
class Texts:
    """A source's records as tokens. A client's examples reach the engine only."""

    source: Source
    base: BaseModel
    max_tokens: int

    def client(self, client: int) -> list[Example]:
        return self._examples(self.source.client(client), f"client {client}")

    def held_out(self, count: int) -> list[Example]:
        return self._examples(self.source.held_out(count), "the server's held-out set")

    def _examples(self, records: Sequence[Record], owner: str) -> list[Example]:
        base = self.base
        return make_examples(map(render, records), base.tokenize, base.end_id, self.max_tokens, owner=owner)


@dataclass(frozen=True)
class Live:
    """A run's live objects."""

    recipe: Recipe
    overview: Overview
    texts: Texts
    lora: LoraModel
    engine: LocalEngine

    @cached_property
    def held_out(self) -> list[Example]:
        """Tokenised held-out records of the server, as many as the final table uses."""
        return self.texts.held_out(self.recipe.evaluation.examples)

    @cached_property
    def questions(self) -> dict[str, tuple[list[list[Example]], list[int]]]:
        """Benchmark -> (four options per question, answers)."""
        wanted = self.recipe.evaluation
        drawn = {name: benchmark(name, count=wanted.questions, seed=self.recipe.seed) for name in wanted.benchmarks}
        return {
            name: (
                question_examples(self.lora, questions, self.recipe.data.max_tokens),
                [question.answer for question in questions],
            )
            for name, questions in drawn.items()
        }

    def noise(self) -> NoiseSource:
        """The recipe's noise source; `replay` is for tests and marks the run as not private."""
        if self.recipe.privacy.noise == "replay":
            return ReplayNoise(derive_seed(self.recipe.seed, "noise"))
        return SecureNoise()

    def encoder(self, prior: GaussianPrior | None, state: dict[str, torch.Tensor] | None = None) -> Encoder:
        """The recipe's encoder, made from the prior, or restored from its saved tensors."""
        wanted, segments = self.recipe.encoder, self.lora.layout.segments
        request = EncoderRequest(
            segments,
            code_size(wanted.name, self.lora.layout.size, wanted.ratio),
            prior,
            derive_seed(self.recipe.seed, "encoder"),
            wanted.floor,
            AutoencoderOptions(
                steps=wanted.train_steps,
                samples=self.recipe.prior.synthetic,
                normalise=wanted.normalise,  # type: ignore[arg-type]  # checked by the recipe
            ),
        )
        return build_encoder(wanted.name, request, state)


def build(recipe: Recipe) -> Live:
    """Plans, loads and checks everything that a run needs.

    Raises:
      DrencoderError: any part of the recipe cannot be had; nothing has been written.
    """
    overview = survey(recipe)
    resolve_device(recipe.model.device)
    set_threads(recipe.speed)
    source = open_source(recipe.data, population=recipe.federation.population, seed=recipe.seed)
    base = load_base(recipe.model)
    texts = Texts(source, base, recipe.data.max_tokens)
    lora = LoraModel(base, recipe.adapter, seed=recipe.seed)
    engine = LocalEngine(lora, texts.client, recipe.local, recipe.seed, recipe.speed.parallel_clients)
    live = Live(recipe, overview, texts, lora, engine)
    _ = live.held_out, live.questions  # refuse empty evaluation data now, not after the last round
    return live


def set_threads(speed: config.Speed) -> None:
    """torch's thread count is process-wide; this is the one place that sets it."""
    if speed.threads:
        torch.set_num_threads(speed.threads)
