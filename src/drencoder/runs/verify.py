"""Does a run folder say what its ledger says? For an auditor; no torch, no trust in the run.

Everything that follows from the ledger and the recipe is computed again and compared field by field. `docs/verify.md` lists
what is checked, and what no file can show.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drencoder.data.evaluation_text import NO_EVALUATION, evaluation_basis
from drencoder.errors import DrencoderError
from drencoder.evaluation.statistics import outcome_estimates
from drencoder.evaluation.verdict import is_uniform_loss, verdict
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.ledger_check import ledger_troubles, plan_differences
from drencoder.reading import cut
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs.certificate import BYTES_COUNTED, derived_part, file_digests, flat_gate, recipe_digest
from drencoder.runs.model_card import write_model_card
from drencoder.runs.plan_overview import privacy_plan, survey
from drencoder.runs.run_folder import RunFolder
from drencoder.runs.signatures import check_signatures
from drencoder.runs.tensor_files import adapter_digest, read_tensors
from drencoder.runs.verify_claims import claim_troubles

_TOLERANCE = 1e-6  # of an epsilon, absolute below 1 and relative above
_CHECKPOINT = "latest.safetensors"
_MOST_TROUBLES = 20
_OTHER_KINDS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
)  # of values that are not the expected ones


@dataclass(frozen=True)
class Verification:
    """Rows (observer, adjacency, certificate's epsilon, ledger's epsilon); `troubles`: what does not hold, a sentence each.

    `signers`: the public keys whose signatures of this ledger are right.
    """

    rows: list[tuple[str, str, str, str]]
    charges: int
    troubles: tuple[str, ...]
    signers: tuple[str, ...] = ()

    @property
    def trouble(self) -> str:
        """All that does not hold; empty if everything does."""
        more = len(self.troubles) - _MOST_TROUBLES
        return " ".join([*self.troubles[:_MOST_TROUBLES], *([f"And {more} more."] if more > 0 else [])])


def verify_run(path: Path, signed_by: Mapping[str, str] | None = None) -> Verification:
    """Checks a run folder against its own ledger and recipe, and the signatures that it has.

    Args:
      signed_by: public key -> name, of all who must have signed (`signatures.read_signers`).

    Raises:
      ArtifactError: a file is missing or damaged, or the ledger's chain is broken.
      RecipeError: the recipe cannot be read.
    """
    folder = RunFolder.open(path)
    recipe = load_recipe(folder.recipe)
    with Ledger.open(folder.ledger, read_only=True) as ledger:
        troubles = list(_plan_troubles(ledger, recipe)) + ledger_troubles(ledger)
        if not any(record["kind"] == "closed" for record in ledger.records):
            troubles.append(f"the run is unfinished: finish it with drencoder run --resume {path}.")
        certificate = folder.read_json(folder.certificate)
        charges = sum(ledger.charges().values())
        if troubles:  # what follows is computed from the ledger, which is not to be trusted that far
            return Verification([], charges, tuple(troubles))
        derived = derived_part(ledger, recipe)
        troubles += _head_troubles(ledger, certificate)
        derived["ledger_head"] = certificate.get("ledger_head")
        troubles += _differences("certificate", certificate, derived)
        try:
            troubles += _round_troubles(ledger, folder, certificate)
            troubles += _byte_troubles(ledger, recipe, folder, certificate)
            troubles += _result_troubles(folder, recipe, certificate)
            if not troubles:
                troubles += _checkpoint_troubles(ledger, folder, certificate)
                troubles += _card_troubles(folder, certificate)
                troubles += claim_troubles(ledger, folder, recipe, certificate, derived)
        except _OTHER_KINDS as error:
            troubles.append(f"a file of the run has a value of another kind than runs write ({type(error).__name__}).")
        troubles += _file_troubles(ledger, folder)
        signers, unsigned = check_signatures(folder, ledger, signed_by or {})
        return Verification(_rows(certificate, derived), charges, (*troubles, *unsigned), tuple(signers))


def _plan_troubles(ledger: Ledger, recipe: Recipe) -> Iterator[str]:
    for name in plan_differences(ledger.plan, privacy_plan(recipe)):
        yield f"the ledger's plan is not the one that the recipe gives: {name} differs."
    if ledger.recipe != recipe_digest(recipe):
        yield "the recipe is not the one with which the ledger was started."


def _head_troubles(ledger: Ledger, certificate: Mapping[str, Any]) -> Iterator[str]:
    """The certificate was written from the ledger's last state but for the lines that close it."""
    head = certificate.get("ledger_head")
    if not isinstance(head, dict) or type(head.get("seq")) is not int or set(head) != {"seq", "sha256"}:
        yield "the certificate's ledger_head is no line of a ledger."
        return
    later = ledger.records[head["seq"] + 1 :] if head["seq"] >= 0 else ledger.records
    closed_after = bool(later) and all(record["kind"] == "closed" for record in later)
    if not closed_after or not ledger.contains((head["seq"], head["sha256"])):
        yield "the certificate was written from another state of the ledger."


def _differences(place: str, actual: Any, expected: Any) -> Iterator[str]:
    """One sentence for each field of `expected` that `actual` has otherwise."""
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for key in expected:
            if key not in actual:
                yield f"the {place} lacks {key}."
            else:
                yield from _differences(f"{place}'s {key}", actual[key], expected[key])
        if place != "certificate":
            yield from (f"the {place} has a field {key!r:.40} of its own." for key in actual.keys() - expected.keys())
    elif not _agree(actual, expected):
        yield f"the {place} is {_shown(actual)}, and ledger and recipe give {_shown(expected)}."


def _agree(actual: Any, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        same = isinstance(actual, list) and len(actual) == len(expected)
        return same and all(map(_agree, actual, expected))
    if type(actual) is int and abs(actual) >= 1 << 53:
        return bool(actual == expected)
    if type(actual) in (int, float) and type(expected) in (int, float):
        return math.isclose(actual, expected, rel_tol=_TOLERANCE, abs_tol=min(_TOLERANCE, abs(expected) * _TOLERANCE))
    return type(actual) is type(expected) and bool(actual == expected)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _round_troubles(ledger: Ledger, folder: RunFolder, certificate: Mapping[str, Any]) -> Iterator[str]:
    """Each finished round has its charge, its line in the metrics, and a word on what became of it."""
    closed = _closed(ledger)
    rounds, planned = closed["rounds"], ledger.plan.rounds
    if certificate.get("rounds") != rounds:
        yield f"the certificate's rounds is {_shown(certificate.get('rounds'))}, and the ledger closes with {rounds}."
    if not 0 <= rounds <= planned:
        yield f"the ledger closes with {rounds} rounds of the plan's {planned}."
        return
    numbers = [row["round"] for row in folder.read_metrics()]
    if numbers != list(range(rounds + 1)):
        yield f"the metrics have not one line for each of the rounds 0 to {rounds}."
    charged = ledger.charges()
    told = {record["slot"] for record in ledger.records if record["kind"] in ("release", "abandoned", "lost")}
    for slot in ledger.plan.slots:
        if slot > rounds:
            break
        if slot not in charged:
            yield f"slot {slot} is done, and the ledger has no charge of it."
        elif slot not in told and ledger.plan.stage(slot) not in ledger.plan.non_private:
            yield f"slot {slot} was charged, and the ledger does not say what it released."


def _byte_troubles(ledger: Ledger, recipe: Recipe, folder: RunFolder, certificate: Mapping[str, Any]) -> Iterator[str]:
    """Uploaded bytes: those of the metrics, and as many as the contributors sent."""
    sent, metrics = certificate.get("bytes"), folder.read_metrics()
    if not isinstance(sent, dict) or any(
        type(sent.get(key)) is not int for key in ("uploaded", "stage1", "downloaded")
    ):
        yield "the certificate's bytes are no numbers of bytes."
        return
    if sent.get("counted") != BYTES_COUNTED[ledger.plan.capped]:
        yield "the certificate's bytes counted is not what this trust allows."
    totals = [row["bytes_up"] for row in metrics]
    if totals != sorted(totals) or (totals and totals[-1] != sent["uploaded"]):
        yield "the certificate's bytes uploaded is not that of the metrics' last line."
    if ledger.plan.trust == "secure-aggregation":
        return  # nodes that drop out in the middle have sent some of theirs
    try:
        overview = survey(recipe)
    except DrencoderError:  # the model is not on this machine
        return
    message = overview.message_bytes
    encoder = certificate.get("encoder")
    stated = encoder.get("code_size") if isinstance(encoder, dict) else None
    if overview.code_size not in (None, stated):
        yield f"the certificate's encoder has codes of {_shown(stated)} values, and the recipe gives {overview.code_size}."
    if message is not None and recipe.prior.source != "gradients":
        low, high = _expected_bytes(ledger, message)
        if not low <= sent["uploaded"] - sent["stage1"] <= high:
            yield (
                f"the rounds' uploads are {sent['uploaded'] - sent['stage1']:,} bytes, and the ledger's contributors sent "
                f"{low:,}{f' to {high:,}' if high > low else ''}."
            )


def _expected_bytes(ledger: Ledger, message: int) -> tuple[int, int]:
    """Bytes of all rounds that count: from every contributor's to all of the cohort's, where messages were rejected."""
    plan, rounds = ledger.plan, _closed(ledger)["rounds"]
    released, known = ledger.released_slots(), ledger.contributors()
    counted = [slot for slot in released if 0 < slot <= rounds]
    if not plan.capped:
        total = len(counted) * round(plan.expected_cohort * message)
        return total, total
    most = sum(len(ledger.sampler().cohort(slot)) for slot in counted)
    return message * sum(known.get(slot, 0) for slot in counted), message * most


def _result_troubles(folder: RunFolder, recipe: Recipe, certificate: Mapping[str, Any]) -> Iterator[str]:
    """The certificate's results are those of outcomes.json, its encoder and stage 1 those of the recipe."""
    try:
        outcomes: dict[str, Any] = folder.read_json(folder.outcomes)
        uniform_loss: Any = certificate.get("uniform_loss")
        if not is_uniform_loss(uniform_loss):
            yield f"the certificate's uniform_loss is {_shown(uniform_loss)}, which no vocabulary has."
            return
        results = {name: outcome_estimates(**one) for name, one in outcomes.items()}
        sentence = verdict(outcomes, uniform_loss, NO_EVALUATION)
    except _OTHER_KINDS:
        yield "outcomes.json has not the outcomes of a run."
        return
    yield from _differences("certificate's results", certificate.get("results"), results)
    if certificate.get("verdict") != sentence:
        yield f"the certificate's verdict is not what outcomes.json gives: {sentence}"
    if (evaluation_basis(recipe) == "nothing") != (sentence == NO_EVALUATION):
        yield "outcomes.json has the loss of other text than the recipe's evaluation data."
    for section, key, expected in (
        ("encoder", "name", recipe.encoder.name),
        ("stage1", "prior", recipe.prior.source),
    ):
        part = certificate.get(section)
        if not isinstance(part, dict) or part.get(key) != expected:
            yield f"the certificate's {section} is not the recipe's {expected}."


def _card_troubles(folder: RunFolder, certificate: Mapping[str, Any]) -> Iterator[str]:
    """The adapter's model card is the one that the certificate gives."""
    try:
        expected, actual = write_model_card(certificate).encode(), folder.model_card.read_bytes()
    except OSError:
        yield "the adapter has no model card."
        return
    except (LookupError, TypeError, ValueError, AttributeError):
        yield "the certificate has not what a model card says."
        return
    if actual != expected:
        yield "the adapter's model card is not the one that the certificate gives."


def _checkpoint_troubles(ledger: Ledger, folder: RunFolder, certificate: Mapping[str, Any]) -> Iterator[str]:
    """The adapter that is handed over is the last checkpoint's, which is the one that the ledger says was released; what the
    certificate says of bytes, stage 1 and the gate is what the checkpoint has."""
    tensors, facts = read_tensors(folder.checkpoints / _CHECKPOINT)
    rounds = _closed(ledger)["rounds"]
    state = tensors.get("state.adapter")
    if state is None or facts.get("slot") != rounds:
        yield f"the checkpoint is not that of round {rounds}."
        return
    head = facts.get("ledger_head")
    if not isinstance(head, list) or len(head) != 2 or not ledger.contains((head[0], head[1])):
        yield "the checkpoint knows of lines that the ledger lacks."
    sent, encoder = certificate["bytes"], certificate["encoder"]
    gate = {key: value for key, value in encoder.items() if key.startswith("gate_")}
    for name, actual, expected in (
        ("bytes uploaded", sent["uploaded"], facts.get("bytes_up")),
        ("bytes downloaded", sent["downloaded"], facts.get("bytes_down")),
        ("bytes of stage 1", sent["stage1"], (facts.get("stage1") or {}).get("bytes", 0)),
        ("stage1", {k: v for k, v in certificate["stage1"].items() if k != "prior"}, facts.get("stage1") or {}),
        ("gate", gate, flat_gate(facts.get("gate") or {})),
        ("encoder's update_size", encoder.get("update_size"), len(state.data) // 4),
    ):
        if not _agree(actual, expected) and actual != expected:
            yield f"the certificate's {name} is not what the checkpoint has."
    digest = hashlib.sha256(state.data).hexdigest()
    if ledger.released_adapter(rounds) not in (None, digest):
        yield "the checkpoint's adapter is not the one that the ledger says was released."
    if adapter_digest(folder.adapter / "adapter_model.safetensors") != digest:
        yield "the adapter folder's adapter is not the checkpoint's."


def _file_troubles(ledger: Ledger, folder: RunFolder) -> Iterator[str]:
    """Every file is the one whose digest the ledger's last line has."""
    if ledger.records[-1]["kind"] != "closed":
        yield "the ledger goes on after the line that closes it: finish the run with --resume."
        return
    closed, actual = _closed(ledger)["files"], file_digests(folder)
    for name in sorted(closed.keys() | actual.keys()):
        if name not in actual:
            yield f"{cut(name)} is missing."
        elif name not in closed:
            yield f"{cut(name)} is not one of the files that the run left."
        elif closed[name] != actual[name]:
            yield f"{cut(name)} was changed after the run closed its ledger."


def _closed(ledger: Ledger) -> Mapping[str, Any]:
    return next(record for record in reversed(ledger.records) if record["kind"] == "closed")


def _rows(certificate: Mapping[str, Any], derived: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for observer, guarantee in derived["observers"].items():
        for relation, report in guarantee["by_relation"].items():
            try:
                claimed = float(certificate["observers"][observer]["by_relation"][relation]["epsilon_pld"])
            except (LookupError, TypeError, ValueError):
                claimed = math.nan
            rows.append((observer, relation, f"{claimed:.6f}", f"{float(report['epsilon_pld']):.6f}"))
    return rows
