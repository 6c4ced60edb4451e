"""A run's non-private twin: the same rounds without noise, so that its user can tell what the noise cost.

The twin trains on the clients' updates as they are. It is charged to no budget, because no budget could pay for it: epsilon says
something about the run only as long as nothing of the twin reaches anybody who does not hold all the text anyway. So it exists only where one
process holds that text, lies in a folder of its own that only its user can read, keeps no weights, and goes into no report.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from drencoder.encoders.code_sizes import auto_ratio
from drencoder.encoders.planning import declared, planned_start, wire_dtype
from drencoder.errors import RecipeError
from drencoder.federated.server_rate import planned_rate
from drencoder.recipe.recipe import Recipe
from drencoder.runs.build import Components
from drencoder.runs.certificate import TWIN_SENTENCE
from drencoder.runs.plan_overview import Overview, survey
from drencoder.runs.run_folder import RunFolder, storing

_WARNING = "NOT-PRIVATE.txt"  # written last


def check_twin(recipe: Recipe, *, wanted: bool, here: bool) -> None:
    """Refuses a twin that would be seen by who does not hold all text, or that the run is itself.

    Args:
      here: whether this process trains all clients.

    Raises:
      RecipeError: it was wanted and cannot be.
    """
    if wanted and not here:
        raise RecipeError(
            "a twin (--twin) takes clients' updates without noise, and the clients of this run are on other machines: only who holds "
            "all text in one process may have one. Leave --twin out."
        )
    if wanted and recipe.privacy.trust == "non-private":
        raise RecipeError("privacy.trust = 'non-private' is what a twin (--twin) would be: leave --twin out.")
    if wanted and recipe.privacy.unit != "client":
        raise RecipeError(
            f"a twin (--twin) is of clients, and privacy.unit = {recipe.privacy.unit!r} protects what is inside them: leave --twin out, or set "
            "privacy.unit = 'client'."
        )


def twin_components(components: Components, certificate: Mapping[str, Any]) -> Components:
    """The same model, text and trainer under the twin's recipe.

    The encoder, its size, the adapter's start and the server's rate follow from the noise where a recipe leaves them open; the twin has the
    run's. It keeps the clip, so that its steps are as long.
    """
    recipe, plan = components.recipe, components.plan
    dtype, encoder = wire_dtype(recipe), declared(recipe)
    changes: dict[str, Any] = {
        "privacy.trust": "non-private",
        "privacy.noise_multiplier": 0.0,
        "federation.sampling_rate": recipe.sampling_rate,
        "encoder.wire_dtype": dtype,
        "encoder.ratio": recipe.encoder.ratio or auto_ratio(components.lora.layout.size, plan.k_star(), dtype),
        "adapter.start": planned_start(recipe, plan),
        "server.learning_rate": planned_rate(recipe.server, plan),
    }
    if recipe.privacy.clip == "fixed":
        changes["privacy.clip_l2"] = certificate["clip"]["clip_l2"]
    if not encoder.linear:  # without noise the order only moves the clip, and a sum of such codes cannot be decoded
        changes["privacy.noise_in"] = "update"
    twin = recipe.changed(changes)
    return replace(components, recipe=twin, overview=survey(twin))


def make_private_folder(folder: RunFolder) -> None:
    """Makes the twin's folder, which only this user can read."""
    with storing(folder.path):
        folder.path.mkdir(mode=0o700, exist_ok=True)
        folder.path.chmod(0o700)


def forget_weights(folder: RunFolder) -> None:
    """Removes the twin's weights, which nobody needs and which could be attacked; leaves its numbers and a warning."""
    with storing(folder.path):
        for part in (folder.adapter, folder.checkpoints):
            shutil.rmtree(part, ignore_errors=True)
    folder.write(folder.path / _WARNING, f"{TWIN_SENTENCE}\n".encode())


def is_finished(folder: RunFolder) -> bool:
    """Whether the twin's numbers are all there."""
    return (folder.path / _WARNING).exists()


class TwinLines:
    """Shows the twin's rounds as lines that say what they are of."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def planned(self, overview: Overview) -> None:
        self.say("the same rounds again without noise, for your eyes only")

    def say(self, text: str) -> None:
        self._say(f"twin, NOT private: {text}")

    def round_done(self, row: Mapping[str, Any]) -> None:
        if row.get("loss") is not None:
            self.say(f"round {row['round']}: held-out loss {row['loss']:.3f}")

    def finished(self, certificate: Mapping[str, Any]) -> None: ...
