"""Broken mechanisms, planted one at a time: the audit names each, and finds nothing where nothing is broken."""

from pathlib import Path

import pytest
from audit_faults import FAULTS, Fault, audit_with, recipe_of
from audit_parts.sites_and_shares import no_clip

from conftest import tiny_overrides
from drencoder.audit import audit
from drencoder.errors import PrivacyError

pytestmark = pytest.mark.usefixtures("known_noise")

SMALL = [
    "prior.source=none", "federation.population=400", "federation.sampling_rate=0.5", "federation.rounds=1", "privacy.delta=1e-5",
    "encoder.name=random", "encoder.ratio=4", "encoder.gate=warn",
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_real_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks on real records train their shadows; none of the faults is found by them."""
    monkeypatch.setattr(audit, "_VICTIMS", 16)
    monkeypatch.setattr(audit, "_SHADOWS", 64)


@pytest.mark.parametrize(
    "fault",
    # Those of a site's records and owners take most of the time.
    [pytest.param(fault, marks=pytest.mark.slow if fault.unit != "client" else ()) for fault in FAULTS],
    ids=lambda fault: f"{fault.breaks}, {fault.trust}, {fault.unit}",
)
def test_every_fault_is_named_and_nothing_else(fault: Fault, tiny_folder: Path) -> None:
    embedded = fault.breaks == "evaluation text is the clients' own"
    overrides = [*tiny_overrides(tiny_folder), *SMALL, *(["evaluation.examples=64"] if embedded else [])]
    if fault.unit == "client" and "share" in fault.breaks:  # a check to the last bit needs no crowd
        overrides.append("federation.population=120")
    failures = audit_with(fault, recipe_of(fault, overrides), canaries=150)
    if fault.breaks.startswith("nothing"):
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
        "noise at 2/3 of its size, in shares": "has not all the noise that its",
        "one value of a share has no noise": "in 1 of 96 values",
        "one client's share has no noise": "has not all the noise that its",
        "clients take part in every round, whatever the cap": "Nobody was asked in more than 4 of 4 releases of a run, and each pays for 1",
        "the clients' noise adds up to nothing in a sum": "The public can tell more than was promised (all 4 releases of the run",
        "half of the messages that are counted are in a sum": "The noise of all 4 rounds of a run together",
        "the sites' noise adds up to nothing in a sum": "The public can tell more than was promised (all 2 releases of the run",
        "one site's share has no noise": "has not all the noise that its 8 contributors drew",
        "a site's noise cancels over the run": "The noise of all 5 rounds of a run together",
        "a site's noise at 2/3 of its size": "which is too little",
        "a site's share of noise at 2/3 of its size": "which is too little",
        "a site divides by how many units took part": "a site divides by how many came",
        "a unit is counted twice": "counted more or less than once",
        "a record is three times as long as the clip": "counted more or less than once, or not clipped",
        "all units of a site take part": "more than the amplification counts on",
        "a site's draw is the same in every round": "who saw one draw knows the next",
        "a site tells how many units took part": "it is not at its site",
    }
    assert any(expected.get(fault.breaks, "") in failure for failure in failures), failures


def test_a_site_that_does_not_clip_is_stopped_by_what_rounds_its_codes(tiny_folder: Path) -> None:
    fault = Fault("a site does not clip", "local", no_clip, unit="record")
    with pytest.raises(PrivacyError, match="longer than its clip of 1: clip it before it is rounded"):
        audit_with(fault, recipe_of(fault, [*tiny_overrides(tiny_folder), *SMALL]), canaries=64)
