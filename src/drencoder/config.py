"""The recipe: every knob of a run as frozen dataclasses, read from TOML, checked at birth.

No torch, no data, no work at import. A knob is declared once, with its bounds and its help; reading,
overriding (`--set section.key=value`), checking, documenting and writing back all use that declaration.
Knobs under `[speed]` change how fast a run is and never what it computes (up to float rounding).
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w

from drencoder.errors import RecipeError

__all__ = [
    "Adapter",
    "Data",
    "Encoder",
    "Evaluation",
    "Federation",
    "Local",
    "Model",
    "Prior",
    "Privacy",
    "Recipe",
    "Server",
    "Speed",
    "describe_knobs",
    "load_recipe",
    "shipped_recipes",
]


def _knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Declares a knob: `low`/`high` are inclusive bounds, `above`/`below` exclusive ones."""
    bounds = {"low": low, "above": above, "high": high, "below": below, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **bounds})


class _Checked:
    """Checks every knob of a section against its declaration when the section is made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for knob in dataclasses.fields(self):  # type: ignore[arg-type]
            where = f"{type(self).__name__.lower()}.{knob.name}"
            value = _coerce(where, getattr(self, knob.name), hints[knob.name])
            object.__setattr__(self, knob.name, value)
            _check_bounds(where, value, knob.metadata)


def _coerce(where: str, value: Any, kind: Any) -> Any:
    """Brings a TOML value to the declared type, or says what was expected."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (tuple[str, ...], tuple[int, ...]) and isinstance(value, list | tuple):
        item_kind = kind.__args__[0]
        return tuple(_coerce(f"{where}[{i}]", item, item_kind) for i, item in enumerate(value))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text in quotes"}
    expected = names.get(kind, "a list of texts" if kind == tuple[str, ...] else "a list of whole numbers")
    raise RecipeError(f"{where} = {value!r} is not {expected}: write {expected}.")


def _check_bounds(where: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if bounds["choices"]:
        for item in value if isinstance(value, tuple) else (value,):
            if item not in bounds["choices"]:
                raise RecipeError(f"{where} = {item!r} is not known: choose one of {', '.join(bounds['choices'])}.")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if not math.isfinite(value):
        raise RecipeError(f"{where} = {value} is not finite: give a finite number.")
    for name, broken, words in (
        ("low", lambda bound: value < bound, "at least"),
        ("above", lambda bound: value <= bound, "above"),
        ("high", lambda bound: value > bound, "at most"),
        ("below", lambda bound: value >= bound, "below"),
    ):
        if bounds[name] is not None and broken(bounds[name]):
            raise RecipeError(f"{where} = {value} is out of range: it must be {words} {bounds[name]:g}.")


@dataclass(frozen=True)
class Model(_Checked):
    """The frozen base model."""

    source: str = _knob("embedded", "`embedded`, a local Hugging Face folder, or a hub id")
    dtype: str = _knob("float32", "type of the frozen weights", choices=("float32", "bfloat16", "float16"))
    device: str = _knob("auto", "`auto` takes a GPU when there is one", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class Adapter(_Checked):
    """The LoRA adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = _knob(8, "rank r of every LoRA pair", low=1)
    alpha: float = _knob(16.0, "LoRA alpha: the product B A is scaled by alpha / rank", above=0)
    dropout: float = _knob(0.0, "dropout on the input of A while training", low=0, below=1)
    targets: tuple[str, ...] = _knob(
        ("q_proj", "k_proj", "v_proj", "o_proj"), "names of the linear modules that get a LoRA pair"
    )
    layers: tuple[int, ...] = _knob((), "indices of the layers that get one; empty = all")


@dataclass(frozen=True)
class Data(_Checked):
    """Where the clients' text comes from, and how it is spread over them."""

    source: str = _knob("embedded", "`embedded`, a .jsonl/.json file in Dolly's schema, or `hub:ORG/NAME`")
    alpha: float = _knob(0.5, "Dirichlet concentration over categories; small = clients differ", above=0)
    examples_per_client: int = _knob(8, "records a client holds (embedded) or uses at most", low=1)
    client_field: str = _knob("", "field that names a record's owner; empty = Dirichlet split")
    max_tokens: int = _knob(512, "tokens of an example; a longer prompt loses its beginning", low=8)
    held_out_share: float = _knob(0.05, "share of a file kept by the server for evaluation", above=0, below=1)


@dataclass(frozen=True)
class Federation(_Checked):
    """Who takes part, and how often."""

    population: int = _knob(10_000, "registered clients N", low=1)
    sampling_rate: float = _knob(0.02, "chance q of a client to be in a round", above=0, high=1)
    rounds: int = _knob(20, "rounds T of stage 2", low=1)


@dataclass(frozen=True)
class Local(_Checked):
    """What a client computes."""

    upload: str = _knob(
        "gradient",
        "gradient: mean gradient; pseudo-gradient: SGD path / (lr * steps); increment: AdamW increment; "
        "state: the trained adapter itself (as a comparator only: almost all of it is shared start)",
        choices=("gradient", "pseudo-gradient", "increment", "state"),
    )
    epochs: int = _knob(1, "local epochs (not for `gradient`)", low=1)
    batch_size: int = _knob(8, "examples of a local step", low=1)
    learning_rate: float = _knob(0.01, "local learning rate (not for `gradient`)", above=0)


@dataclass(frozen=True)
class Server(_Checked):
    """The server's optimiser (FedOpt, Reddi et al. 2021, https://arxiv.org/abs/2003.00295)."""

    optimizer: str = _knob("fedadam", "the server's step", choices=("fedavg", "fedavgm", "fedadam"))
    learning_rate: float = _knob(0.02, "server learning rate", above=0)
    final_share: float = _knob(1.0, "the last round's share of the learning rate; falls linearly to it", low=0, high=1)
    momentum: float = _knob(0.9, "momentum, or beta1 of fedadam", low=0, below=1)
    beta2: float = _knob(0.99, "beta2 of fedadam", low=0, below=1)
    tau: float = _knob(1e-8, "adaptivity floor of fedadam", above=0)


@dataclass(frozen=True)
class Encoder(_Checked):
    """How an update becomes a code."""

    name: str = _knob("random", "the encoder", choices=("identity", "random", "autoencoder"))
    ratio: float = _knob(64.0, "adapter values per code value (not for `identity`)", low=1)
    floor: float = _knob(0.6, "share of the code spread evenly whatever the prior says", low=0, high=1)
    wire_dtype: str = _knob(
        "float32",
        "type of a code on the wire; under local trust float16 leaves the public no better epsilon than the server",
        choices=("float16", "float32"),
    )
    gate: str = _knob("refuse", "what to do with an encoder that carries nothing", choices=("refuse", "warn"))
    train_steps: int = _knob(400, "training steps of the auto-encoder at most", low=1)
    normalise: str = _knob("rms", "input scale of the auto-encoder", choices=("none", "rms"))


@dataclass(frozen=True)
class Prior(_Checked):
    """Stage 1: the random prior that the encoder is made from."""

    source: str = _knob(
        "moments", "`moments`: a charged, noised query; `none`: no stage 1", choices=("moments", "none")
    )
    sampling_rate: float = _knob(0.0, "chance of a client to be in stage 1; 0 = as in a round", low=0, high=1)
    noise_ratio: float = _knob(1.0, "stage 1's noise multiplier over a round's", above=0)
    clip_l2: float = _knob(1.0, "L2 bound of a client's statistics vector", above=0)
    synthetic: int = _knob(512, "synthetic gradients drawn for fitting and for the gate", low=16)


@dataclass(frozen=True)
class Privacy(_Checked):
    """The promise. See docs/guarantee.md."""

    epsilon: float = _knob(8.0, "target epsilon against the strongest untrusted observer", above=0)
    delta: float = _knob(1e-5, "delta", above=0, below=1)
    noise_multiplier: float = _knob(0.0, "noise std / clip_l2; 0 = calibrate to epsilon", low=0)
    trust: str = _knob(
        "local",
        "local: the server is not trusted, each client adds full noise; central: the server adds it; "
        "non-private: no noise and no guarantee, for baselines only",
        choices=("local", "central", "non-private"),
    )
    noise_in: str = _knob(
        "code",
        "code: encode, clip, noise; update: clip, noise, encode (as published)",
        choices=("code", "update"),
    )
    relation: str = _knob(
        "add_remove",
        "adjacency that epsilon is calibrated for; both are reported",
        choices=("add_remove", "replace_one"),
    )
    clip_l2: float = _knob(1.0, "L2 bound of a client's contribution, where the noise is added", above=0)
    participation_cap: int = _knob(1, "releases of one client at most, stage 1 included (local trust)", low=1)
    noise: str = _knob(
        "secure",
        "secure: from the operating system; replay: from the seed, for tests only, NOT private",
        choices=("secure", "replay"),
    )


@dataclass(frozen=True)
class Evaluation(_Checked):
    """What is measured, on data that the server holds."""

    every: int = _knob(1, "rounds between two evaluations; 0 = only at the end", low=0)
    progress_examples: int = _knob(128, "examples and questions of an evaluation between rounds", low=1)
    examples: int = _knob(1024, "held-out examples of the final table", low=1)
    questions: int = _knob(1024, "multiple-choice questions of the final table, per benchmark", low=1)
    benchmarks: tuple[str, ...] = _knob(("mmlu", "ceval"), "multiple-choice benchmarks", choices=("mmlu", "ceval"))


@dataclass(frozen=True)
class Speed(_Checked):
    """How fast, never what."""

    parallel_clients: int = _knob(32, "clients that train as one batch; 1 = one by one through PEFT", low=1)
    threads: int = _knob(0, "CPU threads of torch; 0 = all cores", low=0)


_SECTIONS: dict[str, type] = {
    "model": Model,
    "adapter": Adapter,
    "data": Data,
    "federation": Federation,
    "local": Local,
    "server": Server,
    "encoder": Encoder,
    "prior": Prior,
    "privacy": Privacy,
    "evaluation": Evaluation,
    "speed": Speed,
}


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
        object.__setattr__(self, "name", _coerce("name", self.name, str))
        object.__setattr__(self, "seed", _coerce("seed", self.seed, int))
        if not self.name or any(letter in self.name for letter in '/\\:*?"<>|\0') or self.name in (".", ".."):
            raise RecipeError(f"name = {self.name!r} cannot name a folder: use letters, digits, - and _.")
        _check_together(self)

    @property
    def stage1_rate(self) -> float:
        """Chance of a client to be in stage 1; 0 when there is no stage 1."""
        if self.prior.source == "none":
            return 0.0
        return self.prior.sampling_rate or self.federation.sampling_rate

    def to_dict(self) -> dict[str, Any]:
        """Plain tables of scalars and lists, as written to `recipe.resolved.toml`."""
        tables = dataclasses.asdict(self)
        for section in _SECTIONS:
            for key, value in tables[section].items():
                tables[section][key] = list(value) if isinstance(value, tuple) else value
        return tables

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], *, origin: str = "recipe") -> "Recipe":
        """Builds a recipe; unknown sections and keys raise `RecipeError` with the nearest known name."""
        known = {"name", "seed", *_SECTIONS}
        parts: dict[str, Any] = {}
        for key, value in tables.items():
            if key not in known:
                raise RecipeError(_unknown(f"{origin}: {key!r}", key, known))
            if key not in _SECTIONS:
                parts[key] = value
                continue
            if not isinstance(value, Mapping):
                raise RecipeError(f"{origin}: {key} = {value!r} is not a section: write [{key}] and keys below.")
            section = _SECTIONS[key]
            keys = {knob.name for knob in dataclasses.fields(section)}
            for inner in value:
                if inner not in keys:
                    raise RecipeError(_unknown(f"{origin}: {key}.{inner}", inner, keys))
            parts[key] = section(**value)
        return cls(**parts)


def _unknown(what: str, word: str, known: set[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
    return f"{what} is not a known key: {hint}"


def _check_together(recipe: Recipe) -> None:
    """Bounds that hold between knobs."""
    privacy, encoder = recipe.privacy, recipe.encoder
    if encoder.name == "autoencoder" and recipe.prior.source == "none":
        raise RecipeError(
            "encoder.name = 'autoencoder' is trained on synthetic gradients and prior.source = 'none' gives none: "
            "set prior.source = 'moments'."
        )
    if encoder.name == "autoencoder" and privacy.trust != "local" and privacy.noise_in == "code":
        raise RecipeError(
            "encoder.name = 'autoencoder' is not linear, so a sum of its codes cannot be decoded: with "
            f"privacy.trust = {privacy.trust!r} set privacy.noise_in = 'update', or use trust = 'local'."
        )


def shipped_recipes() -> dict[str, str]:
    """The recipes inside the package: name -> TOML text."""
    folder = resources.files("drencoder") / "recipes"
    return {
        entry.name.removesuffix(".toml"): entry.read_text("utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }


def load_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
      source: a TOML file, the name of a shipped recipe, or None for the embedded quickstart.
      overrides: texts `section.key=value`; the value is TOML, or a bare word taken as text.

    Raises:
      RecipeError: the file is missing or not TOML, a key is unknown, or a value is impossible.
    """
    origin, text = _read(source)
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{origin} is not valid TOML: {error}.") from None
    for override in overrides:
        _override(tables, override)
    return Recipe.from_dict(tables, origin=origin)


def _read(source: str | Path | None) -> tuple[str, str]:
    if source is None:
        source = "quickstart"
    path = Path(source)
    shipped = shipped_recipes()
    if isinstance(source, str) and source in shipped and not path.exists():
        return source, shipped[source]
    try:
        return str(path), path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {str(source)!r} does not exist: give a TOML file or one of {', '.join(shipped)}."
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {str(source)!r} is a folder: give the TOML file in it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(source)!r} cannot be read ({error}): check the file.") from None


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override!r} is not section.key=value: write, say, privacy.epsilon=2.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word, as a shell user writes it
    *sections, last = key.strip().split(".")
    if len(sections) > 1:
        raise RecipeError(f"--set {key.strip()} has more than one dot: write section.key=value.")
    table = tables
    if sections:
        if sections[0] not in _SECTIONS:
            raise RecipeError(_unknown(f"--set {key.strip()}: {sections[0]!r}", sections[0], set(_SECTIONS)))
        table = tables.setdefault(sections[0], {})
        if not isinstance(table, dict):
            raise RecipeError(f"{sections[0]} = {table!r} is not a section: write [{sections[0]}] and keys below.")
    table[last] = value


def describe_knobs() -> list[tuple[str, str, str]]:
    """(section.key, default, help with bounds) of every knob, in order."""
    rows = [("name", "'run'", "names the run folder"), ("seed", "0", "of everything that may be replayed")]
    for name, section in _SECTIONS.items():
        for knob in dataclasses.fields(section):
            choices = knob.metadata["choices"]
            words = f" ({', '.join(choices)})" if choices else ""
            rows.append((f"{name}.{knob.name}", repr(knob.default), knob.metadata["help"] + words))
    return rows
