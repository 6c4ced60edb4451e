"""What the three experiments share: the subjects, the plans, stage 1, and the arms of stage 2.

Legend: N clients, D adapter values.
"""

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from drencoder.audit.arms import Arm, audit_plan, opened
from drencoder.audit.subjects import Subjects
from drencoder.encoders.code_sizes import code_size
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.federated.query import Query, gradient_query, moment_query
from drencoder.federated.round import client_message, message_rows
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.plan import PrivacyPlan, Trust
from drencoder.published.autoencoder import Autoencoder
from drencoder.published.fedcg import RealGradients
from drencoder.published.fitting import AutoencoderOptions
from drencoder.recipe.recipe import Encoder as EncoderKnobs
from drencoder.runs.build import Live
from drencoder.runs.plan_overview import privacy_plan

__all__ = ["Scene", "plan_under"]

Segments = tuple[Segment, ...]

_VALIDATION_SHARE = 0.25


def plan_under(live: Live, trust: Trust) -> PrivacyPlan:
    """The recipe's plan under this trust, at the recipe's epsilon."""
    recipe, plan = live.recipe, live.plan
    if plan.trust == trust and not plan.non_private:
        return plan
    # A recipe of another trust may ask a client in every slot; under local trust that needs the cap for it.
    cap = recipe.federation.rounds + 1 if trust == "local" else recipe.privacy.participation_cap
    privacy = replace(recipe.privacy, trust=trust, noise_in="code", participation_cap=cap)
    prior = replace(recipe.prior, source="moments")
    return privacy_plan(replace(recipe, privacy=privacy, prior=prior, encoder=EncoderKnobs()))


@final
@dataclass(frozen=True)
class Scene:
    """The recipe's objects and numbers as the experiments use them."""

    live: Live
    subjects: Subjects
    seed: int
    trials: int
    options: AutoencoderOptions
    local: PrivacyPlan
    central: PrivacyPlan

    @property
    def segments(self) -> Segments:
        return self.live.lora.layout.segments

    @property
    def sigma(self) -> float:
        """Noise multiplier of one local release."""
        return self.local.noise_multiplier

    @property
    def stage1_sigma(self) -> float:
        return self.local.stage1_noise_multiplier or self.sigma

    # --- stage 1, as the run does it ---------------------------------------------------------------

    def moments(self, segments: Segments) -> Query:
        return moment_query(segments, replace(self.live.recipe.prior, epochs=1))

    def stage1_plan(self, clients: int, sigma: float | None) -> PrivacyPlan:
        return audit_plan("local", clients, 1, sigma, stage1=True)

    def prior(self, update_ND: Tensor, segments: Segments, sigma: float | None) -> GaussianPrior:
        """Fitted to these clients' moments, clipped and noised by each client (`sigma` None: no noise)."""
        cohort = list(range(len(update_ND)))
        with opened(self.stage1_plan(len(cohort), sigma), self.seed) as wire:
            release, _ = wire.release(self.moments(segments), update_ND, cohort)
        return GaussianPrior.from_statistics(release.value / len(cohort), segments, release.noise_std / len(cohort))

    def real_gradients(self, update_ND: Tensor) -> RealGradients:
        """FedCG's stage 1: the gradients as they are, charged as non-private."""
        query = gradient_query(update_ND.shape[1], replace(self.live.recipe.prior, epochs=1))
        with opened(self.stage1_plan(len(update_ND), None), self.seed) as wire:
            permit = wire.ledger.charge(0)
            upload = client_message(query, update_ND, range(len(update_ND)), permit, wire.noise)
            return RealGradients.collected(message_rows(query, [upload], permit)[0], permit)

    def fit_real(
        self, segments: Segments, real: RealGradients, options: AutoencoderOptions, *, by_heart: bool = False
    ) -> tuple[Autoencoder, Tensor]:
        """FedCG's encoder and the rows that trained it. `by_heart`: validated on those very rows."""
        training, validation = (real, real) if by_heart else real.split(_VALIDATION_SHARE, self.seed)
        encoder = Autoencoder.fit_non_private(segments, training, validation, seed=self.seed, options=options)
        return encoder, training.values_ND

    def fit_synthetic(
        self, prior: GaussianPrior, options: AutoencoderOptions, *, by_heart: bool = False
    ) -> Autoencoder:
        """DR-Encoder's encoder, trained on gradients drawn from the prior."""
        training = prior.sample(options.samples, self.seed)
        validation = training if by_heart else prior.sample(options.validation, self.seed + 1)
        return Autoencoder.fit(prior.segments, training, validation, seed=self.seed, options=options)

    def sketch(self, prior: GaussianPrior) -> RandomSketch:
        """The default encoder, at the recipe's ratio."""
        knobs, size = self.live.recipe.encoder, prior.segments[-1].stop
        ratio = knobs.ratio if knobs.name == "random" else EncoderKnobs().ratio
        return RandomSketch.build(prior.segments, code_size("random", size, ratio), prior)

    # --- stage 2 -----------------------------------------------------------------------------------

    def arms(self) -> tuple[Arm, ...]:
        """Every arm, its encoder made in a stage 1 over the `collected` clients; all local, at one epsilon."""
        collected_ND, segments, sigma = self.subjects.collected_ND, self.segments, self.sigma
        prior = self.prior(collected_ND, segments, self.stage1_sigma)
        fedcg, _ = self.fit_real(segments, self.real_gradients(collected_ND), self.options)
        published = self.fit_synthetic(prior, self.options)
        sketch = self.sketch(prior)
        return (
            Arm("no protection", "raw update", IdentityEncoder(segments)),
            Arm("FedCG", "code, no noise", fedcg),
            Arm("FedCG with noise", "noised code", fedcg, noise_multiplier=sigma),
            Arm("DR-Encoder", "code of the noised update", published, noise_in="update", noise_multiplier=sigma),
            Arm("sketch alone", "sketch, no noise", sketch),
            Arm("drencoder", "noised sketch", sketch, noise_multiplier=sigma),
        )
