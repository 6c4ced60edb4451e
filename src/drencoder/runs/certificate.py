"""The certificate: what was promised, to whom, and what was spent; and what binds it and the run's files to the ledger.

No torch at import: an auditor rebuilds the privacy part from the ledger and the recipe alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drencoder import __version__
from drencoder.data.evaluation_text import describe_owners, evaluation_rests_on, owner_kind
from drencoder.data.sources import provenance_of
from drencoder.encoders.code_sizes import BITS_PER_VALUE, plain_lora_bytes
from drencoder.encoders.planning import clip_words, wire_dtype
from drencoder.errors import ArtifactError
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.ledger_check import plan_differences
from drencoder.privacy.plan import PrivacyPlan
from drencoder.privacy.site_epsilons import SITE_TRUST, UNITS, unit_terms
from drencoder.recipe.recipe import Recipe
from drencoder.runs.plan_overview import integer_bits, privacy_plan, sent_dtype
from drencoder.runs.run_folder import RunFolder, storing

if TYPE_CHECKING:  # these import torch
    from drencoder.encoders.contract import Encoder
    from drencoder.runs.build import Components
    from drencoder.runs.checkpoint import Progress

# What a resumed run may change: how fast it is and on which device, and what a plain run ignores.
_FREE_SECTIONS = ("speed", "compare")
_FREE_KNOBS = {"model": ("device",)}

SIMULATED = (
    "The owners of this run are simulated: records were dealt out at random, so nothing is promised to those who wrote them. With "
    "as many real owners the same numbers would mean:"
)

BYTES_COUNTED = {True: "counted", False: "expected: the size of a secret cohort is not published"}
"""Whether cohorts are no secret -> how the certificate's bytes came about."""


TWIN_SENTENCE = (
    "A twin of this run was trained without noise, as a comparison for who holds all clients' text. Its outputs, in twin/, are NOT private: "
    "they must not be shared, and epsilon says nothing about them."
)

STATED = (
    "adapter_start",
    "base",
    "bytes",
    "clip",
    "data",
    "drencoder",
    "encoder",
    "finished",
    "stage1",
    "uniform_loss",
)
"""What a certificate says beside what follows from ledger, recipe and outcomes; the last checkpoint has a copy."""


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 over every knob that decides what a run does: all but [speed], [compare] and model.device."""
    tables = {key: value for key, value in recipe.to_dict().items() if key not in _FREE_SECTIONS}
    for section, free in _FREE_KNOBS.items():
        tables[section] = {key: value for key, value in tables[section].items() if key not in free}
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def check_same_recipe(ledger: Ledger, recipe: Recipe) -> None:
    """Refuses to go on with a ledger under a recipe that it was not started with.

    Raises:
      ArtifactError: a knob was edited that decides what the run does.
    """
    differing = plan_differences(ledger.plan, privacy_plan(recipe))
    if differing or ledger.recipe != recipe_digest(recipe):
        named = f" ({', '.join(differing)} of the plan)" if differing else ""
        raise ArtifactError(
            f"the recipe is not the one with which {ledger.path} was started{named}: restore it; only [speed], [compare] and "
            "model.device may change in a run. Another recipe is a new run, with its own --out."
        )


def file_digests(folder: RunFolder) -> dict[str, str]:
    """Name -> SHA-256 of every file that a finished run leaves behind, but for the ledger itself.

    Raises:
      ArtifactError: one of them cannot be read.
    """
    names = [folder.recipe, folder.metrics, folder.outcomes, folder.samples, folder.certificate, folder.report]
    names += [
        path for part in (folder.checkpoints, folder.adapter) for path in sorted(part.rglob("*")) if path.is_file()
    ]
    with storing(folder.path):
        return {path.relative_to(folder.path).as_posix(): _sha256(path) for path in names if path.is_file()}


def adapter_digests(folder: RunFolder) -> dict[str, str]:
    """Name -> SHA-256 of every file of the adapter folder but the model card, which is made from the certificate."""
    files = [path for path in sorted(folder.adapter.rglob("*")) if path.is_file() and path != folder.model_card]
    with storing(folder.adapter):
        return {path.relative_to(folder.adapter).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derived_part(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """All of a certificate that follows from the ledger and the recipe; the ledger's head is the one at that time."""
    privacy, sites = ledger.certificate(), ledger.sites()
    data = recipe.data
    unit = recipe.privacy.unit
    kinds = [site["owners"] for site in sites] or [owner_kind(data, unit)]
    owners = describe_owners(kinds, "" if sites else data.client_field, unit, data.owner_field)
    return {
        "version": 1,
        "name": recipe.name,
        "statement": _statement(ledger.plan, privacy["observers"], simulated="simulated" in kinds),
        **privacy,
        **({"unit_terms": unit_terms(ledger)} if ledger.plan.curated else {}),
        "owners": owners,
        "sites": sites,
        "evaluation_rests_on": evaluation_rests_on(recipe),
        "slots_without_result": ledger.slots_without_result(),
        "model": recipe.model.source,
        "data": f"the clients' own text, which stays at {len(sites)} sites" if sites else provenance_of(data),
    }


def make_certificate(
    components: "Components", ledger: Ledger, progress: "Progress", encoder: "Encoder"
) -> dict[str, Any]:
    """The certificate of a finished run, but for its results."""
    recipe, plan, layout = components.recipe, components.plan, components.lora.layout
    secure, base = plan.trust == "secure-aggregation", components.lora.base
    senders = recipe.federation.nodes if secure else plan.senders(1)
    uploads = senders * sum(1 for slot in ledger.charges() if slot > 0)
    values = encoder.code_size + (recipe.privacy.clip == "adaptive")
    bits = integer_bits(plan, 1, values) if secure else BITS_PER_VALUE[sent_dtype(recipe, plan, 1, values)]
    return {
        "drencoder": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **derived_part(ledger, recipe),
        "rounds": progress.slot,
        "bytes": {
            "uploaded": progress.bytes_up,
            "downloaded": progress.bytes_down,
            "stage1": (progress.stage1 or {}).get("bytes", 0),
            "counted": BYTES_COUNTED[plan.capped],
            "plain_lora": plain_lora_bytes(uploads, layout.size, wire_dtype(recipe)),
            "bits_per_value": bits,
        },
        "encoder": encoder.describe() | flat_gate(progress.gate or {}),
        "stage1": {"prior": recipe.prior.source, **(progress.stage1 or {})},
        "clip": {
            "kind": recipe.privacy.clip,
            "clip_l2": progress.clip_l2 or recipe.privacy.clip_l2,
            "start": clip_words(recipe, components.texts.public.declared if components.texts.public else ""),
        },
        "adapter_start": components.start,
        "base": {
            "hub_id": base.hub_id,
            "revision": base.revision,
            "licence": base.licence,
            "dtype": recipe.model.dtype,
        },
    }


def flat_gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    """What the gate found, as the certificate has it among the encoder's facts."""
    return {f"gate_{kind}_{key}": value for kind, facts in gate.items() for key, value in facts.items()}


def lost_sentences(slots: Mapping[str, Sequence[int]]) -> list[str]:
    """Which slots were charged and gave nothing, and why."""
    why = {
        "abandoned": "given up, since too few clients answered",
        "lost": "lost with a process that was killed",
    }
    return [
        f"Charged without a result ({reason}; the charge stays): "
        f"{', '.join(f'round {slot}' if slot else 'stage 1' for slot in slots[kind])}."
        for kind, reason in why.items()
        if slots[kind]
    ]


def _statement(plan: PrivacyPlan, observers: Mapping[str, Any], *, simulated: bool) -> str:
    """The promise in one sentence; where owners are simulated, what it would be with real ones, after a sentence that says so."""
    promise = _promise(plan, observers)
    private = plan.noise == "secure" and not plan.non_private
    return f"{SIMULATED} {promise}" if private and simulated else promise


def _promise(plan: PrivacyPlan, observers: Mapping[str, Any]) -> str:
    if "round" in plan.non_private:
        return "This run added no noise: it has no privacy guarantee of any kind and is a baseline only."
    if plan.non_private:
        return (
            "Stage 1 used clients' real gradients without noise, so this run has no privacy guarantee of any kind, "
            "whatever noise its rounds had: it is a baseline only."
        )
    if plan.noise == "replay":
        return "This run's noise can be computed again: it has no privacy guarantee and is a test only."
    seen = {name: row["by_relation"][plan.relation]["epsilon_pld"] for name, row in observers.items()}
    words = {"add_remove": "adding or removing", "replace_one": "replacing"}[plan.relation]
    cost = seen[plan.budget_observer]
    promise = f"({float(cost):.3f}, {plan.delta:g})-differential privacy for {words} {UNITS[plan.unit]}"
    site = f" {SITE_TRUST}" if plan.curated else ""
    if plan.trust == "local":
        rest = f"those who see only sums and the model: epsilon {float(seen['public']):.3f}"
        if plan.curated:  # of few sites one's own noise is much
            rest += f"; against another site, which knows its own noise: {float(seen['clients']):.3f}"
        return f"Against the server: {promise}. Against {rest}.{site}"
    if plan.trust == "secure-aggregation":
        others, honest = ("sites", "sites") if plan.curated else ("clients", "contributors")
        return (
            f"Against the other {others}: {promise}. Against the server, which saw only sums, and the public: epsilon "
            f"{float(seen['server']):.3f}. At least {plan.honest_share:.0%} of the {honest} are taken to be honest.{site}"
        )
    return f"Against everyone but the server: {promise}. The server is trusted: there is no guarantee against it."
