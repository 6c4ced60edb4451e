"""What an audit of a recipe or a run found, as data for the screen, for JSON and for the run's report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from drencoder.audit.noise_checks import Check
from drencoder.audit.observers import BOUNDS, REAL_RECORDS, View
from drencoder.audit.record_attacks import Attack
from drencoder.privacy.observers import json_ready

WITHOUT_RECORDS = (
    "Attacks on real records, and comparisons with them, are shown to whoever starts the audit and are not kept with the run: their numbers "
    "follow from clients' text without noise."
)


@final
@dataclass(frozen=True)
class RunAudit:
    """All that was measured.

    Args:
      facts: what was audited: recipe, run folder, promise, seed, canaries.
      sentence: what the promise lets an attacker do, for a data protection officer.
      views: empirical epsilon of each observer.
      checks: facts that must hold.
      attacks: on real records.
      notes: what was not tried, and why.
    """

    facts: Mapping[str, Any]
    sentence: str
    views: tuple[View, ...]
    checks: tuple[Check, ...]
    attacks: tuple[Attack, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for everything that does not hold; empty if the audit found no fault."""
        found = [view.failure for view in self.views if view.failure]
        found += [check.found for check in self.checks if not check.passed]
        found += [
            f"An attack on real records ({one.name}, {one.sees}) has an AUC of {one.auc.value:.3f}, and {one.max_auc:.3f} was promised at most."
            for one in self.attacks
            if one.exposed
        ]
        return tuple(found)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if self.failures:
            return f"THE PROMISE DOES NOT HOLD: {len(self.failures)} of {len(self.views) + len(self.checks) + len(self.attacks)} tests failed."
        near = max(self.views, key=lambda view: max(bound["99.9"] for bound in view.bounds.values()) / view.promised)
        most = max(bound["99.9"] for bound in near.bounds.values())
        return (
            f"No fault was found in {len(self.views) + len(self.checks) + len(self.attacks)} tests. Nearest to its promise came the {near.observer} with "
            f"{near.sees}: epsilon is at least {most:.2f} (99.9 % confidence), {near.promised:.2f} was promised. An audit can show that a promise "
            "is broken; it cannot prove that one holds."
        )

    def without_records(self) -> "RunAudit":
        """What may be handed on: nothing that was measured on clients' own records, which has no noise and is charged to nobody."""
        if not (self.attacks or any(check.of_records for check in self.checks)):
            return self
        kept = replace(
            self,
            views=tuple(view for view in self.views if view.canary != REAL_RECORDS),
            checks=tuple(check for check in self.checks if not check.of_records),
            attacks=(),
            notes=(WITHOUT_RECORDS,),
        )
        if len(kept.failures) == len(self.failures):
            return kept
        found = "Real records showed that the promise does not hold: start the audit again to see how."
        return replace(kept, checks=(*kept.checks, Check("attacks on real records", False, found)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a number that is infinite is the string "inf"."""
        data = {
            "format": 1,
            "facts": dict(self.facts),
            "verdict": self.verdict,
            "sentence": self.sentence,
            "failures": list(self.failures),
            "assumptions": BOUNDS,
            "views": [asdict(view) for view in self.views],
            "checks": [asdict(check) for check in self.checks],
            "attacks": [asdict(attack) | {"exposed": attack.exposed} for attack in self.attacks],
            "notes": list(self.notes),
        }
        ready: dict[str, Any] = json_ready(data)
        return ready
