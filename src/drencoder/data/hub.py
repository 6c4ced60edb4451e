"""The one door to the datasets library: hub data sets, and local folders that the library can read."""

import contextlib
from collections.abc import Iterator
from typing import Any

from drencoder.errors import DataError

__all__ = ["config_names", "load_rows", "split_names"]


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


def split_names(source: str, config: str, *, knob: str) -> list[str]:
    """The splits of one configuration. Raises DataError as `load_rows` does."""
    with _asking(source, knob) as datasets:
        return list(datasets.get_dataset_split_names(source, config))


@contextlib.contextmanager
def _asking(source: str, knob: str) -> Iterator[Any]:
    """Lends the library without its progress bars (one per split and subject); its errors become one sentence."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{knob} = {source!r} needs the datasets library: pip install 'drencoder[data]'.") from None
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield datasets
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        reason = error.__cause__ or error  # "an error occurred while generating" has the reason as its cause
        first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise DataError(
            f"{knob} = {source!r} cannot be loaded ({first_line}): check the name and the network, or give local files."
        ) from None
    finally:
        if shown:
            datasets.utils.enable_progress_bars()
