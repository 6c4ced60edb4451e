"""Knobs that a recipe sets and that change nothing together with its other knobs: the one place that decides. No torch.

Such a knob is no error: a recipe may be tried under another trust, or compared by methods that each use a part of it. But whoever
sets it expects something of it, so every command that takes a recipe says the same sentence.
"""

from collections.abc import Iterator
from dataclasses import fields

from drencoder.data.benchmarks.taxonomy import TAXONOMIES
from drencoder.data.evaluation_text import evaluation_basis
from drencoder.data.places import Place
from drencoder.encoders.planning import clip_text, declared, public_text
from drencoder.reading import shown
from drencoder.recipe.recipe import Recipe

_FOR_SUMS = "it is for privacy.trust = 'secure-aggregation'"
_NO_NOISE = "privacy.trust = 'non-private' adds no noise"
_EMBEDDED = "the embedded world makes its own clients"


def unused_knobs(recipe: Recipe) -> dict[str, str]:
    """Returns the knobs that have no effect and another value than their default: `section.key` -> a sentence with the reason.

    Knobs that only change how fast a run is are left out.
    """
    found = {}
    for key, why in _without_effect(recipe):
        section, _, name = key.partition(".")
        values = getattr(recipe, section)
        value = getattr(values, name)
        default = next(declared.default for declared in fields(values) if declared.name == name)
        if value != default and key not in found:
            value = dict(value) if key == "data.fields" else value
            found[key] = f"{key} = {shown(value)} has no effect: {why}."
    return found


def _without_effect(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every knob without an effect, whether the recipe sets it or not, and why."""
    yield from _of_data(recipe)
    yield from _of_training(recipe)
    yield from _of_privacy(recipe)


def _of_data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data, unit, basis = recipe.data, recipe.privacy.unit, evaluation_basis(recipe)
    if data.is_embedded:
        yield "data.client_field", _EMBEDDED
        yield "data.owner_field", _EMBEDDED
    if unit != "owner":
        yield "data.owner_field", f"it is for privacy.unit = 'owner', and here epsilon protects one {unit}"
    if basis == "generated":
        yield "data.held_out_share", "the embedded world has text of its own to measure on"
    if unit == "client":
        yield "federation.units_per_site", "it is for privacy.unit = 'record' or 'owner'"
    places = [data.source, recipe.evaluation.data if basis == "server" else "", recipe.prior.public]
    if all(place in ("", "self") or Place.parse(place).kind in ("embedded", *TAXONOMIES) for place in places):
        yield "data.fields", "it is for files of records and for data sets of the hub, and the recipe names none"
    if basis == "nothing" and not recipe.benchmarks:
        yield "evaluation.every", "the run has nothing to evaluate on"
        yield "evaluation.examples", "the run has nothing to evaluate on"


def _of_training(recipe: Recipe) -> Iterator[tuple[str, str]]:
    upload, encoder = recipe.local.upload, recipe.encoder.name
    if upload in ("gradient", "zero"):
        why = f"clients take no local steps with local.upload = {upload!r}"
        yield "local.learning_rate", why
        # Where clients send zeros, stage 1 still asks for a statistic of each epoch.
        if upload == "gradient" or recipe.prior.source == "none":
            yield "local.epochs", why
    if recipe.server.optimizer == "fedavg":
        yield "server.momentum", "server.optimizer = 'fedavg' has none"
    if not declared(recipe).sized_by_ratio:
        yield "encoder.ratio", f"encoder.name = {encoder!r} has a code size of its own"
    if recipe.prior.source == "none":
        yield "prior.sampling_rate", "prior.source = 'none' leaves stage 1 out"
    made = declared(recipe).public_text != "unused" or recipe.adapter.start == "public"
    if not made and recipe.privacy.clip_l2 and evaluation_basis(recipe) != "nothing":
        why = f"encoder.name = {encoder!r} is made without public text, and privacy.clip_l2 is named"
        yield "prior.public", why
        yield "prior.provenance", why
    if not (public_text(recipe) or clip_text(recipe) or recipe.prior.source == "gradients"):
        yield "prior.provenance", "no public text is used"


def _of_privacy(recipe: Recipe) -> Iterator[tuple[str, str]]:
    trust, unit = recipe.privacy.trust, recipe.privacy.unit
    if trust != "secure-aggregation":
        for key in ("privacy.dropout_share", "privacy.honest_share", "federation.nodes"):
            yield key, _FOR_SUMS
    if trust == "non-private":
        for knob in ("epsilon", "delta", "noise_multiplier", "relation"):
            yield f"privacy.{knob}", _NO_NOISE
    if unit != "client":
        yield "privacy.participation_cap", f"with privacy.unit = {unit!r} sites take part in every round"
    elif trust not in ("local", "secure-aggregation"):
        yield "privacy.participation_cap", f"privacy.trust = {trust!r} does not limit how often a client takes part"
