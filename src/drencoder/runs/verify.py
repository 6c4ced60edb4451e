"""Does a run's certificate say what its ledger says? For an auditor; no torch, no trust in the run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from drencoder.errors import ArtifactError
from drencoder.privacy.ledger import Ledger
from drencoder.recipe.recipe import load_recipe
from drencoder.runs.plan_overview import privacy_plan
from drencoder.runs.run_folder import RunFolder

__all__ = ["Verification", "verify_run"]

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verification:
    """Rows (observer, adjacency, certificate's epsilon, ledger's epsilon); `trouble` is empty if all holds."""

    rows: list[tuple[str, str, str, str]]
    charges: int
    trouble: str


def verify_run(path: Path) -> Verification:
    """Re-accounts RUN/ledger.jsonl and compares every observer's epsilon with RUN/certificate.json.

    Also checked: the chain of hashes, that the ledger is the one the certificate was written from, and that its plan
    is the recipe's.

    Raises:
      ArtifactError: a file is missing, or the ledger's chain is broken.
    """
    folder = RunFolder.open(path)
    try:
        certificate = json.loads(folder.certificate.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} has no certificate yet: finish it with drencoder run --resume {path}.") from None
    except ValueError:
        raise ArtifactError(f"{folder.certificate} is not valid JSON: restore it from a copy.") from None
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        rows: list[tuple[str, str, str, str]] = []
        trouble = ""
        for observer, guarantee in ledger.guarantees().items():
            for relation, report in guarantee.by_relation.items():
                claimed = float(certificate["observers"][observer]["by_relation"][relation]["epsilon_pld"])
                found = report.epsilon_pld
                rows.append((observer, relation, f"{claimed:.6f}", f"{found:.6f}"))
                if not (claimed == found or math.isclose(claimed, found, rel_tol=0, abs_tol=_TOLERANCE)):
                    trouble = f"the certificate's {relation} epsilon for the {observer} is {claimed}, the ledger gives {found}."
        head = certificate["ledger_head"]
        if ledger.head != (head["seq"], head["sha256"]):
            trouble = "the certificate was written from another state of the ledger."
        if ledger.plan != privacy_plan(load_recipe(folder.recipe)):
            trouble = "the ledger's plan is not the one that the recipe gives."
        return Verification(rows, sum(ledger.charges().values()), trouble)
