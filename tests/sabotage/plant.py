"""Plants each bug of `bugs.py` in a copy of the package and shows which test catches it.

    scripts/sabotage [--only WORDS] [--no-control] [--json FILE]

Takes about half a minute a bug on one core, so it is for now and then, not for every change. Exits with 1 if a bug survives.
The libraries are imported once; each bug has a process of its own, forked from there.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path

from bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]
LONGEST = 1200  # seconds of one bug's tests; a bug that makes them hang is caught


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose sentence or module has these words")
    parser.add_argument("--no-control", action="store_true", help="does not run the tests without a bug first")
    parser.add_argument("--json", type=Path, help="writes the table there")
    options = parser.parse_args()
    chosen = [bug for bug in BUGS if options.only in bug.breaks or options.only in bug.module]
    import dp_accounting  # noqa: F401  # what every test needs, once
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    if not options.no_control and (failed := plant(_no_bug(chosen), longest=10 * LONGEST)):
        raise SystemExit(f"Without a bug {failed} fails: mend that first.")
    rows = []
    for bug in chosen:
        start = time.monotonic()
        caught = plant(bug)
        rows.append({"breaks": bug.breaks, "module": bug.module, "caught_by": caught})
        print(f"{bug.breaks} ({bug.module}): {caught or 'SURVIVES'}  [{time.monotonic() - start:.0f} s]", flush=True)
    survivors = [row for row in rows if not row["caught_by"]]
    print(f"{len(rows)} bugs, {len(rows) - len(survivors)} caught, {len(survivors)} survive.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if survivors else 0


def _no_bug(bugs: Sequence[Bug]) -> Bug:
    """All tests of these bugs, and nothing planted."""
    return Bug(
        "nothing", "errors", "import", "import", tuple(dict.fromkeys(name for bug in bugs for name in bug.tests))
    )


def plant(bug: Bug, longest: float = LONGEST) -> str:
    """The first test that fails with the bug in place; empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        module = source / "drencoder" / f"{bug.module}.py"
        module.write_text(module.read_text().replace(bug.old, bug.new))
        report = Path(folder) / "report"
        child = os.fork()
        if child == 0:
            _run_tests(bug, source, report)
        deadline = time.monotonic() + longest
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "the tests do not end"
            time.sleep(0.1)
        if not report.exists():
            raise SystemExit(f"The tests of {bug.breaks!r} could not be run: run pytest on {', '.join(bug.tests)}.")
        return report.read_text()


def _run_tests(bug: Bug, source: Path, report: Path) -> None:
    """In the child: runs the tests against the copy and leaves the first failure's name. Never returns."""
    import pytest

    class FirstFailure:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.note(report)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            self.note(report)

        def note(self, one: pytest.TestReport | pytest.CollectReport) -> None:
            if one.failed and not report.exists():
                report.write_text(one.nodeid.removeprefix("tests/"))

    os.setpgid(0, 0)
    sys.modules["__main__"] = types.ModuleType("__main__")  # else processes that tests start import this script again
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(source)
    sys.path[:] = [str(source), *(p for p in sys.path if p not in (str(ROOT / "src"), str(Path(__file__).parent)))]
    tests = [str(ROOT / "tests" / name) for name in bug.tests]
    # The libraries are here before pytest could rewrite their assertions.
    quietly = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main(["-x", *quietly, "-m", "not slow", *tests], plugins=[FirstFailure()])
    if status == 0:
        report.write_text("")
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
