"""What a comparison runs: the `[compare]` table of a recipe file, read here and by no run. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drencoder.data.survey import with_population
from drencoder.encoders.planning import check_encoder
from drencoder.recipe.knobs import Checked, knob
from drencoder.recipe.recipe import STUDY_TABLE, Recipe, read_section, read_tables


@dataclass(frozen=True)
class Compare(Checked):
    """The settings of `drencoder compare`: methods x epsilons x seeds, and how learning rates are tuned."""

    # fmt: off
    methods: tuple[str, ...] = knob(("lora", "dp-lora", "dr-encoder", "fedcg", "random"), "what is compared, see "
        "drencoder.study.methods")
    epsilons: tuple[float, ...] = knob((0.25, 2.0, 8.0), "budgets of the private methods", above=0)
    seeds: tuple[int, ...] = knob((0, 1, 2), "paired: the same clients, start and held-out data for every method")
    tuning_seed: int = knob(100, "the seed on which learning rates are chosen, by held-out loss")
    tuning_runs: int = knob(4, "learning rates that each method may try per epsilon; 1 = its first guess", low=1, high=12)
    rates: tuple[str, ...] = knob((), "`method=rate`: where a method's tuning starts, if not at the recipe's rate")
    tuning_factor: float = knob(3.0, "ratio between neighbouring learning rates", above=1)


def load_comparison(source: str | Path | None = None, overrides: Sequence[str] = ()) -> tuple[Recipe, Compare]:
    """Reads a recipe file with its `[compare]` table; both may be overridden with `section.key=value`.

    Raises:
      RecipeError: as `load_checked_recipe` does, and for an unknown or impossible setting of the comparison.
    """
    origin, tables = read_tables(source, overrides)
    settings = read_section(STUDY_TABLE, tables.pop(STUDY_TABLE, {}), Compare, origin)
    recipe = Recipe.from_dict(tables, origin=origin)
    check_encoder(recipe)
    return with_population(recipe), settings
