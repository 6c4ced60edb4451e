"""Every path of a client's computation on another device than the CPU: a graphics card where there is one, and `meta` always."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import random_examples, tiny_base
from drencoder.data.tokenization import Example
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.errors import EncoderError
from drencoder.federated.row_encoding import encode_rows, is_row_exact, rows_at_once
from drencoder.models import cohort_training
from drencoder.models.client_training import CohortTrainer
from drencoder.models.cohort_training import Pass, adapter_after, cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from encoder_toys import SEGMENTS
from one_device import CUDA, OneDevice


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # transformers looks, in every pass, whether texts are packed: it is the one wait for a value that is left.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_a, **_k: None)
    with OneDevice():
        yield


def lora_on(device: str, dtype: torch.dtype = torch.float32, **knobs: object) -> LoraModel:
    base = tiny_base()
    base.model.to(dtype)
    if device == "cuda":
        base.model.to(device)
    lora = LoraModel(base, config.Adapter(**{"rank": 4, **knobs}), seed=5)  # type: ignore[arg-type]
    if device == "meta":  # whose shapes are tried on the CPU, before
        base.model.to("meta")
        lora.fixed_slots, lora.batch_tokens, lora.pass_tokens = True, 512, 1024
    return lora


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
@pytest.mark.parametrize(("dtype", "frugal"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("upload", ["gradient", "increment"])
def test_training(device: str, dtype: torch.dtype, upload: str, frugal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_on(device, dtype)
    if frugal:
        lora.fit_tokens = 0
    if device == "meta":
        monkeypatch.setattr(cohort_training, "_keeps_apart", lambda *_a: True)  # compares bits
    clients = [random_examples(count, seed) for seed, count in enumerate((5, 5, 2, 0, 9))]
    local = config.Local(upload=upload, batch_size=2, learning_rate=0.01)
    adapter_D = (lora.initial_D.cpu() + 0.01).to(lora.device)
    update_KD = cohort_updates(lora, adapter_D, clients, local, list(range(5)))
    assert update_KD.device.type == device
    assert update_KD.shape == (5, lora.layout.size)
    assert update_KD.dtype == torch.float32
    ends = adapter_after(local, adapter_D, update_KD, torch.ones(5, 1, device=lora.device))
    assert ends.shape == update_KD.shape
    if device == "cuda":
        expected = cohort_updates(lora_on("cpu", dtype), adapter_D.cpu(), clients, local, list(range(5)))
        difference = (update_KD.cpu() - expected).norm() / expected.norm()
        assert difference < (5e-2 if dtype == torch.bfloat16 or upload == "increment" else 1e-3)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_passes_keep_clients_apart_and_give_the_same_updates(
    device: str, dropout: float, dtype: torch.dtype
) -> None:
    """The way of a card: passes of one size with empty clients, and lengths in large steps."""
    lora = lora_on(device, dtype, dropout=dropout)
    lora.fixed_slots, lora.batch_tokens = True, 2048
    local = config.Local(upload="gradient", batch_size=2)
    examples, adapter_D = random_examples(5, 1), lora.initial_D + 0.01
    alone = cohort_updates(lora, adapter_D, [examples], local, [7])[0]
    assert alone.any()
    assert lora.tried_shapes
    for count in (1, 5):
        others = [random_examples(5, seed) for seed in range(count)]
        seeds = list(range(100, 100 + count))
        for place in (0, count):
            clients, own = [*others], [*seeds]
            clients.insert(place, examples)
            own.insert(place, 7)
            assert torch.equal(cohort_updates(lora, adapter_D, clients, local, own)[place], alone)
    plain = lora_on(device, dtype, dropout=0.0)
    if not dropout:
        expected = cohort_updates(plain, adapter_D, [examples], local, [7])[0]
        assert (alone - expected).norm() < (5e-2 if dtype == torch.bfloat16 else 1e-4) * expected.norm()


def test_where_a_shape_rounds_otherwise_in_company_clients_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_on("cpu")
    lora.fixed_slots, lora.batch_tokens, lora.pass_tokens = True, 512, 10**9
    rows: list[int] = []
    lora.base.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    honest = cohort_training.compute_pass
    assert cohort_training._keeps_apart(lora, 4, 2, 24)

    def leaking(lora: LoraModel, one: Pass) -> torch.Tensor:
        gradient_KD = honest(lora, one)
        if len(one.pieces) > 1:  # one rounding in one value
            gradient_KD[0, -1] = torch.nextafter(gradient_KD[0, -1], gradient_KD.new_tensor(9.0))
        return gradient_KD

    monkeypatch.setattr(cohort_training, "compute_pass", leaking)
    assert not cohort_training._keeps_apart(lora, 4, 2, 24)
    rows.clear()
    lora.tried_shapes.clear()
    local = config.Local(upload="gradient", batch_size=2)
    clients = [random_examples(2, seed) for seed in range(3)]
    cohort_updates(lora, lora.initial_D + 0.01, clients, local, [1, 2, 3])
    assert rows[-3:] == [2, 2, 2]
    assert set(lora.tried_shapes.values()) == {False}


@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_a_client_whose_training_raises_gives_a_row_on_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_on(device)
    monkeypatch.setattr(cohort_training, "_keeps_apart", lambda *_a: True)

    def examples_of(client: int, slot: int) -> list[Example]:
        if client == 3:
            raise ValueError("no")
        return random_examples(4, client)

    trainer = CohortTrainer(lora, examples_of, config.Local(), 0, 8, reports_failures=False)
    update_KD = trainer.train_clients(lora.initial_D, [1, 2, 3, 4], 1, 2)
    assert update_KD.device.type == device
    assert update_KD.shape == (4, 2 * lora.layout.size)
    if device != "meta":
        assert update_KD.isnan().all(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("room", "tries"), [("recomputed", 2), ("alone", 3)])
def test_too_little_memory_of_a_device_costs_time_and_nobodys_contribution(
    room: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, attempts = lora_on("cpu"), []
    lora.batch_tokens, lora.fit_tokens = 512, 10**9
    honest = cohort_training.compute_pass
    clients = [random_examples(4, seed) for seed in range(3)]

    def small(lora: LoraModel, one: Pass) -> torch.Tensor:
        if lora.fit_tokens or (room == "alone" and len(one.pieces) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(lora, one)

    trainer = CohortTrainer(lora, lambda client, _slot: clients[client], config.Local(), 0, 8)
    expected = trainer.train_clients(lora.initial_D, [0, 1, 2], 1, 1)
    monkeypatch.setattr(cohort_training, "compute_pass", small)
    train = CohortTrainer._train

    def counted(self: CohortTrainer, *args: Any) -> torch.Tensor:
        attempts.append(1)
        return train(self, *args)

    monkeypatch.setattr(CohortTrainer, "_train", counted)
    update_KD = trainer.train_clients(lora.initial_D, [0, 1, 2], 1, 1)
    assert torch.equal(update_KD, expected)
    assert len(attempts) == tries


def test_a_client_that_fits_nowhere_contributes_zero_and_takes_nobody_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = lora_on("cpu")
    honest = cohort_training.compute_pass
    clients = [random_examples(count, seed) for seed, count in enumerate((4, 11, 3))]

    def small(lora: LoraModel, one: Pass) -> torch.Tensor:
        if any(piece.examples == clients[1] or len(piece.examples) > 4 for piece in one.pieces):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(lora, one)

    monkeypatch.setattr(cohort_training, "compute_pass", small)
    lora.pass_tokens = 10**9  # one piece for each client
    local = config.Local(batch_size=16)
    trainer = CohortTrainer(lora, lambda client, _slot: clients[client], local, 0, 8)
    update_KD = trainer.train_clients(lora.initial_D, [0, 1, 2], 1, 1)
    assert update_KD.isnan().all(dim=1).tolist() == [False, True, False]
    assert "OutOfMemoryError" in capsys.readouterr().err


class _Mixing:
    """An encoder in which a row's code depends, by one rounding, on the rows beside it."""

    def __init__(self, encoder: Any) -> None:
        self._encoder, self.update_size, self.code_size = encoder, encoder.update_size, encoder.code_size

    def encode(self, update_ND: torch.Tensor, seed: int) -> torch.Tensor:
        code_NK = self._encoder.encode(update_ND, seed)
        if bool(update_ND[-1].any()):
            code_NK[0, 0] = torch.nextafter(code_NK[0, 0], code_NK.new_tensor(9.0))
        return code_NK


def test_a_block_of_rows_is_encoded_together_only_if_no_row_notices() -> None:
    encoder = RandomSketch.build(SEGMENTS, 50)
    assert is_row_exact(encoder, 1, torch.device("cpu"), 4)
    assert not is_row_exact(_Mixing(encoder), 1, torch.device("cpu"), 4)  # type: ignore[arg-type]
    assert rows_at_once(encoder, 1, torch.device("cpu")) == 1
    with pytest.raises(EncoderError):
        encode_rows(encoder, torch.zeros(1, 3), 1, 2)
