"""What an auditor checks in a ledger, by this package and by the script that imports nothing of it."""

import dataclasses
import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest

from drencoder.errors import ArtifactError, PrivacyError
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.ledger_check import ledger_troubles, plan_differences
from drencoder.privacy.make_plan import make_plan

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


def test_the_script_is_independent():
    for part in TOOL.parent.glob("reaccount*.py"):
        assert not re.search(r"^\s*(import|from) drencoder", part.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "made",
    [
        plan(noise_multiplier=5.0, sampling_rate=0.1, stage1_noise_ratio=1.5),
        plan("local", participation_cap=2, noise_multiplier=5.0, stage1_noise_ratio=0.8),
        plan("local", participation_cap=2, noise_multiplier=5.0, nonlinear_decoding=True),
    ],
    ids=["central", "local", "local-decodes-each"],
)
def test_the_independent_script_agrees(path, made):
    script = runpy.run_path(str(TOOL.with_name("reaccount_ledger.py")))
    with Ledger.create(path, made) as ledger:
        for slot in (0, 1, 2, 3):
            ledger.charge(slot)
            if made.trust == "local":
                ledger.record_contributors(slot, len(ledger.sampler().cohort(slot)) - slot)
        observers, troubles = ledger.certificate()["observers"], ledger_troubles(ledger)
    records, head = script["read_ledger"](path)
    assert head == ledger.head[1]
    assert troubles == script["line_troubles"](records) == []
    for observer, events in script["compositions"](records).items():
        for relation, row in observers[observer]["by_relation"].items():
            found = {"epsilon_pld": script["epsilon"](events, made.delta, relation)}
            found |= script["other_numbers"](events, made.delta, relation)
            assert all(script["agree"](row[name], value) for name, value in found.items()), (observer, relation)


def test_both_see_a_line_that_the_plan_does_not_allow(path):
    script = runpy.run_path(str(TOOL.with_name("reaccount_ledger.py")))
    with Ledger.create(path, plan("local")) as ledger:
        ledger.charge(0)
        ledger.record_contributors(0, 3)
        ledger.record_release(0, b"", "statistics")
        ledger.charge(1)
        ledger.record_abandoned(1, 2)
        ledger.charge(2)
        ledger.record_lost(2)
        with pytest.raises(PrivacyError, match="nothing of it may be released"):
            ledger.record_release(3, b"", "adapter")
        with pytest.raises(PrivacyError, match="nothing of it can be lost"):
            ledger.record_lost(3)
    good = lines(path)
    for edit in (
        lambda rows: rows[1]["event"].update(noise_multiplier=0.05),
        lambda rows: rows[2].update(contributors=500),
        lambda rows: rows[3].update(of="adapter"),
        lambda rows: rows[3].update(attempt=1),
        lambda rows: rows[4].update(slot=0),
        lambda rows: rows.__delitem__(4),
        lambda rows: rows[0].update(delta=1e-9),
        lambda rows: rows[0].update(sampler_key=None),
    ):
        rows = json.loads(json.dumps(good))
        assert script["line_troubles"](rows) == []
        edit(rows)
        assert script["line_troubles"](rows)
        chained(path, rows)
        with Ledger.open(path, read_only=True) as ledger:
            assert ledger_troubles(ledger)


def chained(path, rows):
    """Writes these lines with a whole chain of hashes."""
    previous, text = "0" * 64, b""
    for seq, row in enumerate(rows):
        line = json.dumps(row | {"seq": seq, "prev": previous}, sort_keys=True).encode()
        text, previous = text + line + b"\n", hashlib.sha256(line).hexdigest()
    path.write_bytes(text)


def test_a_header_that_no_run_wrote_is_one_sentence(path):
    with Ledger.create(path, plan("local")):
        pass
    for change in (
        {"rounds": 10**12}, {"rounds": "4"}, {"rounds": None}, {"population": 0}, {"sampling_rate": "often"},
        {"trust": ["local"]}, {"trust": {}}, {"non_private": 3}, {"delta": 10**299}, {"more": 1},
    ):  # fmt: skip
        rows = lines(path)
        rows[0]["plan"] |= change
        chained(path.with_name("other"), rows)
        with pytest.raises(ArtifactError, match="has a header that no run wrote"):
            Ledger.open(path.with_name("other"))


def test_an_old_ledger_names_the_version_that_wrote_it(path):
    with Ledger.create(path, plan()):
        pass
    rows = lines(path)
    chained(
        path, [{key: value for key, value in rows[0].items() if key not in ("recipe", "drencoder")} | {"format": 1}]
    )
    with pytest.raises(ArtifactError, match=r"format 1, written by drencoder 0\.1; .* use the version that wrote it"):
        Ledger.open(path)
    chained(path, [rows[0] | {"format": 9, "drencoder": "7.1"}])
    with pytest.raises(ArtifactError, match=r"format 9, written by drencoder 7\.1"):
        Ledger.open(path)


def test_plans_of_two_versions_of_scipy_are_the_same(path):
    one = plan(noise_multiplier=None, epsilon=2.0)
    near = dataclasses.replace(one, noise_multiplier=one.noise_multiplier * (1 + 1e-12))
    assert plan_differences(one, near) == []
    assert plan_differences(one, dataclasses.replace(one, noise_multiplier=one.noise_multiplier * 1.001)) == [
        "noise_multiplier"
    ]
    assert plan_differences(one, dataclasses.replace(one, delta=2e-4)) == ["delta"]
