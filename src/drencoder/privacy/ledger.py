"""The ledger: one line per release, on disk before the release leaves.

`ledger.jsonl` starts with a header (format version, run id, plan, digest of the recipe) and goes on with one JSON line per
event, each with the SHA-256 of the line before it (`ledger_file`). Lines are flushed and fsynced before `charge` returns
the `Permit` without which `privacy.mechanism` releases nothing. So a crash can waste budget and never hide it.
After a release a line says by its digest what became public; a finished run's last line, "closed", has the digests of all
that it leaves behind. A ledger without that line is of a run that is not finished.

Resuming after a crash, for a slot that is charged but whose result was lost:

- central: charge it again. The new attempt draws a fresh cohort and fresh noise and composes with the first;
  when the budget has no room for it, the run ends that much earlier.
- local, secure aggregation: it must be skipped (`resume_rule` says "skip", `charge` refuses). Its clients may have released once
  already; a second release with fresh noise would be one more than the participation cap allows them.
  A lost stage 1 can therefore not be repeated.
- replayable noise (tests): redo it. The identical release tells nothing new; a line of kind "repeat" costs nothing.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Literal

from drencoder import __version__
from drencoder.errors import ArtifactError, BudgetError, PrivacyError
from drencoder.privacy.accounting import REPORT_INTERVAL, Event, NonPrivateEvent, Relation, epsilon_pld, event_to_dict
from drencoder.privacy.ledger_file import FORMAT, LedgerFile
from drencoder.privacy.noise_terms import NoiseTerms, ShareTerms, noise_terms
from drencoder.privacy.observers import OBSERVERS, ObserverGuarantee, epsilons_by_observer
from drencoder.privacy.plan import Noise, PrivacyPlan, Stage, Trust
from drencoder.privacy.sampling import KEY_BYTES, Sampler

_MOST_ROUNDS = 1_000_000
ROUNDING = 1e-6  # a charge may pass the budget by no more than this
_TOKEN = object()


@dataclass
class Permit:
    """Leave to release one slot once, made by `Ledger.charge` only (anything else gets a TypeError).

    `cohort` has the clients that this charge was written for, ascending: ask these and no others. Under central trust with
    secure noise it is a secret that is in no file; nothing may tell it or its size. Where the unit is inside a site, its clients are
    all sites. Central: one sum. Local: one code of each client of `cohort`; one that is not in it, or that comes a second time, is
    refused. Secure aggregation: one share of each client, on the terms of `shares`, and one sum of them.
    """

    trust: Trust
    stage: Stage
    slot: int
    attempt: int
    event: Event
    relation: Relation
    noise: Noise
    cohort: tuple[int, ...] = field(repr=False)
    run_id: str = ""  # of the ledger: other machines tell this run's questions from another's by it
    shares: ShareTerms | None = None
    terms: NoiseTerms | None = None  # None for a stage without noise
    token: InitVar[object] = None
    _spent: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("a Permit comes from Ledger.charge, which writes it down first")

    @property
    def noise_multiplier(self) -> float:
        """Noise std / clip that the charge paid for; 0 only for an event of kind `non_private`."""
        return 0.0 if isinstance(self.event, NonPrivateEvent) else self.event.noise_multiplier

    def spend_sum(self) -> None:
        """Uses the permit up. Raises PrivacyError the second time and under local trust."""
        if self.trust == "local":
            raise PrivacyError("Under local trust there is no sum to release: each client releases its own code.")
        if -1 in self._spent:
            raise PrivacyError(f"Slot {self.slot} was charged for one release; charge again for another.")
        self._spent.add(-1)

    def spend_clients(self, client_ids: list[int]) -> None:
        """Uses the permit up for these clients. Raises PrivacyError, then none of them is used up."""
        if self.trust == "central":
            raise PrivacyError("Under central trust clients release nothing: the server releases the sum.")
        if strangers := set(client_ids) - set(self.cohort):
            raise PrivacyError(f"Client {min(strangers)} is not in the cohort of slot {self.slot}.")
        twice = self._spent & set(client_ids)
        if twice or len(set(client_ids)) < len(client_ids):
            who = min(twice) if twice else next(c for c in client_ids if client_ids.count(c) > 1)
            raise PrivacyError(f"Client {who} would release a second time in slot {self.slot}; one was charged.")
        self._spent |= set(client_ids)


class Ledger:
    """An open ledger. One process writes it at a time (file lock); make it with `create` or `open`."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        header = file.records[0]
        try:
            if not 0 < header["plan"]["rounds"] <= _MOST_ROUNDS:
                raise PrivacyError("its plan has no number of rounds that a run can have")
            self.plan = PrivacyPlan.from_dict(header["plan"])
            key = bytes.fromhex(header["sampler_key"] or "")
            # A secret cohort's key lives in memory only: each start of the run draws its own.
            self._sampler = self.plan.sampler(key or secrets.token_bytes(KEY_BYTES))
        except (PrivacyError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            said = f"{error}".splitlines()[0][:120] if isinstance(error, PrivacyError) else "a value of another kind"
            raise ArtifactError(
                f"{file.path} has a header that no run wrote ({said}): restore it from a copy."
            ) from None

    @classmethod
    def create(
        cls, path: str | Path, plan: PrivacyPlan, *, run_id: str = "", key: bytes | None = None, recipe: str = ""
    ) -> "Ledger":
        """Starts a ledger at `path`, which must not exist.

        `key` seeds the cohorts. Central trust with secure noise takes none (it is secret, fresh in each process and never written).
        Local trust draws one if none is given; it is kept in the header, since the cap must survive a resume. Replayed runs must give one.
        `recipe`: digest of what the run does, which binds a resumed run to it.
        Raises ArtifactError when the file exists or cannot be written.
        """
        secret = plan.trust == "central" and plan.noise == "secure"
        if secret and key is not None:
            raise PrivacyError("A sampling key was given, but secret cohorts draw their own: leave it out.")
        if plan.noise == "replay" and key is None:
            raise PrivacyError("Replayable runs need a sampling key of 32 bytes derived from the seed; give one.")
        if not secret:
            key = key or secrets.token_bytes(KEY_BYTES)
            plan.sampler(key)  # a bad key fails before a file exists
        header = {
            "format": FORMAT, "run_id": run_id, "plan": plan.to_dict(), "delta": plan.delta, "recipe": recipe,
            "sampler_key": key.hex() if key else None, "drencoder": __version__,
        }  # fmt: skip
        return cls(LedgerFile.create(Path(path), header))

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False) -> "Ledger":
        """Opens and verifies a ledger.

        A last line without its end is a crash in mid-write: its charge had not returned, so nothing had
        left; it is cut off, with a note. Any other damage raises ArtifactError naming the line.
        """
        file = LedgerFile.open(Path(path), read_only=read_only)
        try:
            ledger = cls(file)
            if not read_only and (torn := file.cut_torn()):
                file.append({"kind": "note", "text": f"cut off {torn} bytes of a line that was never finished"})
        except BaseException:
            file.close()
            raise
        return ledger

    def close(self) -> None:
        """Gives the lock back. Closing twice is fine."""
        self._file.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def records(self) -> list[dict[str, Any]]:
        """All whole lines, the header first; to be read only."""
        return self._file.records

    @property
    def torn(self) -> int:
        """Bytes of a last line that was never finished; only a ledger opened to be read can have any."""
        return self._file.torn

    @property
    def run_id(self) -> str:
        """Tells this run from all others."""
        return str(self.records[0]["run_id"])

    @property
    def recipe(self) -> str:
        """Digest of what the run does, as `create` got it."""
        return str(self.records[0]["recipe"])

    @property
    def head(self) -> tuple[int, str]:
        """(number of the last line, its SHA-256); `contains` recognises it later."""
        return len(self.records) - 1, self._file.head_hash

    def contains(self, head: tuple[int, str]) -> bool:
        """Whether this ledger is the one that had `head` once, or a continuation of it.

        A chain cannot show that its own end is missing: keep the head in each checkpoint and check it.
        """
        return head[1] == (
            self.records[head[0] + 1]["prev"] if head[0] + 1 < len(self.records) else self._file.head_hash
        )

    def charges(self) -> dict[int, int]:
        """How often each slot was charged."""
        return dict(Counter(record["slot"] for record in self.records if record["kind"] == "charge"))

    def released_slots(self) -> dict[int, str]:
        """Slot -> SHA-256 of what its last attempt made public; without slots whose result was lost or thrown away."""
        last: dict[int, str] = {}
        for record in self.records:
            if record["kind"] == "release":
                last[record["slot"]] = record["sha256"]
            elif record["kind"] in ("lost", "abandoned"):
                last.pop(record["slot"], None)
        return last

    def slots_without_result(self) -> dict[str, list[int]]:
        """Slots that were charged and gave nothing: "abandoned" (too few answered), "lost" (with a killed process)."""
        return {
            kind: sorted({record["slot"] for record in self.records if record["kind"] == kind})
            for kind in ("abandoned", "lost")
        }

    def sites(self) -> list[dict[str, str]]:
        """What each site of a federation last said about itself and its clients' text, by name; empty in one process."""
        said = {record["name"]: record for record in self.records if record["kind"] == "site"}
        return [{key: said[name][key] for key in ("name", "clients", "data", "owners")} for name in sorted(said)]

    def released_adapter(self, rounds: int) -> str | None:
        """SHA-256 of the adapter after the first `rounds` rounds; None if no round of them released any."""
        released = self.released_slots()
        known = [slot for slot in released if 0 < slot <= rounds]
        return released[max(known)] if known else None

    def contributors(self) -> dict[int, int]:
        """How many clients' releases the sum of each slot holds at least, where that is known."""
        contributors: dict[int, int] = {}
        for record in (record for record in self.records if record["kind"] == "contributors"):
            slot = record["slot"]  # of a slot's records the smallest counts
            contributors[slot] = min(record["contributors"], contributors.get(slot, record["contributors"]))
        return contributors

    def unasked(self) -> dict[int, list[int]]:
        """Slot -> the sites that were not asked in it, where the unit of privacy is inside a site; without slots that asked all."""
        return {record["slot"]: record["sites"] for record in self.records if record["kind"] == "unasked"}

    def charged(self) -> dict[int, tuple[int, int]]:
        """Slot -> (how often it was charged, how many contributors its sum has at least): what a plan composes."""
        known = self.contributors()
        return {slot: (count, known.get(slot, 1)) for slot, count in self.charges().items()}

    def sampler(self) -> Sampler:
        return self._sampler

    def resume_rule(self, slot: int) -> Literal["run", "skip", "redo"]:
        """What to do about `slot` when its result is not there: see the module's docstring."""
        if slot not in self.charges():
            return "run"
        return "skip" if self.plan.capped and self.plan.noise == "secure" else "redo"

    def guarantees(self) -> dict[str, ObserverGuarantee]:
        """What was spent so far for "server", "clients" and "public", for the certificate."""
        charged, plan = self.charged(), self.plan
        return {name: plan.guarantee(name, plan.composition(name, charged), REPORT_INTERVAL) for name in OBSERVERS}

    def spent(self) -> dict[str, float]:
        """PLD epsilon so far per observer, for progress lines (a quicker grid; cached)."""
        return epsilons_by_observer(self.plan, self.charged(), self.plan.relation)

    def certificate(self) -> dict[str, Any]:
        """JSON-ready: the plan, what was spent, per observer, and the ledger's last hash."""
        seq, digest = self.head
        return {
            "unit": self.plan.unit, "run_id": self.run_id,
            "private": self.plan.noise == "secure" and not self.plan.non_private,
            "delta": self.plan.delta, "relation": self.plan.relation, "plan": self.plan.to_dict(),
            "charges": sum(self.charges().values()), "ledger_head": {"seq": seq, "sha256": digest},
            "observers": {name: g.to_dict() for name, g in self.guarantees().items()},
        }  # fmt: skip

    # Writing

    def charge(self, slot: int) -> Permit:
        """Charges one release of `slot`: checks the budget, writes and fsyncs, then permits.

        The permit has the cohort that was drawn for this charge: no other one can be had.

        Raises BudgetError when the composition would pass the budget (nothing is written),
        PrivacyError for a slot outside the plan or one that must be skipped, ArtifactError when the line
        cannot be made durable (nothing may be released).
        """
        plan, event = self.plan, self.plan.event(slot)
        rule, attempt = self.resume_rule(slot), self.charges().get(slot, 0)
        if rule == "skip":
            raise PrivacyError(
                f"Slot {slot} is charged already, and its clients may have released in it: a second time would "
                f"pass their participation cap of {plan.participation_cap}. Skip it"
                + ("; a lost stage 1 needs a new run." if slot == 0 else ".")
            )
        cohort = tuple(self._sampler.cohort(slot, attempt))
        record = {"stage": plan.stage(slot), "slot": slot, "trust": plan.trust}
        if rule == "redo" and plan.noise == "replay":
            self._file.append({"kind": "repeat", **record})
        else:
            self._check_budget(slot)
            self._file.append({"kind": "charge", **record, "attempt": attempt, "event": event_to_dict(event)})
        return _permit(plan, slot, attempt, cohort, self.run_id)

    def record_contributors(self, slot: int, contributors: int) -> None:
        """How many clients' releases the sum of `slot` holds, once it is known.

        It makes the epsilon of those who see only sums smaller; without it one is assumed under local trust, and the
        plan's least under secure aggregation. Refused under central trust, where the realised size of a cohort is secret.
        """
        if not self.plan.capped:
            raise PrivacyError("The size of a secret cohort is never written: drop this call under central trust.")
        if slot not in self.charges() or not 0 <= contributors <= len(self._sampler.cohort(slot)):
            raise PrivacyError(f"Slot {slot} has no charge, or fewer than {contributors} clients in its cohort.")
        self._file.append({"kind": "contributors", "slot": slot, "contributors": contributors})

    def record_unasked(self, slot: int, sites: Iterable[int]) -> None:
        """Sites that could not be asked in a charged slot: it costs their units nothing. Where a unit is a client, nothing is written."""
        if self.plan.curated and (names := sorted(sites)):
            self._file.append({"kind": "unasked", "slot": slot, "sites": names})

    def record_abandoned(self, slot: int, answered: int | None) -> None:
        """A charged slot whose answers were thrown away, because too few came. Its charge stays.

        `answered` clients (None: a secret, or a sum that stayed hidden) had released to the server by then; the public saw
        nothing of it.
        """
        self._check_charged(slot, "there is nothing to abandon")
        if answered is not None:
            self.record_contributors(slot, answered)
        self._file.append({"kind": "abandoned", "slot": slot})

    def record_release(self, slot: int, data: bytes, of: Literal["statistics", "adapter"]) -> None:
        """What became public in a charged slot, by its SHA-256, so that nothing else can be shown in its place later.

        `data`: stage 1's released statistics, a round's adapter after it, as little-endian float32. Call it after the charge
        and before anything that was made of the release is stored.
        """
        self._check_charged(slot, "nothing of it may be released")
        digest = hashlib.sha256(data).hexdigest()
        self._file.append(
            {"kind": "release", "slot": slot, "attempt": self.charges()[slot] - 1, "of": of, "sha256": digest}
        )

    def record_lost(self, slot: int) -> None:
        """A charged slot whose release, if there was one, was lost with a killed process and is not asked for again."""
        self._check_charged(slot, "nothing of it can be lost")
        self._file.append({"kind": "lost", "slot": slot})

    def record_sites(self, sites: Iterable[Mapping[str, str]]) -> None:
        """What sites say about themselves (`name`, `clients`, `data`, `owners`); what the ledger has already is not repeated."""
        known = self.sites()
        for site in sites:
            if dict(site) not in known:
                self._file.append({"kind": "site", **site})

    def record_closed(self, rounds: int, files: Mapping[str, str]) -> None:
        """The run's last line: how many rounds there were, and the SHA-256 of each file that it leaves behind."""
        self._file.append({"kind": "closed", "rounds": rounds, "files": dict(files)})

    def _check_charged(self, slot: int, so: str) -> None:
        if slot not in self.charges():
            raise PrivacyError(f"Slot {slot} has no charge, so {so}.")

    def _check_budget(self, slot: int) -> None:
        plan, charges = self.plan, self.charges()
        after = {**charges, slot: charges.get(slot, 0) + 1}
        # Within the schedule only its total matters, computed once; past it, every charge anew.
        planned = all(count == 1 for count in after.values())
        counted = dict.fromkeys(plan.slots, 1) if planned else after
        interval = None if planned else REPORT_INTERVAL
        cost = epsilon_pld(plan.budget_events(counted), plan.gaussian_delta, plan.relation, interval)
        if cost > plan.budget + ROUNDING:
            spent = epsilon_pld(plan.budget_events(charges), plan.gaussian_delta, plan.relation)
            raise BudgetError(
                f"Slot {slot} would bring epsilon from {spent:.4f} to {cost:.4f}, past the budget of {plan.budget:.4f} "
                f"at delta {plan.delta:g}: stop here, or plan a run with more noise or fewer rounds."
            )


def _permit(plan: PrivacyPlan, slot: int, attempt: int, cohort: tuple[int, ...], run_id: str) -> Permit:
    """For the two ledgers, the run's and a site's, when the charge is on disk."""
    return Permit(
        trust=plan.trust, stage=plan.stage(slot), slot=slot, attempt=attempt, event=plan.event(slot),
        relation=plan.relation, noise=plan.noise, cohort=cohort, run_id=run_id,
        shares=plan.share_terms(slot) if plan.trust == "secure-aggregation" else None, terms=noise_terms(plan, slot), token=_TOKEN,
    )  # fmt: skip
