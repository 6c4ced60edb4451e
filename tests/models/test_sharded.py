"""A model whose layers are split over two processes of the CPU computes what the whole model does, bit for bit, and none of them is left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_examples, tiny_overrides
from drencoder.data.tokenization import Example
from drencoder.errors import DeviceError
from drencoder.evaluation.held_out import held_out_loss
from drencoder.models import cohort_training
from drencoder.models.base_model import load_base
from drencoder.models.client_training import CohortTrainer
from drencoder.models.cohort_training import Pass, blank_pass, cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.models.sharded import open_lora
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import Recipe
from tiny_models import make_model

LONGEST = 120.0  # seconds of a test; one that hangs ends with an error of the ranks
# Several have as many steps as others and texts of other lengths, so that they are in other passes of the same step.
CLIENTS = [random_examples(count, seed, longest=6 * seed + 6) for seed, count in enumerate((3, 1, 7, 4, 5, 6, 2))]
SEEDS = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def pair(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LoraModel, LoraModel]]:
    """A model whole, and the same over two ranks; with dropout."""
    folder = make_model(request.param, tmp_path_factory.mktemp("sharded") / "model", tiny_folder)
    recipe = Recipe(
        model=config.Model(source=str(folder)),
        adapter=config.Adapter(rank=4, dropout=0.2),
        speed=config.Speed(tokens=200),
    )
    split = replace(recipe, model=config.Model(source=str(folder), device="shard"))
    loras = [open_lora(load_base(one.model), one) for one in (recipe, split)]
    yield loras[0], loras[1]
    ranks_of(loras[1]).close()


def ranks_of(lora: LoraModel) -> Any:
    return getattr(lora.compute, "__self__")  # noqa: B009  # a function's object, which its type does not tell


@pytest.fixture(autouse=True)
def bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """A rank that waits for ever is ended, and rank 0 with an error, so that a hang is a failed test."""
    if "pair" not in request.fixturenames:
        yield
        return
    ranks = ranks_of(request.getfixturevalue("pair")[1])
    timer = threading.Timer(LONGEST, lambda: [process.kill() for process in ranks._processes])
    timer.start()
    yield
    timer.cancel()


def moved(lora: LoraModel) -> torch.Tensor:
    return lora.initial_D + 0.05 * torch.randn(lora.layout.size, generator=torch.Generator().manual_seed(3))


def both(pair: tuple[LoraModel, LoraModel], upload: str = "gradient", clients: Any = CLIENTS) -> list[torch.Tensor]:
    local = config.Local(upload=upload, batch_size=3, learning_rate=0.01)
    return [cohort_updates(lora, moved(pair[0]), clients, local, SEEDS[: len(clients)]) for lora in pair]


@pytest.mark.parametrize("upload", ["gradient", "increment"])
@pytest.mark.parametrize("fit_tokens", [10**9, 0, 60], ids=["kept", "recomputed", "some"])
def test_updates_are_those_of_the_whole_model(
    pair: tuple[LoraModel, LoraModel], upload: str, fit_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    honest = pair[1].compute
    assert honest is not None
    monkeypatch.setattr(pair[1], "compute", lambda passes: together.append(len(passes)) or honest(passes))
    for lora in pair:
        monkeypatch.setattr(lora, "fit_tokens", fit_tokens)
        monkeypatch.setattr(lora, "pass_tokens", 8)  # a client's texts are cut into pieces
    whole, split = both(pair, upload)
    assert whole.any(dim=1).all()
    assert torch.equal(whole, split)
    assert torch.equal(*both(pair, upload, CLIENTS[:1]))  # a client that draws is in one pass at a time
    assert {1, 2} == set(together)


def test_each_rank_has_a_half_of_the_layers(pair: tuple[LoraModel, LoraModel]) -> None:
    whole, split = ({name: p for name, p in lora.base.model.named_parameters()} for lora in pair)
    halves = [name for name, p in split.items() if hasattr(p, "to_local") and p.to_local().numel() < p.numel()]
    layers = [name for name in whole if ".layers." in name or ".h." in name]
    assert set(halves) == {name for name in layers if ".lora_" not in name}
    assert all(split[name].to_local().numel() * 2 == whole[name].numel() for name in halves if whole[name].ndim == 2)


def test_everything_else_is_computed_as_by_the_whole_model(pair: tuple[LoraModel, LoraModel], tmp_path: Path) -> None:
    adapter_D = moved(pair[0])
    losses = [held_out_loss(lora, adapter_D, CLIENTS[2]) for lora in pair]
    assert losses[0] == losses[1]
    assert len({tuple(lora.base.write(2, 12, 7)) for lora in pair}) == 1
    for lora, name in zip(pair, ("whole", "split"), strict=True):
        lora.save(adapter_D, tmp_path / name)
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "split")}) == 1
    assert torch.equal(*both(pair))


class FaultError(Exception):
    pass


@pytest.mark.parametrize("where", ["before", "forward", "backward", "text", "another rank", "another rank's end"])
def test_what_fails_on_one_rank_stops_no_other(
    pair: tuple[LoraModel, LoraModel], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' next pass is as if nothing had been."""
    _whole, split = pair
    wrong = blank_pass(split)
    if where == "another rank":
        wrong = replace(wrong, pieces=[replace(wrong.pieces[0], examples=[Example((10**6, 1), 1)])])
    elif where == "another rank's end":  # after its layers have run, and before they run backwards
        two = {
            "pieces": wrong.pieces * 2,
            "adapter_KD": wrong.adapter_KD.repeat(2, 1),
            "generators": [*wrong.generators] * 2,
        }
        wrong = replace(wrong, **two, total_K=torch.ones(3))
    elif where == "backward":
        products = sys.modules["drencoder.models.client_products"]._AdaptedProducts
        monkeypatch.setattr(products, "backward", staticmethod(fail))
    layer = split.base.model.get_input_embeddings() if where == "before" else list(layers_of(split))[1]
    hook = layer.register_forward_hook(fail) if where in ("before", "forward", "text") else None
    try:
        if where == "text":
            with pytest.raises(FaultError):
                held_out_loss(split, moved(split), CLIENTS[2])
        else:
            compute = split.compute
            assert compute is not None
            with pytest.raises(RuntimeError, match="a pass failed"):
                compute([blank_pass(split), wrong])
    finally:
        if hook is not None:
            hook.remove()
        monkeypatch.undo()
    assert torch.equal(*both(pair))
    assert held_out_loss(pair[0], moved(split), CLIENTS[2]) == held_out_loss(split, moved(split), CLIENTS[2])


def layers_of(lora: LoraModel) -> Any:
    decoder = lora.base.model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def fail(*_: Any) -> Any:
    raise FaultError("a client's text")


def test_too_little_memory_of_one_rank_costs_time_and_nobodys_contribution(
    pair: tuple[LoraModel, LoraModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, trainers = cohort_training.compute_pass, []
    for lora in pair:
        monkeypatch.setattr(lora, "fit_tokens", 10**9)
        monkeypatch.setattr(lora, "batch_tokens", 200)
        trainers.append(CohortTrainer(lora, lambda client, _slot: CLIENTS[client], config.Local(), 0, 8))

    def small(lora: LoraModel, one: Pass) -> torch.Tensor:
        if lora is pair[1] and lora.fit_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(lora, one)

    monkeypatch.setattr("drencoder.models.sharded.compute_pass", small)
    whole, split = (trainer.train_clients(moved(pair[0]), [0, 1, 2, 3], 1, 1) for trainer in trainers)
    assert torch.equal(whole, split)
    assert pair[1].fit_tokens == 0


def test_a_second_model_in_a_process_is_one_sentence(pair: tuple[LoraModel, LoraModel]) -> None:
    recipe = Recipe(model=config.Model(device="shard"))
    with pytest.raises(DeviceError, match="can split one model in a process"):
        open_lora(load_base(recipe.model), recipe)


def test_an_order_that_the_others_do_not_follow_is_an_error_and_no_wait(pair: tuple[LoraModel, LoraModel]) -> None:
    """A gradient outside of passes would gather layers for which the others give nothing."""
    split = pair[1]
    stack = {name: tensor[None].requires_grad_() for name, tensor in split.layout.unflatten(moved(split)).items()}
    with split.stacked(stack):
        loss = split.base.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum()
        with pytest.raises(DeviceError, match="asked for a gradient in a way"):
            loss.backward()
    assert torch.equal(*both(pair))


def piece(client: int, length: int) -> Any:
    return cohort_training._Piece(client, [Example((1,) * length, 1)], length)


def test_shares_that_draw_from_one_generator_are_not_computed_at_once() -> None:
    a, b, c = (
        [piece(client, length) for client, length in share] for share in ([(0, 8)], [(0, 16), (1, 16)], [(2, 16)])
    )
    alike = [[piece(1, 24)], [piece(3, 32)]]
    shares = [a, b, c, *alike]
    assert list(cohort_training._in_turn(shares, 1, drawing=True)) == [[share] for share in shares]
    assert list(cohort_training._in_turn(shares, 2, drawing=False)) == [[a, b], [c, alike[0]], [alike[1]]]
    # b waits for a's client 0, and client 1's second share for b.
    assert list(cohort_training._in_turn(shares, 2, drawing=True)) == [[a, c], [b, alike[1]], [alike[0]]]
    assert list(cohort_training._in_turn(shares, 3, drawing=True)) == [[a, c, alike[1]], [b], [alike[0]]]


# --- whole runs -----------------------------------------------------------------------------------

SET = ["model.device=shard", "privacy.noise=replay", "privacy.trust=central", "model.source=embedded"]


def command(tmp_path: Path, name: str, *overrides: str) -> list[str]:
    settings = [*tiny_overrides(tmp_path), *overrides]
    words = [word for one in settings for word in ("--set", one)]
    return [sys.executable, "-m", "drencoder", "run", "quickstart", *words, "--out", str(tmp_path / name), "-q"]


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=one_thread())


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def ranks_below(parent: int) -> list[int]:
    """Processes of ranks: the children that Python's spawn began, without the one that keeps its semaphores."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found += [int(folder.name)] * (above == parent and b"spawn_main" in (folder / "cmdline").read_bytes())
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_whole_run_has_the_adapter_of_the_unsplit_model(tmp_path: Path) -> None:
    for name, device in (("whole", "cpu"), ("split", "shard")):
        done = finish(command(tmp_path, name, *SET, f"model.device={device}", "federation.rounds=2"))
        assert (done.returncode, done.stderr) == (0, "")
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "split")]
    assert files[0] == files[1]
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "split")]
    losses = [[json.loads(row)["loss"] for row in one if "loss" in json.loads(row)] for one in rows]
    assert losses[0] == losses[1] != []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.parametrize("how", ["a rank is killed", "Ctrl-C", "the run is killed"])
def test_no_rank_outlives_a_run_and_no_run_hangs_without_one(tmp_path: Path, how: str) -> None:
    process = subprocess.Popen(
        command(tmp_path, "run", *SET, "federation.rounds=400"), stderr=subprocess.PIPE, text=True, env=one_thread(), start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
        ranks = ranks_below(process.pid)
        assert len(ranks) == 1
        match how:
            case "a rank is killed":
                os.kill(ranks[0], signal.SIGKILL)
            case "Ctrl-C":
                os.killpg(process.pid, signal.SIGINT)
            case _:
                process.kill()
        assert process.stderr is not None
        process.wait(timeout=60)
        errors = process.stderr.read()
        wait_until(lambda: not any(is_there(rank) for rank in ranks), 30)
    finally:
        with_all(process)
    if how == "a rank is killed":
        assert process.returncode == 2
        assert errors.count("\n") == 1
        assert "a process that held a part of the model ended" in errors
        assert "drencoder run --resume FOLDER" in errors
        resume(tmp_path / "run")
    elif how == "Ctrl-C":
        assert "Interrupted" in errors


def resume(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    done = len(metrics.read_text().splitlines())
    again = subprocess.Popen(
        [sys.executable, "-m", "drencoder", "run", "--resume", str(run), "-q"], env=one_thread(), start_new_session=True
    )
    try:
        wait_until(lambda: len(metrics.read_text().splitlines()) > done + 1)
    finally:
        with_all(again)


def with_all(process: subprocess.Popen[Any]) -> None:
    """Ends what is left of a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
