"""This module holds what an audit found: measured attacks beside what the accounting allows."""

from dataclasses import asdict, dataclass, field
from typing import Any, final

from drencoder.audit.auc import Auc

LEAKAGES = {
    "tokens": "Tokens of a client's text, from what it uploads",
    "training set": "Membership of a client's gradient in the encoder's training set",
    "release": "Membership of a client in a release",
}


@final
@dataclass(frozen=True)
class Finding:
    """One attack on one arm.

    Args:
      leakage: a key of `LEAKAGES`.
      arm: the method.
      sees: what the attacker has.
      attack: how it scores.
      auc: measured, with its 95 % interval.
      max_auc: the largest AUC that the accounting allows for this release; None where nothing is promised.
      tokens_found: tokens only: share of a text's tokens among as many best guesses.
      note: one fact more.
      sabotaged: the audit itself took noise away, to see whether the attack notices; then `exposed` must be true.
    """

    leakage: str
    arm: str
    sees: str
    attack: str
    auc: Auc
    max_auc: float | None = None
    tokens_found: float | None = None
    note: str = ""
    sabotaged: bool = False

    @property
    def exposed(self) -> bool:
        """Whether the promise was measured not to hold; true by chance once in 2,000 rows."""
        return self.max_auc is not None and self.auc.floor > self.max_auc

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as JSON-ready values."""
        return asdict(self) | {"exposed": self.exposed}


@final
@dataclass(frozen=True)
class Audit:
    """All findings, what was run, one text that was read from an unprotected upload, and what to keep in mind."""

    findings: tuple[Finding, ...]
    facts: dict[str, Any]
    example: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    @property
    def broken(self) -> tuple[Finding, ...]:
        """Promises that were measured not to hold."""
        return tuple(finding for finding in self.findings if finding.exposed and not finding.sabotaged)

    @property
    def unnoticed(self) -> tuple[Finding, ...]:
        """Sabotage that went unnoticed: then the audit proves nothing."""
        return tuple(finding for finding in self.findings if finding.sabotaged and not finding.exposed)

    def to_dict(self) -> dict[str, Any]:
        """Returns the audit as JSON-ready values."""
        return {
            "facts": self.facts,
            "findings": [finding.to_dict() for finding in self.findings],
            "broken": len(self.broken),
            "unnoticed": len(self.unnoticed),
            "example": self.example,
            "notes": list(self.notes),
        }
