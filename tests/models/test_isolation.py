"""Nothing about who shares a batch, or about how it is cut into passes, changes a bit of a client's update."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_loras import LORAS, UPLOADS, make_lora, moved
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import random_examples, tiny_base
from drencoder.data.tokenization import Example
from drencoder.errors import ModelError
from drencoder.models import lora as lora_module
from drencoder.models.base_model import BaseModel
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config

COMPANIES = {
    "two": [(9, 2), (2, 3)],
    "many": [(count, seed) for seed, count in enumerate((5, 5, 1, 9, 5, 12, 5, 5, 5), start=10)],
    "alike": [(5, seed) for seed in range(20, 40)],
}


@pytest.mark.parametrize("base", ["llama", "llama-rank-1", "llama-head", "llama-bfloat16", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("upload", UPLOADS)
def test_no_bit_of_an_update_depends_on_who_shares_the_batch(upload: str, dropout: float, base: str) -> None:
    """Others leave, join, and have other texts and lengths; the client stands first, in the middle and last."""
    lora = LORAS[base](dropout)
    local = config.Local(upload=upload, batch_size=2, epochs=2, learning_rate=0.01)
    examples, adapter_D = random_examples(5, 1), moved(lora)
    alone = cohort_updates(lora, adapter_D, [examples], local, [7])[0]
    assert alone.isfinite().all()
    assert alone.any()
    for name, company in COMPANIES.items():
        others = [(random_examples(count, seed), 100 + seed) for count, seed in company]
        last = len(others)
        # Of the large companies the client is three members at once, so that each is trained in one go.
        for places in ((0,), (last // 2,), (last,)) if name == "two" else ((0, last // 2 + 1, last + 2),):
            members = [*others]
            for place in places:
                members.insert(place, (examples, 7))
            updates = cohort_updates(lora, adapter_D, [one for one, _ in members], local, [seed for _, seed in members])
            for place in places:
                assert torch.equal(updates[place], alone)


def test_no_linear_layer_multiplies_the_rows_of_several_clients_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries may round both ways alike for the shapes of a test, so that equal bits alone do not show it."""
    lora, calls = make_lora(), Counter[str]()

    def counted(name: str, made: Any) -> Any:
        def call(*rest: Any) -> Any:
            calls[name] += 1
            return made(*rest)

        return call

    monkeypatch.setattr(lora_module, "own_products", counted("own", lora_module.own_products))
    monkeypatch.setattr(functional, "linear", counted("together", functional.linear))
    clients = [random_examples(2, 3)] * 3  # of one shape: they share every pass
    cohort_updates(lora, moved(lora), clients, config.Local(upload="gradient", batch_size=2), [1, 2, 3])
    heads = len(clients)  # the vocabulary's products, which are one client's by the slices that they get
    assert calls["own"] > 0
    assert calls["together"] <= heads


def test_a_layer_that_gets_a_part_of_the_tokens_is_refused_by_name() -> None:
    base = tiny_base()

    class Routed(torch.nn.Module):
        """Gives every other token to its layer, as an expert of a mixture gets those that were routed to it."""

        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.expert = layer

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            result = torch.zeros(*states.shape[:-1], self.expert.out_features)
            result[:, ::2] = self.expert(states[:, ::2])
            return result

    layer = base.model.model.layers[1].mlp
    layer.up_proj = Routed(layer.up_proj)
    with pytest.raises(ModelError, match=r"up_proj\.expert.*clients could not be told apart"):
        LoraModel(base, config.Adapter(rank=3, targets=("expert",)), seed=5)


@pytest.mark.parametrize("base", ["llama", "llama-rank-1", "llama-head", "llama-bfloat16", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("upload", ["gradient", "increment"])
def test_neither_the_budget_of_tokens_nor_recomputation_changes_a_bit(upload: str, dropout: float, base: str) -> None:
    lora = LORAS[base](dropout)
    local = config.Local(upload=upload, batch_size=2, epochs=2, learning_rate=0.01)
    clients = [random_examples(count, seed) for seed, count in enumerate((5, 5, 2, 9, 5, 12))]
    adapter_D, seeds = moved(lora), list(range(6))
    updates: list[torch.Tensor] = []
    sizes: list[int] = []
    passes: list[int] = []
    lora.base.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: sizes.append(args[0].numel()))
    for budget, fit in ((1, 10**9), (100, 10**9), (10**9, 10**9), (10**9, 0), (1, 0)):
        sizes.clear()
        lora.batch_tokens, lora.fit_tokens = budget, fit
        updates.append(cohort_updates(lora, adapter_D, clients, local, seeds))
        passes.append(len(sizes))
        # One client's own piece: a batch of two examples of at most 24 tokens, or all twelve of a gradient.
        assert max(sizes) <= max(budget, (12 if upload == "gradient" else 2) * 24)
    assert all(len(example.tokens) <= 24 for client in clients for example in client)
    if base not in ("llama-rank-1", "llama-head"):
        assert passes[2] < passes[0]  # some did share
    assert updates[0].isfinite().all()
    assert updates[0].any(dim=1).all()
    for other in updates[1:]:
        assert torch.equal(other, updates[0])


def test_recomputation_keeps_the_layers_inputs_only() -> None:
    lora, kept = make_lora(), []
    examples, local = [random_examples(8, 1)], config.Local()
    for fit in (10**9, 0):
        lora.fit_tokens, saved = fit, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            cohort_updates(lora, moved(lora), examples, local, [1])
        kept.append(sum(saved))
    assert kept[1] < kept[0]
    assert (
        lora.base.model.get_decoder().layers[0].forward.__func__
        is type(lora.base.model.get_decoder().layers[0]).forward
    )


@pytest.mark.parametrize(("rank", "shared"), [(1, False), (2, True), (4, True), (5, False), (6, False), (8, True)])
def test_only_ranks_that_round_alike_in_any_company_are_stacked(rank: int, shared: bool) -> None:
    assert make_lora(rank=rank).can_share(16) is shared
    assert not make_lora(rank=rank).can_share(5)  # rows of five tokens fill no whole line of the cache


def test_passes_that_clients_may_share_run_on_two_threads_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread takes a part of a tensor's values, and SiLU rounds the last values of a part otherwise: with six threads an
    update depended on who else was there. In halves a client's values fill whole steps."""
    torch.manual_seed(4)
    shape = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=704, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval().requires_grad_(False)
    lora = LoraModel(
        BaseModel(model, tiny_base().tokenizer, "wide"), config.Adapter(rank=8), seed=5, batch_tokens=10**6
    )
    clients = [[Example(tuple(range(2, 22 + kind)), 3)] * 8 for kind in (0, 0, 0, 0, 0, 8)]
    local, adapter_D, before = config.Local(batch_size=8), moved(lora), torch.get_num_threads()
    threads: list[tuple[int, int]] = []
    lora.base.model.get_input_embeddings().register_forward_pre_hook(
        lambda _m, args: threads.append((len(args[0]), torch.get_num_threads()))
    )
    try:
        torch.set_num_threads(6)
        together = cohort_updates(lora, adapter_D, clients, local, [0] * 6)
        alone = torch.cat([cohort_updates(lora, adapter_D, [one], local, [0]) for one in clients])
        assert torch.get_num_threads() == 6
        monkeypatch.setattr(LoraModel, "can_share", lambda *_: False)
        cohort_updates(lora, adapter_D, clients[:1], local, [0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)
    assert threads == [(40, 2), (8, 2), *[(8, 2)] * 6, (8, 6)]


def test_texts_get_a_length_that_fills_whole_lines_and_loops_and_no_more_padding_than_pays() -> None:
    lora = make_lora()  # layers of 24 and 48, rank 4: 8 tokens fill whole steps of 64 values
    lora.pass_tokens = 64
    for rows, longest in ((1, 17), (2, 9), (4, 13), (8, 13), (3, 20)):
        length = lora.padded_length(rows, longest)
        assert longest <= length < longest + 16
        assert lora.can_share(rows * length)
    assert lora.padded_length(8, 13) == 13  # 104 tokens do already
    assert lora.padded_length(1, 125) == 128
    assert lora.padded_length(1, 127) <= 128  # the model has no more positions
    assert make_lora(rank=5).padded_length(1, 17) == 17  # trains alone whatever its length


def test_a_layer_whose_values_end_within_a_step_of_a_loop_is_not_shared() -> None:
    """Twelve values of a client would be the last of a tensor, and rounded otherwise, or not, as others are there."""
    values = torch.randn(1 << 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(functional.silu(values[:128]), functional.silu(values)[:128])
    assert not make_lora().can_share(4)  # 4 x 24 and 4 x 48 values
    assert make_lora().can_share(8)


def test_a_gradient_of_many_records_takes_as_many_at_a_time_as_keep_a_core_busy() -> None:
    lora, sizes = make_lora(), list[int]()
    lora.base.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    examples = [Example(tuple(range(2, 18)), 4)] * 20
    whole = cohort_updates(lora, moved(lora), [examples], config.Local(batch_size=4), [0])
    assert sizes == [20]
    lora.size = replace(
        lora.size, linear_values=80_000_000 * lora.size.num_linear // 100
    )  # 100 tokens keep a core busy
    sizes.clear()
    parts = cohort_updates(lora, moved(lora), [examples], config.Local(batch_size=4), [0])
    assert sorted(sizes) == [2, 6, 6, 6]
    assert torch.allclose(whole, parts, atol=1e-6)
