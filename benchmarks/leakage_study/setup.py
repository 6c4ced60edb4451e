"""This module prepares what the three experiments share: the subjects, the plans, stage 1, and the arms of stage 2.

Legend: N clients, D adapter values.
"""

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from drencoder.encoders.code_sizes import auto_ratio
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.identity import IdentityEncoder
from drencoder.encoders.planning import wire_dtype
from drencoder.encoders.random_sketch import RandomSketch
from drencoder.federated.query import Query, gradient_query, moment_query
from drencoder.federated.round import client_message, message_rows
from drencoder.models.adapter_layout import Segment
from drencoder.privacy.plan import PrivacyPlan, Trust
from drencoder.published.autoencoder import Autoencoder
from drencoder.published.fedcg import RealGradients
from drencoder.published.fitting import AutoencoderOptions
from drencoder.recipe.recipe import Encoder as EncoderKnobs
from drencoder.runs.build import Components
from drencoder.runs.plan_overview import privacy_plan
from leakage_study.arms import Arm, audit_plan, open_channel
from leakage_study.subjects import Subjects

Segments = tuple[Segment, ...]

_VALIDATION_SHARE = 0.25


def plan_under(components: Components, trust: Trust) -> PrivacyPlan:
    """Returns the recipe's plan under this trust, at the recipe's epsilon."""
    recipe, plan = components.recipe, components.plan
    if plan.trust == trust and not plan.non_private:
        return plan
    # A recipe of another trust may ask a client in every slot; under local trust that needs the cap for it.
    cap = recipe.federation.rounds + 1 if trust == "local" else recipe.privacy.participation_cap
    privacy = replace(recipe.privacy, trust=trust, noise_in="code", participation_cap=cap)
    prior = replace(recipe.prior, source="moments")
    return privacy_plan(replace(recipe, privacy=privacy, prior=prior, encoder=EncoderKnobs()))


@final
@dataclass(frozen=True)
class AuditSetup:
    """The recipe's objects and numbers as the experiments use them."""

    components: Components
    subjects: Subjects
    seed: int
    trials: int
    options: AutoencoderOptions
    local: PrivacyPlan
    central: PrivacyPlan

    @property
    def segments(self) -> Segments:
        """The segments of the whole adapter."""
        return self.components.lora.layout.segments

    @property
    def sigma(self) -> float:
        """The noise multiplier of one local release."""
        return self.local.noise_multiplier

    @property
    def stage1_sigma(self) -> float:
        """The noise multiplier of one local release of stage 1."""
        return self.local.stage1_noise_multiplier or self.sigma

    # --- stage 1, as the run does it ---------------------------------------------------------------

    def make_moment_query(self, segments: Segments) -> Query:
        """Returns stage 1's own query over these segments, of one epoch."""
        return moment_query(segments, self.components.recipe.changed({"local.epochs": 1}))

    def make_stage1_plan(self, clients: int, sigma: float | None) -> PrivacyPlan:
        """Returns a plan whose stage 1 asks all clients under local trust."""
        return audit_plan("local", clients, 1, sigma, stage1=True)

    def fit_prior(self, update_ND: Tensor, segments: Segments, sigma: float | None) -> GaussianPrior:
        """Fits a prior to these clients' moments, which each client clips and noises (`sigma` None: no noise)."""
        cohort = list(range(len(update_ND)))
        with open_channel(self.make_stage1_plan(len(cohort), sigma), self.seed) as channel:
            release, _ = channel.release(self.make_moment_query(segments), update_ND, cohort)
        return GaussianPrior.from_statistics(release.value / len(cohort), segments, release.noise_std / len(cohort))

    def collect_gradients(self, update_ND: Tensor) -> RealGradients:
        """Collects the gradients as they are, as FedCG's stage 1 does. They are charged as non-private."""
        query = gradient_query(update_ND.shape[1], 1)
        with open_channel(self.make_stage1_plan(len(update_ND), None), self.seed) as channel:
            permit = channel.ledger.charge(0)
            upload = client_message(query, update_ND, range(len(update_ND)), permit, channel.noise)
            return RealGradients.collected(message_rows(query, [upload], permit)[0], permit)

    def fit_on_gradients(
        self, segments: Segments, real: RealGradients, options: AutoencoderOptions, *, overfit: bool = False
    ) -> tuple[Autoencoder, Tensor]:
        """Trains FedCG's encoder and returns it with the rows that trained it. `overfit`: these rows validate it, too."""
        training, validation = (real, real) if overfit else real.split(_VALIDATION_SHARE, self.seed)
        encoder = Autoencoder.fit_non_private(segments, training, validation, seed=self.seed, options=options)
        return encoder, training.values_ND

    def fit_on_prior(self, prior: GaussianPrior, options: AutoencoderOptions, *, overfit: bool = False) -> Autoencoder:
        """Trains DR-Encoder's encoder on gradients drawn from the prior. `overfit`: these validate it, too."""
        training = prior.sample(options.samples, self.seed)
        validation = training if overfit else prior.sample(options.validation, self.seed + 1)
        return Autoencoder.fit(prior.segments, training, validation, seed=self.seed, options=options)

    def build_sketch(self, prior: GaussianPrior) -> RandomSketch:
        """Builds a random sketch over the prior's segments, laid out by the prior.

        Its ratio is the recipe's, or what the plan chooses for the whole adapter where the recipe leaves it open (0).
        """
        recipe, size = self.components.recipe, prior.segments[-1].stop
        ratio = recipe.encoder.ratio if recipe.encoder.name == "random" else 0
        ratio = ratio or auto_ratio(self.segments[-1].stop, self.local.k_star(), wire_dtype(recipe))
        return RandomSketch.build(prior.segments, max(1, round(size / ratio)), prior)

    # --- stage 2 -----------------------------------------------------------------------------------

    def make_arms(self) -> tuple[Arm, ...]:
        """Returns every arm, its encoder made in a stage 1 over the `collected` clients; all local, at one epsilon."""
        collected_ND, segments, sigma = self.subjects.collected_ND, self.segments, self.sigma
        prior = self.fit_prior(collected_ND, segments, self.stage1_sigma)
        fedcg, _ = self.fit_on_gradients(segments, self.collect_gradients(collected_ND), self.options)
        published = self.fit_on_prior(prior, self.options)
        sketch = self.build_sketch(prior)
        return (
            Arm("no protection", "raw update", IdentityEncoder(segments)),
            Arm("FedCG", "code, no noise", fedcg),
            Arm("FedCG with noise", "noised code", fedcg, noise_multiplier=sigma),
            Arm("DR-Encoder", "code of the noised update", published, noise_in="update", noise_multiplier=sigma),
            Arm("sketch alone", "sketch, no noise", sketch),
            Arm("drencoder", "noised sketch", sketch, noise_multiplier=sigma),
        )
