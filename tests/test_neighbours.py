"""Whole runs on two data sets that differ in one owner: every other client's message is the same to the last bit.

This is what the sensitivity of a sum takes for granted (METHOD's rule: what a client sends is a function of the adapter, the
seeds and its own records). Noise is replayed and cohorts have a fixed key, so that runs can be compared message by message. The
second run goes on from the first one's releases: the theorem compares a round's messages after the same releases before it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drencoder.federated import client_side
from drencoder.federated.query import Query
from drencoder.privacy.mechanism import Release, clip_rows
from neighbours import WORDS, go_on_from, run_watched

OWNERS, CHANGED = 6, 2


def records() -> list[dict[str, str]]:
    """Owners have between 3 and 5 records of different lengths."""
    return [
        {
            "instruction": " ".join(WORDS[: 2 + (owner + number) % 7]),
            "response": " ".join(WORDS[number : number + 2 + owner % 3]),
            "owner": f"o{owner}",
        }
        for owner in range(OWNERS)
        for number in range(3 + owner % 3)
    ]


def changed(how: str) -> list[dict[str, str]]:
    own = [record for record in records() if record["owner"] == f"o{CHANGED}"]
    others = [record for record in records() if record["owner"] != f"o{CHANGED}"]
    first = own[0]
    neighbour = {
        "gone": [{**record, "response": ""} for record in own],
        "one more": [*own, {**first, "instruction": "a further note", "response": "quite another text"}],
        "longer": [{**record, "instruction": " ".join(WORDS * 3)} for record in own],
        "fewer": own[:1],
        "other": [{**record, "response": "zebra quartz"} for record in own],
    }[how]
    return [*neighbour, *others]


class Spy:
    """Keeps what each client's update became between encoding and noise, slot -> client -> clipped values, and the releases.

    With `releases`, a run goes on from these and not from its own.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, releases: dict[int, Release] | None) -> None:
        self.bounded: dict[tuple[int, int], torch.Tensor] = {}
        self.clip: dict[int, float] = {}
        self.releases = go_on_from(monkeypatch, releases)
        for name in ("client_message", "client_share"):
            monkeypatch.setattr(client_side, name, self.watch(getattr(client_side, name)))

    def watch(self, original: Any) -> Any:
        def watched(query: Query, update_ND: torch.Tensor, clients: Any, *rest: Any) -> Any:
            spec = query.spec
            values = query.encode(update_ND) if spec.noise_in == "code" else update_ND
            bounded = clip_rows(values, spec.clip_l2).values_NV
            self.clip[spec.slot] = spec.clip_l2
            self.bounded |= {(spec.slot, client): row for client, row in zip(clients, bounded, strict=True)}
            return original(query, update_ND, clients, *rest)

        return watched


def run_on(
    rows: list[dict[str, str]],
    settings: list[str],
    folder: Path,
    tiny: Path,
    releases: dict[int, Release] | None = None,
) -> Spy:
    overrides = [
        "data.client_field=owner", "data.examples_per_client=2",
        f"federation.population={OWNERS}", "federation.sampling_rate=0.9", "federation.rounds=2",
        "privacy.participation_cap=3", *settings,
    ]  # fmt: skip
    return run_watched(rows, overrides, folder, tiny, lambda patch: Spy(patch, releases))


SETTINGS = {
    "local": ["privacy.trust=local"],
    "local, one at a time": ["privacy.trust=local", "speed.parallel_clients=1"],
    "local, dropout": ["privacy.trust=local", "adapter.dropout=0.2"],
    "local, several steps": ["privacy.trust=local", "local.upload=increment", "local.epochs=2", "local.batch_size=1"],
    "local, as published": ["privacy.trust=local", "privacy.noise_in=update"],
    "central": ["privacy.trust=central"],
    "central, adaptive clip": ["privacy.trust=central", "privacy.clip=adaptive"],
    "central, kronecker": ["privacy.trust=central", "encoder.name=kronecker", "encoder.ratio=4", "prior.public=self"],
    "secure aggregation, dropout": ["privacy.trust=secure-aggregation", "federation.nodes=3", "adapter.dropout=0.2",
                                    "privacy.honest_share=1.0"],
}  # fmt: skip


@pytest.fixture(scope="module", params=SETTINGS)
def reference(request: Any, tiny_folder: Path, tmp_path_factory: Any) -> tuple[list[str], Spy]:
    settings = SETTINGS[request.param]
    return settings, run_on(records(), settings, tmp_path_factory.mktemp("reference") / "data", tiny_folder)


@pytest.mark.parametrize("how", ["gone", "one more", "longer", "fewer", "other"])
def test_a_neighbour_moves_no_other_clients_message(
    how: str, reference: tuple[list[str], Spy], tiny_folder: Path, tmp_path: Path
) -> None:
    settings, before = reference
    after = run_on(changed(how), settings, tmp_path / "data", tiny_folder, before.releases)
    assert before.bounded.keys() == after.bounded.keys()  # the same cohorts
    slots = sorted({slot for slot, _ in before.bounded})
    assert slots == [0, 1, 2]
    for slot in slots:
        others = [client for at, client in before.bounded if at == slot and client != CHANGED]
        assert len(others) >= 3
        for client in others:
            assert torch.equal(before.bounded[slot, client], after.bounded[slot, client]), (slot, client)
        if (slot, CHANGED) in before.bounded:
            moved = not torch.equal(before.bounded[slot, CHANGED], after.bounded[slot, CHANGED])
            assert moved or how in ("one more", "fewer")  # a record more need not be among those that are used
            if how == "gone":
                assert not after.bounded[slot, CHANGED].any()  # its contribution is zero
    for spy in (before, after):
        for (at, client), row in spy.bounded.items():
            assert float(np.linalg.norm(row.double().numpy())) <= spy.clip[at] * (1 + 1e-9), (at, client)
