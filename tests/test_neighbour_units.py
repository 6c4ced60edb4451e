"""Whole runs on two data sets that differ in one record, or in one owner inside a site: nothing of any other unit moves by a bit.

Draws and noise are replayed, so that runs can be compared message by message, and the second run goes on from the first one's
releases: the theorem compares a round's messages after the same releases before it. What a site's sum is made of, before noise, is what
the clip let through: the sum then moves by that one unit's code, which is at most C long (2 C where the unit is replaced).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drencoder.encoders.wire import unpack_rows
from drencoder.federated import site_round
from drencoder.federated.round import message_wire
from drencoder.privacy.mechanism import BoundedCodes, Release
from neighbours import WORDS, go_on_from, run_watched

SITES, OWNERS = 3, 5
Unit = tuple[int, int]  # site, number


def records() -> list[dict[str, str]]:
    """Owners have one to three records of different lengths; one record of each site stands there twice."""
    rows = [
        {
            "instruction": " ".join(WORDS[: 2 + (site + owner + number) % 7]),
            "response": " ".join(WORDS[number : number + 2 + owner % 3]),
            "ward": f"w{site}",
            "patient": f"p{owner}",
        }
        for site in range(SITES)
        for owner in range(OWNERS)
        for number in range(1 + owner % 3)
    ]
    return rows + [dict(row) for row in rows if row["patient"] == "p1"][::2]


def is_changed(row: dict[str, str]) -> bool:
    return (row["ward"], row["patient"]) == ("w1", "p2")


def neighbour(unit: str, how: str) -> list[dict[str, str]]:
    """The records with one unit of ward 1 gone, come, or replaced, at another place of the file."""
    others, own = [row for row in records() if not is_changed(row)], [row for row in records() if is_changed(row)]
    kept, first = (own[1:], own[:1]) if unit == "record" else ([], own)
    if how == "removed":
        return [*kept, *others]
    if how == "added":
        name = "p2" if unit == "record" else "p9"
        new = [{**row, "instruction": "a further note", "patient": name} for row in first]
        return [*new, *own, *others]
    return [*({**row, "response": "zebra quartz", "instruction": " ".join(WORDS * 3)} for row in first), *kept, *others]


class Spy:
    """What stood between clip and noise: slot -> unit -> code; what left: slot -> site -> values; and the releases."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, releases: dict[int, Release] | None) -> None:
        self.releases = go_on_from(monkeypatch, releases)
        self.bounded: dict[int, dict[Unit, torch.Tensor]] = {}
        self.sent: dict[int, dict[int, torch.Tensor]] = {}
        self.clip: dict[int, float] = {}
        codes, message = site_round.SiteCurator._codes, site_round.SiteCurator.message

        def watched_codes(curator: Any, query: Any, adapter_D: Any, site: int, permit: Any) -> Any:
            for units, batch in codes(curator, query, adapter_D, site, permit):
                assert isinstance(batch, BoundedCodes)
                self.clip[query.spec.slot] = batch.clip_l2
                self.bounded.setdefault(query.spec.slot, {}).update(
                    {(site, unit): row for unit, row in zip(units, batch.values_NV, strict=True)}
                )
                yield units, batch

        def watched_message(curator: Any, query: Any, adapter_D: Any, site: int, *rest: Any) -> Any:
            upload = message(curator, query, adapter_D, site, *rest)
            assert upload.clients == (site,)
            assert upload.nonfinite == 0
            assert len(upload.messages) == 1
            row = unpack_rows(upload.messages, message_wire(query, rest[0]), query.spec.slot).code_NK[0]
            self.sent.setdefault(query.spec.slot, {})[site] = row
            return upload

        monkeypatch.setattr(site_round.SiteCurator, "_codes", watched_codes)
        monkeypatch.setattr(site_round.SiteCurator, "message", watched_message)


def run_on(
    rows: list[dict[str, str]],
    settings: list[str],
    folder: Path,
    tiny: Path,
    releases: dict[int, Release] | None = None,
) -> Spy:
    overrides = [
        "data.client_field=ward", "data.owner_field=patient",
        f"federation.population={SITES}", "federation.nodes=3", "federation.units_per_site=10", "federation.sampling_rate=0.8",
        "federation.rounds=1", *settings,
    ]  # fmt: skip
    return run_watched(rows, overrides, folder, tiny, lambda patch: Spy(patch, releases))


SETTINGS = {
    "local": ["privacy.trust=local"],
    "local, several steps, dropout": [
        "privacy.trust=local", "local.upload=increment", "local.epochs=2", "local.batch_size=1", "adapter.dropout=0.2",
    ],
    "local, adaptive clip": ["privacy.trust=local", "privacy.clip=adaptive", "speed.parallel_clients=1"],
    "secure aggregation": ["privacy.trust=secure-aggregation", "privacy.honest_share=1.0"],
}  # fmt: skip


@pytest.fixture(scope="module", params=[(unit, name) for unit in ("record", "owner") for name in SETTINGS], ids=str)
def reference(request: Any, tiny_folder: Path, tmp_path_factory: Any) -> tuple[str, list[str], Spy]:
    unit, name = request.param
    settings = [*SETTINGS[name], f"privacy.unit={unit}"]
    return unit, settings, run_on(records(), settings, tmp_path_factory.mktemp("reference") / "data", tiny_folder)


@pytest.mark.parametrize("how", ["removed", "added", "replaced"])
def test_a_neighbour_moves_its_own_code_and_no_other(
    how: str, reference: tuple[str, list[str], Spy], tiny_folder: Path, tmp_path: Path
) -> None:
    unit, settings, before = reference
    after = run_on(neighbour(unit, how), settings, tmp_path / "data", tiny_folder, before.releases)
    assert before.bounded.keys() == after.bounded.keys() == {0, 1}
    for slot in (0, 1):
        check_slot(slot, unit, how, before, after)


def check_slot(slot: int, unit: str, how: str, before: Spy, after: Spy) -> None:
    one, two, clip = before.bounded[slot], after.bounded[slot], before.clip[slot]
    assert clip == after.clip[slot]
    gone, come = one.keys() - two.keys(), two.keys() - one.keys()
    assert len(gone) <= (how != "added")
    assert len(come) <= (how != "removed")
    # One owner's numbers of records are part of the owner: replacing some of them leaves its name, and its draw, as they were.
    same_name = {at for at in one.keys() & two.keys() if not torch.equal(one[at], two[at])}
    assert len(same_name) <= (unit == "owner" and how == "replaced")
    moved = gone | come | same_name
    assert all(site == 1 for site, _ in moved)
    assert len(one.keys() - moved) >= 8  # there is somebody who might have moved

    zero = np.zeros_like(next(iter(one.values())).double().numpy())
    sums = [sum((row.double().numpy() for (site, _), row in spy.items() if site == 1), zero) for spy in (one, two)]
    assert np.linalg.norm(sums[0] - sums[1]) <= clip * (2 if how == "replaced" else 1) * (1 + 1e-9)
    for row in (*one.values(), *two.values()):
        assert float(np.linalg.norm(row.double().numpy())) <= clip * (1 + 1e-9)
    if before.sent:
        for site in (0, 2):  # noise and draws are replayed: a message that moved would tell of another site's unit
            assert torch.equal(before.sent[slot][site], after.sent[slot][site])
        assert before.sent[slot][1].shape == after.sent[slot][1].shape


def test_somebody_does_move(tiny_folder: Path, tmp_path: Path) -> None:
    """The comparison above would pass on runs that ignore their data; this one sees the changed unit's code."""
    settings = ["privacy.trust=local", "privacy.unit=owner", "federation.sampling_rate=1.0"]
    before = run_on(records(), settings, tmp_path / "before", tiny_folder)
    after = run_on(neighbour("owner", "removed"), settings, tmp_path / "after", tiny_folder)
    assert len(before.bounded[0].keys() - after.bounded[0].keys()) == 1
    assert not torch.equal(before.sent[0][1], after.sent[0][1])
