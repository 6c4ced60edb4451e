"""The methods that `drencoder compare` knows: the published ones, the baselines, and this project's own. No torch.

A method is a set of knobs. Everything else is the recipe's and the same for all methods: clients, sampling rate, rounds, local work,
optimiser, clip and accountant. Cohorts are drawn anew in every run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from drencoder.encoders.code_sizes import AUTOENCODERS
from drencoder.errors import RecipeError
from drencoder.federated.server_rate import RATE
from drencoder.recipe.recipe import Recipe

CENTRALISED = "centralised"


@dataclass(frozen=True)
class Method:
    """One arm of a comparison. `private` methods are run once per epsilon, the others once.

    `rate_knob` is the learning rate that is tuned. The recipe's value is the first guess, unless `compare.rates` has another one.
    A method with an auto-encoder has the recipe's, if the recipe names one. `public` methods are made from public text: the recipe's, or the embedded world's general part if it names none.
    """

    name: str
    words: str
    knobs: Mapping[str, Any]
    private: bool = True
    rate_knob: str = "server.learning_rate"
    public: bool = False

    def first_rate(self, base: Recipe, rates: Mapping[str, float]) -> float:
        """The learning rate that tuning starts from; `rates` are those of `start_rates`. Where the recipe leaves it open, that without noise."""
        section, _, key = self.rate_knob.partition(".")
        return rates.get(self.name, getattr(getattr(base, section), key) or RATE)

    def recipe(self, base: Recipe, *, epsilon: float | None, seed: int, rate: float) -> Recipe:
        """The recipe of one run of this method with this learning rate.

        Raises:
          RecipeError: the method and the base recipe do not fit together.
        """
        changes: dict[str, Any] = {**self.knobs, self.rate_knob: rate, "seed": seed}
        if changes["encoder.name"] == "autoencoder" and base.encoder.name in AUTOENCODERS:
            changes["encoder.name"] = base.encoder.name
        if self.public:
            changes["prior.public"] = base.prior.public or "embedded"
        if self.private and epsilon is not None:
            changes |= {"privacy.epsilon": epsilon, "privacy.noise_multiplier": 0.0}
        return base.changed(changes | {"name": self.name, "evaluation.every": 0})


def start_rates(entries: Sequence[str]) -> dict[str, float]:
    """The entries of `compare.rates` ("method=rate") as numbers by method.

    Raises:
      RecipeError: an entry names no method or no positive number.
    """
    rates = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        try:
            rate = float(text)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise RecipeError(
                f"compare.rates holds {entry!r}: write METHOD=RATE with a positive rate, say dp-lora=0.1."
            )
        rates[method_named(name.strip()).name] = rate
    return rates


_WHOLE_UPDATES = {"encoder.name": "identity", "prior.source": "none"}
_NO_NOISE = {"privacy.trust": "non-private"}
_AUTOENCODER = {"encoder.name": "autoencoder", "encoder.gate": "warn"}  # warn: what it carries is what is to be shown
_NOISE_IN_UPDATE = {"privacy.noise_in": "update"}
_NOISE_IN_CODE = {"privacy.noise_in": "code"}
_PRIOR_OF_MOMENTS = {"prior.source": "moments"}
_PRIOR_OF_GRADIENTS = {"prior.source": "gradients"}


def _coded(encoder: str) -> dict[str, Any]:
    """A linear encoder without a stage 1, clipped and noised in its code."""
    return {"encoder.name": encoder, "prior.source": "none"} | _NOISE_IN_CODE


_AS_PUBLISHED = _AUTOENCODER | _PRIOR_OF_MOMENTS | _NOISE_IN_UPDATE
_RANDOM = {"encoder.name": "random"}
# fmt: off
_ALL = (
    Method("lora", "federated LoRA: whole updates, no noise", _WHOLE_UPDATES | _NO_NOISE, private=False),
    Method(CENTRALISED, "LoRA with AdamW on the clients' text in one place", _WHOLE_UPDATES | _NO_NOISE, private=False, rate_knob="local.learning_rate"),
    Method("dp-lora", "DP-LoRA: whole updates, clipped and noised", _WHOLE_UPDATES),
    Method("dr-encoder", "DR-Encoder as published: auto-encoder of a random prior, clip and noise of the update (a trusted server: after decoding)", _AS_PUBLISHED),
    Method("dr-encoder-code", "the same auto-encoder, noise in the code", _AUTOENCODER | _PRIOR_OF_MOMENTS | _NOISE_IN_CODE),
    Method("fedcg", "FedCG: auto-encoder of real gradients, no noise", _AUTOENCODER | _PRIOR_OF_GRADIENTS | _NO_NOISE | _NOISE_IN_UPDATE, private=False),
    Method("fedcg-dp", "FedCG with noise in its rounds; stage 1 stays un-noised", _AUTOENCODER | _PRIOR_OF_GRADIENTS | _NOISE_IN_UPDATE),
    Method("random", "drencoder: sketch allocated by the prior, noise in the code", _RANDOM | _NOISE_IN_CODE),
    Method("noise", "control: DR-Encoder's pipeline with zero updates, that is, its noise alone", _AS_PUBLISHED | {"local.upload": "zero"}),
    Method("kronecker", "drencoder: closed form of a structured public prior", _coded("kronecker"), public=True),
    Method("hybrid", "drencoder: structured prior, the run's momentum and a fresh sketch", _coded("hybrid"), public=True),
    Method("ffa-lora", "FFA-LoRA: B only, A frozen", _coded("ffa")),
    Method("ffa-orthonormal", "FFA-LoRA from an orthonormal A (FedSVD's start)", _coded("ffa") | {"adapter.start": "orthonormal"}),
    Method("top-k", "the places where public text has the largest updates", _coded("top-k"), public=True),
    Method("core", "Fed-SB's r x r core per module, in directions of public text", _coded("core"), public=True),
    Method("power", "low rank, after PowerSGD: directions from the run's own momentum", _coded("power")),
    Method("random-silent", "the same sketch, no noise", _RANDOM | _NO_NOISE, private=False),
)
# fmt: on

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
      RecipeError: there is none.
    """
    if name not in METHODS:
        raise RecipeError(f"compare.methods names {name!r}: choose from {', '.join(METHODS)}.")
    return METHODS[name]
