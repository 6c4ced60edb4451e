"""The text that a recipe names, read before a run as the run will read it. No torch."""

from pathlib import Path

from drencoder.data.benchmarks.questions import load_benchmarks
from drencoder.data.chat_template import NO_TEMPLATE, TEMPLATES, read_template
from drencoder.data.evaluation_text import evaluation_basis, open_evaluation, set_aside_share
from drencoder.data.places import Place
from drencoder.data.public_text import open_public
from drencoder.data.sources import AbsentSource
from drencoder.data.units import open_text
from drencoder.encoders.planning import clip_text, public_text
from drencoder.errors import DataError
from drencoder.models.place import locate
from drencoder.recipe.recipe import Recipe


def check_text(recipe: Recipe) -> None:
    """Reads the clients' text, and what `check_other_text` reads; loads nothing from a hub.

    Raises:
      DataError: what a run would refuse.
    """
    if not Place.parse(recipe.data.source).is_on_hub:
        open_text(recipe, set_aside=set_aside_share(recipe))
    check_other_text(recipe)


def check_other_text(recipe: Recipe) -> None:
    """Reads the server's evaluation data, benchmarks, public text and a template's file; loads nothing from a hub.

    Raises:
      DataError: what a run would refuse.
    """
    if evaluation_basis(recipe) in ("server", "generated") and not Place.parse(recipe.evaluation.data).is_on_hub:
        open_evaluation(recipe, AbsentSource())
    public, provenance = public_text(recipe) or clip_text(recipe), recipe.prior.provenance
    if not (Place.parse(public).is_on_hub and provenance.strip()):
        open_public(public, provenance, lambda count, seed: [], dict(recipe.data.fields))
    if recipe.data.template not in TEMPLATES:
        read_template(Path(recipe.data.template))
    if recipe.data.template == "chat" and _lacks_template(locate(recipe.model).folder):
        raise DataError(NO_TEMPLATE)
    if not any(Place.parse(place).is_on_hub for place in recipe.benchmarks.values()):
        load_benchmarks(recipe)


def _lacks_template(folder: Path | None) -> bool:
    """Whether a model's folder has none of the files that transformers takes a chat template from; False where there is no folder."""
    if folder is None or not folder.is_dir():
        return False
    config = folder / "tokenizer_config.json"
    if config.is_file() and b'"chat_template"' in config.read_bytes():
        return False
    names = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    return not any((folder / name).exists() for name in names)
