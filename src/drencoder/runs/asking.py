"""Asking a cohort, in one place for both stages: charge, deliver, release, and how many bytes that took.

Legend: D adapter values.
"""

from dataclasses import asdict

from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.errors import QuorumError
from drencoder.federated.query import Query
from drencoder.federated.round import CohortRelease, server_release
from drencoder.privacy.ledger import Ledger, Permit
from drencoder.runs.build import Components


def ask_cohort(components: Components, ledger: Ledger, query: Query, adapter_D: Tensor) -> tuple[CohortRelease, Permit]:
    """Charges the slot, asks the cohort that was charged, and releases the sum of its answers, in this order.

    Raises:
      EngineError: no clients can be reached; nothing was charged.
      QuorumError: too few answered; their answers were thrown away and the charge stays.
    """
    slot = query.spec.slot
    components.engine.ready()
    ledger.record_sites(asdict(site) for site in components.engine.sites())
    permit, noise = ledger.charge(slot), components.noise()
    try:
        result = server_release(
            query, components.engine.gather(query, adapter_D, permit.cohort, permit, noise), permit, noise
        )
    except QuorumError as error:
        ledger.record_unasked(slot, components.engine.unasked())
        ledger.record_abandoned(slot, error.answered if permit.trust == "local" else None)
        raise
    ledger.record_unasked(slot, components.engine.unasked())
    ledger.record_sites(asdict(site) for site in components.engine.sites())  # of those that came in between
    if result.release.contributors is not None:
        # How many noised codes hide each other is public but under central trust, and makes the epsilon of a sum.
        ledger.record_contributors(slot, result.release.contributors)
    return result, permit


def uploaded_bytes(result: CohortRelease, expected_cohort: float, query: Query) -> int:
    """Bytes of a slot's uploads: counted, or expected where the size of a cohort is secret."""
    if result.release.contributors is not None:
        return result.bytes_up
    return round(expected_cohort * query.spec.wire.message_size)


def downloaded_bytes(encoder: Encoder, update_size: int) -> int:
    """Bytes that one client needs for a round: the adapter in float32, and the encoder's bases where it has any."""
    return 4 * update_size + int(encoder.describe().get("basis_bytes", 0))
