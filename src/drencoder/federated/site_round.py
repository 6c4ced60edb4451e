"""A site's part of a slot where the unit of privacy is a record, or an owner inside the site: draw, train, clip, add up, noise.

Legend: N units, D adapter values, K values of a message.

    units    = those of the site that a secret draw puts into the slot, each with the sampling rate
    code     = clip(encode(train(adapter, the unit's own records)))
    message  = sum of rounded codes + noise, modulo 2^b                local trust
    share    = sum of rounded codes + share of noise, modulo 2^b       secure aggregation

A unit is trained as a client of few records, so its update is a function of the adapter, the seeds, its number and its own records.
The message has one size whatever the site holds. Neither counts nor names of units are in it, in a ledger or in a log.
"""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drencoder.data.units import SiteUnits
from drencoder.encoders.wire import pack_rows
from drencoder.errors import PrivacyError
from drencoder.federated.query import Query
from drencoder.federated.round import Upload, code_values, message_wire, modulus_bits, trained_batches
from drencoder.models.client_training import ClientTrainer
from drencoder.privacy.accounting import PoissonGaussianEvent
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import BoundedCodes, NoiseSource, clip_rows, quantiser_for
from drencoder.privacy.sampling import KEY_BYTES, UnitSampler
from drencoder.privacy.site_mechanism import release_site_sum


@final
@dataclass(frozen=True)
class SiteCurator:
    """What the sites of this machine compute from their units. `trainer` takes units by number; `seed` is for replayed draws."""

    units: SiteUnits
    trainer: ClientTrainer
    seed: int

    def message(self, query: Query, adapter_D: Tensor, site: int, permit: Permit, noise: NoiseSource) -> Upload:
        """The one message of a site: local trust. Raises PrivacyError if the permit does not cover it."""
        spec, wire = query.spec, message_wire(query, permit)
        codes = self._codes(query, adapter_D, site, permit)
        sum_K = release_site_sum(codes, spec.wire.code_size, spec.clip_l2, site, permit, noise)
        steps_1K = torch.from_numpy(quantiser_for(permit, len(sum_K), spec.clip_l2).to_steps(sum_K))[None]
        values_1K = steps_1K if wire.integers else code_values(query, permit, steps_1K)
        return Upload((site,), pack_rows(values_1K, wire, spec.slot), 0)

    def node_share(
        self, query: Query, adapter_D: Tensor, sites: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> npt.NDArray[np.uint32]:
        """Secure aggregation: what a node adds up of its sites, (K,) uint32 modulo 2^b. It must not leave unmasked."""
        spec = query.spec
        total_K = np.zeros(spec.wire.code_size, dtype=np.uint32)
        for site in sites:
            codes = self._codes(query, adapter_D, site, permit)
            total_K += release_site_sum(codes, spec.wire.code_size, spec.clip_l2, site, permit, noise)
        return total_K & np.uint32((1 << modulus_bits(query, permit)) - 1)

    def _codes(
        self, query: Query, adapter_D: Tensor, site: int, permit: Permit
    ) -> Iterator[tuple[Sequence[int], BoundedCodes]]:
        """The clipped codes of the units that are in the slot, some at a time, with their numbers."""
        spec = query.spec
        if spec.noise_in != "code" or not spec.summable:
            raise PrivacyError("A site sums codes: it needs noise_in = 'code' and a linear encoder.")
        joining = self.draw(site, permit)
        for batch, update_ND in trained_batches(self.trainer, query, adapter_D, joining):
            yield batch, clip_rows(query.encode(update_ND), spec.clip_l2)

    def draw(self, site: int, permit: Permit) -> list[int]:
        """The site's secret: which of its units are in the slot, at the rate that was charged."""
        if not isinstance(permit.event, PoissonGaussianEvent):
            raise PrivacyError(f"Slot {permit.slot} was not charged for a draw among a site's units: check the plan.")
        key = secrets.token_bytes(KEY_BYTES)  # serves this draw, and is forgotten
        if permit.noise == "replay":
            key = hashlib.sha256(f"replay units/{self.seed}".encode()).digest()
        return UnitSampler(key).joining(self.units.units(site), permit.event.sampling_rate, permit.slot, site)
