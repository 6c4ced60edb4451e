"""The flat vector: lossless both ways, in an order that depends on names only, for any LoRA config."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_base
from drencoder.errors import ModelError
from drencoder.models.adapter_layout import AdapterLayout
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config

names = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["q_proj", "v_proj", "mlp.up"]), st.sampled_from("AB")),
    min_size=1,
    max_size=12,
    unique=True,
)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


def tensor_name(layer: int, module: str, side: str) -> str:
    return f"base.layers.{layer}.{module}.lora_{side}.weight"


@given(names, st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip_is_lossless_in_any_order_and_dtype(keys: list[tuple[int, str, str]], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    lead = data.draw(st.sampled_from([(), (3,), (2, 2)]))
    tensors = {tensor_name(*key): torch.randn(*lead, *data.draw(shapes)).to(dtype) for key in keys}
    layout = AdapterLayout.from_shapes({name: tuple(t.shape[len(lead) :]) for name, t in tensors.items()})
    shuffled = list(tensors.items())
    random.Random(0).shuffle(shuffled)

    vector = layout.flatten(dict(shuffled))

    assert vector.shape == (*lead, layout.size)
    assert vector.dtype == torch.float32
    back = layout.unflatten(vector)
    assert all(torch.equal(back[name].to(dtype), tensor) for name, tensor in tensors.items())
    assert torch.equal(layout.flatten(back), vector)
    assert AdapterLayout.from_shapes(dict(reversed([(s.name, s.shape) for s in layout.segments]))) == layout


def test_segments_tile_and_layers_are_in_numeric_order() -> None:
    keys = [(layer, "q_proj", side) for layer in (10, 2, 0) for side in "BA"]
    layout = AdapterLayout.from_shapes({tensor_name(*key): (2, 3) for key in keys})
    assert [s.name for s in layout.segments] == [tensor_name(i, "q_proj", side) for i in (0, 2, 10) for side in "AB"]
    assert [s.start for s in layout.segments] == [0, 6, 12, 18, 24, 30]
    assert layout.size == layout.segments[-1].stop == 36


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("layers", [(), (1,), (0, 2)])
def test_any_peft_config(rank: int, targets: tuple[str, ...], layers: tuple[int, ...]) -> None:
    inside = {"q_proj": "self_attn.q_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj"}
    named = tuple(f"layers.{layer}.{inside[name]}" for layer in layers for name in targets) or targets
    lora = LoraModel(tiny_base(layers=3), config.Adapter(rank=rank, targets=named), seed=0)
    num_modules = len(named) * (1 if layers else 3)
    assert len(lora.layout.segments) == 2 * num_modules
    vector = torch.randn(lora.layout.size)
    with lora.peft(vector):
        assert torch.equal(lora.layout.flatten(lora._peft_tensors()), vector)
    pairs = list(lora.layout.pairs(vector))
    assert len(pairs) == num_modules
    for pair in pairs:
        assert pair.A.shape[0] == pair.B.shape[1] == rank
        assert pair.A.data_ptr() >= vector.data_ptr()  # a view, not a copy


def test_what_does_not_fit_is_refused() -> None:
    layout = AdapterLayout.from_shapes({"m.lora_A.weight": (2, 3), "m.lora_B.weight": (3, 2)})
    good = layout.unflatten(torch.zeros(12))
    with pytest.raises(ModelError, match="missing"):
        layout.flatten({"m.lora_A.weight": good["m.lora_A.weight"]})
    with pytest.raises(ModelError, match="no place"):
        layout.flatten({**good, "other": torch.zeros(1)})
    with pytest.raises(ModelError, match="shape"):
        layout.flatten({**good, "m.lora_A.weight": torch.zeros(3, 2)})
    with pytest.raises(ModelError, match="float64"):
        layout.flatten({**good, "m.lora_A.weight": torch.zeros(2, 3, dtype=torch.float64)})
    with pytest.raises(ModelError, match="13 values"):
        layout.unflatten(torch.zeros(13))
    with pytest.raises(ModelError, match="no tensors"):
        AdapterLayout.from_shapes({})
