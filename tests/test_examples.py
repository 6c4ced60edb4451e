"""The examples that the README names run as they are written."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_one_round_by_hand_costs_what_its_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "by_hand.py"))
    shown = capsys.readouterr().out
    assert "against the server: epsilon 8.000." in shown
    assert [shown.count(f'"kind": "{kind}"') for kind in ("header", "charge", "contributors")] == [1, 1, 1]
    assert names["direction_D"].shape == names["lora"].initial_D.shape
    assert names["direction_D"].isfinite().all()
