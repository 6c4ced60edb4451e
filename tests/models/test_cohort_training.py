"""Cohort-parallel training gives each client the update it would have computed alone through PEFT."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_loras import UPLOADS, make_lora, moved

from conftest import random_examples, tiny_base
from drencoder.data.tokenization import Example, collate
from drencoder.errors import ModelError
from drencoder.models.client_training import CohortTrainer
from drencoder.models.cohort_training import adapter_after, cohort_updates, num_steps
from drencoder.models.lora import LoraModel
from drencoder.recipe import recipe as config
from peft_reference import client_update


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
