"""What a run tells and leaves is compared whole: nothing is left out because a clock moved, and no clock makes a false alarm."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_overrides
from drencoder.audit import secrecy
from drencoder.encoders.planning import load_checked_recipe
from drencoder.recipe.recipe import Recipe
from drencoder.runs import certificate

SMALL = [
    "prior.source=none", "federation.population=400", "federation.sampling_rate=0.5", "federation.rounds=1", "privacy.delta=1e-5",
    "privacy.trust=central", "encoder.name=random", "encoder.ratio=4", "encoder.gate=warn",
]  # fmt: skip


class _Clock(datetime):
    """Every reading is a second later than the one before, but the first two are equal."""

    readings = 0

    @classmethod
    def now(cls, tz: Any = None) -> "datetime":
        _Clock.readings += 1
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=max(0, _Clock.readings - 2))


@pytest.fixture
def recipe(tiny_folder: Path) -> Recipe:
    return load_checked_recipe("quickstart", [*tiny_overrides(tiny_folder), *SMALL])


def test_the_time_of_day_is_no_finding(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "datetime", _Clock)
    checks = secrecy.check_secrecy(recipe)
    assert _Clock.readings >= 5
    assert [check.passed for check in checks] == [True, True, True], checks


def test_the_certificate_is_always_among_what_is_compared(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that counts answers of a secret cohort is found, however late in a second a run ends."""
    whole = certificate.make_certificate
    counts = iter([7, 7, 7, 7, 6])

    def told(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**whole(*args, **kwargs), "answers": next(counts)}

    monkeypatch.setattr(certificate, "datetime", _Clock)
    monkeypatch.setattr("drencoder.runs.run.make_certificate", told)
    failed = [check.found for check in secrecy.check_secrecy(recipe) if not check.passed]
    assert len(failed) == 1
    assert "does not answer" in failed[0]
