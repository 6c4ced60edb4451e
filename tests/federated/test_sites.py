"""A site's part of a slot: its secret draw, its one message, and what is nowhere to be read: how many and which units took part."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from drencoder.encoders.identity import IdentityEncoder
from drencoder.errors import PrivacyError
from drencoder.federated import site_round
from drencoder.federated.in_process import InProcessEngine
from drencoder.federated.query import Query, update_query
from drencoder.federated.round import Upload, message_wire, released_update, server_release
from drencoder.federated.site_round import SiteCurator
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.mechanism import NoiseSource
from drencoder.privacy.noise_source import ReplayNoise, SecureNoise
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import load_recipe
from encoder_toys import SEGMENTS, SIZE

SITES, RATE, CLIP, SIGMA, UNITS = 3, 0.5, 1.3, 0.7, 40


@dataclass(frozen=True)
class Units:
    """Site s has sizes[s] units."""

    sizes: tuple[int, ...]
    provenance = "made here"

    def units(self, site: int) -> list[int]:
        return [1000 * site + number for number in range(self.sizes[site])]

    def client(self, client: int) -> list[dict[str, str]]:
        return []


@dataclass
class Trainer:
    """A unit's update points along the axis of its own number, and is as long as the clip."""

    batch_clients: int = 4

    def __post_init__(self) -> None:
        self.trained: list[int] = []

    def train_clients(self, adapter_D: torch.Tensor, clients: list[int], slot: int, epochs: int) -> torch.Tensor:
        self.trained += clients
        return torch.stack([CLIP * torch.nn.functional.one_hot(torch.tensor(c % SIZE), SIZE).float() for c in clients])


def plan_of(noise: str = "secure", trust: str = "local", rate: float = RATE) -> PrivacyPlan:
    return make_plan(
        trust=trust, population=SITES, sampling_rate=rate, rounds=3, delta=1e-4, noise_multiplier=SIGMA, noise=noise,
        unit="record", site_units=UNITS, dropout_share=0.0, honest_share=1.0,
    )  # fmt: skip


@pytest.fixture
def charge(tmp_path: Path) -> Callable[..., Permit]:
    """A function that charges slot 1 of a new ledger, with a key of its own in each."""

    def charged(noise: str = "secure", **more: object) -> Permit:
        path = tmp_path / f"ledger{len(list(tmp_path.iterdir()))}.jsonl"
        key = bytes(32) if noise == "replay" else None
        with Ledger.create(path, plan_of(noise, **more), run_id="r", key=key) as ledger:  # type: ignore[arg-type]
            return ledger.charge(1)

    return charged


def query_of() -> Query:
    query = update_query(IdentityEncoder(SEGMENTS), load_recipe("quickstart", [f"privacy.clip_l2={CLIP}"]), 1)
    return replace(query, spec=replace(query.spec, wire=replace(query.spec.wire, dtype="float32")))


def noise_of(permit: Permit) -> NoiseSource:
    return ReplayNoise(3) if permit.noise == "replay" else SecureNoise()


def message_of(permit: Permit, sizes: tuple[int, ...] = (UNITS,) * SITES, site: int = 1) -> tuple[Upload, list[int]]:
    trainer = Trainer()
    curator = SiteCurator(Units(sizes), trainer, seed=0)
    upload = curator.message(query_of(), torch.zeros(SIZE), site, permit, noise_of(permit))
    return upload, trainer.trained


# --- the draw --------------------------------------------------------------------------------------


def test_the_draw_is_of_the_operating_system_and_new_every_time(
    charge: Callable[..., Permit], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[bytes] = []
    real = site_round.secrets.token_bytes
    monkeypatch.setattr(site_round.secrets, "token_bytes", lambda size: keys.append(real(size)) or keys[-1])
    drawn = [message_of(charge())[1] for _ in range(6)]
    assert len(keys) >= 6
    assert len({bytes(key) for key in keys}) == len(keys)
    assert len({tuple(units) for units in drawn}) == 6  # two of 2**40 draws are the same once in 10**11 runs
    assert all(0 < len(units) < UNITS for units in drawn)


def test_neither_run_nor_recipe_nor_ledger_gives_a_draw_away(charge: Callable[..., Permit]) -> None:
    """All that the server knows is the same in both: the run's name, the seed, the plan, the key in the ledger's header."""
    first, second = charge(), charge()
    object.__setattr__(second, "run_id", first.run_id)
    assert message_of(first)[1] != message_of(second)[1]


def test_a_replayed_draw_is_the_same_and_every_sites_own(charge: Callable[..., Permit]) -> None:
    assert message_of(charge("replay"))[1] == message_of(charge("replay"))[1]
    here, there = (message_of(charge("replay"), site=site)[1] for site in (0, 1))
    assert [unit % 1000 for unit in here] != [unit % 1000 for unit in there]


def test_the_rate_is_the_one_that_was_charged(charge: Callable[..., Permit]) -> None:
    assert message_of(charge(rate=1.0))[1] == Units((UNITS,) * SITES).units(1)
    sizes = (4000,) * SITES
    for rate in (0.05, 0.5):
        count = len(message_of(charge(rate=rate), sizes)[1])
        spread = 7 * (4000 * rate * (1 - rate)) ** 0.5
        assert abs(count - 4000 * rate) < spread


def test_a_charge_for_clients_is_no_leave_to_draw_units(tmp_path: Path) -> None:
    plan = make_plan(trust="local", population=SITES, sampling_rate=1.0, rounds=1, delta=1e-4, noise_multiplier=SIGMA)
    with Ledger.create(tmp_path / "ledger.jsonl", plan, run_id="r") as ledger:
        permit = ledger.charge(1)
    with pytest.raises(PrivacyError, match="not charged for a draw"):
        message_of(permit)


# --- the message -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 400])
def test_a_message_looks_alike_whatever_a_site_holds(charge: Callable[..., Permit], size: int) -> None:
    upload, _ = message_of(charge(), (5, size, 5))
    usual, _ = message_of(charge(), (5, 5, 5))
    assert {field.name for field in fields(Upload)} == {"clients", "messages", "nonfinite"}
    assert (upload.clients, upload.nonfinite) == (usual.clients, usual.nonfinite) == ((1,), 0)
    assert [len(message) for message in upload.messages] == [len(message) for message in usual.messages]
    prefix = len(usual.messages[0]) - SIZE * message_wire(query_of(), charge()).bits // 8
    assert 0 < prefix < 64
    assert upload.messages[0][:prefix] == usual.messages[0][:prefix]  # all but the noised values


def test_nothing_of_a_draw_is_in_a_ledger(tmp_path: Path, charge: Callable[..., Permit]) -> None:
    _, trained = message_of(charge())
    for path in tmp_path.iterdir():
        words = path.read_text()
        assert not any(str(unit) in words for unit in trained)
        assert {json.loads(line)["kind"] for line in words.splitlines()} <= {"header", "charge"}


def test_a_unit_whose_training_fails_is_not_counted(charge: Callable[..., Permit]) -> None:
    class Failing(Trainer):
        def train_clients(self, adapter_D: torch.Tensor, clients: list[int], slot: int, epochs: int) -> torch.Tensor:
            return torch.full((len(clients), SIZE), torch.nan)

    permit = charge("replay")
    upload = SiteCurator(Units((UNITS,) * SITES), Failing(), 0).message(
        query_of(), torch.zeros(SIZE), 1, permit, noise_of(permit)
    )
    empty, _ = message_of(charge("replay"), (0, 0, 0))
    assert upload.nonfinite == 0
    assert upload.messages == empty.messages  # zero, with its noise


# --- the release -----------------------------------------------------------------------------------


def released_sum(permit: Permit, trainer: Trainer, sizes: tuple[int, ...], trust: str) -> np.ndarray:
    """The released mean times q N of the recipe."""
    query, noise = query_of(), noise_of(permit)
    engine = InProcessEngine(trainer, SITES, SITES, curator=SiteCurator(Units(sizes), trainer, 0))
    result = server_release(query, engine.gather(query, torch.zeros(SIZE), permit.cohort, permit, noise), permit, noise)
    assert result.release.contributors == SITES
    plan = plan_of("replay", trust)
    assert plan.expected_cohort == RATE * SITES * UNITS
    mean_D = released_update(query, result.release, permit, plan.expected_cohort)
    return mean_D.double().numpy() * plan.expected_cohort


@pytest.mark.parametrize("trust", ["local", "secure-aggregation"])
def test_a_release_is_the_sum_over_what_everybody_knows(charge: Callable[..., Permit], trust: str) -> None:
    """Sites of other sizes than the recipe says: each drawn unit counts once, and nothing is divided by how many came."""
    trainer = Trainer()
    found = released_sum(charge("replay", trust=trust), trainer, (11, 80, 3), trust)
    noise = released_sum(charge("replay", trust=trust), Trainer(), (0, 0, 0), trust)  # the same, since it is replayed
    expected = np.zeros(SIZE)
    for unit in trainer.trained:
        expected[unit % SIZE] += CLIP
    assert len(trainer.trained) > 20
    assert len(trainer.trained) != RATE * SITES * UNITS
    assert np.abs(found - noise - expected).max() < 0.25 * CLIP  # rounding at random; a unit is 1 CLIP
