"""The clients' data as a plan reads and shows them. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from drencoder.data.places import Place
from drencoder.data.survey import DataSurvey, survey_data
from drencoder.models.place import locate
from drencoder.reading import printable, shown
from drencoder.recipe.recipe import Recipe
from drencoder.runs.display import make_table
from drencoder.runs.named_text import check_other_text
from drencoder.runs.unit_table import UnitRow, k_star_text


def read_data(config: Recipe) -> tuple[DataSurvey | None, str]:
    """What is in the recipe's data, and why that is not known where it need not be.

    Raises:
      DataError: the data, or other text that the recipe names, are here and cannot be read.
    """
    place, source = Place.parse(config.data.source), f"data.source = {shown(config.data.source)}"
    if not (place.is_on_hub or config.data.is_embedded or os.path.lexists(place.name)):
        return None, f"{source} is not on this machine, so the plan goes by the recipe alone."
    survey = None if place.is_on_hub else survey_data(config, _tokenizer_file(config))
    check_other_text(config)
    return survey, f"{source} was not read: a plan loads nothing from a hub." if place.is_on_hub else ""


def _tokenizer_file(config: Recipe) -> Path | None:
    """The model's tokenizer.json, if it is on this machine."""
    folder = locate(config.model).folder
    file = folder / "tokenizer.json" if folder is not None else None
    return file if file is not None and file.is_file() else None


def data_table(survey: DataSurvey, max_tokens: int) -> Table:
    """What was read: schema, counts, and what of it will be left out, cut or changed."""
    table = make_table(f"Data of {survey.source!r}", words=())
    fewest, median, most = survey.records_of_client
    table.add_row("schema", printable(survey.schema))
    table.add_row("records", f"{survey.records:,}, about {survey.tokens:,} tokens ({survey.tokens_are})")
    named = "" if survey.clients_are == "simulated" else "; how many they are is treated as public"
    who = "site" if survey.clients_are.startswith("sites") else "client"
    table.add_row(f"{who}s", printable(f"{survey.clients:,} ({survey.clients_are}){named}"))
    table.add_row(f"records of a {who}", f"{fewest:,} to {most:,}, median {median:,}")
    if survey.owners is not None:
        table.add_row("owners", f"{survey.owners:,}, about {survey.owners / max(1, survey.clients):,.0f} of a {who}")
    table.add_row("evaluation", f"{survey.evaluation_records:,} records" if survey.evaluation_records else "no records")
    changes = [
        (survey.empty, "without a response, left out"),
        (survey.too_long, f"of more than {max_tokens:,} tokens, to be cut"),
        (survey.changed, "with characters or messages that are no text, changed"),
        (
            survey.shared_owners,
            f"owners' names at more than one {who}, each of which counts by itself",
        ),
        (survey.duplicates.across_owners, "texts that several clients have word for word"),
        (survey.duplicates.in_evaluation, "texts of clients that the evaluation data have, too"),
    ]
    for count, what in changes:
        if count:
            table.add_row(what, f"{count:,}")
    return table


def unit_table(rows: Sequence[UnitRow], recipe: Recipe) -> Table:
    """The units that the data allow, side by side."""
    headings = ("unit", "protects", "trust", "N", "q", "noise", "k*", "verdict")
    table = make_table(
        f"What could be protected at epsilon {recipe.privacy.epsilon:g}",
        *headings,
        words=("unit", "protects", "trust", "verdict"),
        caption="N of another unit than the recipe's is that of your data; federation.units_per_site has to be a public number",
    )
    for row in rows:
        table.add_row(
            row.unit, row.protects, row.trust, f"{row.units:,}", f"{row.sampling_rate:g}", f"{row.noise_multiplier:.3g}", k_star_text(row.k_star),
            row.verdict,
        )  # fmt: skip
    return table
