"""One recipe, the same sentence from every command: on knobs that nothing uses, and on text that cannot be read."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.audit import audit as audit_room
from drencoder.cli import main as cli
from drencoder.encoders.unused_knobs import unused_knobs
from drencoder.errors import DrencoderError
from drencoder.flower.client_app import open_site
from drencoder.flower.server_app import ServerOptions, serve
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.plan_overview import survey
from drencoder.study import compare as comparison
from flower_grid import InProcessGrid

STOP = "this test needs no training"
MESSAGE = "zzyzx"
RUN_BUILT = experiment.run_built


class Commands:
    """Every command that takes a recipe, stopped before it trains: its exit code and what it shows."""

    def __init__(self, recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe, self._capfd, self._monkeypatch = recipe, capfd, monkeypatch

    def __getitem__(self, name: str) -> Callable[[], tuple[int, str]]:
        return {"server": self._server, "client": self._client}.get(name, lambda: self._typed(name))

    def _typed(self, name: str) -> tuple[int, str]:
        out = [] if name in ("plan", "audit") else ["--out", str(self.recipe.parent / "made")]
        self._monkeypatch.setattr(sys, "argv", ["drencoder", name, str(self.recipe), *out])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, self._shown()

    def _server(self) -> tuple[int, str]:
        options = ServerOptions(load_recipe(self.recipe), self.recipe.parent / "made")
        return self._called(lambda: serve(InProcessGrid([]), options))

    def _client(self) -> tuple[int, str]:
        state = self.recipe.parent / "state"
        return self._called(lambda: open_site(str(self.recipe), "0/1", data=None, state=state, say=print))

    def _called(self, command: Callable[[], Any]) -> tuple[int, str]:
        try:
            command()
        except DrencoderError as error:
            print(error)
            return 2, self._shown()
        return 0, self._shown()

    def _shown(self) -> str:
        return " ".join(" ".join(self._capfd.readouterr()).split())


NAMES = ("plan", "run", "audit", "compare", "server", "client")


@pytest.fixture
def commands(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Commands]:
    def stop(*arguments: Any, **named: Any) -> None:
        raise DrencoderError(STOP)

    for room, name in ((experiment, "run_built"), (audit_room, "fit_encoder"), (comparison, "run_study")):
        monkeypatch.setattr(room, name, stop)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"{MESSAGE} {number}", "response": "well", "ward": f"w{number % 8}", "patient": f"p{number}"}
        for number in range(40)
    ]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [
        "data.source=notes.jsonl", "data.client_field=ward", "federation.population=8", "evaluation.data=notes.csv",
        "evaluation.benchmarks=[]", "federation.sampling_rate=0.5", "privacy.participation_cap=5",
    ]  # fmt: skip
    (tmp_path / "notes.csv").write_text("instruction,response\nhow?,so\nwhy?,because\n")

    def of(*overrides: str) -> Commands:
        recipe = load_recipe("quickstart", [*tiny_overrides(tiny_folder), *own, *overrides])
        (tmp_path / "mine.toml").write_text(recipe.to_toml())
        return Commands(tmp_path / "mine.toml", capfd, monkeypatch)

    return of


@pytest.mark.parametrize("name", NAMES)
def test_every_command_says_which_knobs_nothing_uses(name: str, commands: Callable[..., Commands]) -> None:
    _, shown = commands("data.owner_field=patient", "privacy.honest_share=0.9", "local.epochs=2")[name]()
    for sentence in (
        "data.owner_field = 'patient' has no effect: it is for privacy.unit = 'owner', and here epsilon protects one client.",
        "privacy.honest_share = 0.9 has no effect: it is for privacy.trust = 'secure-aggregation'.",
        "local.epochs = 2 has no effect: clients take no local steps with local.upload = 'gradient'.",
    ):
        assert shown.count(sentence) == 1, shown
    assert shown.count("has no effect") == 3
    assert MESSAGE not in shown


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.owner_field=nope", "record 1 of notes.jsonl has no field 'nope', or no text or number in it: set data.owner_field"),
        ("data.client_field=nope", "record 1 of notes.jsonl has no field 'nope', or no text or number in it: set data.client_field"),
    ],
)  # fmt: skip
def test_a_field_that_names_nobody_is_refused_by_every_command_that_has_the_text(
    name: str, override: str, words: str, commands: Callable[..., Commands]
) -> None:
    code, shown = commands(override)[name]()
    if name == "server":  # it has no client's text
        assert STOP in shown
        assert words not in shown
        return
    assert code == 2
    assert shown.count(words) == 1, shown
    assert STOP not in shown
    assert MESSAGE not in shown


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.data=absent.csv", "evaluation.data"),
        ("evaluation.benchmarks=mmlu=absent", "absent"),
        ("prior.public=absent.jsonl", "prior.provenance"),
        ("data.template=absent.jinja", "data.template = 'absent.jinja' cannot be read"),
        ("data.template=chat", "this model's tokenizer has no chat template"),
    ],
)
@pytest.mark.parametrize("source", ["notes.jsonl", "embedded"])
def test_other_text_that_is_not_there_is_refused_by_every_command_that_needs_it(
    name: str, override: str, words: str, source: str, commands: Callable[..., Commands]
) -> None:
    overrides = [f"data.source={source}", override] + ["data.client_field="] * (source == "embedded")
    code, shown = commands(*overrides)[name]()
    if name == "client" and not override.startswith("data."):  # the server alone has these
        assert code == 0, shown
        return
    assert code == 2
    assert words in shown
    assert STOP not in shown


DEFAULTS = load_recipe("quickstart")
MODES: dict[str, tuple[str, ...]] = {
    "local": (),
    "central": ("privacy.trust=central",),
    "secure": ("privacy.trust=secure-aggregation",),
    "non-private": ("privacy.trust=non-private",),
    "sites": ("privacy.unit=owner", "federation.units_per_site=10", "data.owner_field=patient"),
    "records": ("privacy.unit=record", "federation.units_per_site=10"),
    "zero": ("local.upload=zero", "privacy.trust=central"),
    "steps": ("local.upload=pseudo-gradient", "server.optimizer=fedavg", "encoder.name=identity", "prior.source=none"),
}
FILE = ("data.source=notes.jsonl", "data.client_field=ward", "federation.population=9", "evaluation.data=notes.csv")
# Knob -> another value than its default, and the modes in which it counts.
COUNTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data.owner_field": ("patient", ("sites",)),
    "federation.units_per_site": ("10", ("sites", "records")),
    "federation.nodes": ("6", ("secure",)),
    "privacy.dropout_share": ("0.1", ("secure",)),
    "privacy.honest_share": ("0.9", ("secure",)),
    "privacy.participation_cap": ("3", ("local", "secure", "steps")),
    "privacy.epsilon": ("4.0", tuple(mode for mode in MODES if mode != "non-private")),
    "privacy.relation": ("replace_one", tuple(mode for mode in MODES if mode != "non-private")),
    "local.epochs": ("2", ("steps", "zero")),
    "local.learning_rate": ("0.5", ("steps",)),
    "server.momentum": ("0.7", tuple(mode for mode in MODES if mode != "steps")),
    "encoder.ratio": ("16.0", tuple(mode for mode in MODES if mode != "steps")),
    "prior.sampling_rate": ("0.3", tuple(mode for mode in MODES if mode != "steps")),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", COUNTS)
def test_a_knob_is_named_where_it_does_not_count_and_nowhere_else(mode: str, key: str) -> None:
    value, counts = COUNTS[key]
    recipe = load_recipe("quickstart", [*FILE, *MODES[mode], f"{key}={value}"])
    assert (key in unused_knobs(recipe)) == (mode not in counts)


@pytest.mark.parametrize("mode", MODES)
def test_knobs_that_count_for_nothing_change_no_plan(mode: str) -> None:
    idle = [f"{key}={value}" for key, (value, counts) in COUNTS.items() if mode not in counts]
    assert idle
    costs = []
    for more in (idle, ()):
        overview = survey(load_recipe("quickstart", [*FILE, *MODES[mode], *more]))
        plan = overview.privacy
        epsilons = {name: guarantee.epsilon_pld for name, guarantee in plan.epsilons().items()}
        sizes = overview.code_size, overview.total_bytes, overview.training_bytes, overview.server_step, overview.clip
        costs.append((plan.noise_multiplier, plan.stage1_rate, plan.k_star(), plan.senders(1), epsilons, sizes))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("mode", ["central", "zero", "sites", "steps"])
def test_knobs_that_count_for_nothing_change_no_run(
    mode: str, tiny_folder: Path, commands: Any, tmp_path: Path
) -> None:
    """All of them together; the noise is replayed, so that two runs are alike bit for bit."""
    base = [
        *tiny_overrides(tiny_folder), *FILE, *MODES[mode], "federation.population=8", "federation.sampling_rate=0.5", "federation.rounds=2",
        "evaluation.benchmarks=[]", "privacy.noise=replay", "encoder.gate=warn", "privacy.participation_cap=3", "privacy.epsilon=2",
    ]  # fmt: skip
    commands()  # writes the files
    idle = []
    for key, (value, _) in COUNTS.items():
        if key in unused_knobs(load_recipe("quickstart", [*base, f"{key}={value}"])):
            idle.append(f"{key}={value}")
    assert len(idle) > 4
    adapters = []
    for name, more in (("without", []), ("with", idle)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiment, "run_built", RUN_BUILT)
            result = experiment.run(load_recipe("quickstart", [*base, *more]), tmp_path / name)
        adapters.append((result.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_a_plan_for_programs_has_the_sentences() -> None:
    command = [sys.executable, "-m", "drencoder", "plan", "--json", "--set", "federation.nodes=6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["unused_knobs"] == [
        "federation.nodes = 6 has no effect: it is for privacy.trust = 'secure-aggregation'."
    ]


def test_defaults_and_the_shipped_recipes_name_little() -> None:
    assert unused_knobs(Recipe()) == {}
    assert unused_knobs(DEFAULTS) == {}
    assert unused_knobs(load_recipe("silos")) == {}


def test_every_sentence_names_a_knob_of_the_recipe() -> None:
    recipe = load_recipe("silos", ["privacy.unit=client", "privacy.trust=central"])
    found = unused_knobs(recipe)
    assert set(found) == {"federation.units_per_site", "federation.nodes"}
    sections = {part.name for part in fields(Recipe)}
    for key, sentence in found.items():
        assert key.partition(".")[0] in sections
        assert sentence.startswith(f"{key} = ")
