"""The archive of a utility study, beside its results page: every row, from which a study's folder can be made again. No torch."""

import json
import lzma
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError
from drencoder.runs.run_folder import RunFolder
from drencoder.study.cells import CELLS, STUDY, CellStore

ARCHIVE = "utility-cells.jsonl.xz"
COMPACT = "utility.json"  # of which the archive needs the scale and the machine


def archive(folder: Path, results_folder: Path) -> None:
    """Keeps every row of a study among the results; the same rows give the same bytes."""
    lines = sorted((folder / CELLS).read_bytes().splitlines(keepends=True))
    RunFolder(results_folder).write(results_folder / ARCHIVE, lzma.compress(b"".join(lines), preset=9))


def read_study(folder: Path) -> dict[str, Any]:
    """The scale and the machine of a study's cells.

    Raises:
      ArtifactError: the folder holds no study.
    """
    try:
        known = json.loads((folder / STUDY).read_text("utf-8"))
        return {"scale": known["cells_depend_on"]["scale"], "machine": known["machine"]}
    except (OSError, ValueError, TypeError, KeyError):
        raise ArtifactError(
            f"{folder} holds no utility study: give the --out of one, or --from a results page."
        ) from None


def restore(results_folder: Path, folder: Path) -> None:
    """Makes a study's folder out of the archive beside a page.

    Raises:
      ArtifactError: the folder has cells already, or the results cannot be read.
    """
    if (folder / CELLS).exists():
        raise ArtifactError(f"{folder} has cells already: leave --from out to go on with them, or give another --out.")
    try:
        known = json.loads((results_folder / COMPACT).read_text("utf-8"))
        rows = list(map(json.loads, lzma.decompress((results_folder / ARCHIVE).read_bytes()).splitlines()))
    except OSError as error:
        raise ArtifactError(f"{error.filename} is missing: give the folder that --page wrote.") from None
    except (ValueError, lzma.LZMAError) as error:
        raise ArtifactError(
            f"{results_folder} cannot be read ({error}): restore the files that --page wrote."
        ) from None
    with CellStore(folder, {"scale": known["scale"]}, {"machine": known["machine"]}) as store:
        store.add(*rows)
