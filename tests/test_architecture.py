"""The rules of the rooms: a room imports only rooms below it, each outside library has one door and one version, files are short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "drencoder"
LEVELS = (
    {"errors", "reading", "rng"},
    {"recipe"},
    {"secure_aggregation"},
    {"privacy", "data"},
    {"models"},
    {"encoders", "evaluation"},
    {"published"},
    {"federated"},
    {"runs"},
    {"flower", "study", "audit"},
    {"cli"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
DOORS = {  # library -> rooms, or files of a room, that may import it
    "transformers": {"models"},
    "peft": {"models"},
    "datasets": {"data/hub", "evaluation/lm_eval_tasks"},
    "lm_eval": {"evaluation/lm_eval_tasks", "evaluation/lm_eval_runner"},
    "dp_accounting": {"privacy/accounting"},
    "matplotlib": {"runs/plots"},
    "typer": {"cli"},
    "rich": {"cli", "runs/display", "flower/server_app"},
    "flwr": {"flower"},
    "httpx": {"flower"},
    "uvicorn": {"flower"},
    "cryptography": {"flower/keys", "runs/signatures", "secure_aggregation/crypto"},
    "tomli_w": {"recipe"},
}
# What must answer in about a second: `import drencoder`, the commands' help, `plan` and `verify`.
TORCH_FREE = ("drencoder", "drencoder.cli.main", "drencoder.runs.plan_overview", "drencoder.runs.verify")
TABLES = {"tests/sabotage/bugs.py"}  # one entry a bug, all alike: longer than a file of code may be


def files() -> Iterator[tuple[str, Path]]:
    """(name such as `privacy/plan`, path) of every module in a room."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name not in ("__init__", "__main__"):
            yield name, path


def imported(path: Path, *, at_load: bool = False) -> set[str]:
    """Dotted names that a file imports; with `at_load` only those at its top level."""
    tree = ast.parse(path.read_text("utf-8"))
    names = set()
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_rooms_import_only_rooms_below() -> None:
    for name, path in files():
        room = name.split("/")[0]
        for other in {dotted.split(".")[1] for dotted in imported(path) if dotted.startswith("drencoder.")}:
            if other in LEVEL_OF and other != room:
                assert LEVEL_OF[other] < LEVEL_OF[room], f"{name} imports {other}, which is not below {room}"


def test_every_room_is_in_the_rules() -> None:
    assert {name.split("/")[0] for name, _ in files()} == set(LEVEL_OF)


def test_each_library_has_one_door() -> None:
    for name, path in files():
        libraries = {dotted.split(".")[0] for dotted in imported(path)}
        for library, doors in DOORS.items():
            if library in libraries:
                assert name in doors or name.split("/")[0] in doors, f"{name} imports {library}: {sorted(doors)} may"


def test_no_torch_where_an_answer_takes_a_second() -> None:
    paths = {f"drencoder.{name.replace('/', '.')}".removesuffix(".__init__"): path for name, path in files()}
    paths["drencoder"] = PACKAGE / "__init__.py"
    seen: set[str] = set()
    waiting = list(TORCH_FREE)
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        names = imported(paths[module], at_load=True)
        assert not any(name.split(".")[0] in ("torch", "transformers") for name in names), f"{module} loads torch"
        waiting += [name for name in names if name in paths]
        waiting += [
            name for name in (module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)) if name in paths
        ]


def test_the_lock_files_agree() -> None:
    """They are installed one after the other: a package with two versions would end as the last one says."""
    versions: dict[str, set[str]] = {}
    for lock in ROOT.glob("requirements*.lock"):
        for line in lock.read_text().splitlines():
            if match := re.match(r"([\w.-]+)(?:\[[^\]]*\])?==([^\s;]+)", line):
                versions.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), set()).add(match[2])
    assert len(versions) > 50
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_no_file_has_more_lines_than_a_reader_takes_in_at_once() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if path.relative_to(ROOT).as_posix() not in TABLES:
            assert len(path.read_text("utf-8").splitlines()) <= 400, f"split {path.name} along what it is about"


def test_only_the_package_itself_lists_its_names() -> None:
    """What a module offers are its names without an underscore; a second list of them would be kept in step by hand."""
    for name, path in files():
        assert not re.search(r"^__all__\b", path.read_text("utf-8"), re.MULTILINE), f"{name} lists its own names"
