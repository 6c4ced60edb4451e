"""A site's own ledger: what its clients have answered, on disk before the answer leaves.

A site, a machine that answers for some clients, need not believe the server about what was asked before. Its file has a
header (the recipe's digest and plan; the run, once there is one) and one JSON line per answered slot, fsynced before
`charge` returns the `Permit` without which `privacy.mechanism` releases nothing. One file serves one run: what a client may
release there is what the plan says, and another run is another consent and needs another file.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drencoder.errors import ArtifactError, PrivacyError
from drencoder.privacy.ledger import Permit, _permit
from drencoder.privacy.plan import PrivacyPlan

__all__ = ["AnsweredError", "ForeignRunError", "SiteLedger"]

_FORMAT = 1


class AnsweredError(PrivacyError):
    """A client has answered this already, or would release more often than the plan allows it."""


class ForeignRunError(PrivacyError):
    """The ledger belongs to another run."""


class SiteLedger:
    """An open site ledger; one process writes it at a time.

    Local trust: a client answers one slot of each of the plan's blocks, once. Central trust: an attempt at a slot is
    answered once; a new attempt is a new charge of the server's, which is trusted there. Replayable noise (tests): the
    answer to the same slot is the same message, so it may be given again.
    """

    def __init__(self, path: Path, descriptor: int, records: list[dict[str, Any]], plan: PrivacyPlan) -> None:
        self.path, self.plan = path, plan
        self._descriptor: int | None = descriptor
        self._run = next((record["run"] for record in records if record["kind"] == "run"), None)
        self._answered = {
            (client, record["slot"], record["attempt"])
            for record in records
            if record["kind"] == "answer"
            for client in record["clients"]
        }

    @classmethod
    def open(cls, path: str | Path, recipe: str, plan: PrivacyPlan) -> "SiteLedger":
        """Opens the ledger at `path` for the recipe with this digest, or starts it.

        A last line without its end is a crash in mid-write: its answer had not left; it is cut off.

        Raises:
          ArtifactError: it is another recipe's, damaged, in use, or cannot be written.
        """
        path = Path(path)
        header = {"kind": "header", "format": _FORMAT, "recipe": recipe, "plan": plan.to_dict()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ArtifactError(f"Cannot open the site's ledger {path}: {error.strerror}.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole, _, torn = path.read_bytes().rpartition(b"\n")
            if torn:
                os.ftruncate(descriptor, len(whole) + 1 if whole else 0)
            records = [json.loads(line) for line in whole.split(b"\n")] if whole else []
            if records and records[0] != header:
                raise ArtifactError(
                    f"{path} is the ledger of another recipe or plan: give another --state folder for this one."
                )
            ledger = cls(path, descriptor, records, plan)
            if not records:
                ledger._append(header)
            return ledger
        except BlockingIOError:
            os.close(descriptor)
            raise ArtifactError(f"{path} is in use by another process: give each site its own --state folder.") from None
        except (ValueError, KeyError, TypeError):
            os.close(descriptor)
            raise ArtifactError(f"{path} is damaged: restore it from a copy; without it nobody may answer.") from None
        except ArtifactError:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Gives the lock back. Closing twice is fine."""
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
        if self._run not in (None, run):
            raise ForeignRunError(f"{self.path} is the ledger of run {self._run} and run {run} asks.")
        if self.plan.noise == "secure":
            self._check_fresh(slot, attempt, clients)
        if self._run is None:
            self._append({"kind": "run", "run": run})
            self._run = run
        answered = {(client, slot, attempt) for client in clients}
        if not answered <= self._answered:
            self._append({"kind": "answer", "slot": slot, "attempt": attempt, "clients": list(clients)})
            self._answered |= answered
        cohort = frozenset(clients) if self.plan.trust == "local" else None
        return _permit(self.plan, slot, attempt, cohort, run)

    def _check_fresh(self, slot: int, attempt: int, clients: Sequence[int]) -> None:
        local = self.plan.trust == "local"
        block = next((block for block in self.plan.blocks if slot in block), (slot,)) if local else (slot,)
        asked = set(clients)
        for client, before, tried in self._answered:
            if client in asked and before in block and (local or tried == attempt):
                raise AnsweredError(f"Client {client} has answered slot {before}; slot {slot} would be once too often.")

    def _append(self, record: dict[str, Any]) -> None:
        if self._descriptor is None:
            raise ArtifactError(f"The site's ledger {self.path} is closed or failed before: start the site again.")
        data = json.dumps(record, sort_keys=True).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            self.close()  # what is on disk is unknown now; `open` finds out
            raise ArtifactError(
                f"Cannot write the site's ledger {self.path}: {error.strerror}. Nothing left; free the disk, start again."
            ) from None
