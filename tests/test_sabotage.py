"""The list of planted bugs fits the code and docs/planted-bugs.md: each can be planted in one place and compiles (tests/sabotage/plant.py)."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "sabotage"))

from bugs import BUGS, Bug

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "drencoder"


def test_there_are_sixty_bugs_and_each_is_another() -> None:
    assert len(BUGS) >= 60
    assert len({(bug.module, bug.old, bug.new) for bug in BUGS}) == len({bug.breaks for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.breaks)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    text = (SOURCE / f"{bug.module}.py").read_text()
    assert text.count(bug.old) == 1
    compile(text.replace(bug.old, bug.new), bug.module, "exec")
    for name in bug.tests:
        assert (ROOT / "tests" / name).exists()


def test_the_tests_that_the_documents_name_are_there() -> None:
    pages = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("guarantee.md", "planted-bugs.md"))
    named = re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)", pages)
    assert len(named) >= 60
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), f"{file} has no {test}"
