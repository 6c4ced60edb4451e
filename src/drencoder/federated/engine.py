"""What every engine is: it brings a query to a cohort and the uploads back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.federated.query import Query
from drencoder.federated.round import SecureSum, Upload
from drencoder.federated.site_round import SiteCurator
from drencoder.models.client_training import ClientTrainer
from drencoder.models.identity import BaseDigests
from drencoder.models.lora import LoraModel
from drencoder.privacy.ledger import Permit
from drencoder.privacy.mechanism import NoiseSource
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Recipe


@dataclass(frozen=True)
class SiteFacts:
    """What a site says about itself: its name, the clients it hosts (`0-9,12`), what their text is called there, and whether
    their owners are "named", "simulated" or "generated". Nobody can check it."""

    name: str
    clients: str
    data: str
    owners: str


class Engine(Protocol):
    """Knows neither stage, encoder nor epsilon. All engines give the same sums from the same seeds, up to float rounding
    (tests/federated/test_engines.py)."""

    def ready(self) -> None:
        """Returns once enough clients can be reached; called before a slot is charged.

        Raises:
          EngineError: they cannot, for as long as the engine is willing to wait.
        """
        ...

    def sites(self) -> Sequence[SiteFacts]:
        """The sites that have said who they are; none where the clients are in this process."""
        ...

    def unasked(self) -> Sequence[int]:
        """Those of the last cohort who were not asked, since their machine could not be reached."""
        ...

    def gather(
        self, query: Query, adapter_D: Tensor, cohort: Sequence[int], permit: Permit, noise: NoiseSource
    ) -> Iterator[Upload | SecureSum]:
        """Asks every client of the cohort once; yields what they send, some clients at a time; under secure aggregation one sum.

        A client that does not answer is left out; nothing is weighted up for it. `noise` is for clients of this machine.

        Raises:
          QuorumError: so few answered that the slot should be given up (under secure aggregation a VoidRoundError: the sum
            stays hidden); raised before the iterator ends.
        """
        ...


class RunComponents(Protocol):
    """The parts of a run that a remote engine and a site need; `runs.build` makes them from a recipe."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def plan(self) -> PrivacyPlan: ...
    @property
    def base_digests(self) -> BaseDigests: ...
    @property
    def clients_text(self) -> tuple[str, str]: ...
    @property
    def lora(self) -> LoraModel: ...
    @property
    def trainer(self) -> ClientTrainer: ...
    @property
    def curator(self) -> SiteCurator | None: ...
    def noise(self) -> NoiseSource: ...
    def encoder(self, prior: GaussianPrior | None, state: dict[str, Tensor] | None = None) -> Encoder: ...
