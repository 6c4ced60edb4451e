"""Whose text a run is measured on: text that the server owns, or that of owners who are no clients.

Nothing here is a share of a client's own records: what is measured on them text by text would be a release without noise.
"""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

from drencoder.data.benchmarks.questions import DEFAULT_SPLIT
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.hub import split_names
from drencoder.data.places import Place, read_records
from drencoder.data.sources import (
    EmbeddedSource,
    Record,
    Source,
    embedded_task,
    in_hashed_order,
)
from drencoder.data.units import file_of
from drencoder.errors import DataError
from drencoder.recipe import sections
from drencoder.recipe.recipe import Recipe

Basis = Literal["server", "generated", "owners", "records", "nothing"]

_RECORD_SHARE = 0.05  # of a file with simulated owners, where data.held_out_share says nothing
_SPLITS = ("test", "validation", "val", "dev", "train")  # of a hub data set: the first that is there and no client's

OwnerKind = Literal["generated", "named", "simulated"]
OWNER_KINDS: tuple[str, ...] = get_args(OwnerKind)
SIMULATED_OWNERS = "simulated owners"
GENERATED_OWNERS = "generated clients of the embedded world"
NO_EVALUATION = (
    "The run has no evaluation data, so it cannot know whether it learned: name a file that the server owns in "
    "evaluation.data, or set owners who agreed aside with data.held_out_share."
)


def owner_kind(data: sections.Data, unit: str = "client") -> OwnerKind:
    """Who the clients are, or the sites' units, which nobody simulates."""
    if data.is_embedded:
        return "generated"
    return "named" if data.client_field or unit != "client" else "simulated"


def describe_owners(kinds: Iterable[str], field: str = "", unit: str = "client", owner_field: str = "") -> str:
    """Who the clients are, in words, as the certificate has it. Sites may have several kinds; `field` names the owners of a file.

    Where the unit is inside a site, `field` names the sites of a file, and `owner_field` their owners.
    """
    if unit != "client":
        return "; ".join(_describe_units(kind, field, unit, owner_field) for kind in sorted(set(kinds)))
    words = {
        "generated": GENERATED_OWNERS,
        "simulated": SIMULATED_OWNERS,
        "named": f"owners whom the field {field!r} names" if field else "owners whom the sites' own files name",
    }
    return "; ".join(words.get(kind, "owners of an unknown kind") for kind in sorted(set(kinds)))


def _describe_units(kind: str, field: str, unit: str, owner_field: str) -> str:
    if kind != "named":
        return (
            f"{unit}s of generated sites of the embedded world" if kind == "generated" else "units of an unknown kind"
        )
    whose = f"at sites that the field {field!r} names" if field else "whom the sites' own files hold"
    named = f"owners whom the field {owner_field!r} names, " if field and owner_field else "owners "
    return (named if unit == "owner" else "single records ") + whose


def evaluation_basis(recipe: Recipe) -> Basis:
    """What kind of text the server measures the loss on; follows from the recipe alone."""
    where = recipe.evaluation.data
    if where == "none":
        return "nothing"
    if where and where.partition(":")[0] != "embedded":
        return "server"
    if where or recipe.data.is_embedded:
        return "generated"
    if recipe.data.client_field or recipe.privacy.unit != "client":
        return "owners" if recipe.data.held_out_share else "nothing"
    return "records"


def set_aside_share(recipe: Recipe) -> float:
    """The share of the owners, or of the records where owners are simulated, that no client has; 0 = none."""
    basis = evaluation_basis(recipe)
    if basis == "owners":
        return recipe.data.held_out_share
    return (recipe.data.held_out_share or _RECORD_SHARE) if basis == "records" else 0.0


def evaluation_rests_on(recipe: Recipe) -> str:
    """Whose text the evaluation rests on, in one sentence, for plan, certificate and report."""
    share, unit = f"{set_aside_share(recipe):.3g}", recipe.privacy.unit
    if unit == "record" and evaluation_basis(recipe) == "owners":
        return (
            f"The loss is measured on a share of {share} of the records, which no site trains on; their people must have agreed, and "
            "epsilon does not cover them."
        )
    return {
        "server": f"The loss is measured on {recipe.evaluation.data!r}, which the server owns.",
        "generated": "The loss is measured on text that drencoder generated for the server; no client has any of it.",
        "owners": f"The loss is measured on the text of a share of {share} of the owners, who are no clients and must have agreed; "
        "epsilon does not cover them.",
        "records": f"The loss is measured on a share of {share} of the records, set aside before the owners were simulated; no "
        "client has any of them, and epsilon does not cover them.",
        "nothing": NO_EVALUATION,
    }[evaluation_basis(recipe)]


def open_evaluation(recipe: Recipe, source: Source) -> Callable[[int], list[Record]] | None:
    """Gives at most as many of the server's records as it is asked for, always the same ones; None without evaluation data.

    Raises:
      DataError: evaluation.data is missing, unreadable or empty, or it is the clients' own text.
    """
    basis, where = evaluation_basis(recipe), recipe.evaluation.data
    if basis == "nothing":
        return None
    if basis == "generated":
        task = embedded_task(where, "evaluation.data") if where else embedded_task(recipe.data.source, "data.source")
        return EmbeddedSource(recipe.data, recipe.seed, task).held_out
    if basis == "server":
        split = _evaluation_split(recipe)
        records = read_records(where, knob="evaluation.data", split=split, fields=dict(recipe.data.fields))
        ordered = in_hashed_order(records, recipe.seed)  # files are often sorted, and less than all may be asked for
        return lambda count: ordered[:count]
    file = file_of(source)
    assert file is not None
    return file.held_out


def _evaluation_split(recipe: Recipe) -> str:
    """The split of evaluation.data that the server takes; files have none.

    Raises:
      DataError: that text is the clients' own.
    """
    place, owned = Place.parse(recipe.evaluation.data), Place.parse(recipe.data.source)
    if place.split:
        splits = [place.split]
    elif place.kind in TAXONOMIES:
        splits = [DEFAULT_SPLIT[place.kind]]
    elif place.kind == "hub":
        present = split_names(place.name, None, knob="evaluation.data")
        splits = [split for split in _SPLITS if split in present] or present
    else:
        splits = [place.clients_split]
    left = [split for split in splits if not (owned.is_same(place) and owned.shares_records(split))]
    if not left:
        raise DataError(
            f"evaluation.data = {recipe.evaluation.data!r} is the clients' own text (data.source): name text that no client has, or set whole "
            "owners aside with data.held_out_share."
        )
    return left[0]
