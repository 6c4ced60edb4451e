"""The table of DESIGN as a test: a module imports only from lower levels, and each library has one door."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "drencoder"

# Modules of one level are strangers, except that inside a row an entry may import entries left of it.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "rng"),
    ("knobs", "sections"),
    ("config", "artifacts", "layout", "examples", "encoders.sizes"),
    (
        "secure.discrete",
        "secure.quantise",
        "secure.crypto",
        "secure.shamir",
        "secure.messages",
        "secure.node",
        "secure.server",
    ),
    (
        "privacy.sampling",
        "privacy.accounting",
        "privacy.observers",
        "privacy.plan",
        "privacy.curves",
        "privacy.tradeoff",
        "privacy.ledger",
        "privacy.site",
        "privacy.mechanism",
    ),
    (
        "overview",
        "methods",
        "plots",
        "curves_view",
        "data.template",
        "data.world_facts",
        "data.subjects",
        "data.world",
        "data.taxonomy",
        "data.prompts",
        "data.hub",
        "data.benchmark_files",
        "data.benchmarks",
        "data.source",
        "data.public",
        "scores",
        "model",
        "training",
    ),
    (
        "structured",
        "prior",
        "encoders.contract",
        "encoders.sketch",
        "encoders.rotated",
        "encoders.wire",
        "encoders.gate",
        "encoders.identity",
        "encoders.kronecker",
        "encoders.hybrid",
        "encoders.subset",
        "encoders.lowrank",
        "encoders.fedcg",
    ),
    ("encoders.architectures", "encoders.fitting", "encoders.autoencoder", "encoders.registry"),
    ("adaptive_clip", "decoding", "steps"),
    ("checkpoint", "engines.contract", "engines.aggregation", "engines.local", "evaluation", "starts"),
    ("build", "report", "verify"),
    (
        "engines.flower.agreement",
        "engines.flower.frames",
        "engines.flower.instruction",
        "engines.flower.roster",
        "engines.flower.seat",
        "engines.flower.transport",
        "engines.flower.rounds",
        "engines.flower.site",
        "engines.flower.engine",
        "engines.flower.keys",
        "engines.flower.processes",
        "engines.flower.superlink",
        "engines.flower.supernode",
        "engines.flower.tasks",
        "engines.flower.client_app",
    ),
    ("stage1", "results", "baselines", "assess", "assess_view"),
    ("experiment", "console"),
    ("engines.flower.server_app", "engines.flower.deploy", "engines.flower.simulation"),
    ("compare", "compare_table", "compare_view"),
    (
        "audit.findings",
        "audit.auc",
        "audit.arms",
        "audit.subjects",
        "audit.scene",
        "audit.tokens",
        "audit.memory",
        "audit.membership",
        "audit.leakages",
        "audit_view",
    ),
    ("cli_flower", "cli"),
)
ORDERED = {1, 3, 4, 5, 6, 7, 8, 9, 11, 14, 15, 16, 17}  # rows in which "left of it" is allowed
EVERYWHERE = {"drencoder"}  # only for __version__

DOORS = {
    "transformers": {"model"},
    "peft": {"model"},
    "datasets": {"data.hub"},
    "dp_accounting": {"privacy.accounting"},
    "matplotlib": {"plots"},
    "typer": {"cli", "cli_flower"},
    "rich": {
        "assess_view",
        "audit_view",
        "cli",
        "cli_flower",
        "compare_view",
        "console",
        "curves_view",
        "engines.flower.server_app",
    },
    "flwr": {
        f"engines.flower.{name}" for name in ("transport", "tasks", "client_app", "server_app", "deploy", "simulation")
    },
    "httpx": {"engines.flower.deploy", "engines.flower.tasks"},
    "uvicorn": {"engines.flower.superlink"},
    "cryptography": {"engines.flower.keys", "secure.crypto"},
    "tomli_w": {"config"},
}
TORCH_FREE = {
    "errors", "rng", "knobs", "sections", "config", "artifacts", "encoders.sizes", "overview", "report", "console", "cli", "verify",
    "privacy.sampling", "privacy.accounting", "privacy.observers", "privacy.plan", "privacy.ledger",
    "privacy.site", "cli_flower", "engines.flower.agreement", "engines.flower.frames", "engines.flower.keys",
    "engines.flower.processes", "engines.flower.superlink", "engines.flower.supernode", "engines.flower.roster",
    "privacy.curves", "privacy.tradeoff", "plots", "curves_view",
    "data.template", "data.world_facts", "data.subjects", "data.world", "data.source", "data.public",
    "data.taxonomy", "data.prompts", "data.hub", "data.benchmark_files", "data.benchmarks", "scores", "assess_view",
    "secure.discrete", "secure.quantise", "secure.crypto", "secure.shamir", "secure.messages", "secure.node", "secure.server",
    "methods", "compare", "compare_table", "compare_view", "audit.findings", "audit_view",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__") and name != "__main__":
            found[name] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path, known: dict[str, Path]) -> set[str]:
    names = {name.removeprefix("drencoder.") for name in imports(path) if name.startswith("drencoder")}
    return {name for name in names if name in known}


def place(name: str) -> tuple[int, int]:
    for level, row in enumerate(LEVELS):
        if name in row:
            return level, row.index(name)
    raise AssertionError(f"{name} has no place in the table: add it to LEVELS and to DESIGN's table")


def test_every_module_has_a_place_and_every_place_a_module() -> None:
    known = set(modules())
    assert known == {name for row in LEVELS for name in row}


def test_imports_point_down() -> None:
    known = modules()
    for name, path in known.items():
        level, position = place(name)
        for other in ours(path, known):
            other_level, other_position = place(other)
            allowed = other_level < level or (other_level == level and level in ORDERED and other_position < position)
            assert allowed, f"{name} imports {other}, which is not below it"


def test_each_library_has_one_door() -> None:
    for name, path in modules().items():
        for library, doors in DOORS.items():
            used = any(found == library or found.startswith(f"{library}.") for found in imports(path))
            assert not used or name in doors, f"{name} imports {library}; its door is {', '.join(sorted(doors))}"


def test_no_torch_where_a_plan_must_answer_in_a_second() -> None:
    known = modules()

    def loads_torch(name: str, seen: set[str]) -> bool:
        direct = imports(known[name], top_level_only=True)
        if any(found == "torch" or found.startswith("torch.") for found in direct):
            return True
        mine = {found.removeprefix("drencoder.") for found in direct if found.startswith("drencoder")} & set(known)
        return any(loads_torch(other, seen | {name}) for other in mine - seen)

    for name in TORCH_FREE:
        assert not loads_torch(name, set()), f"{name} loads torch at import"


def test_readme_map_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    listed = set(re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)*)`", readme))
    missing = {name for name in modules() if name not in listed}
    assert not missing, f"the README's map of the code lacks {sorted(missing)}"
