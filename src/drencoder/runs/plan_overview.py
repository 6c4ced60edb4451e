"""This module plans a whole run before anything is spent: privacy, code size, bytes. No torch here.

Legend: D adapter values, K code values.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from drencoder.data.evaluation_text import SIMULATED_OWNERS, describe_owners, evaluation_rests_on, owner_kind
from drencoder.encoders.code_sizes import (
    BITS_PER_VALUE,
    FEW_COORDINATES,
    NOISY_RATIO,
    AdapterShape,
    auto_ratio,
    message_bytes,
    noise_dominates,
    plain_lora_bytes,
    stage1_values,
)
from drencoder.encoders.planning import (
    check_encoder,
    clip_words,
    declared,
    planned_code_size,
    planned_start,
    wire_dtype,
)
from drencoder.encoders.unused_knobs import unused_knobs
from drencoder.errors import RecipeError
from drencoder.federated.server_rate import step_words
from drencoder.models.place import locate
from drencoder.models.planned_layers import adapted_matrices, planned_size
from drencoder.models.training_size import ModelSize, free_memory, gigabytes
from drencoder.privacy.make_plan import make_plan
from drencoder.privacy.noise_terms import noise_terms
from drencoder.privacy.plan import PrivacyPlan, Stage
from drencoder.recipe.recipe import Recipe
from drencoder.secure_aggregation.messages import round_bytes


@dataclass(frozen=True)
class Overview:
    """What a run will cost, in privacy and in bytes. Public.

    `adapter_size` is None for a hub model that is not on this machine, and where a model's files do not tell; all that depends on it is None too.
    Bytes are totals of all expected uploads; `message_bytes` is a client's in a round, under secure aggregation a node's.
    Plain LoRA sends the whole adapter, as often, in float32, or in 16 bits beside codes of fewer bits.
    """

    privacy: PrivacyPlan
    adapter_size: int | None = None
    code_size: int | None = None
    message_bytes: int | None = None
    stage1_bytes: int | None = None
    total_bytes: int | None = None
    plain_lora_bytes: int | None = None
    code_reason: str = ""  # why the code has this size, if the plan chose it
    encoder_warning: str = ""  # what speaks against the encoder, in one sentence
    unused_knobs: tuple[str, ...] = ()  # sentences on what the recipe sets and nothing uses
    owners: str = ""  # who the clients are
    evaluation_rests_on: str = ""  # whose text the loss is measured on, in one sentence
    server_step: str = ""  # the server's optimiser and its rate, in words
    clip: str = ""  # the bound of a client's contribution, and where it comes from, in words
    weight_bytes: int | None = None  # memory of the base model; None: not known
    training_bytes: tuple[int, int] | None = (
        None  # memory of training with short records, and with the longest; None: not known
    )

    training_way: str = ""  # how clients train together; empty: not known

    @property
    def stage2_bytes(self) -> int | None:
        """Bytes of all expected uploads of the rounds."""
        return None if self.total_bytes is None or self.stage1_bytes is None else self.total_bytes - self.stage1_bytes

    @property
    def k_star(self) -> float:
        """Coordinates that a round can learn, with half of the clip's energy shared by all clients."""
        return self.privacy.k_star()

    def warnings(self) -> list[str]:
        """Returns what a person should know before starting, one sentence each."""
        sentences = [self.encoder_warning] if self.encoder_warning else []
        if self.owners == SIMULATED_OWNERS:
            sentences.append(
                "The owners are simulated: records are dealt out at random, so epsilon says nothing about those who wrote them. "
                "Name the owner's field in data.client_field where there is one."
            )
        if "round" in self.privacy.non_private:
            sentences.append("privacy.trust = 'non-private': no noise and no guarantee. For baselines only.")
        elif self.privacy.non_private:
            sentences.append(
                "prior.source = 'gradients': stage 1 takes real gradients without noise, so no guarantee holds."
            )
        if self.privacy.noise == "replay":
            sentences.append(
                "privacy.noise = 'replay': the noise can be computed again, so nothing is private. For tests only."
            )
        if self.privacy.trust == "secure-aggregation" and self.privacy.share_terms(1).honest < 10:
            terms = self.privacy.share_terms(1)
            curated = self.privacy.curated
            cure = "more sites, or a larger privacy.honest_share," if curated else "larger cohorts"
            sentences.append(
                f"Of a round's contributors only {terms.honest} are sure and honest, so each {'site' if curated else 'client'} adds "
                f"{terms.honest**-0.5:.0%} of the noise that it would add under local trust: {cure} would make secure aggregation "
                "worth more."
            )
        if self.k_star < 1:
            who = "site" if self.privacy.curated else "client"
            trust = f", or secure aggregation instead of noise by every {who}" if self.privacy.trust == "local" else ""
            sentences.append(
                f"k* = {self.k_star:.2g}: the noise lets a round learn less than one coordinate, so this run cannot "
                f"learn. More {self.privacy.unit}s a round, fewer rounds, a larger epsilon{trust} would help."
            )
        free = free_memory()
        if self.training_bytes and free is not None and self.training_bytes[0] > free:
            sentences.append(
                f"Training takes about {gigabytes(self.training_bytes[0])} of memory and {gigabytes(free)} are free here: use a machine "
                "with more, a smaller model, model.dtype = 'bfloat16' or a smaller local.batch_size."
            )
        return [*sentences, *self.unused_knobs]

    def to_dict(self) -> dict[str, Any]:
        """Returns the overview as JSON-ready values, with epsilon for every observer."""
        observers = {name: guarantee.to_dict() for name, guarantee in self.privacy.epsilons().items()}
        k_star = None if self.privacy.non_private else self.k_star
        return {**asdict(self), "privacy": self.privacy.to_dict(), "k_star": k_star, "observers": observers}


def privacy_plan(recipe: Recipe) -> PrivacyPlan:
    """Makes the recipe's privacy plan: sampler, noise and events in one place.

    Raises:
      RecipeError: the recipe's encoder does not exist, or cannot do what the recipe asks of it.
      PrivacyError: the recipe's numbers cannot be planned for.
    """
    check_encoder(recipe)
    if not recipe.federation.population:
        what = "their owners" if recipe.privacy.unit == "client" else "the sites"
        raise RecipeError(
            f"federation.population is not named, and the clients' data are not here to count {what}: set it."
        )
    privacy, federation = recipe.privacy, recipe.federation
    private = privacy.trust != "non-private"
    return make_plan(
        trust=privacy.trust if private else "central",  # type: ignore[arg-type]  # checked by the recipe
        epsilon=privacy.epsilon if private else None,
        noise_multiplier=privacy.noise_multiplier if private and privacy.noise_multiplier else None,
        delta=privacy.delta,
        population=federation.population,
        sampling_rate=recipe.sampling_rate,
        rounds=federation.rounds,
        stage1_rate=recipe.stage1_rate,
        participation_cap=privacy.participation_cap,
        relation=privacy.relation,  # type: ignore[arg-type]  # checked by the recipe
        noise=privacy.noise,  # type: ignore[arg-type]
        non_private=_non_private(recipe),
        # The public's epsilon rests on seeing nothing but a sum of noised codes. A decoder that takes each code by
        # itself, encoding each after its noise, and rounding each to fewer bits, put something else in its place.
        dropout_share=privacy.dropout_share if privacy.trust == "secure-aggregation" else 0.0,
        honest_share=privacy.honest_share if privacy.trust == "secure-aggregation" else 1.0,
        nonlinear_decoding=not declared(recipe).linear
        or wire_dtype(recipe) != "float32"
        or (privacy.trust, privacy.noise_in) == ("local", "update"),
        unit=privacy.unit,  # type: ignore[arg-type]  # checked by the recipe
        site_units=0 if privacy.unit == "client" else federation.units_per_site,
    )


def _non_private(recipe: Recipe) -> tuple[Stage, ...]:
    """Returns the stages without noise. FedCG's first one always is: its gradients go up as they are."""
    if recipe.privacy.trust == "non-private":
        return ("stage1", "round")
    return ("stage1",) if recipe.prior.source == "gradients" else ()


def survey(recipe: Recipe) -> Overview:
    """Plans a recipe and returns what it will cost.

    Raises:
      RecipeError: the recipe's encoder does not exist, or cannot do what the recipe asks of it.
      PrivacyError: the privacy numbers are impossible together.
      ModelError: the local model folder is unreadable or has no target module.
    """
    plan = privacy_plan(recipe)
    place = locate(recipe.model)
    matrices = adapted_matrices(place, recipe.adapter.targets)
    model = planned_size(place)
    memory = _training_bytes(recipe, model)
    way = "" if model is None else _training_way(recipe, model)
    weights = None if model is None else model.weight_bytes(recipe.model.dtype)
    data, unit = recipe.data, recipe.privacy.unit
    owners = describe_owners([owner_kind(data, unit)], data.client_field, unit, data.owner_field)
    basis, clip = evaluation_rests_on(recipe), _clip_words(recipe)
    known = Overview(
        plan,
        encoder_warning=_encoder_warning(recipe),
        unused_knobs=tuple(unused_knobs(recipe).values()),
        owners=owners,
        evaluation_rests_on=basis,
        server_step=step_words(recipe.server, plan),
        clip=clip,
        weight_bytes=weights,
        training_bytes=memory,
        training_way=way,
    )
    if matrices is None:
        return known
    size = AdapterShape(matrices, recipe.adapter.rank).update_size
    prior, dtype = recipe.prior, wire_dtype(recipe)
    code = planned_code_size(recipe, plan, matrices)
    values = code + (recipe.privacy.clip == "adaptive")
    message = message_bytes(values, sent_dtype(recipe, plan, 1, values))
    rounds, nodes = recipe.federation.rounds, recipe.federation.nodes
    uploads = plan.senders(1) * rounds
    asked = stage1_values(prior.source, size, len(matrices), recipe.stage1_epochs)
    stage1 = round(plan.senders(0) * message_bytes(asked, sent_dtype(recipe, plan, 0, asked))) if asked else 0
    stage2, senders = round(uploads * message), uploads
    if plan.trust == "secure-aggregation":  # a node sends one vector for all its clients
        message = round_bytes(nodes, values, integer_bits(plan, 1, values))[0]
        senders = rounds * nodes
        stage2 = senders * message
        stage1 = nodes * round_bytes(nodes, asked, integer_bits(plan, 0, asked))[0] if asked else 0
    return replace(
        known,
        adapter_size=size,
        code_size=code,
        message_bytes=message,
        stage1_bytes=stage1,
        total_bytes=stage2 + stage1,
        plain_lora_bytes=plain_lora_bytes(senders, size, dtype),
        code_reason="; ".join(_reasons(recipe, plan, size)),
    )


def _clip_words(recipe: Recipe) -> str:
    privacy = recipe.privacy
    named = f"{privacy.clip_l2:g}, " if privacy.clip_l2 else ""
    follows = "; it then follows the clients' lengths" if privacy.clip == "adaptive" else ""
    return f"{named}{clip_words(recipe)}{follows}"


def _training_bytes(recipe: Recipe, size: ModelSize | None) -> tuple[int, int] | None:
    """Memory of training as the CPU does it: with a batch of `speed.tokens`, and with a client's longest batch, if that is larger."""
    if size is None:
        return None
    tokens = recipe.speed.tokens or size.busy_tokens
    longest = max(tokens, recipe.local.batch_size * recipe.data.max_tokens)
    return size.training_bytes(tokens, recipe.model.dtype), size.training_bytes(longest, recipe.model.dtype)


def _training_way(recipe: Recipe, size: ModelSize) -> str:
    dtype = recipe.model.dtype
    if dtype in ("int8", "nf4"):
        saved = gigabytes(size.weight_bytes("float32") - size.weight_bytes(dtype))
        return (
            f"clients one by one: model.dtype = '{dtype}' saves {saved} of weights beside float32, and each product unpacks a layer again, "
            "which is slow on a CPU"
        )
    if recipe.model.device == "shard":
        return "clients on all graphics cards at the same time, with a part of each layer on each; without a card in two processes"
    return "" if recipe.model.device == "cuda" else size.way_to_train(recipe.speed.tokens)


def _encoder_warning(recipe: Recipe) -> str:
    """Says so before a run spends stage 1's budget on an encoder that the viability gate will probably refuse."""
    if declared(recipe).expected_viable or recipe.encoder.gate == "warn":
        return ""
    return (
        f"encoder.name = {recipe.encoder.name!r} has carried too little of an update in every measurement, so the viability gate "
        "will probably stop this run after stage 1: set encoder.gate = 'warn' to go on regardless, or choose another encoder."
    )


def _reasons(recipe: Recipe, plan: PrivacyPlan, size: int) -> Iterator[str]:
    """Why the code is as the plan chose it; nothing of what the recipe says itself."""
    encoder, dtype = declared(recipe), wire_dtype(recipe)
    if encoder.sized_by_ratio and not recipe.encoder.ratio:
        yield _size_reason(size, plan.k_star(), dtype)
    if encoder.starts_from_public_text and recipe.adapter.start == "auto":
        public, bound = planned_start(recipe, plan) == "public", f"{FEW_COORDINATES:g}"
        yield f"A from public text, since k* < {bound}" if public else f"A at random, since k* >= {bound}"
    if recipe.encoder.wire_dtype == "auto" and dtype != "float32":
        yield f"in {BITS_PER_VALUE[dtype]} bits a value"


def _size_reason(size: int, k_star: float, wire_dtype: str) -> str:
    """Returns why `auto_ratio` chose what it did."""
    ratio, bound = auto_ratio(size, k_star, wire_dtype), size / NOISY_RATIO
    if not noise_dominates(size, k_star):
        return f"1/{ratio:g}, since k* >= D/{NOISY_RATIO:g} = {bound:,.0f}: a smaller code would limit the run more than the noise"
    return (
        f"1/{ratio:g}, since k* < D/{NOISY_RATIO:g} = {bound:,.0f}: noise dominates, more values would carry more of it"
    )


def integer_bits(plan: PrivacyPlan, slot: int, values: int) -> int:
    """Returns how many bits a value of a slot's codes (local trust) or of their sum (secure aggregation) has as an integer."""
    terms = noise_terms(plan, slot)
    assert terms is not None
    return terms.quantiser(values, 1.0).bits  # the clip is their unit


def sent_dtype(recipe: Recipe, plan: PrivacyPlan, slot: int, values: int) -> str:
    """Returns the wire type of one client's message: what `federated.round.message_wire` finds with a permit."""
    asked = wire_dtype(recipe) if slot else "float32"
    noised = plan.trust == "local" and plan.stage(slot) not in plan.non_private
    in_code = slot == 0 or recipe.privacy.noise_in == "code"
    return f"integer{integer_bits(plan, slot, values)}" if noised and in_code and asked == "float32" else asked
