"""The methods that `drencoder compare` knows: the published ones, the baselines, and this project's own. No torch.

A method is a set of knobs. Everything else, clients, chance to take part, rounds, local work, optimiser, clip and
accountant, is the recipe's and the same for all; cohorts are drawn anew in every run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from drencoder.errors import RecipeError
from drencoder.recipe.recipe import Recipe

__all__ = ["CENTRALISED", "METHODS", "Method", "method_named", "start_rates"]

CENTRALISED = "centralised"


@dataclass(frozen=True)
class Method:
    """One arm of a comparison. `private` methods are run once per epsilon, the others once.

    `rate_knob` is the learning rate that is tuned: the recipe's value, or its own in `compare.rates`, is the first guess.
    `public` methods are made from public text: the recipe's, or the embedded world's general part if it names none.
    """

    name: str
    words: str
    knobs: Mapping[str, Any]
    private: bool = True
    rate_knob: str = "server.learning_rate"
    public: bool = False

    def first_rate(self, base: Recipe) -> float:
        """The learning rate that tuning starts from.

        Raises:
          RecipeError: compare.rates is ill-formed.
        """
        section, _, key = self.rate_knob.partition(".")
        own = getattr(getattr(base, section), key)
        return start_rates(base).get(self.name, own)

    def recipe(self, base: Recipe, *, epsilon: float | None, seed: int, multiplier: float) -> Recipe:
        """The recipe of one run of this method, at `multiplier` times its first learning rate.

        Raises:
          RecipeError: the method and the base recipe do not fit together.
        """
        changes: dict[str, Any] = {**self.knobs, self.rate_knob: self.first_rate(base) * multiplier, "seed": seed}
        if self.public:
            changes["prior.public"] = base.prior.public or "embedded"
        if self.private and epsilon is not None:
            changes |= {"privacy.epsilon": epsilon, "privacy.noise_multiplier": 0.0}
        return base.changed(changes | {"name": self.name, "evaluation.every": 0})


def start_rates(base: Recipe) -> dict[str, float]:
    """`compare.rates` ("method=rate") as numbers.

    Raises:
      RecipeError: an entry names no method or no positive number.
    """
    rates = {}
    for entry in base.compare.rates:
        name, _, text = entry.partition("=")
        try:
            rates[method_named(name.strip()).name] = float(text)
        except ValueError:
            raise RecipeError(f"compare.rates holds {entry!r}: write METHOD=RATE, say dp-lora=0.1.") from None
    return rates


_WHOLE = {"encoder.name": "identity", "prior.source": "none"}
_SILENT = {"privacy.trust": "non-private"}
_TRAINED = {"encoder.name": "autoencoder", "encoder.gate": "warn"}  # warn: what it carries is what is to be shown
_BEFORE, _AFTER = {"privacy.noise_in": "update"}, {"privacy.noise_in": "code"}
_MOMENTS, _GRADIENTS = {"prior.source": "moments"}, {"prior.source": "gradients"}


def _coded(encoder: str) -> dict[str, Any]:
    """A linear encoder without a stage 1, clipped and noised in its code."""
    return {"encoder.name": encoder, "prior.source": "none"} | _AFTER


_ALL = (
    Method("lora", "federated LoRA: whole updates, no noise", _WHOLE | _SILENT, private=False),
    Method(
        CENTRALISED,
        "LoRA with AdamW on the clients' text in one place",
        _WHOLE | _SILENT,
        private=False,
        rate_knob="local.learning_rate",
    ),
    Method("dp-lora", "DP-LoRA: whole updates, clipped and noised", _WHOLE),
    Method(
        "dr-encoder",
        "DR-Encoder as published: auto-encoder of a random prior, clip and noise of the update (a trusted server: after decoding)",
        _TRAINED | _MOMENTS | _BEFORE,
    ),
    Method("dr-encoder-code", "the same auto-encoder, noise in the code", _TRAINED | _MOMENTS | _AFTER),
    Method(
        "fedcg",
        "FedCG: auto-encoder of real gradients, no noise",
        _TRAINED | _GRADIENTS | _SILENT | _BEFORE,
        private=False,
    ),
    Method("fedcg-dp", "FedCG with noise in its rounds; stage 1 stays un-noised", _TRAINED | _GRADIENTS | _BEFORE),
    Method(
        "random", "drencoder: sketch allocated by the prior, noise in the code", {"encoder.name": "random"} | _AFTER
    ),
    Method(
        "noise",
        "control: DR-Encoder's pipeline with zero updates, that is, its noise alone",
        _TRAINED | _MOMENTS | _BEFORE | {"local.upload": "zero"},
    ),
    Method("kronecker", "drencoder: closed form of a structured public prior", _coded("kronecker"), public=True),
    Method(
        "hybrid", "drencoder: structured prior, the run's momentum and a fresh sketch", _coded("hybrid"), public=True
    ),
    Method("ffa-lora", "FFA-LoRA: B only, A frozen", _coded("ffa")),
    Method(
        "ffa-orthonormal",
        "FFA-LoRA from an orthonormal A (FedSVD's start)",
        _coded("ffa") | {"adapter.start": "orthonormal"},
    ),
    Method("top-k", "the places where public text has the largest updates", _coded("top-k"), public=True),
    Method("core", "Fed-SB's r x r core per module, in directions of public text", _coded("core"), public=True),
    Method("power", "low rank, after PowerSGD: directions from the run's own momentum", _coded("power")),
    Method("random-silent", "the same sketch, no noise", {"encoder.name": "random"} | _SILENT, private=False),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
      RecipeError: there is none.
    """
    if name not in METHODS:
        raise RecipeError(f"compare.methods names {name!r}: choose from {', '.join(METHODS)}.")
    return METHODS[name]
