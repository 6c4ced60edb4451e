"""Cohort-parallel training gives each client the update it would have computed alone through PEFT."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from conftest import random_examples, tiny_base
from drencoder.data.tokenization import Example, collate
from drencoder.errors import ModelError
from drencoder.models import lora as lora_module
from drencoder.models.base_model import BaseModel
from drencoder.models.client_training import CohortTrainer
from drencoder.models.cohort_training import adapter_after, cohort_updates, num_steps
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from peft_reference import client_update

UPLOADS = ("gradient", "pseudo-gradient", "increment")


def make_lora(**knobs: object) -> LoraModel:
    wanted = config.Adapter(**{"rank": 4, **knobs})  # type: ignore[arg-type]
    return LoraModel(tiny_base(), wanted, seed=5)


def moved(lora: LoraModel) -> torch.Tensor:
    """An adapter away from its start, so that the gradient of A is not zero."""
    generator = torch.Generator().manual_seed(3)
    return lora.initial_D + 0.05 * torch.randn(lora.layout.size, generator=generator)


@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "down_proj", "o_proj")])
def test_cohort_equals_one_by_one(upload: str, targets: tuple[str, ...]) -> None:
    lora = make_lora(targets=targets)
    local = config.Local(upload=upload, epochs=2, batch_size=3, learning_rate=0.01)
    clients = [random_examples(count, seed) for seed, count in enumerate((1, 7, 3, 12))]
    seeds = [11, 12, 13, 14]
    adapter_D = moved(lora)

    together = cohort_updates(lora, adapter_D, clients, local, seeds)

    alone = torch.stack(
        [client_update(lora, adapter_D, one, local, seed) for one, seed in zip(clients, seeds, strict=True)]
    )
    assert together.shape == (4, lora.layout.size)
    assert alone.norm(dim=1).min() > 1e-4  # something was learned
    error = (together - alone).norm(dim=1) / alone.norm(dim=1)
    # AdamW's first steps divide by |gradient|, so values whose gradient is nearly zero amplify rounding.
    assert error.max() < (2e-2 if upload == "increment" else 1e-4)


def test_the_control_sends_nothing() -> None:
    lora, clients = make_lora(), [random_examples(3, 1), random_examples(5, 2)]
    local = config.Local(upload="zero")
    together = cohort_updates(lora, moved(lora), clients, local, [1, 2])
    assert together.shape == (2, lora.layout.size)
    assert not together.any()
    assert not client_update(lora, moved(lora), clients[0], local, 1).any()


@pytest.mark.parametrize("upload", UPLOADS)
def test_a_path_goes_on_from_where_each_client_stands(upload: str) -> None:
    """Two epochs one after the other are two trainings, the second from every client's own end of the first."""
    lora = make_lora()
    local = config.Local(upload=upload, batch_size=3, learning_rate=0.01)
    clients, start_D = [random_examples(count, seed) for seed, count in enumerate((5, 2, 9))], moved(lora)
    steps_K1 = torch.tensor([[num_steps(one, local)] for one in clients])
    first = cohort_updates(lora, start_D, clients, local, [1, 2, 3])
    middle = adapter_after(local, start_D, first, steps_K1)
    second = cohort_updates(lora, middle, clients, local, [4, 5, 6])
    for i, one in enumerate(clients):
        mine = client_update(lora, start_D, one, local, i + 1)
        if upload == "gradient":
            end_D = start_D + 0.01 * mine
        elif upload == "pseudo-gradient":
            end_D = start_D + 0.01 * -(-len(one) // 3) * mine
        else:
            end_D = start_D + mine
        assert (middle[i] - end_D).norm() < 2e-2 * (end_D - start_D).norm()
        again = client_update(lora, middle[i], one, local, i + 4)
        assert (second[i] - again).norm() < 5e-2 * again.norm()


COMPANIES = {
    "alone": [],
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
    for company in COMPANIES.values():
        others = [random_examples(count, seed) for count, seed in company]
        seeds = [100 + seed for _, seed in company]
        for place in (0, len(others) // 2, len(others)):
            clients, own_seeds = [*others], [*seeds]
            clients.insert(place, examples)
            own_seeds.insert(place, 7)
            assert torch.equal(cohort_updates(lora, adapter_D, clients, local, own_seeds)[place], alone)


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


def gpt2(dropout: float) -> LoraModel:
    """Fused projections in transposed layers (Conv1D)."""
    torch.manual_seed(2)
    shape = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    base = tiny_base()
    model = GPT2LMHeadModel(shape).eval().requires_grad_(False)
    wrapped = BaseModel(model, base.tokenizer, "gpt2")
    return LoraModel(wrapped, config.Adapter(rank=4, dropout=dropout, targets=("c_attn", "c_fc")), seed=5)


def bfloat16(dropout: float) -> LoraModel:
    base = tiny_base()
    base.model.to(torch.bfloat16)
    return LoraModel(base, config.Adapter(rank=4, dropout=dropout), seed=5)


LORAS = {
    "llama": lambda dropout: make_lora(dropout=dropout),
    "llama-rank-1": lambda dropout: make_lora(dropout=dropout, rank=1),
    "llama-head": lambda dropout: make_lora(dropout=dropout, targets=("q_proj", "lm_head")),
    "llama-bfloat16": bfloat16,
    "gpt2": gpt2,
}


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


def test_gradient_is_a_descent_direction() -> None:
    lora = make_lora()
    examples = random_examples(8, 4)
    adapter_D = moved(lora)
    local = config.Local()
    step = cohort_updates(lora, adapter_D, [examples], local, [0])[0]

    def loss(vector: torch.Tensor) -> float:
        stack = {name: tensor[None] for name, tensor in lora.layout.unflatten(vector).items()}
        with torch.no_grad(), lora.stacked(stack):
            return lora.token_losses(collate([examples], 0)).mean().item()

    assert loss(adapter_D + 0.1 * step / step.norm()) < loss(adapter_D)


def test_gradient_of_a_client_is_the_mean_over_its_tokens_whatever_the_batch_size() -> None:
    lora = make_lora()
    examples = random_examples(9, 5)
    whole = cohort_updates(lora, moved(lora), [examples], config.Local(batch_size=16), [0])
    split = cohort_updates(lora, moved(lora), [examples], config.Local(batch_size=2), [0])
    assert torch.allclose(whole, split, atol=1e-6)


def test_base_model_is_untouched_and_output_without_stack_is_the_base() -> None:
    fresh, wrapped = tiny_base(), make_lora()
    input_ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        expected = fresh.model(input_ids=input_ids).logits
        before = wrapped.base.model(input_ids=input_ids).logits
    cohort_updates(wrapped, moved(wrapped), [random_examples(4, 0)], config.Local(), [0])
    with torch.no_grad():
        after = wrapped.base.model(input_ids=input_ids).logits
    assert torch.equal(before, expected)
    assert torch.equal(after, expected)


def test_saved_adapter_loads_in_plain_peft_with_the_same_logits(tmp_path: Path) -> None:
    lora = make_lora(targets=("q_proj", "down_proj"))
    adapter_D = moved(lora)
    lora.save(adapter_D, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_base().model, str(tmp_path / "adapter"))
    input_ids = torch.arange(2, 30)[None]
    stack = {name: tensor[None] for name, tensor in lora.layout.unflatten(adapter_D).items()}
    with torch.no_grad():
        expected = plain(input_ids=input_ids).logits
        with lora.stacked(stack):
            ours = lora.base.model(input_ids=input_ids).logits
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, lora.base.model(input_ids=input_ids).logits, atol=1e-3)


def test_start_depends_on_the_seed_alone() -> None:
    first = make_lora().initial_D
    torch.manual_seed(99)
    assert torch.equal(first, make_lora().initial_D)
    other = LoraModel(tiny_base(), config.Adapter(rank=4), seed=6).initial_D
    assert not torch.equal(first, other)


def test_targets_that_do_not_exist_are_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"'nothing' names no linear layer of 'tiny'.*q_proj, k_proj"):
        make_lora(targets=("nothing",))


@pytest.mark.parametrize("upload", ["gradient", "increment"])
def test_dropout_depends_on_the_seed_and_leaves_the_global_generator_alone(upload: str) -> None:
    lora = make_lora(dropout=0.5)
    local, examples = config.Local(upload=upload, batch_size=2), random_examples(5, 1)

    def alone(seed: int) -> torch.Tensor:
        return client_update(lora, moved(lora), examples, local, seed)

    def together(seed: int) -> torch.Tensor:
        return cohort_updates(lora, moved(lora), [examples], local, [seed])[0]

    before = torch.random.get_rng_state()
    for train in (alone, together):
        assert torch.equal(train(3), train(3))
        assert not torch.allclose(train(3), train(4))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_is_used_in_training_only() -> None:
    lora = make_lora(dropout=0.5)
    lora_without = make_lora()
    examples = [random_examples(6, 1)]
    adapter_D = moved(lora)
    dropped = cohort_updates(lora, adapter_D, examples, config.Local(), [1])
    plain = cohort_updates(lora_without, adapter_D, examples, config.Local(), [1])
    assert not torch.allclose(dropped, plain, atol=1e-5)


@pytest.mark.parametrize("upload", UPLOADS)
def test_a_client_without_text_sends_a_zero_update_and_changes_nobody_elses(upload: str) -> None:
    lora, local = make_lora(), config.Local(upload=upload, batch_size=2, learning_rate=0.01)
    first, last = random_examples(3, 1), random_examples(5, 2)
    both = cohort_updates(lora, moved(lora), [first, last], local, [1, 2])
    among = cohort_updates(lora, moved(lora), [first, [], last], local, [1, 9, 2])
    assert not among[1].any()
    assert torch.equal(among[[0, 2]], both)


def test_a_client_whose_training_raises_takes_nobody_with_it_and_shows_no_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora, secret = make_lora(), "the patient in room 12"

    def examples_of(client: int, slot: int) -> list[Example]:
        if client == 3:
            raise ValueError(secret)
        return random_examples(4, client)

    trainer = CohortTrainer(lora, examples_of, config.Local(), 0, 8)
    without = trainer.train_clients(moved(lora), [1, 2, 4], 1, 1)
    among = trainer.train_clients(moved(lora), [1, 2, 3, 4], 1, 1)
    assert among[2].isnan().all()
    assert torch.equal(among[[0, 1, 3]], without)
    shown = "".join(capsys.readouterr())
    assert "ValueError" in shown
    assert secret not in shown
    assert "3" not in shown  # nor who is in the cohort


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
