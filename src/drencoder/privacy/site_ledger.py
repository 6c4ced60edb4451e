"""A site's own ledger: what its clients have answered, on disk before the answer leaves.

A site, a machine that answers for some clients, need not believe the server about what was asked before. Its file has a
header (the recipe's digest and plan; the run, once there is one) and one JSON line per answered slot, fsynced before
`charge` returns the `Permit` without which `privacy.mechanism` releases nothing. One file serves one run: what a client may
release there is what the plan says, and another run is another consent and needs another file.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError, PrivacyError
from drencoder.privacy.ledger import Permit, _permit
from drencoder.privacy.ledger_check import plan_differences
from drencoder.privacy.ledger_file import NEEDS_WRITING, write_all
from drencoder.privacy.observers import epsilons_by_observer
from drencoder.privacy.plan import PrivacyPlan
from drencoder.reading import cut, parse_json

_FORMAT = 1


class AnsweredError(PrivacyError):
    """A client has answered this already, or would release more often than the plan allows it."""


class ForeignRunError(PrivacyError):
    """The ledger belongs to another run."""


class SiteLedger:
    """A site's ledger. Several processes of one site may share the file: each charge locks it and reads what is new.

    Secure aggregation: the site takes part in a slot once, with or without clients, since a node that began a round twice could
    sign two lists of who is in the sum. There and under local trust: a client answers one slot of each of the plan's blocks, once. Central trust: an attempt at a slot is
    answered once; a new attempt is a new charge of the server's, which is trusted there. Replayable noise (tests): the
    answer to the same slot is the same message, so it may be given again.
    """

    def __init__(self, path: Path, descriptor: int, header: dict[str, Any], plan: PrivacyPlan) -> None:
        self.path, self.plan = path, plan
        self._descriptor: int | None = descriptor
        self._header = header
        self._read = 0  # bytes of the file that are in the fields below
        self._run: str | None = None
        self._answered: set[tuple[int, int, int]] = set()  # (client, slot, attempt)
        self._begun: set[int] = set()  # slots

    @classmethod
    def open(cls, path: str | Path, recipe: str, plan: PrivacyPlan) -> "SiteLedger":
        """Opens the ledger at `path` for the recipe with this digest, or starts it.

        A last line without its end is a crash in mid-write: its answer had not left; it is cut off.

        Raises:
          ArtifactError: it is another recipe's, damaged, or cannot be written.
        """
        path = Path(path)
        header = {"kind": "header", "format": _FORMAT, "recipe": recipe, "plan": plan.to_dict()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArtifactError(f"Cannot open the site's ledger {path}: {error.strerror}. {NEEDS_WRITING}") from None
        ledger = cls(path, descriptor, header, plan)
        try:
            with ledger._locked():
                if not ledger._read:
                    ledger._append(header)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @property
    def run(self) -> str | None:
        """The run that this ledger serves; None before the first charge."""
        with self._locked():
            return self._run

    def spent(self) -> dict[str, float]:
        """Observer -> PLD epsilon of the worst client here, or of a site's units, by what was answered so far.

        How many others answered is not known here, so that none are counted on beyond what the plan needs.
        """
        with self._locked():
            charged = {slot: (1, 1) for slot in sorted(self._begun)}
        return epsilons_by_observer(self.plan, charged, self.plan.relation)

    def close(self) -> None:
        """Closing twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def charge(self, run: str, slot: int, attempt: int, clients: Sequence[int]) -> Permit:
        """Writes down that these clients answer, fsyncs, then permits it; the plan is the site's own.

        Raises:
          ForeignRunError: the ledger is of another run.
          AnsweredError: one of the clients has answered, or took part in another slot of this block.
          PrivacyError: the slot is not in the plan.
          ArtifactError: the line cannot be made durable; nothing may leave.
        """
        self.plan.event(slot)  # refuses slots that are not in the plan
        with self._locked():
            if self._run not in (None, run):
                raise ForeignRunError(f"{self.path} is the ledger of run {cut(self._run)} and run {cut(run)} asks.")
            if self.plan.noise == "secure":
                self._check_fresh(slot, attempt, clients)
            if self._run is None:
                self._append({"kind": "run", "run": run})
            if slot not in self._begun or not {(client, slot, attempt) for client in clients} <= self._answered:
                self._append({"kind": "answer", "slot": slot, "attempt": attempt, "clients": list(clients)})
        return _permit(self.plan, slot, attempt, tuple(clients), run)

    def _check_fresh(self, slot: int, attempt: int, clients: Sequence[int]) -> None:
        if self.plan.trust == "secure-aggregation" and slot in self._begun:
            raise AnsweredError(f"This site has taken part in slot {slot}: a second time would be once too often.")
        capped = self.plan.capped
        block = next((block for block in self.plan.blocks if slot in block), (slot,)) if capped else (slot,)
        asked = set(clients)
        for client, before, tried in self._answered:
            if client in asked and before in block and (capped or tried == attempt):
                raise AnsweredError(f"Client {client} has answered slot {before}; slot {slot} would be once too often.")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._descriptor is None:
            raise ArtifactError(f"The site's ledger {self.path} is closed or failed before: start the site again.")
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            self._refresh()
            yield
        finally:
            if self._descriptor is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _refresh(self) -> None:
        """Takes in the lines that were written since; under the lock, so a torn one is a crash and is cut off."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        whole, end, torn = os.pread(self._descriptor, size - self._read, self._read).rpartition(b"\n")
        if torn:
            os.ftruncate(self._descriptor, size - len(torn))
        try:
            for line in whole.split(b"\n") if end else ():
                self._enter(parse_json(line))
        except (ValueError, LookupError, TypeError, AttributeError, PrivacyError):
            raise ArtifactError(
                f"{self.path} is damaged: restore it from a copy; without it nobody may answer."
            ) from None
        self._read += len(whole) + len(end)

    def _enter(self, record: dict[str, Any]) -> None:
        """Takes a line in. Raises ValueError, or what comes of a missing field, for one that no site wrote."""
        match record["kind"]:
            case "header" if self._is_own(record):
                pass
            case "header":
                raise ArtifactError(
                    f"{self.path} is the ledger of another recipe or plan. If this run goes on, give the site the recipe that it "
                    "was started with; only another run, to which the clients consent anew, may have a --state folder of its own."
                )
            case "run" if isinstance(record["run"], str):
                self._run = record["run"]
            case "answer" if all(type(n) is int for n in (record["slot"], record["attempt"], *record["clients"])):
                self._begun.add(record["slot"])
                self._answered |= {(client, record["slot"], record["attempt"]) for client in record["clients"]}
            case _:
                raise ValueError

    def _is_own(self, header: dict[str, Any]) -> bool:
        """Whether a header is of this recipe and plan, up to the last digits that another machine's arithmetic gives."""
        same = header.keys() == self._header.keys() and header["format"] == _FORMAT
        same = same and header["recipe"] == self._header["recipe"]
        return same and not plan_differences(PrivacyPlan.from_dict(header["plan"]), self.plan)

    def _append(self, record: dict[str, Any]) -> None:
        assert self._descriptor is not None
        data = json.dumps(record, sort_keys=True).encode() + b"\n"
        try:
            write_all(self._descriptor, data)
            os.fsync(self._descriptor)
        except OSError as error:
            self.close()  # what is on disk is unknown now; `open` finds out
            raise ArtifactError(
                f"Cannot write the site's ledger {self.path}: {error.strerror}. Nothing left; free the disk, start again."
            ) from None
        self._read += len(data)
        self._enter(record)
