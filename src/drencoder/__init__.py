"""drencoder: differentially private federated fine-tuning of language models with encoded LoRA updates.

::

    import drencoder

    recipe = drencoder.load_recipe("quickstart", ["privacy.epsilon=4"])
    result = drencoder.run(recipe, "runs/mine")
    print(result.certificate["observers"], result.adapter)

Importing the package imports no torch; `run` does.
"""

from typing import TYPE_CHECKING, Any

from drencoder.errors import DrencoderError
from drencoder.recipe.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from drencoder.runs.run import RunResult, resume, run

__version__ = "0.1.0"
__all__ = ["DrencoderError", "Recipe", "RunResult", "load_recipe", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name in ("RunResult", "resume", "run"):  # these need torch, which takes seconds to import
        from drencoder.runs import run as experiment

        return getattr(experiment, name)
    raise AttributeError(f"module 'drencoder' has no attribute {name!r}")
