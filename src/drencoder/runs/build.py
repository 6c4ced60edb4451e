"""Recipe -> live objects. Everything that can be refused is refused here, before a run folder exists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from drencoder.data.benchmarks.questions import load_benchmarks
from drencoder.data.evaluation_text import evaluation_basis, open_evaluation, owner_kind, set_aside_share
from drencoder.data.places import Place
from drencoder.data.public_text import PublicText, open_public
from drencoder.data.sources import AbsentSource, EmbeddedSource, Record, Source
from drencoder.data.text_report import report_records, report_source
from drencoder.data.tokenization import Example, RecordTokenizer
from drencoder.data.units import EmbeddedUnits, SiteUnits, open_text
from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.encoders.lora_init import START_TEXTS, public_start
from drencoder.encoders.matrix_normal_prior import PublicUpdates
from drencoder.encoders.planning import clip_text, declared, planned_code_size, planned_start, public_text
from drencoder.encoders.registry import build_encoder
from drencoder.encoders.request import EncoderRequest, StepCallback, TrainingGradients
from drencoder.errors import DataError
from drencoder.evaluation.held_out import question_examples
from drencoder.federated.engine import Engine
from drencoder.federated.in_process import InProcessEngine
from drencoder.federated.site_round import SiteCurator
from drencoder.models.base_model import load_base, open_tokenizer, resolve_device
from drencoder.models.client_training import ClientTrainer, CohortTrainer
from drencoder.models.cohort_training import cohort_updates
from drencoder.models.identity import BaseDigests
from drencoder.models.loaded_size import check_memory
from drencoder.models.lora import LoraModel
from drencoder.models.sharded import open_lora
from drencoder.privacy.mechanism import NoiseSource
from drencoder.privacy.noise_source import ReplayNoise, SecureNoise
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Recipe
from drencoder.rng import derive_seed
from drencoder.runs.plan_overview import Overview, survey

_WRITTEN_TOKENS = 32  # of a text by the base model itself: 64 carry no more, 16 a little less (docs/log.md)
_PUBLIC_TOKENS = 128  # that a record of a make-believe client is reckoned with
_GATE_DRAW, _ONLY_DRAW = -1, 1  # of public text; those of the slots are 1 and above
_PUBLIC_CLIENTS = 16  # make-believe ones, per estimate of the structured prior: 64 do no better (docs/log.md)


@dataclass(frozen=True)
class Texts:
    """A source's records as tokens. A client's examples reach the engine only."""

    source: Source
    tokenizer: RecordTokenizer
    d1_share: float  # of a client's records, used by slot 0 and by nothing else; 0 = all slots use all
    public: PublicText | None = None
    evaluation: Callable[[int], list[Record]] | None = None  # the server's records, if it has any to measure on

    def client(self, client: int, slot: int) -> list[Example]:
        """What a client uses in a slot. FedCG's D1 (stage 1) and D2 (the rounds) share no record if it has two."""
        records = self.source.client(client)
        if self.d1_share and len(records) > 1:
            first = min(len(records) - 1, max(1, round(self.d1_share * len(records))))
            records = records[:first] if slot == 0 else records[first:]
        return self.tokenizer.examples(records)

    def held_out(self, count: int) -> list[Example]:
        """At most `count` texts of the server; none without evaluation data."""
        if self.evaluation is None:
            return []
        return self.tokenizer.examples(self.evaluation(count), owner="the evaluation data")

    def report(self, count: int) -> list[str]:
        """Sentences on how many records are left out, cut or changed: of the clients' file, if it is here, and of the first
        `count` of the evaluation data, if they are a file's.

        Raises:
          DataError: the chat template refuses a record.
        """
        sentences = report_source(self.tokenizer, self.source)
        if self.evaluation is not None and not isinstance(self.source, EmbeddedSource | EmbeddedUnits):
            measured = list(enumerate(self.evaluation(count), start=1))
            sentences.append(report_records(self.tokenizer, measured, "The evaluation data"))
        return sentences

    def public_clients(self, count: int, size: int, seed: int) -> list[list[Example]]:
        """Make-believe clients of `size` public texts each; the same for the same seed. Needs `public`."""
        assert self.public is not None
        examples = self.tokenizer.examples(self.public.draw(count * size, seed), owner="the public text")
        return [examples[start : start + size] for start in range(0, len(examples), size)]


@dataclass(frozen=True)
class Components:
    """A run's live objects."""

    recipe: Recipe
    overview: Overview
    texts: Texts
    lora: LoraModel
    trainer: ClientTrainer
    engine: Engine
    digests: BaseDigests | None = None  # of a federation's server and sites
    own: "SiteText | None" = None  # at a site whose text is not the recipe's
    curator: SiteCurator | None = None  # where sites' own units are protected, and their text is here

    @property
    def plan(self) -> PrivacyPlan:
        """What the run may spend, and on what."""
        return self.overview.privacy

    @property
    def base_digests(self) -> BaseDigests:
        """What base model and tokenizer are, for machines that must have the same."""
        assert self.digests is not None, "only a federation's server and sites digest their base model"
        return self.digests

    @property
    def clients_text(self) -> tuple[str, str]:
        """What a site says of its clients' text: what it is called, without its folders, and the kind of its owners."""
        data = self.recipe.data if self.own is None else replace(self.recipe.data, source=self.own.source)
        place = Place.parse(data.source)
        name = data.source if place.kind in ("hub", "embedded") else Path(place.name.removeprefix("hub:")).name
        return name, owner_kind(data, self.recipe.privacy.unit)

    @property
    def start(self) -> str:
        """Where A started, in words for the certificate; of public text, whose it is."""
        start, public = planned_start(self.recipe, self.plan), self.texts.public
        if start != "public" or public is None:
            return start
        return f"public: leading inputs of {START_TEXTS} texts; {public.declared}"

    @cached_property
    def held_out(self) -> list[Example]:
        """Tokenised evaluation text of the server, as many as the final table uses; empty without evaluation data."""
        return self.texts.held_out(self.recipe.evaluation.examples)

    @cached_property
    def questions(self) -> dict[str, tuple[list[list[Example]], list[int]]]:
        """Benchmark -> (four options per question, answers)."""
        drawn = load_benchmarks(self.recipe)
        tokenizer = self.texts.tokenizer
        return {name: (question_examples(tokenizer, one.questions), one.answers) for name, one in drawn.items()}

    @property
    def encoder_has_public_text(self) -> bool:
        """Whether the encoder is made from public text; clips may be measured on some all the same."""
        return declared(self.recipe).public_text != "unused" and bool(public_text(self.recipe))

    def public_updates(self, adapter_D: torch.Tensor, slot: int) -> PublicUpdates | None:
        """Updates of make-believe clients with public text at this adapter; None if the encoder is not made from any.

        Other text in every slot, but the model's own is written once for all of them; the same whenever a slot is computed again.
        """
        return self.updates_of_public_text(adapter_D, slot) if self.encoder_has_public_text else None

    def updates_of_public_text(self, adapter_D: torch.Tensor, slot: int) -> PublicUpdates | None:
        """The same, whatever the encoder is made from; None without public text."""
        if self.texts.public is None:
            return None
        draw = _ONLY_DRAW if self.texts.public.written_once else slot
        return PublicUpdates(self._updates_of_public_text(adapter_D, draw), self.texts.public.declared)

    @cached_property
    def start_updates(self) -> PublicUpdates:
        """Those of the untouched adapter, which clips are measured on and the first encoder may be made from."""
        updates = self.updates_of_public_text(self.lora.initial_D, 1)
        assert updates is not None, "`encoders.planning.clip_text` sees to it that there is public text"
        return updates

    def gate_updates(self, adapter_D: torch.Tensor, clients: int) -> tuple[torch.Tensor, str] | None:
        """Updates (up to `clients`, D) of make-believe clients, of text that the encoder was not made from, and whose it is.

        Of the evaluation data; without any of public text, which is drawn anew; None if there is neither.
        """
        held_out = self.held_out
        if not held_out:
            if self.texts.public is None:
                return None
            return self._updates_of_public_text(adapter_D, _GATE_DRAW), "public text, drawn anew"
        # With little text they hold less of it: of two or three updates the gate could say nothing with confidence.
        size = min(self._records_each, max(1, len(held_out) // clients))
        groups = [held_out[start : start + size] for start in range(0, min(len(held_out), clients * size), size)]
        while len(groups) < 2:  # the gate compares at least two
            groups.append(held_out)
        return self.updates_of(groups, adapter_D), "server-held text"

    def _updates_of_public_text(self, adapter_D: torch.Tensor, draw: int) -> torch.Tensor:
        seed = derive_seed(self.recipe.seed, "public", draw)
        return self.updates_of(self.texts.public_clients(_PUBLIC_CLIENTS, self._records_each, seed), adapter_D)

    @property
    def _records_each(self) -> int:
        """Records of a make-believe client: of a large model one carries as much as eight, at a fifth of the cost (docs/log.md)."""
        return min(self.recipe.data.examples_per_client, max(1, self.lora.size.busy_tokens // _PUBLIC_TOKENS))

    def updates_of(self, groups: Sequence[list[Example]], adapter_D: torch.Tensor) -> torch.Tensor:
        """What clients with these examples would compute (N, D), on text that the server holds itself."""
        local = self.recipe.local
        if local.upload == "zero":  # a control's clients send nothing, but its encoder can be asked all the same
            local = replace(local, upload="gradient")
        return cohort_updates(self.lora, adapter_D, groups, local, [0] * len(groups)).cpu()

    def noise(self) -> NoiseSource:
        """The recipe's noise source; `replay` is for tests and marks the run as not private."""
        if self.recipe.privacy.noise == "replay":
            return ReplayNoise(derive_seed(self.recipe.seed, "noise"))
        return SecureNoise()

    def encoder(
        self,
        prior: GaussianPrior | None,
        state: dict[str, torch.Tensor] | None = None,
        *,
        real: TrainingGradients | None = None,
        public: PublicUpdates | None = None,
        history_JD: torch.Tensor | None = None,
        on_step: StepCallback | None = None,
    ) -> Encoder:
        """The recipe's encoder, made from the prior (FedCG: from real gradients; others: from public updates
        and directions of what was released), or restored from saved tensors."""
        recipe, layout = self.recipe, self.lora.layout
        matrices = [(pair.B.shape[0], pair.A.shape[1]) for pair in layout.pairs(self.lora.initial_D)]
        request = EncoderRequest(
            layout.segments,
            planned_code_size(recipe, self.plan, matrices),
            prior,
            derive_seed(recipe.seed, "encoder"),
            public=public,
            history_JD=history_JD,
            real=real,
            on_step=on_step,
        )
        return build_encoder(recipe.encoder.name, request, state)


EngineMaker = Callable[[Components], Engine]


def build(recipe: Recipe, engine: EngineMaker | None = None) -> Components:
    """Plans, loads and checks everything that a run needs. `engine` makes what reaches the clients (default: this process).

    Raises:
      DrencoderError: any part of the recipe cannot be had; nothing has been written.
    """
    components = _loaded(recipe, None, remote=engine is not None)
    _ = components.held_out, components.questions  # refuse empty evaluation data now, not after the last round
    return components if engine is None else replace(components, engine=engine(components))


@dataclass(frozen=True)
class SiteText:
    """A site's own text, in the schema of `data.source`, and the clients of the population whose text it is."""

    source: str
    clients: tuple[int, ...]


def build_site(recipe: Recipe, own: SiteText | None) -> Components:
    """What a machine needs to answer for clients: all but what the server evaluates on.

    `own` takes the place of the recipe's data; None = the recipe's own source holds these clients' text.

    Raises:
      DrencoderError: any part of the recipe, or the site's text, cannot be had.
    """
    return _loaded(recipe, own, site=True)


def _loaded(recipe: Recipe, own: SiteText | None, *, site: bool = False, remote: bool = False) -> Components:
    overview = survey(recipe)
    if recipe.model.device != "spread":
        check_memory(overview.weight_bytes, resolve_device(recipe.model.device))
    if recipe.speed.threads:  # process-wide; this is the one place that sets it
        torch.set_num_threads(recipe.speed.threads)
    source = _clients_text(recipe, own, remote)
    evaluation = None if site else open_evaluation(recipe, source)
    base = load_base(recipe.model, recipe.data.max_tokens)
    d1_share = 0.0
    if recipe.prior.source == "gradients":
        from drencoder.published.fedcg import D1_SHARE

        d1_share = D1_SHARE
    # A site gets the encoder from the server, who made it: public text is the server's to have.
    named = "" if site else public_text(recipe) or clip_text(recipe)
    if recipe.prior.source == "gradients" and evaluation is None and not site:
        named = named or "self"  # no prior is fitted that the gate could draw from, and it must have something

    def write(count: int, seed: int) -> list[str]:
        return base.write(count, _WRITTEN_TOKENS, seed)

    public = open_public(named, recipe.prior.provenance, write, dict(recipe.data.fields))
    texts = Texts(source, open_tokenizer(base, recipe.data), d1_share, public, evaluation)
    # Before the adapter is in the model; only a federation compares them.
    digests = BaseDigests.of(base.model, base.tokenizer) if site or remote else None
    lora = open_lora(base, recipe, recipe.data.max_tokens)
    if public is not None and planned_start(recipe, overview.privacy) == "public":
        groups = texts.public_clients(START_TEXTS, 1, derive_seed(recipe.seed, "start"))
        lora.initial_D = public_start(lora, [example for group in groups for example in group])
    trainer = CohortTrainer(
        lora,
        texts.client,
        recipe.local,
        recipe.seed,
        recipe.speed.parallel_clients,
        reports_failures=not overview.privacy.secret_draw,
    )
    curator = SiteCurator(source, trainer, recipe.seed) if isinstance(source, SiteUnits) else None
    engine = InProcessEngine(trainer, recipe.federation.nodes, recipe.threshold, curator=curator)
    return Components(recipe, overview, texts, lora, trainer, engine, digests, own, curator)


def _clients_text(recipe: Recipe, own: SiteText | None, remote: bool) -> Source:
    """The clients' text: the recipe's, a site's own, or nothing where a server needs no text but its own."""
    if own is not None:
        return open_text(recipe, own=(own.source, own.clients))
    if remote and not recipe.data.is_embedded and evaluation_basis(recipe) in ("server", "nothing"):
        return AbsentSource()
    try:
        return open_text(recipe, set_aside=set_aside_share(recipe))
    except DataError as error:
        if not remote:
            raise
        raise DataError(
            f"{error} (The server would set a share of that text aside: where only the sites have it, name text that the server owns "
            "in evaluation.data, or none.)"
        ) from None
