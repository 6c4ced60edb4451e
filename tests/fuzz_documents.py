"""Readers of files: recipes, records, benchmarks, studies, a run's folder, keys."""

import random
from collections.abc import Callable
from pathlib import Path

from drencoder.data.benchmarks.files import read_questions
from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.places import read_records
from drencoder.encoders.planning import load_checked_recipe
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.flower.deploy import SiteEndpoint
from drencoder.models.place import ModelPlace
from drencoder.models.planned_layers import adapted_matrices
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.assess import assess
from drencoder.runs.checkpoint import load_checkpoint
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.signatures import check_signatures, sign_run
from drencoder.runs.tensor_files import adapter_digest, read_tensors
from drencoder.study.cells import CellStore, loss_of
from drencoder.study.settings import load_comparison
from fuzz_world import CANARY, PERSON, Mutate, Reader, World
from mutations import mutations_of

# --- documents -----------------------------------------------------------------------------------------


def recipe_file(world: World) -> Reader:
    text = load_recipe().to_toml() + '\n[compare]\nmethods = ["lora"]\nepsilons = [2.0]\n'
    return Reader(
        text.encode(), lambda path: (load_checked_recipe(path), load_comparison(path)), world.folder / "r.toml"
    )


def override(world: World) -> Reader:
    sets = [
        "privacy.epsilon=2",
        "name=run-1",
        "adapter.targets=['q_proj']",
        "evaluation.benchmarks=[]",
        "data.source=a.jsonl",
    ]

    def mutate(data: bytes, chance: random.Random) -> bytes:
        return mutations_of(chance.choice(sets).encode(), chance)

    def read(path: Path) -> object:
        return load_checked_recipe("quickstart", [path.read_bytes().decode("utf-8", "surrogateescape")])

    return Reader(sets[0].encode(), read, world.folder / "set", mutate, share=0.5)


RECORDS = [
    {"instruction": f"What has {PERSON}?", "context": "", "response": f"{PERSON} {i}", "category": "qa", "who": f"p{i}", "age": i}
    for i in range(4)
]  # fmt: skip


def records(name: str, data: bytes) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        return Reader(data, lambda path: read_records(str(path), knob="data.source"), world.folder / name)

    return made


def benchmark(name: str, split: str, subject: str, header: str) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        rows = "".join(
            f'{i if header else ""}{"," if header else ""}"{PERSON}, {i}?",yes,no,"per{chr(10)}haps",{CANARY},B\n'
            for i in range(4)
        )
        path = world.folder / name / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True)
        taxonomy = TAXONOMIES[name]
        return Reader(
            (header + rows).encode(), lambda _: read_questions(taxonomy, str(world.folder / name), split, ()), path
        )

    return made


def study(name: str) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        folder = world.folder / "study"
        with CellStore(folder, {"recipe": {"name": "x"}}) as store:
            for i in range(3):
                store.add(
                    {
                        "key": f"lora/seed{i}",
                        "seed": i,
                        "loss": {"value": 1.5, "low": 1.0, "high": 2.0},
                        "accuracy": {"mmlu": 0.5},
                    }
                )

        def read(_: Path) -> object:
            with CellStore(folder, {"recipe": {"name": "x"}}) as store:
                return [loss_of(row) for row in store.rows.values()]

        return Reader((folder / name).read_bytes(), read, folder / name)

    return made


def model_weights(world: World) -> Reader:
    source = Path(world.components.recipe.model.source) / "model.safetensors"
    folder = world.folder / "model"
    folder.mkdir()
    return Reader(
        source.read_bytes(),
        lambda _: adapted_matrices(ModelPlace(folder), ["q_proj"]),
        folder / "model.safetensors",
        in_header,
    )


# --- a run's folder --------------------------------------------------------------------------------------


def in_header(data: bytes, chance: random.Random) -> bytes:
    """Damage to a safetensors file: to the JSON of its header and what drencoder keeps in it, as often as to its bytes."""
    import json

    if chance.random() < 0.4:
        return mutations_of(data, chance)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = header.get("__metadata__", {})
    name = next(iter(facts), None)
    if name in ("drencoder", "prior") and chance.random() < 0.7:
        facts[name] = mutations_of(facts[name].encode(), chance).decode("utf-8", "replace")
        changed = json.dumps(header).encode()
    else:
        changed = mutations_of(data[8 : 8 + length], chance)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def run_file(
    name: str, read: Callable[[World, Path], object], mutate: Mutate = mutations_of, share: float = 1.0
) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        run = world.folder / "run"
        return Reader((run / name).read_bytes(), lambda _: read(world, run), run / name, mutate, share)

    return made


def read_checkpoint(world: World, run: Path) -> object:
    folder, lora = RunFolder(run), world.components.lora
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        progress = load_checkpoint(folder, ledger, lora.initial_D, lora.layout.segments)
    read_tensors(folder.checkpoints / "latest.safetensors")
    return world.components.encoder(progress.prior, dict(progress.encoder_state or {}))


def read_ledger(world: World, run: Path) -> object:
    with Ledger.open(run / "ledger.jsonl", read_only=True) as ledger:
        return ledger.charges()


def read_adapter(world: World, run: Path) -> object:
    return adapter_digest(run / "adapter" / "adapter_model.safetensors"), experiment.RunFolder(run)


def read_scores(world: World, run: Path) -> object:
    return assess(run)


# --- sites and keys ----------------------------------------------------------------------------------------


def site_ledger(world: World) -> Reader:
    path = world.folder / "state" / "site.jsonl"
    plan, digest = world.components.plan, agreement(world.components.recipe).hex()
    world.site([])
    ledger = SiteLedger.open(path, digest, plan)
    ledger.charge("run-1", 0, 0, [1, 2])
    ledger.charge("run-1", 1, 0, [3])
    ledger.close()

    def read(path: Path) -> object:
        ledger = SiteLedger.open(path, digest, plan)
        try:
            return ledger.charge("run-1", 1, 0, [4])
        finally:
            ledger.close()

    return Reader(path.read_bytes(), read, path)


def signatures(world: World) -> Reader:
    folder = RunFolder(world.folder / "run")
    sign_run(folder, world.certificates / "signing.key")

    def read(_: Path) -> object:
        with Ledger.open(folder.ledger, read_only=True) as ledger:
            good, troubles = check_signatures(folder, ledger, {})
        assert all(line.isprintable() and len(line) < 1000 for line in troubles)
        return good

    return Reader(folder.signatures.read_bytes(), read, folder.signatures)


def key_file(name: str, read: Callable[[Path], object]) -> Callable[[World], Reader]:
    def made(world: World) -> Reader:
        return Reader((world.certificates / name).read_bytes(), read, world.folder / Path(name).name)

    return made


def read_authority(path: Path) -> object:
    key = path.with_name("key")
    key.touch()
    return SiteEndpoint("localhost:9", path, key, path.parent).check()


def read_clients(path: Path) -> object:
    return ClientSet.parse(path.read_bytes().decode("utf-8", "surrogateescape"), 10_000)
