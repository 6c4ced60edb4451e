"""Broken mechanisms, planted one at a time: the audit names each, and finds nothing where nothing is broken."""

import hashlib
import os
from pathlib import Path

import pytest
from audit_faults import FAULTS, Fault, audit_with, recipe_of

from conftest import tiny_overrides

SMALL = [
    "prior.source=none", "federation.population=400", "federation.sampling_rate=0.5", "federation.rounds=1", "privacy.delta=1e-5",
    "encoder.name=random", "encoder.ratio=4", "encoder.gate=warn",
]  # fmt: skip


@pytest.fixture(autouse=True)
def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's generator, but the same in every run of the tests: chance must not fail one."""
    drawn = iter(range(10**9))

    def known(size: int) -> bytes:
        return hashlib.shake_256(f"draw {next(drawn)}".encode()).digest(size)

    monkeypatch.setattr(os, "urandom", known)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.breaks}, {fault.trust}")
def test_every_fault_is_named_and_nothing_else(fault: Fault, tiny_folder: Path) -> None:
    embedded = fault.breaks == "evaluation text is the clients' own"
    overrides = [*tiny_overrides(tiny_folder), *SMALL, *(["evaluation.examples=64"] if embedded else [])]
    failures = audit_with(fault, recipe_of(fault, overrides), canaries=300)
    if fault.breaks == "nothing":
        assert failures == ()
        return
    assert failures
    expected = {
        "one value of a message has no noise": "value 95 has too little",  # the last of 384 / 4
        "the sum is divided by the cohort that came": "divided by the expected cohort",
        "bytes are counted as they came from a secret cohort": "it does not answer",
        "evaluation text is the clients' own": "evaluation texts are also a client's",
        "noise from a fixed seed": "drew the same noise",
        "all clients of a batch have the same noise": "the same noise, or a part of it in common",
        "no noise at all, in messages": "epsilon is at least any number",
    }
    assert any(expected.get(fault.breaks, "") in failure for failure in failures), failures
