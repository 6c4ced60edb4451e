"""The ledger is never short: written before, chained, refused when the budget is spent."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drencoder.errors import ArtifactError, BudgetError, PrivacyError
from drencoder.privacy.accounting import GaussianEvent, NonPrivateEvent, PoissonGaussianEvent, epsilon_pld
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.privacy.make_plan import make_plan

KEY = bytes(range(32))
TOOL = Path(__file__).parents[2] / "tools" / "reaccount.py"


def plan(trust="central", **change):
    return make_plan(
        **{
            "trust": trust,
            "population": 500,
            "sampling_rate": 0.05,
            "rounds": 4,
            "stage1_rate": 0.05,
            "delta": 1e-4,
            "noise_multiplier": 1.5,
            **change,
        }
    )


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize("trust", ["central", "local"])
def test_a_run_and_its_resume(path, trust):
    with Ledger.create(path, plan(trust), run_id="r1") as ledger:
        assert ledger.spent()["public"] == 0 == ledger.spent()["clients"]
        for slot in (0, 1, 2):
            permit = ledger.charge(slot)
            assert (permit.slot, permit.attempt, permit.noise_multiplier) == (slot, 0, 1.5)
        head = ledger.head
    with Ledger.open(path) as ledger:
        assert ledger.plan == plan(trust)
        assert ledger.run_id == "r1"
        assert ledger.head == head == (3, head[1])
        ledger.charge(3)
        ledger.charge(4)
        assert ledger.contains(head)
        assert not ledger.contains((3, "0" * 64))
        assert not ledger.contains((99, head[1]))
        assert ledger.charges() == dict.fromkeys(range(5), 1)
        for name, view in ledger.guarantees().items():
            promised = plan(trust).epsilons()[name]
            # Local: without recorded contributors, one is assumed, so nothing beyond the server's epsilon.
            wanted = plan(trust).epsilons()["server"] if trust == "local" else promised
            assert view.epsilon_pld == pytest.approx(wanted.epsilon_pld, abs=3e-4)
            assert ledger.spent()[name] == pytest.approx(view.epsilon_pld, abs=3e-4)


def test_budget_is_refused_before_anything_is_written(path):
    with Ledger.create(path, plan()) as ledger:
        for slot in (0, 1, 2, 3, 4):
            ledger.charge(slot)
        before = path.read_bytes()
        with pytest.raises(BudgetError, match=r"from \d\.\d+ to \d\.\d+, past the budget of \d\.\d+"):
            ledger.charge(4)
        assert path.read_bytes() == before


def test_a_repeated_central_round_is_charged_and_costs_a_later_one(path):
    with Ledger.create(path, plan()) as ledger:
        ledger.charge(0)
        first = ledger.charge(1)
        assert ledger.resume_rule(1) == "redo"
        assert ledger.resume_rule(2) == "run"
        second = ledger.charge(1)
        assert second.cohort != first.cohort  # a fresh draw, as the composition assumes
        assert second.attempt == 1
        once = epsilon_pld([PoissonGaussianEvent(0.05, 1.5, 3)], ledger.plan.gaussian_delta, "add_remove")
        assert ledger.spent()["public"] == pytest.approx(once, abs=1e-9)
        ledger.charge(2)
        ledger.charge(3)
        with pytest.raises(BudgetError):
            ledger.charge(4)


def test_a_target_epsilon_bounds_the_ledger(path):
    tight = plan(noise_multiplier=None, epsilon=2.0)
    with Ledger.create(path, tight) as ledger:
        for slot in (0, 1, 2, 3, 4):
            ledger.charge(slot)
        assert 1.99 < ledger.spent()["public"] <= 2.0
        with pytest.raises(BudgetError, match=r"2\.0000"):
            ledger.charge(0)


def test_a_charged_local_slot_is_skipped_never_redone(path):
    with Ledger.create(path, plan("local")) as ledger:
        assert ledger.resume_rule(2) == "run"
        ledger.charge(2)
    with Ledger.open(path) as ledger:
        assert ledger.resume_rule(2) == "skip"
        with pytest.raises(PrivacyError, match="Skip it"):
            ledger.charge(2)
        assert ledger.charge(3).cohort
        assert len(lines(path)) == 3


def test_local_cohorts_survive_a_resume_and_keep_to_the_cap(path):
    with Ledger.create(path, plan("local", participation_cap=2)) as ledger:
        before = [ledger.sampler().cohort(slot) for slot in range(5)]
    with Ledger.open(path) as ledger:
        assert [ledger.sampler().cohort(slot) for slot in range(5)] == before
        assert ledger.charge(1).cohort == tuple(before[1])
    counts = [sum(client in cohort for cohort in before) for client in range(500)]
    assert max(counts) == 2


def test_replayed_slots_cost_nothing_and_are_written(path):
    with Ledger.create(path, plan(noise="replay"), key=KEY) as ledger:
        first = ledger.charge(1).cohort
        spent = ledger.spent()
    with Ledger.open(path) as ledger:
        for _ in range(9):
            assert ledger.charge(1).cohort == first
        assert ledger.spent() == spent
        assert [record["kind"] for record in lines(path)] == ["header", "charge", *["repeat"] * 9]
        assert ledger.certificate()["private"] is False
        assert "NOT PRIVATE" in ledger.certificate()["observers"]["public"]["assumption"]


def test_secret_cohorts_and_their_key_are_never_written(path):
    with Ledger.create(path, plan()) as ledger:
        size = len(ledger.charge(1).cohort)
        with pytest.raises(PrivacyError, match="never written"):
            ledger.record_contributors(1, size)
        ours = ledger.charge(2).cohort
    assert lines(path)[0]["sampler_key"] is None
    assert "contributors" not in path.read_text()
    with Ledger.open(path) as ledger:
        assert ledger.charge(3).cohort != ours
        assert ledger.sampler().cohort(2) != list(ours)
    with pytest.raises(PrivacyError, match="leave it out"):
        Ledger.create(path.with_name("other"), plan(), key=KEY)
    with pytest.raises(PrivacyError, match="give one"):
        Ledger.create(path.with_name("other"), plan(noise="replay"))
    assert not path.with_name("other").exists()


def test_contributors_lower_what_the_others_see(path):
    with Ledger.create(path, plan("local", participation_cap=5)) as ledger:
        sizes = {slot: len(ledger.sampler().cohort(slot)) for slot in range(5)}
        for slot, size in sizes.items():
            ledger.charge(slot)
            if slot:
                ledger.record_contributors(slot, size)
        with pytest.raises(PrivacyError, match="fewer than"):
            ledger.record_contributors(1, sizes[1] + 1)
        views = ledger.guarantees()
        public = 1 / 1.5 * math.sqrt(1 + sum(1 / sizes[slot] for slot in range(1, 5)))  # slot 0: one assumed
        others = 1 / 1.5 * math.sqrt(1 + sum(1 / (sizes[slot] - 1) for slot in range(1, 5)))
        assert views["public"].mu == pytest.approx(public, rel=1e-12)
        assert views["clients"].mu == pytest.approx(others, rel=1e-12)
        assert views["server"].mu == pytest.approx(math.sqrt(5) / 1.5, rel=1e-12)
        ledger.record_contributors(1, 2)  # of two records the smaller counts
        with_two = ledger.guarantees()["public"].mu
        assert with_two > views["public"].mu
        ledger.record_contributors(1, sizes[1])
        assert ledger.guarantees()["public"].mu == with_two


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_cut_off_with_a_note(path, cut):
    with Ledger.create(path, plan()) as ledger:
        ledger.charge(0)
        ledger.charge(1)
    path.write_bytes(path.read_bytes()[:-cut])
    with Ledger.open(path, read_only=True) as ledger:
        assert ledger.charges() == {0: 1}
    with Ledger.open(path) as ledger:
        assert ledger.charges() == {0: 1}
        assert ledger.resume_rule(1) == "run"
        ledger.charge(1)
    assert [record["kind"] for record in lines(path)] == ["header", "charge", "note", "charge"]
    Ledger.open(path).close()


def test_any_other_damage_names_the_line(path):
    with Ledger.create(path, plan()) as ledger:
        for slot in range(4):
            ledger.charge(slot)
    good = path.read_bytes().splitlines(keepends=True)
    damages = {
        2: [good[0], good[1].replace(b"1.5", b"9.5"), *good[2:]],  # found at the next line's hash, see below
        3: [*good[:2], *good[3:]],
        4: [*good[:3], b"\n", *good[3:]],
        1: [good[0].replace(b"0.0001", b"0.0009"), *good[1:]],
        5: [*good[:4], good[4].replace(b'"kind": "charge"', b'"kind": "bonus"')],
    }
    for number, damaged in damages.items():
        path.write_bytes(b"".join(damaged))
        shown = number + 1 if number in (1, 2) else number
        with pytest.raises(ArtifactError, match=f"line {shown}, was changed"):
            Ledger.open(path)


def test_files_that_cannot_be(path):
    with pytest.raises(ArtifactError, match="No such file"):
        Ledger.open(path)
    path.write_bytes(b'{"half')
    with pytest.raises(ArtifactError, match="no complete first line, so it was cut or damaged: restore it"):
        Ledger.open(path)
    with pytest.raises(ArtifactError, match="exists"):
        Ledger.create(path, plan())
    with pytest.raises(ArtifactError, match="Nothing was released"):
        Ledger.create(path.parent / "missing" / "ledger.jsonl", plan())


def test_one_writer_at_a_time(path):
    with Ledger.create(path, plan()) as ledger:
        with pytest.raises(ArtifactError, match="in use"):
            Ledger.open(path)
        with Ledger.open(path, read_only=True) as reader, pytest.raises(ArtifactError, match="read-only"):
            reader.charge(0)
        ledger.charge(0)
    with pytest.raises(ArtifactError, match="closed"):
        ledger.charge(1)


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_no_permit_when_the_disk_is_full(path, monkeypatch, broken):
    ledger = Ledger.create(path, plan())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(ArtifactError, match=r"No space left on device.*Nothing was released"):
        ledger.charge(0)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="open it again"):
        ledger.charge(0)
    with Ledger.open(path) as again:
        again.charge(1)


def test_the_permit_comes_after_the_fsync(path, monkeypatch):
    ledger = Ledger.create(path, plan())
    order = []
    real_write, real_fsync, real_init = os.write, os.fsync, Permit.__post_init__
    monkeypatch.setattr(os, "write", lambda *a: order.append("write") or real_write(*a))
    monkeypatch.setattr(os, "fsync", lambda *a: order.append("fsync") or real_fsync(*a))
    monkeypatch.setattr(Permit, "__post_init__", lambda *a: order.append("permit") or real_init(*a))
    ledger.charge(0)
    assert order == ["write", "fsync", "permit"]
    ledger.close()


def test_creation_syncs_file_and_folder(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.realpath(f"/proc/self/fd/{fd}")) or real(fd))
    Ledger.create(path, plan()).close()
    # The file is whole under another name before it has its own: no kill leaves half a header.
    assert synced == [str(path.resolve().with_name(".ledger.jsonl.starting")), str(path.parent.resolve())]


def test_kill_9_leaves_every_returned_charge(path):
    code = (
        "import os, signal, sys; from drencoder.privacy.ledger import Ledger;"
        "ledger = Ledger.open(sys.argv[1]); ledger.charge(0); ledger.charge(1);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    Ledger.create(path, plan()).close()
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=600).returncode == -9
    with Ledger.open(path) as ledger:
        assert ledger.charges() == {0: 1, 1: 1}


def test_permits_come_from_the_ledger_only():
    with pytest.raises(TypeError, match=r"Ledger\.charge"):
        Permit("central", "round", 1, 0, GaussianEvent(1.0), "add_remove", "secure", ())


def test_non_private_stages_are_charged_and_infinite(path):
    with Ledger.create(path, plan(non_private=["stage1"])) as ledger:
        assert ledger.charge(0).event == NonPrivateEvent()
        assert ledger.spent()["public"] == math.inf
        for slot in (1, 2, 3, 4):
            ledger.charge(slot)  # the private rest still has its budget
        with pytest.raises(BudgetError):
            ledger.charge(1)
        certificate = json.loads(json.dumps(ledger.certificate(), allow_nan=False))
        assert certificate["observers"]["public"]["epsilon_pld"] == "inf"
        assert certificate["private"] is False
