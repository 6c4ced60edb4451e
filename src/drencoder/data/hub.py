"""The one door to the datasets library: hub data sets, and local folders that the library can read."""

import contextlib
from collections.abc import Iterator
from typing import Any

from drencoder.errors import DataError
from drencoder.reading import cut, shown


def load_rows(source: str, split: str, *, knob: str, config: str | None = None) -> list[dict[str, Any]]:
    """All rows of one split of `source` (a hub id or a folder), in order; `knob` is named in an error message.

    Raises:
      DataError: the library is not installed, or it cannot load that.
    """
    with _asking(source, knob) as datasets:
        return [dict(row) for row in datasets.load_dataset(source, config, split=split)]


def config_names(source: str, *, knob: str) -> list[str]:
    """The configurations of a data set; `["default"]` where it has none. Raises DataError as `load_rows` does."""
    with _asking(source, knob) as datasets:
        return list(datasets.get_dataset_config_names(source))


def split_names(source: str, config: str | None, *, knob: str) -> list[str]:
    """The splits of one configuration; None = the one that is read unless another is named. Raises DataError as `load_rows` does."""
    with _asking(source, knob) as datasets:
        return list(datasets.get_dataset_split_names(source, config))


@contextlib.contextmanager
def _asking(source: str, knob: str) -> Iterator[Any]:
    """Lends the library without its progress bars (one per split and subject); its errors become one sentence.

    A name of dots and slashes alone is refused: the library would read whatever lies in that folder.
    """
    if not source.strip("./ ") or "\0" in source:
        raise DataError(
            f"{knob} = {shown(source)} names no data set: give ORG/NAME of the hub, or a folder of its own."
        )
    try:
        import datasets
    except ImportError:
        raise DataError(f"{knob} = {source!r} needs the datasets library: pip install 'drencoder[data]'.") from None
    had_bars = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        reason = error.__cause__ or error  # "an error occurred while generating" has the reason as its cause
        raise DataError(
            f"{knob} = {shown(source)} cannot be loaded ({_explain(reason)}): check the name and the network, or give local files."
        ) from None
    finally:
        if had_bars:
            datasets.utils.enable_progress_bars()


_OF_NAMES = (
    "DatasetNotFoundError",
    "DataFilesNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "FileNotFoundError",
)
_OF_SPLITS = ("Unknown split", "BuilderConfig", "Config name")


def _explain(error: BaseException) -> str:
    """The first line of a message that is about names; of any other error its type alone, since it may quote a record."""
    lines = str(error).strip().splitlines()
    known = type(error).__name__ in _OF_NAMES or (type(error) is ValueError and str(error).startswith(_OF_SPLITS))
    return cut(lines[0], 300) if known and lines else type(error).__name__
