"""What a recipe asks of its encoder, with every `auto` resolved, and what its encoder cannot do. No torch.

The recipe itself knows no encoder. Whatever depends on one is asked here, of the encoder's declaration.
"""

from collections.abc import Sequence
from pathlib import Path

from drencoder.data.survey import with_population
from drencoder.encoders.code_sizes import AdapterShape, auto_ratio, few_coordinates
from drencoder.encoders.registry import EncoderDeclaration, declaration_of
from drencoder.errors import EncoderError, RecipeError
from drencoder.privacy.plan import PrivacyPlan
from drencoder.recipe.recipe import Recipe, load_recipe


def load_checked_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe`, `check_encoder` and `with_population`: what a command does with a recipe before anything else.

    Raises:
      RecipeError: the recipe cannot be read, or cannot be meant.
      DataError: the recipe does not say how many clients there are, and the data that would cannot be read.
    """
    recipe = load_recipe(source, overrides)
    check_encoder(recipe)
    return with_population(recipe)


def declared(recipe: Recipe) -> EncoderDeclaration:
    """What the recipe's encoder declares.

    Raises:
      RecipeError: there is no encoder of the recipe's name.
    """
    try:
        return declaration_of(recipe.encoder.name)
    except EncoderError as error:
        raise RecipeError(f"encoder.name: {error}.") from None


def public_text(recipe: Recipe) -> str:
    """`prior.public`. Where encoder or adapter need public text and the recipe names none, it is "self": the base model writes it."""
    needed = declared(recipe).public_text == "required" or recipe.adapter.start == "public"
    return recipe.prior.public or ("self" if needed else "")


def clip_text(recipe: Recipe) -> str:
    """The public text that the clip is measured on; empty where the recipe names one."""
    return "" if recipe.privacy.clip_l2 else public_text(recipe) or "self"


def clip_words(recipe: Recipe, declared: str = "") -> str:
    """Where the first clip comes from, in words; `declared` says whose the public text is."""
    if recipe.privacy.clip_l2:
        return "named by the recipe"
    whose = f" ({declared})" if declared else ""
    return f"the median length of the updates of make-believe clients with public text{whose} at the start; no real client is asked"


def wire_dtype(recipe: Recipe) -> str:
    """`encoder.wire_dtype`, `auto` resolved.

    Four bits of a rotated code cost 1 % of its energy (`encoders.rotated`). Without a trusted server they would cost the
    public's better epsilon, and secure aggregation adds no codes of that kind.
    """
    if recipe.encoder.wire_dtype != "auto":
        return recipe.encoder.wire_dtype
    trusted = (recipe.privacy.trust, recipe.privacy.noise_in) == ("central", "code")
    return declared(recipe).trusted_wire_dtype if trusted else "float32"


def planned_code_size(recipe: Recipe, plan: PrivacyPlan, matrices: Sequence[Sequence[int]]) -> int:
    """K of the recipe's encoder under this plan, for adapted matrices of these shapes (out, in)."""
    adapter = AdapterShape(matrices, recipe.adapter.rank)
    ratio = recipe.encoder.ratio or auto_ratio(adapter.update_size, plan.k_star(), wire_dtype(recipe))
    return declared(recipe).code_size(adapter, ratio)


def planned_start(recipe: Recipe, plan: PrivacyPlan) -> str:
    """`adapter.start`, `auto` resolved: for some encoders, directions of public text where a round learns few coordinates."""
    if recipe.adapter.start != "auto":
        return recipe.adapter.start
    return "public" if declared(recipe).starts_from_public_text and few_coordinates(plan.k_star()) else "peft"


def check_encoder(recipe: Recipe) -> None:
    """Refuses a recipe whose encoder does not exist or cannot do what the other knobs ask of it.

    Raises:
      RecipeError: one sentence with the value and the cure.
    """
    encoder, name, privacy = declared(recipe), recipe.encoder.name, recipe.privacy
    if recipe.prior.source == "gradients" and not encoder.trained:
        raise RecipeError(
            f"prior.source = 'gradients' trains the encoder and encoder.name = {name!r} is not trained: set encoder.name = "
            "'autoencoder', or prior.source = 'moments'."
        )
    if encoder.trained and recipe.prior.source == "none" and encoder.public_text != "required":
        raise RecipeError(
            f"encoder.name = {name!r} is trained on synthetic gradients and prior.source = 'none' gives none: "
            "set prior.source = 'moments'."
        )
    if encoder.linear:
        return
    if privacy.trust == "secure-aggregation":
        raise RecipeError(
            f"privacy.trust = 'secure-aggregation' gives the server sums of codes only, and encoder.name = {name!r} is not "
            "linear, so that no sum of its codes can be decoded: set encoder.name = 'random'."
        )
    if privacy.unit != "client":
        raise RecipeError(
            f"privacy.unit = {privacy.unit!r} sums codes at a site, and encoder.name = {name!r} is not linear, so that no sum of its "
            "codes can be decoded: set encoder.name = 'random'."
        )
    if privacy.clip == "adaptive":
        raise RecipeError(
            f"privacy.clip = 'adaptive' needs codes that can be summed and encoder.name = {name!r} is not linear: set "
            "encoder.name = 'random', or privacy.clip = 'fixed'."
        )
    if privacy.trust != "local" and privacy.noise_in == "code":
        raise RecipeError(
            f"encoder.name = {name!r} is not linear, so a sum of its codes cannot be decoded: with "
            f"privacy.trust = {privacy.trust!r} set privacy.noise_in = 'update', or use trust = 'local'."
        )
