"""What a plan says about the memory of training, and when."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from drencoder.recipe.recipe import load_recipe
from drencoder.runs import display, plan_overview
from drencoder.runs.display import plan_tables
from drencoder.runs.plan_overview import Overview, survey


def shown(overview: Overview) -> str:
    console = Console(file=io.StringIO(), width=300)
    for table in plan_tables(overview, "mine", "hybrid"):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_plan_states_training_beside_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "free_memory", lambda: 20_000_000_000)
    overview = replace(survey(load_recipe(None)), training_bytes=(1_500_000_000, 10_400_000_000))
    line = "training takes about 1.5 GB, up to 10.4 GB if a client's texts are as long as data.max_tokens; 20.0 GB are free here"
    assert line in shown(overview)
    monkeypatch.setattr(display, "free_memory", lambda: None)
    assert "training takes about 1.5 GB " in shown(replace(overview, training_bytes=(1_500_000_000,) * 2))
    assert "training takes" not in shown(replace(overview, training_bytes=None))


@pytest.mark.parametrize(("free", "warned"), [(1_400_000_000, True), (1_500_000_000, False), (None, False)])
def test_a_plan_that_does_not_fit_is_one_sentence(
    free: int | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    overview = replace(survey(load_recipe(None)), training_bytes=(1_500_000_000, 10_400_000_000))
    monkeypatch.setattr(plan_overview, "free_memory", lambda: free)
    sentences = [sentence for sentence in overview.warnings() if "memory" in sentence]
    assert bool(sentences) is warned
    assert all("1.5 GB" in sentence and "1.4 GB are free" in sentence for sentence in sentences)


def test_longer_records_and_larger_batches_take_more() -> None:
    def most(*settings: str) -> int:
        memory = survey(load_recipe("quickstart", settings)).training_bytes
        assert memory is not None
        return memory[1]

    plain = most()
    assert most("data.max_tokens=2048") > plain
    assert most("local.batch_size=64") > plain
    assert most("speed.tokens=100000") > plain
    assert most("model.dtype=bfloat16") < plain
