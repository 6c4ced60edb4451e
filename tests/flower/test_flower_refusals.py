"""What a site refuses whatever the server asks, what it writes down before it answers, and what it never says."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deployment import small_recipe
from drencoder.encoders.wire import unpack_rows
from drencoder.errors import ArtifactError, DataError, PrivacyError
from drencoder.federated.client_side import ClientSide
from drencoder.federated.query import QuerySpec, moment_query
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer, Instruction
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.site import Site
from drencoder.federated.round import message_wire
from drencoder.flower.client_app import open_site
from drencoder.models.client_training import CohortTrainer
from drencoder.privacy.ledger import _permit
from drencoder.privacy.site_ledger import SiteLedger
from drencoder.recipe.recipe import Recipe
from federation import Federation

BIG = 1 << 24


@pytest.fixture
def federation(tmp_path: Path) -> Callable[..., Federation]:
    return lambda *overrides: Federation(tmp_path, small_recipe("evaluation.every=0", *overrides))


def question(site: Site, made: Federation, **head: Any) -> bytes:
    """A sound stage-1 question to the site of node 0, with some facts of its head changed."""
    live, plan = site._components, site._components.plan
    sound = Instruction(
        nonce="n", run="run-1", attempt=0, trust=plan.trust, noise=plan.noise, noise_multiplier=plan.stage1_noise_multiplier,
        spec=moment_query(live.lora.layout.segments, live.recipe).spec, clients=(0, 3), encoder="",
        **live.base_digests.to_dict(),
    )  # fmt: skip
    facts = sound.head()
    facts["spec"] |= {key: head.pop(key) for key in list(head) if key in QuerySpec.__dataclass_fields__}
    values_D = head.pop("adapter", live.lora.initial_D.float())
    recipe = head.pop("recipe", site._recipe)
    return pack_frame(Frame(Kind.QUERY, recipe, {**facts, **head}, first=values_D.numpy().tobytes()))


def refusal(data: bytes) -> Refusal:
    return Refusal(Answer.of(unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0).head).refusal)


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ({}, Refusal.NONE),
        ({"recipe": bytes(32)}, Refusal.RECIPE),
        ({"noise_multiplier": 0.5}, Refusal.PLAN),
        ({"noise_multiplier": 1e9}, Refusal.PLAN),
        ({"trust": "central"}, Refusal.PLAN),
        ({"noise": "replay"}, Refusal.PLAN),
        ({"slot": 99}, Refusal.PLAN),
        ({"slot": 1}, Refusal.PLAN),
        ({"kind": "gradients"}, Refusal.PLAN),
        ({"clients": [1]}, Refusal.CLIENTS),
        ({"model": "0" * 64}, Refusal.MODEL),
        ({"tokenizer": "0" * 64}, Refusal.TOKENIZER),
        ({"clients": [], "model": "0" * 64}, Refusal.MODEL),
        ({"clients": [], "noise_multiplier": 0.5}, Refusal.PLAN),  # who is not asked answers as who is
        ({"clients": [0, 0]}, Refusal.FOREIGN),
        ({"clip_l2": 1e9}, Refusal.CLIP),
        ({"clip_l2": -1.0}, Refusal.CLIP),
        ({"wire": {"dtype": "float32", "code_size": 7, "encoder_tag": 7}}, Refusal.ENCODER),
        ({"wire": {"dtype": "int3", "code_size": 7, "encoder_tag": 7}}, Refusal.FOREIGN),
        ({"epochs": 2}, Refusal.ENCODER),
        ({"seed": 5}, Refusal.ENCODER),
        ({"adapter": torch.full((4,), 0.0)}, Refusal.ADAPTER),
        ({"adapter": None}, Refusal.ADAPTER),
        ({"more": 1}, Refusal.FOREIGN),
        ({"slot": True}, Refusal.FOREIGN),
    ],
)
def test_site_refuses(head: dict[str, Any], code: Refusal, federation: Callable[..., Federation]) -> None:
    made = federation()
    site = made.sites[0]
    if "adapter" in head and head["adapter"] is None:
        head = {"adapter": torch.full((site._components.lora.layout.size,), float("nan"))}
    assert refusal(site.answer(question(site, made, **head))) == code
    answered = [row for row in ledger_of(made, 0) if row["kind"] == "answer"]
    assert len(answered) == (code == Refusal.NONE)  # on disk exactly if something left


def ledger_of(made: Federation, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.folder / f"site{number}" / "site.jsonl").read_text().splitlines()]


def test_site_answers_once_whatever_the_server_says_also_after_a_restart(
    federation: Callable[..., Federation],
) -> None:
    made = federation("privacy.participation_cap=1")
    site = made.sites[0]
    assert refusal(site.answer(question(site, made))) == Refusal.NONE
    for again in (site, made.site(0)):
        assert refusal(again.answer(question(site, made))) == Refusal.ANSWERED
        assert refusal(again.answer(question(site, made, attempt=1, nonce="m"))) == Refusal.ANSWERED
        assert refusal(again.answer(question(site, made, clients=[3, 6]))) == Refusal.ANSWERED  # 3 has
        assert refusal(again.answer(question(site, made, run="run-2"))) == Refusal.RUN
    assert refusal(site.answer(question(site, made, clients=[6]))) == Refusal.NONE


def test_participation_cap_is_kept_across_slots(tmp_path: Path) -> None:
    plan = open_plan(small_recipe("privacy.participation_cap=1"))
    ledger = SiteLedger.open(tmp_path / "site.jsonl", "r", plan)
    ledger.charge("run", 1, 0, [4])
    with pytest.raises(PrivacyError, match="once too often"):
        ledger.charge("run", 2, 0, [4])
    ledger.charge("run", 2, 0, [5])
    with pytest.raises(ArtifactError, match="another recipe"):
        SiteLedger.open(tmp_path / "site.jsonl", "other", plan)


def test_central_trust_answers_a_new_attempt_and_no_old_one(tmp_path: Path) -> None:
    ledger = SiteLedger.open(tmp_path / "site.jsonl", "r", open_plan(small_recipe("privacy.trust=central")))
    ledger.charge("run", 1, 0, [4])
    ledger.charge("run", 1, 1, [4])
    with pytest.raises(PrivacyError, match="once too often"):
        ledger.charge("run", 1, 0, [4])


def open_plan(recipe: Recipe) -> Any:
    from drencoder.runs.plan_overview import privacy_plan

    return privacy_plan(recipe)


def test_two_processes_of_a_site_share_its_ledger(tmp_path: Path) -> None:
    plan = open_plan(small_recipe())
    one, two = (SiteLedger.open(tmp_path / "site.jsonl", "r", plan) for _ in range(2))
    one.charge("run", 1, 0, [4])
    with pytest.raises(PrivacyError, match="once too often"):
        two.charge("run", 1, 0, [4])


def test_a_torn_line_is_cut_off_and_a_damaged_one_refused(tmp_path: Path) -> None:
    plan, path = open_plan(small_recipe()), tmp_path / "site.jsonl"
    SiteLedger.open(path, "r", plan).charge("run", 1, 0, [4])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "ans')
    with pytest.raises(PrivacyError, match="once too often"):
        SiteLedger.open(path, "r", plan).charge("run", 1, 0, [4])
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"answer"', b'"answer'))
    with pytest.raises(ArtifactError, match="damaged"):
        SiteLedger.open(path, "r", plan)


def test_min_noise_is_the_sites_own(federation: Callable[..., Federation]) -> None:
    made = federation()
    sigma = made.sites[0]._components.plan.noise_multiplier
    made.site(0, min_noise=0.99 * sigma)
    with pytest.raises(PrivacyError, match="below --min-noise"):
        made.site(0, min_noise=1.01 * sigma)


def test_a_full_disk_at_a_site_stops_the_answer(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = federation()
    site = made.sites[0]

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    answer = site.answer(question(site, made))
    monkeypatch.undo()
    assert refusal(answer) == Refusal.STORAGE
    assert "free the disk" in capsys.readouterr().err
    assert refusal(site.answer(question(site, made))) == Refusal.STORAGE  # until it is started again
    assert refusal(made.site(0).answer(question(site, made))) == Refusal.NONE


SECRET = "the patient in room 12"


@pytest.mark.parametrize("where", ["training", "site"])
def test_no_text_of_an_exception_reaches_the_server_or_the_sites_log(
    where: str,
    federation: Callable[..., Federation],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made, said = federation(), list[str]()
    site = made.site(0, "heard", say=said.append)

    def failing(*_: Any) -> Any:
        raise ValueError(SECRET)

    if where == "training":
        monkeypatch.setattr(CohortTrainer, "_train", failing)
    else:
        monkeypatch.setattr(ClientSide, "uploads", failing)
    answer = site.answer(question(site, made))
    assert SECRET.encode() not in answer
    assert SECRET not in "".join([*capsys.readouterr(), *said])
    assert ("failed: ValueError" in said) == (where == "site")
    assert refusal(answer) == (Refusal.NONE if where == "training" else Refusal.FAILED)


def test_a_client_whose_training_raises_takes_nobody_with_it(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one client's text would decide about others' contributions: the sum would move by more than one clip."""
    made = federation("privacy.noise=replay")
    site = made.sites[0]
    sound = site.answer(question(site, made))
    original = CohortTrainer._train

    def sometimes(self: CohortTrainer, adapter_D: torch.Tensor, clients: Sequence[int], *rest: Any) -> torch.Tensor:
        if 3 in clients:
            raise RuntimeError("CUDA out of memory")
        return original(self, adapter_D, clients, *rest)

    monkeypatch.setattr(CohortTrainer, "_train", sometimes)
    broken = site.answer(question(site, made))
    first, second = (unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0).first for data in (sound, broken))
    half = len(first) // 2
    assert first[:half] == second[:half]
    assert first[half:] != second[half:]
    live = site._components
    query = moment_query(live.lora.layout.segments, live.recipe)
    wire = message_wire(query, _permit(live.plan, 0, 0, (0, 3), "run-1"))
    read = unpack_rows([second[half:]], wire, 0)
    assert read.rejected == 0
    assert read.code_NK.double().norm() > 0  # still noised


def test_random_bytes_never_raise(federation: Callable[..., Federation]) -> None:
    made = federation()
    site, chance = made.sites[0], torch.Generator().manual_seed(0)
    sound = question(site, made)
    for size in range(1, 400, 7):
        noise = bytes(torch.randint(256, (size,), generator=chance).tolist())
        place = int(torch.randint(len(sound), (), generator=chance))
        for data in (noise, b"DRFL\x01\x03" + noise, sound[:place], sound[:place] + noise + sound[place:]):
            refusal(site.answer(data))
    assert [row["kind"] for row in ledger_of(made, 0)] == ["header"]


def test_a_sites_own_file_belongs_to_its_clients_alone(tmp_path: Path) -> None:
    """All records are used, each by one hosted client under its number in the population; nothing is set aside."""
    recipe, file = small_recipe("data.examples_per_client=12"), tmp_path / "ward.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"q{i}", "response": f"a{i}"}) + "\n" for i in range(12)))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    site = open_site(str(tmp_path / "recipe.toml"), "4,17", data=str(file), state=tmp_path / "state")
    source = site._components.texts.source
    held = [record["instruction"] for client in (4, 17) for record in source.client(client)]
    assert sorted(held) == sorted(f"q{i}" for i in range(12))
    assert site._components.held_out == []
    with pytest.raises(DataError, match="none of this site's"):
        source.client(5)
