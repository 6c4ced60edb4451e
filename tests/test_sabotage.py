"""The list of planted bugs fits the code: each can be planted, in one place, and still compiles (tests/sabotage/plant.py)."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "sabotage"))

from bugs import BUGS, Bug

SOURCE = Path(__file__).parents[1] / "src" / "drencoder"


def test_there_are_sixty_bugs_and_each_is_another() -> None:
    assert len(BUGS) >= 60
    assert len({(bug.module, bug.old, bug.new) for bug in BUGS}) == len({bug.breaks for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.breaks)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    text = (SOURCE / f"{bug.module}.py").read_text()
    assert text.count(bug.old) == 1
    compile(text.replace(bug.old, bug.new), bug.module, "exec")
    for name in bug.tests:
        assert (Path(__file__).parent / name).exists()
