"""A run folder in the hands of somebody who edits it and then mends every hash, as one who wants to deceive would."""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from drencoder.errors import DrencoderError
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.certificate import derived_part, file_digests
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.verify import verify_run

TOOLS = Path(__file__).parents[1] / "tools"


def verdict(path: Path) -> str:
    """What `verify` finds wrong; empty if nothing."""
    try:
        return verify_run(path).trouble
    except DrencoderError as error:
        return str(error)


def reaccount(path: Path, *signers: Path) -> int:
    """The exit status of the script that imports nothing of this package."""
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return int(importlib.import_module("reaccount").main(path, *signers))


class Forgery:
    """A copy of a run folder. Change `records`, `certificate` or files; `mend` makes all hashes and heads fit again."""

    def __init__(self, run: Path, target: Path) -> None:
        shutil.copytree(run, target)
        self.path, self.folder = target, RunFolder(target)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in self.folder.ledger.read_bytes().splitlines()]
        self.certificate: dict[str, Any] = json.loads(self.folder.certificate.read_bytes())
        self._checkpoint = target / "checkpoints" / "latest.safetensors"
        self._checkpoint_line = self.records[self.checkpoint()[1]["ledger_head"][0]]
        self._certificate_line = self.records[self.certificate["ledger_head"]["seq"]]

    def of(self, kind: str, slot: int | None = None) -> dict[str, Any]:
        """The first line of a kind (and slot)."""
        return next(r for r in self.records if r["kind"] == kind and slot in (None, r.get("slot")))

    def remove(self, *kinds: str, slot: int | None = None) -> None:
        self.records = [r for r in self.records if r["kind"] not in kinds or slot not in (None, r.get("slot"))]

    def insert_after(self, line: dict[str, Any], **record: Any) -> None:
        self.records.insert(next(i for i, r in enumerate(self.records) if r is line) + 1, record)

    def checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(tensors, facts)."""
        data = self._checkpoint.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return load(data), json.loads(header["__metadata__"]["drencoder"])

    def write_checkpoint(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        self._checkpoint.write_bytes(save(tensors, metadata={"drencoder": json.dumps(facts)}))

    def write_ledger(self) -> None:
        """The lines with a whole chain."""
        previous, lines = "0" * 64, []
        for seq, record in enumerate(self.records):
            record |= {"seq": seq, "prev": previous}
            lines.append(json.dumps(record, sort_keys=True).encode())
            previous = hashlib.sha256(lines[-1]).hexdigest()
        self.folder.ledger.write_bytes(b"".join(line + b"\n" for line in lines))

    def _head(self, line: dict[str, Any]) -> tuple[int, str]:
        """Number and hash of the line, or of the last one before the ledger closes if it is gone."""
        places = [i for i, r in enumerate(self.records) if r is line]
        last = next((i for i, r in enumerate(self.records) if r["kind"] == "closed"), len(self.records)) - 1
        place = places[0] if places else last
        return place, hashlib.sha256(json.dumps(self.records[place], sort_keys=True).encode()).hexdigest()

    def recertify(self) -> None:
        """The certificate that this ledger and recipe would give."""
        self.write_ledger()
        with Ledger.open(self.folder.ledger, read_only=True) as ledger:
            self.certificate |= json.loads(json.dumps(derived_part(ledger, load_recipe(self.folder.recipe))))

    def mend(self) -> Path:
        """Writes ledger, checkpoint, certificate and the closing digests so that every hash fits."""
        self.write_ledger()
        tensors, facts = self.checkpoint()
        self.write_checkpoint(tensors, facts | {"ledger_head": self._head(self._checkpoint_line)})
        seq, digest = self._head(self._certificate_line)
        self.certificate["ledger_head"] = {"seq": seq, "sha256": digest}
        self.folder.write_json(self.folder.certificate, self.certificate)
        self.mend_digests()
        return self.path

    def mend_digests(self) -> None:
        """Makes the ledger close with the digests of the files as they are."""
        for record in self.records:
            if record["kind"] == "closed":
                record["files"] = file_digests(self.folder)
        self.write_ledger()

    @staticmethod
    def digest_of(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()
