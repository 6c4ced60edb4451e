"""The recipe: all sections of a run together, read from TOML, checked at birth.

No torch, no data, no work at import. A knob is declared once, with its bounds and its help (`sections`); reading,
overriding (`--set section.key=value`), checking, documenting and writing back all use that declaration.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomli_w

from drencoder.errors import RecipeError
from drencoder.reading import cut, parse_toml, read_text, reason, shown
from drencoder.recipe.knobs import Table, coerce
from drencoder.recipe.removed import reject_removed_key
from drencoder.recipe.sections import (
    Adapter,
    Data,
    Encoder,
    Evaluation,
    Federation,
    Local,
    Model,
    Prior,
    Privacy,
    Server,
    Speed,
)

Section = TypeVar("Section")

EMBEDDED_CLIENTS, EMBEDDED_SITES = 10_000, 10
"""Clients, or sites, of the embedded world, where a recipe does not say how many."""

STUDY_TABLE = "compare"
"""The table of a recipe file that is no part of a recipe: `drencoder compare` reads it (`study.settings`), a run does not."""

# Where a recipe names no sampling rate: a share of the clients, and of few clients so many that a round can learn (docs/log.md).
_SAMPLING_RATE, _LEAST_COHORT = 0.02, 32

_MOST_BYTES = 1 << 20  # of a recipe file
_LONGEST_NAME = 200  # bytes; files beside the run folder have its name and a suffix


@dataclass(frozen=True)
class Recipe:
    """A whole run, as data. Equal recipes with replayable noise give equal adapters."""

    name: str = "run"
    seed: int = 0
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    federation: Federation = field(default_factory=Federation)
    local: Local = field(default_factory=Local)
    server: Server = field(default_factory=Server)
    encoder: Encoder = field(default_factory=Encoder)
    prior: Prior = field(default_factory=Prior)
    privacy: Privacy = field(default_factory=Privacy)
    evaluation: Evaluation = field(default_factory=Evaluation)
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", coerce("name", self.name, str))
        object.__setattr__(self, "seed", coerce("seed", self.seed, int))
        if not self.name or any(letter in self.name for letter in '/\\:*?"<>|\0') or self.name in (".", ".."):
            raise RecipeError(f"name = {shown(self.name)} cannot name a folder: use letters, digits, - and _.")
        if len(self.name.encode()) > _LONGEST_NAME:
            raise RecipeError(
                f"name = {shown(self.name)} has {len(self.name.encode())} bytes, more than the {_LONGEST_NAME} that a folder's "
                "name leaves room for: shorten it."
            )
        if self.data.is_embedded and not self.federation.population:
            population = EMBEDDED_CLIENTS if self.privacy.unit == "client" else EMBEDDED_SITES
            object.__setattr__(self, "federation", dataclasses.replace(self.federation, population=population))
        _check_together(self)

    @property
    def sampling_rate(self) -> float:
        """Chance of a client (or other unit) to be in a round. Where none is named it follows from the population, which must be set.

        Where a client may answer so often only, as under local trust, it is no more than that leaves room for.
        """
        federation = self.federation
        if federation.sampling_rate:
            return federation.sampling_rate
        units = federation.population * (1 if self.privacy.unit == "client" else federation.units_per_site)
        return max(_SAMPLING_RATE, min(self.rate_within_cap, _LEAST_COHORT / units))

    @property
    def rate_within_cap(self) -> float:
        """The largest sampling rate that the participation cap leaves room for; 1 where there is no cap."""
        if self.privacy.trust not in ("local", "secure-aggregation") or self.privacy.unit != "client":
            return 1.0
        slots = self.federation.rounds + (self.prior.source != "none")
        return 1.0 / math.ceil(slots / self.privacy.participation_cap)

    @property
    def stage1_rate(self) -> float:
        """Chance of a client to be in stage 1; 0 when there is no stage 1."""
        if self.prior.source == "none":
            return 0.0
        return self.prior.sampling_rate or self.sampling_rate

    @property
    def stage1_epochs(self) -> int:
        """Epochs of which a client sends statistics, or gradients, in stage 1: all that it trains. A gradient has none."""
        return 1 if self.local.upload == "gradient" else self.local.epochs

    @property
    def benchmarks(self) -> dict[str, str]:
        """The multiple-choice benchmarks that are asked, name -> place: those named, and what `auto` stands for."""
        named = dict(item.partition("=")[::2] for item in self.evaluation.benchmarks)
        if named.pop("auto", None) is not None and self.model.source == "embedded" and self.data.is_embedded:
            named = {"mmlu": "", "ceval": ""} | named
        return {name: named[name] or "embedded" for name in ("mmlu", "ceval") if name in named}

    @property
    def threshold(self) -> int:
        """Secure aggregation: how many nodes must take part to the end."""
        return self.federation.nodes - math.floor(self.privacy.dropout_share * self.federation.nodes + 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain tables of scalars and lists, as written to `recipe.resolved.toml`."""
        tables = dataclasses.asdict(self)
        for section, kind in _SECTIONS.items():
            hints = get_type_hints(kind)
            for key, value in tables[section].items():
                whole = dict if hints[key] == Table else list
                tables[section][key] = whole(value) if isinstance(value, tuple) else value
        return tables

    def changed(self, values: Mapping[str, Any]) -> "Recipe":
        """This recipe with some knobs set, each named `section.key` (or `name`, `seed`); checked like a new one."""
        tables = self.to_dict()
        for key, value in values.items():
            section, dot, last = key.partition(".")
            (tables.setdefault(section, {}) if dot else tables)[last or section] = value
        return Recipe.from_dict(tables, origin=self.name)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], *, origin: str = "recipe") -> "Recipe":
        """Builds a recipe; unknown sections and keys raise `RecipeError` with the nearest known name."""
        keys = {"name", "seed", *_SECTIONS}
        parts: dict[str, Any] = {}
        for key, value in tables.items():
            if key not in keys:
                reject_removed_key(key, origin)
                raise RecipeError(_unknown(f"{origin}: {shown(key)}", key, keys))
            if key not in _SECTIONS:
                parts[key] = value
                continue
            parts[key] = read_section(key, value, _SECTIONS[key], origin)
        return cls(**parts)


_SECTIONS: dict[str, Any] = {
    part.name: part.type for part in dataclasses.fields(Recipe) if dataclasses.is_dataclass(part.type)
}


def read_section(key: str, value: Any, section: type[Section], origin: str) -> Section:
    """A section from its table; unknown keys raise `RecipeError` with the nearest known name."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{origin}: {key} = {shown(value)} is not a section: write [{key}] and keys below.")
    knobs = {declared.name for declared in dataclasses.fields(section)}  # type: ignore[arg-type]
    for inner in value:
        if inner not in knobs:
            reject_removed_key(f"{key}.{inner}", origin)
            raise RecipeError(_unknown(f"{origin}: {key}.{cut(inner)}", inner, knobs))
    return section(**value)


def _unknown(what: str, word: str, names: set[str]) -> str:
    near = difflib.get_close_matches(word, sorted(names), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}."
    return f"{what} is not a known key: {hint}"


def _check_together(recipe: Recipe) -> None:
    """Bounds that hold between knobs, whatever the encoder; `encoders.planning.check_encoder` holds the others."""
    privacy, encoder = recipe.privacy, recipe.encoder
    if privacy.trust == "secure-aggregation":
        _check_secure(recipe)
    if privacy.unit != "client":
        _check_sites(recipe)
    if recipe.data.held_out_share and recipe.evaluation.data:
        raise RecipeError(
            f"data.held_out_share = {recipe.data.held_out_share} sets owners aside for evaluation, and evaluation.data = "
            f"{shown(recipe.evaluation.data)} already gives the server its text: leave one of them out."
        )
    if 0 < encoder.ratio < 1:
        raise RecipeError(
            f"encoder.ratio = {encoder.ratio} would make codes longer than updates: give 1 or more, or 0 for a size from the plan."
        )
    if privacy.clip == "adaptive" and privacy.noise_in == "update":
        raise RecipeError(
            "privacy.clip = 'adaptive' needs noise in the codes and privacy.noise_in = 'update' puts it before them: set "
            "privacy.noise_in = 'code', or privacy.clip = 'fixed'."
        )


def _check_sites(recipe: Recipe) -> None:
    """What cannot be where sites send noised sums of their own units."""
    unit, trust, federation = recipe.privacy.unit, recipe.privacy.trust, recipe.federation
    if trust == "central":
        raise RecipeError(
            f"privacy.trust = 'central' would send sums without noise to the server, and with privacy.unit = {unit!r} each site adds "
            "the noise itself: set privacy.trust = 'secure-aggregation', which with privacy.honest_share = 1 adds nearly as little noise as "
            "a trusted server would, or 'local'."
        )
    if trust == "non-private":
        raise RecipeError(
            f"privacy.trust = 'non-private' has no unit and privacy.unit = {unit!r} names one: set privacy.unit = 'client' for a baseline."
        )
    if recipe.privacy.noise_in == "update" or recipe.prior.source == "gradients":
        key, values = ("prior.source", ("gradients", "moments"))
        if recipe.prior.source != "gradients":
            key, values = ("privacy.noise_in", ("update", "code"))
        raise RecipeError(
            f"privacy.unit = {unit!r} sums clipped codes at a site, and {key} = {values[0]!r} does not go with that: set {key} = "
            f"{values[1]!r}."
        )
    if not federation.units_per_site:
        raise RecipeError(
            f"privacy.unit = {unit!r} needs federation.units_per_site, how many {unit}s everybody may take a site to have: name a "
            "round number that does not come from the records, such as 100."
        )


def _check_secure(recipe: Recipe) -> None:
    """What secure aggregation cannot do, and the numbers of nodes that its protocol needs."""
    privacy, nodes = recipe.privacy, recipe.federation.nodes
    wire, source = recipe.encoder.wire_dtype, recipe.prior.source
    sized = "codes travel as integers with noise, of a size that follows"
    for key, value, required, why in (
        ("privacy.noise_in", privacy.noise_in, "code", "what is summed is the code"),
        ("encoder.wire_dtype", wire, "auto" if wire == "auto" else "float32", sized),
        ("prior.source", source, source.replace("gradients", "moments"), "nothing is seen alone"),
    ):
        if value != required:
            raise RecipeError(
                f"privacy.trust = 'secure-aggregation' gives the server sums of codes only, and {key} = {value!r} does not go "
                f"with that ({why}): set {key} = {required!r}."
            )
    colluding, allowed = math.floor((1 - privacy.honest_share) * nodes + 1e-9), 2 * recipe.threshold - nodes - 1
    if colluding > allowed:
        raise RecipeError(
            f"privacy.honest_share = {privacy.honest_share} lets {colluding} of {nodes} nodes collude with the server, and with "
            f"{recipe.threshold} needed to the end the protocol holds against {allowed}: raise honest_share, lower "
            "privacy.dropout_share, or add nodes."
        )


def shipped_recipes() -> dict[str, str]:
    """The recipes inside the package: name -> TOML text."""
    top = resources.files("drencoder.recipe") / "shipped"
    entries = {entry.name: entry for entry in top.iterdir()}
    entries |= {f"paper/{entry.name}": entry for entry in (top / "paper").iterdir()}
    return {
        name.removesuffix(".toml"): entry.read_text("utf-8")
        for name, entry in sorted(entries.items())
        if name.endswith(".toml")
    }


def load_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
      source: a TOML file, the name of a shipped recipe, or None for the embedded quickstart; where the overrides name a model or
        data of one's own, None stands for the defaults, since the quickstart's rate and clip were tuned for the embedded model.
      overrides: texts `section.key=value`; the value is TOML, or a bare word taken as text.

    Raises:
      RecipeError: the file is missing or not TOML, a key is unknown, or a value is impossible.
    """
    origin, tables = read_tables(source, overrides)
    tables.pop(STUDY_TABLE, None)
    return Recipe.from_dict(tables, origin=origin)


def read_tables(source: str | Path | None = None, overrides: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """What a recipe file says, with the overrides, unchecked: where it comes from, and its tables.

    Raises:
      RecipeError: as `load_recipe` does, but for keys and values.
    """
    named: dict[str, Any] = {}
    for override in overrides:
        _override(named, override)
    sections = [table for name in ("model", "data") if isinstance(table := named.get(name), Mapping)]
    places = (str(table.get("source", "embedded")) for table in sections)
    if source is None and any(place.partition(":")[0] != "embedded" for place in places):
        return "--set", named
    origin, text = _read("quickstart" if source is None else source)
    try:
        tables = parse_toml(text)
    except ValueError as error:
        raise RecipeError(f"{origin} cannot be read as a recipe ({error}): mend it there.") from None
    for override in overrides:
        _override(tables, override)
    return origin, tables


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    shipped = shipped_recipes()
    if isinstance(source, str) and source in shipped and not os.path.exists(path):
        return source, shipped[source]
    try:
        return cut(path), read_text(path, _MOST_BYTES)
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {shown(path)} does not exist: give a TOML file or one of {', '.join(shipped)}."
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {shown(path)} is a folder: give the TOML file in it.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {shown(path)} cannot be read ({reason(error)}): check the file.") from None


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {shown(override)} is not section.key=value: write, say, privacy.epsilon=2.")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a bare word, as a shell user writes it
    *sections, last = key.strip().split(".")
    if len(sections) > 1:
        raise RecipeError(f"--set {cut(key.strip())} has more than one dot: write section.key=value.")
    table = tables
    if sections:
        if sections[0] not in (*_SECTIONS, STUDY_TABLE):
            reject_removed_key(key.strip())
            reject_removed_key(sections[0])
            raise RecipeError(_unknown(f"--set {cut(key.strip())}: {shown(sections[0])}", sections[0], set(_SECTIONS)))
        table = tables.setdefault(sections[0], {})
        if not isinstance(table, dict):
            raise RecipeError(f"{sections[0]} = {shown(table)} is not a section: write [{sections[0]}] and keys below.")
    table[last] = value


def describe_knobs() -> list[tuple[str, str, str]]:
    """(section.key, default, help with bounds) of every knob, in order."""
    rows = [
        ("name", "'run'", "names the run folder"),
        (
            "seed",
            "0",
            "the same seed gives the same split, order of examples and sketches; noise does not follow from it",
        ),
    ]
    for name, section in _SECTIONS.items():
        for declared in dataclasses.fields(section):
            choices = declared.metadata["choices"]
            words = f" ({', '.join(choices)})" if choices else ""
            default = "{}" if get_type_hints(section)[declared.name] == Table else repr(declared.default)
            rows.append((f"{name}.{declared.name}", default, declared.metadata["help"] + words))
    return rows
