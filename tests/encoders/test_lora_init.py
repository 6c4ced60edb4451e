"""A that starts at the directions which public text fills."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conftest import tiny_base
from drencoder.data.tokenization import Example, collate
from drencoder.encoders import lora_init as starts
from drencoder.encoders.lora_init import public_start
from drencoder.encoders.planning import public_text
from drencoder.errors import ModelError
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.build import Texts, build
from encoder_toys import recipe_of


def texts(count: int, length: int = 9) -> list[Example]:
    """Of random tokens and different lengths, so that most rows of a batch end in padding."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(2, 97, (count, length), generator=generator).tolist()
    return [Example(tuple(row[: 3 + index % (length - 2)]), 1) for index, row in enumerate(drawn)]


def inputs_of(lora: LoraModel, examples: list[Example], name: str) -> torch.Tensor:
    """What the layer of this A gets, text by text and without padding (T, I), in float64."""
    rows = []
    for example in examples:
        batch = collate([[example]], 0)
        with torch.no_grad(), lora.watched() as inputs:
            lora.logits_before(batch.input_ids, batch.predicted)
        rows.append(inputs[name][0].double())
    return torch.cat(rows)


def test_a_starts_at_the_leading_directions_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    lora, examples = LoraModel(tiny_base(), config.Adapter(rank=3), seed=5), texts(40)
    monkeypatch.setattr(starts, "_AT_ONCE", 40)
    started_D = public_start(lora, examples)
    before, after = lora.layout.unflatten(lora.initial_D), lora.layout.unflatten(started_D)
    monkeypatch.setattr(starts, "_AT_ONCE", 7)
    in_small_steps = lora.layout.unflatten(public_start(lora, examples))
    names = [name for name in before if "lora_A" in name]
    assert len(names) == 8
    for name in names:
        A_rI, length = after[name], float(before[name].norm())
        assert torch.allclose(A_rI @ A_rI.T, torch.eye(3) * length**2 / 3, atol=1e-5 * length**2)
        input_TI = inputs_of(lora, examples, name)
        _, _, right_II = torch.linalg.svd(input_TI, full_matrices=False)
        held, best, random = (
            float((input_TI @ torch.linalg.qr(rows.double().T).Q).square().sum())
            for rows in (A_rI, right_II[:3], before[name])
        )
        assert held == pytest.approx(best, rel=1e-6)
        assert held > 1.2 * random  # what a random A sees
        stepped = float((input_TI @ torch.linalg.qr(in_small_steps[name].double().T).Q).square().sum())
        assert stepped == pytest.approx(best, rel=1e-2)  # steps forget a little of the weak directions
    for name in set(before) - set(names):
        assert not after[name].any()


def test_the_directions_of_an_input_that_layers_share_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value of a layer get one tensor, its output projection another; an input that only looks like it is its own."""
    lora, taken, directions_of = LoraModel(tiny_base(), config.Adapter(rank=3), seed=5), [], starts.top_directions

    def counted(rows_XL: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(rows_XL.shape)
        return directions_of(rows_XL, rank)

    monkeypatch.setattr(starts, "top_directions", counted)
    shared = public_start(lora, texts(20))
    assert len(taken) == 2 * 2 * 2  # two passes, two layers, two inputs each
    watched = LoraModel.watched

    @contextlib.contextmanager
    def copied(self: LoraModel) -> Iterator[dict[str, torch.Tensor]]:
        with watched(self) as inputs:
            own: dict[str, torch.Tensor] = {}
            yield own
            own |= {name: values.clone() for name, values in inputs.items()}

    monkeypatch.setattr(LoraModel, "watched", copied)
    assert torch.equal(public_start(lora, texts(20)), shared)
    assert len(taken) == 8 + 16


def test_a_layer_with_too_few_directions_keeps_random_rows() -> None:
    lora = LoraModel(tiny_base(), config.Adapter(rank=5), seed=5)
    example = Example((7, 9), 1)
    after = lora.layout.unflatten(public_start(lora, [example]))
    for name in (name for name in after if "lora_A" in name):
        A_rI = after[name]
        assert torch.allclose(A_rI @ A_rI.T, torch.eye(5) * float(A_rI.norm()) ** 2 / 5, atol=1e-6)
        input_TI = inputs_of(lora, [example], name).float()
        unit_rI = A_rI / A_rI.norm(dim=1, keepdim=True)
        assert torch.allclose(input_TI @ unit_rI.T @ unit_rI, input_TI, atol=1e-4)


def test_too_many_rows_or_broken_activations_are_refused() -> None:
    wide = LoraModel(tiny_base(), config.Adapter(rank=25), seed=5)
    with pytest.raises(ModelError, match=r"'public' cannot give 25 orthogonal rows of 24 values: lower adapter\.rank"):
        public_start(wide, texts(20))
    broken = LoraModel(tiny_base(), config.Adapter(rank=2), seed=5)
    broken.base.model.get_input_embeddings().weight.data[9, 0] = float("nan")
    with pytest.raises(ModelError, match="activations on public text are not finite"):
        public_start(broken, [Example((7, 9, 11), 1)])


def test_the_plan_says_where_a_starts(tiny_folder: Path) -> None:
    recipe = recipe_of(tiny_folder, "hybrid", "adapter.start=auto")
    few, many = (
        recipe.changed({"privacy.epsilon": 0.1}),
        recipe.changed({"privacy.noise_multiplier": 0.07, "privacy.epsilon": 1e3}),
    )
    starts_of = {}
    for name, one in {"few": few, "again": few, "many": many, "peft": few.changed({"adapter.start": "peft"})}.items():
        live = build(one)
        assert (live.overview.k_star < 512) == (one is not many)
        starts_of[name] = live.lora.initial_D
    assert torch.equal(starts_of["few"], starts_of["again"])
    assert torch.equal(starts_of["many"], starts_of["peft"])
    assert not torch.equal(starts_of["few"], starts_of["many"])


def test_the_start_reads_no_clients_text(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A from clients' text would be an answer about them that nothing charges."""
    read: list[int] = []
    monkeypatch.setattr(Texts, "client", lambda self, client, slot: read.append(client))
    live = build(recipe_of(tiny_folder, "hybrid", "adapter.start=public"))
    assert live.start.startswith("public: leading inputs of 64 texts; general part of the embedded world")
    assert read == []
    other = build(recipe_of(tiny_folder, "hybrid", "adapter.start=public", "data.source=embedded:facts"))
    assert torch.equal(live.lora.initial_D, other.lora.initial_D)  # whatever the clients hold


def test_whole_updates_can_start_there_too() -> None:
    said = ["encoder.name=identity", "privacy.trust=central", "federation.population=20"]
    plain, written = (load_recipe("quickstart", [*said, f"adapter.start={start}"]) for start in ("auto", "public"))
    assert (public_text(plain), public_text(written)) == ("", "self")
    assert torch.equal(build(plain).lora.initial_D, build(plain.changed({"adapter.start": "peft"})).lora.initial_D)
    live = build(written)
    assert not torch.equal(build(plain).lora.initial_D, live.lora.initial_D)
    assert live.start == "public: leading inputs of 64 texts; written by the base model itself"
    assert build(plain).start == "peft"
