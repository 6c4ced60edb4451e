"""The clip that a run starts with, where its recipe names none: what public text makes clients send, at this model's own scale.

Legend: N make-believe clients, K values of a message.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.errors import ViabilityError
from drencoder.federated.query import moment_query, update_query
from drencoder.recipe.recipe import Recipe
from drencoder.runs.build import Components

__all__ = ["measured_clip", "stage1_clip", "with_named_clip"]


def measured_clip(recipe: Recipe, encoder: Encoder, public: PublicUpdates) -> float:
    """The median L2 norm of what make-believe clients would send in a round before clip and noise, to three digits.

    Public text alone goes in, so it costs no privacy. Noise follows the clip, so no clip is less private than another.

    Raises:
      ViabilityError: more than half of these clients would send nothing, or what they would send is not finite.
    """
    if recipe.privacy.noise_in == "update":
        return _median_norm(public.update_ND, "privacy")
    return _median_norm(update_query(encoder, recipe, 1, clip_l2=1.0).encode(public.update_ND), "privacy")


def stage1_clip(components: Components) -> float:
    """The clip of stage 1's statistics: the recipe's, or measured in the same way, the updates of all epochs being taken as alike.

    Raises:
      ViabilityError: as `measured_clip` does.
    """
    prior = components.recipe.prior
    if prior.clip_l2:
        return prior.clip_l2
    update_NP = components.start_updates.update_ND.repeat(1, prior.epochs)
    return _median_norm(moment_query(components.lora.layout.segments, prior, 1.0).encode(update_NP), "prior")


def _median_norm(values_NK: Tensor, section: str) -> float:
    norm = float(torch.linalg.vector_norm(values_NK, dim=1, dtype=torch.float64).median())
    if not 0 < norm < math.inf:
        raise ViabilityError(
            f"no clip can be had from public text, since half of its updates have norm {norm:g}: name one in {section}.clip_l2."
        )
    return float(f"{norm:.3g}")


def with_named_clip(components: Components) -> Components:
    """The same, with clips in the recipe: measured on whole updates where it names none, for what has no run to measure them in."""
    recipe, segments, clips = components.recipe, components.lora.layout.segments, {}
    if not recipe.privacy.clip_l2:
        clips["privacy.clip_l2"] = measured_clip(recipe, IdentityEncoder(segments), components.start_updates)
    if not recipe.prior.clip_l2 and recipe.prior.source == "moments":
        clips["prior.clip_l2"] = stage1_clip(components)
    return replace(components, recipe=recipe.changed(clips)) if clips else components
