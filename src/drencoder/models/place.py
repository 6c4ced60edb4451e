"""Where a base model lies, read from `model.source` alone. No torch: the plan asks, too."""

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from drencoder.errors import ModelError
from drencoder.models.gguf_header import read_gguf_header
from drencoder.reading import shown
from drencoder.recipe.sections import Model

UNKNOWN_LICENCE = "unknown"
"""The hub's own tag for a licence that nobody states."""

_TAG = "[A-Za-z0-9.+-]{1,60}"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)")  # of the hub's own cache


@dataclass(frozen=True)
class ModelPlace:
    """`path`: a folder in Hugging Face's layout or a GGUF file on this machine; None for a hub id that is to be fetched.

    `hub_id` and `revision` are empty for a model that has none.
    """

    path: Path | None
    hub_id: str = ""
    revision: str = ""

    @property
    def is_gguf(self) -> bool:
        return self.path is not None and self.path.suffix.lower() == ".gguf"

    @property
    def folder(self) -> Path | None:
        """The model's folder if its files are on this machine; of a hub id, where the hub's cache has it."""
        if self.path is not None or not self.hub_id:
            return self.path
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(self.hub_id, "config.json", revision=self.revision or None)
        except ValueError:  # not a name that the hub could have
            return None
        return Path(found).parent if isinstance(found, str) else None


def embedded_folder() -> Path:
    """The folder of the model that is shipped inside the package."""
    return Path(str(resources.files("drencoder") / "embedded"))


def licence_of(place: ModelPlace) -> str | None:
    """The licence tag that the model's own files state; None where they are not on this machine.

    Raises:
      ModelError: a GGUF file is damaged.
    """
    if place.path == embedded_folder():
        return "apache-2.0"
    if place.is_gguf:
        assert place.path is not None
        stated = str(read_gguf_header(place.path).facts.get("general.license", ""))
        return stated if re.fullmatch(_TAG, stated) else UNKNOWN_LICENCE
    folder = place.folder
    if folder is None or not (folder / "config.json").is_file():
        return None
    # A hub's card may not have been fetched.
    return licence_in(folder / "README.md") if place.path or (folder / "README.md").exists() else None


def licence_in(card: Path) -> str:
    """The licence tag at the head of a model's own card, as the hub reads it."""
    try:
        text = card.read_text("utf-8")
    except (OSError, ValueError):
        return UNKNOWN_LICENCE
    head = re.match(r"---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    tag = re.search(rf"^license:\s*[\"']?({_TAG})[\"']?\s*$", head[1], re.MULTILINE) if head else None
    return tag[1] if tag else UNKNOWN_LICENCE


def locate(knobs: Model) -> ModelPlace:
    """Says where the model is.

    Raises:
      ModelError: a path leads nowhere or to something else, or has a revision, which only a hub id can have.
    """
    if knobs.source == "embedded":
        _refuse_revision(knobs)
        return ModelPlace(embedded_folder())
    if not knobs.source.strip():  # to a path it would be the folder that the command was called in
        raise ModelError("model.source is empty: give 'embedded', a folder, a .gguf file or a hub id.")
    path = Path(knobs.source)
    try:
        there = path.exists()
    except OSError as error:
        raise ModelError(
            f"model.source = {shown(knobs.source)} cannot be read ({error.strerror}): give another."
        ) from None
    if not there and _HUB_ID.fullmatch(knobs.source) and path.suffix.lower() != ".gguf":
        return ModelPlace(None, knobs.source, knobs.revision)
    _refuse_revision(knobs)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"model.source = {shown(knobs.source)} is a file, but no .gguf file: give the folder of the model, or a .gguf file."
            )
        return ModelPlace(path)
    if not path.is_dir():
        raise ModelError(
            f"model.source = {shown(knobs.source)} is not there: give 'embedded', a folder, a .gguf file or a hub id."
        )
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"model.source = {shown(knobs.source)} holds an adapter and not a whole model: name its base model, or merge the two first."
        )
    if not (path / "config.json").is_file():
        gguf = next((f": name the file, {file.name}" for file in sorted(path.glob("*.gguf"))), "")
        raise ModelError(
            f"model.source = {shown(knobs.source)} has no config.json, so it is not a model's folder{gguf or ': give the folder that has one'}."
        )
    match = _SNAPSHOT.search(path.resolve().as_posix())
    return ModelPlace(path, f"{match[1]}/{match[2]}", match[3]) if match else ModelPlace(path)


def _refuse_revision(knobs: Model) -> None:
    if knobs.revision:
        raise ModelError(
            f"model.revision = {shown(knobs.revision)} belongs to a hub id, and model.source = {shown(knobs.source)} is on this machine: "
            "remove model.revision."
        )
