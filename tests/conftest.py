"""Small real models and data for all tests: random weights, made here, no downloads."""

import hashlib
import os
import random
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drencoder.data.tokenization import Example
from drencoder.models.base_model import BaseModel
from drencoder.privacy import ledger
from drencoder.published import autoencoder

torch.set_num_threads(1)
# The same examples in every run, and no stopwatch: a busy machine is no error. `--hypothesis-profile=explore` draws others.
settings.register_profile(
    "steady", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("steady")
# A shell's background job ignores Ctrl-C, and so would every process that a test starts and means to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite("encoder_contract")


class KnownKeys:
    """Stands for `secrets` where a ledger draws the key of its cohorts: each test sees the same keys whenever it runs.

    A few dozen clients at a rate of a tenth leave a round without any client once in 600, and a test of what the clients sent
    would fail then. Noise stays that of the operating system.
    """

    def __init__(self) -> None:
        self.drawn = 0

    def token_bytes(self, size: int) -> bytes:
        self.drawn += 1
        return hashlib.shake_256(f"key {self.drawn} of a test".encode()).digest(size)


KEYS = KnownKeys()


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's auto-encoder trains two steps, not four hundred."""
    monkeypatch.setattr(autoencoder, "TRAINING", autoencoder.AutoencoderOptions(steps=2, samples=16))


@pytest.fixture
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's generator, but the same in every run of a test: where noise is judged, chance must not fail one."""
    drawn = iter(range(10**9))

    def known(size: int) -> bytes:
        return hashlib.shake_256(f"draw {next(drawn)}".encode()).digest(size)

    monkeypatch.setattr(os, "urandom", known)
    monkeypatch.setattr(random, "_urandom", known)  # what `secrets` reads


@pytest.fixture(scope="session", autouse=True)
def known_cohorts() -> Iterator[None]:
    assert ledger.secrets is secrets  # outside of tests, keys are secret
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "secrets", KEYS)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    KEYS.drawn = 0


def tiny_base(seed: int = 0, vocab: int = 97, layers: int = 2) -> BaseModel:
    """A random Llama of a few thousand parameters; its tokenizer maps a text to its code points."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=3,
                num_key_value_heads=3,
                max_position_embeddings=128,
            )
        )
    model.requires_grad_(False)

    class LetterTokenizer(SimpleNamespace):
        eos_token_id = 1
        pad_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [2 + ord(letter) % (vocab - 2) for letter in text]}

    return BaseModel(model.eval(), LetterTokenizer(), "tiny")


def random_examples(count: int, seed: int, vocab: int = 97, longest: int = 14) -> list[Example]:
    chance = random.Random(seed)
    examples = []
    for _ in range(count):
        prompt, response = chance.randint(1, longest), chance.randint(1, 4)
        tokens = tuple(chance.randrange(2, vocab) for _ in range(prompt + response))
        examples.append(Example(tokens, prompt))
    return examples


@pytest.fixture
def base() -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random one-layer Llama and a byte-level tokenizer: loads like any model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE(vocab={}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" A B C D Answer:"] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    tiny_base(vocab=len(wrapped), layers=1).model.save_pretrained(folder)
    return folder


def tiny_overrides(folder: Path) -> list[str]:
    """Overrides that make the quickstart a matter of seconds."""
    return [
        f"model.source={folder}",
        "adapter.rank=2",
        "data.examples_per_client=2",
        "data.max_tokens=24",
        "federation.population=60",
        "federation.sampling_rate=0.1",
        "federation.rounds=4",
        "encoder.ratio=4",
        "evaluation.examples=8",
        "evaluation.benchmarks=['mmlu', 'ceval']",
        "privacy.delta=1e-3",
        "speed.parallel_clients=4",
    ]
