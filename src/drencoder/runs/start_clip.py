"""The clip that a run starts with, where its recipe names none: what public text makes clients send, at this model's own scale.

Legend: N make-believe clients, K values of a message.
"""

import math

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.errors import ViabilityError
from drencoder.federated.query import moment_query, update_query
from drencoder.recipe.recipe import Recipe
from drencoder.runs.build import Components


def measured_clip(recipe: Recipe, encoder: Encoder, public: PublicUpdates) -> float:
    """The median L2 norm of what make-believe clients would send in a round before clip and noise, to three digits.

    Public text alone goes in, so it costs no privacy. Noise follows the clip, so no clip is less private than another.

    Raises:
      ViabilityError: more than half of these clients would send nothing, or what they would send is not finite.
    """
    if recipe.privacy.noise_in == "update":
        return _median_norm(public.update_ND)
    return _median_norm(update_query(encoder, recipe, 1, clip_l2=1.0).encode(public.update_ND))


def stage1_clip(components: Components) -> float:
    """The clip of stage 1's statistics: the recipe's, or measured in the same way, the updates of all epochs being taken as alike.

    Raises:
      ViabilityError: as `measured_clip` does.
    """
    recipe = components.recipe
    if recipe.privacy.clip_l2:
        return recipe.privacy.clip_l2
    update_NP = components.start_updates.update_ND.repeat(1, recipe.stage1_epochs)
    return _median_norm(moment_query(components.lora.layout.segments, recipe, 1.0).encode(update_NP))


def _median_norm(values_NK: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values_NK, dim=1, dtype=torch.float64).median())
    if not 0 < norm < math.inf:
        raise ViabilityError(
            f"no clip can be had from public text, since half of its updates have norm {norm:g}: name one in privacy.clip_l2."
        )
    return float(f"{norm:.3g}")
