"""What a certificate states beside its privacy part, and the files that people read, against each other. No torch.

Nothing here is bound by epsilon's arithmetic. A statement is compared with what recipe and ledger give, or with the checkpoint, which
has a copy of it, or with the files that are handed over.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drencoder.encoders.code_sizes import BITS_PER_VALUE, plain_lora_bytes
from drencoder.encoders.planning import wire_dtype
from drencoder.errors import ArtifactError, DrencoderError
from drencoder.models.place import ModelPlace, licence_of, locate
from drencoder.privacy.ledger import Ledger
from drencoder.reading import cut
from drencoder.recipe.recipe import Recipe
from drencoder.runs.certificate import STATED, TWIN_SENTENCE, adapter_digests
from drencoder.runs.plan_overview import integer_bits, sent_dtype
from drencoder.runs.report import page_without_figure, without_figure
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.tensor_files import read_tensors

_MADE_AT_THE_END = ("rounds", "results", "verdict", "twin")
_PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""What `adapter_config.json` says of an adapter that is LoRA on its layers and nothing else."""


def claim_troubles(
    ledger: Ledger, folder: RunFolder, recipe: Recipe, certificate: Mapping[str, Any], derived: Mapping[str, Any]
) -> Iterator[str]:
    """One sentence for each statement that is not what another place of the run folder has.

    Raises:
      ArtifactError: a file is missing or damaged.
    """
    facts = read_tensors(folder.checkpoints / "latest.safetensors")[1]
    stated = facts.get("stated") or {}
    for key in STATED:
        if key not in stated or certificate.get(key) != stated[key]:
            yield f"the certificate's {key} is not what the checkpoint has."
    for key in sorted(certificate.keys() - {*derived, *STATED, *_MADE_AT_THE_END}):
        yield f"the certificate has a field {key!r:.40} of its own."
    if certificate.get("twin") != (TWIN_SENTENCE if "twin" in certificate or folder.twin.exists() else None):
        yield "the certificate says otherwise whether the run has a twin."
    yield from _mechanism_troubles(ledger, recipe, certificate, facts)
    yield from _base_troubles(recipe, certificate)
    yield from _adapter_troubles(folder, recipe, certificate, stated.get("adapter"))
    yield from _metrics_troubles(folder, recipe, certificate)
    try:
        page = folder.report.read_bytes().decode("utf-8")  # as it is: an answer may hold any kind of line end
    except (OSError, ValueError):
        yield "report.html is missing or damaged: drencoder report makes it again."
        return
    try:
        expected = page_without_figure(folder)
    except ArtifactError as error:  # samples or an audit that is none
        yield str(error)
        return
    if without_figure(page) != expected:
        yield "report.html is not the page that the run's other files give: drencoder report makes it again."


def _mechanism_troubles(
    ledger: Ledger, recipe: Recipe, certificate: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[str]:
    """The clip, and how large codes and uploads are, follow from recipe, plan and the encoder's sizes."""
    plan, encoder, sent, clip = ledger.plan, certificate["encoder"], certificate["bytes"], certificate["clip"]
    size, code = encoder["update_size"], encoder["code_size"]
    values, secure = code + (recipe.privacy.clip == "adaptive"), plan.trust == "secure-aggregation"
    bits = integer_bits(plan, 1, values) if secure else BITS_PER_VALUE[sent_dtype(recipe, plan, 1, values)]
    senders = recipe.federation.nodes if secure else plan.senders(1)
    uploads = senders * sum(slot > 0 for slot in ledger.charges())
    for name, actual, expected in (
        ("clip kind", clip["kind"], recipe.privacy.clip),
        ("clip_l2", clip["clip_l2"], facts["clip_l2"] or recipe.privacy.clip_l2),
        ("bits_per_value", sent["bits_per_value"], bits),
        ("bytes of plain_lora", sent["plain_lora"], plain_lora_bytes(uploads, size, wire_dtype(recipe))),
    ):
        if actual != expected:
            yield f"the certificate's {name} is {json.dumps(actual)[:40]}, and recipe and ledger give {expected}."
    if not math.isclose(encoder["ratio"], code / size, rel_tol=1e-6):
        yield "the certificate's ratio is not the code's size in the update's."


def _base_troubles(recipe: Recipe, certificate: Mapping[str, Any]) -> Iterator[str]:
    """What the certificate says of the base model, as far as its files are on this machine."""
    base = certificate["base"]
    if base["dtype"] != recipe.model.dtype:
        yield "the certificate's base has another dtype than the recipe."
    try:
        place = locate(recipe.model)
    except DrencoderError:  # its folder is on another machine
        place = ModelPlace(Path())
    if base["hub_id"] != place.hub_id and place.path != Path():
        yield "the certificate's base has another hub_id than the recipe's model."
    licence = licence_of(place)
    if licence is not None and base["licence"] != licence:
        yield f"the certificate's licence is {cut(base['licence'], 40)}, and the model's own files say {licence}."


def _adapter_troubles(folder: RunFolder, recipe: Recipe, certificate: Mapping[str, Any], digests: Any) -> Iterator[str]:
    """The adapter folder is the one that the run left, and is used with the recipe's rank and alpha."""
    actual = adapter_digests(folder)
    for name in sorted(actual.keys() | dict(digests or {}).keys()):
        if actual.get(name) != (digests or {}).get(name):
            yield f"adapter/{cut(name)} is not what the checkpoint has a digest of."
    if any(tensor.dtype != "F32" for tensor in read_tensors(folder.adapter / "adapter_model.safetensors")[0].values()):
        yield "the adapter folder's adapter is not in float32, as a run's is."
    config = folder.read_json(folder.adapter / "adapter_config.json")
    base = certificate["base"]
    expected = _PLAIN | {
        "r": recipe.adapter.rank,
        "lora_alpha": recipe.adapter.alpha,
        "lora_dropout": recipe.adapter.dropout,
        "revision": base["revision"] or None if base["hub_id"] else None,
    }
    if base["hub_id"]:
        expected["base_model_name_or_path"] = base["hub_id"]
    elif recipe.model.source != "embedded":
        place = Path(recipe.model.source)
        expected["base_model_name_or_path"] = str(place.parent if place.suffix.lower() == ".gguf" else place)
    for key, value in expected.items():
        if config.get(key) != value:
            yield f"adapter_config.json has another {key} than the run."


def _metrics_troubles(folder: RunFolder, recipe: Recipe, certificate: Mapping[str, Any]) -> Iterator[str]:
    """Epsilon in the metrics grows to the certificate's, and the losses are its results, where they are of all texts."""
    rows = folder.read_metrics()
    if any(row.keys() - {"round", "epsilon", "bytes_up", "loss", "accuracy"} for row in rows):
        yield "the metrics have fields of their own."
    for name, observer in certificate["observers"].items():
        spent = [float(row["epsilon"][name]) for row in rows]
        if spent != sorted(spent) or not _near(spent[-1], float(observer["epsilon_pld"])):
            yield f"the metrics' epsilon of {name} is not the certificate's."
    results = certificate["results"]
    if "loss" not in rows[0] or results["this run"]["loss"]["count"] > recipe.evaluation.progress_examples:
        return
    ends = [(rows[0], "base model")] + ([(rows[-1], "this run")] if "loss" in rows[-1] else [])
    if not all(_near(row["loss"], results[name]["loss"]["value"]) for row, name in ends):
        yield "the metrics' loss is not the certificate's."


def _near(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=1e-4)
