"""For reaccount.py: rounds, bytes, results, adapter and digests of a run's files, against the ledger's last line."""

import hashlib
import math
import re
from pathlib import Path

from reaccount_claims import claim_troubles
from reaccount_ledger import agree, cohort_size, parse, slots_of
from scipy.stats import norm

Z95 = float(norm.ppf(0.975))
NO_EVALUATION = (
    "The run has no evaluation data, so it cannot know whether it learned: name a file that the server owns in "
    "evaluation.data, or set owners who agreed aside with data.held_out_share."
)


def read_tensors(path: Path) -> tuple[dict[str, bytes], dict]:
    """(name -> bytes of a float32 tensor, drencoder's facts in the header) of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = parse(data[8 : 8 + length]), data[8 + length :]
    facts = parse(header.pop("__metadata__", {}).get("drencoder", "{}"))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if entry["dtype"] == "F32"}
    return {name: body[start:stop] for name, (start, stop) in spans.items()}, facts


def natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def result_of(outcome: dict) -> dict:
    """Loss (where there are texts) and accuracies of one model, with 95 % intervals: a ratio estimator's and Wilson's."""
    z, rows = Z95, {"loss": ratio(outcome["losses"], outcome["targets"])} if outcome["losses"] else {}
    for name, hits in outcome["right"].items():
        n, share = len(hits), sum(hits) / len(hits)
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        rows[name] = {"value": share, "low": centre - half, "high": centre + half, "count": n}
    return rows


def ratio(sums: list[float], counts: list[int]) -> dict:
    total = sum(counts)
    mean = sum(sums) / total
    error = Z95 * math.sqrt(sum((a - mean * b) ** 2 for a, b in zip(sums, counts, strict=True))) / total
    return {"value": mean, "low": mean - error, "high": mean + error, "count": len(sums)}


def is_embedded(source: str) -> bool:
    return source.partition(":")[0] == "embedded"


def sites_of(records: list[dict]) -> list[dict]:
    """What each site last said about itself."""
    said = {
        r["name"]: {key: r[key] for key in ("name", "clients", "data", "owners")}
        for r in records
        if r["kind"] == "site"
    }
    return [said[name] for name in sorted(said)]


def units_of_sites(recipe: dict, sites: list[dict]) -> str:
    """Whose text it is where the unit is inside a site."""
    data, unit = recipe["data"], recipe["privacy"]["unit"]
    field, owner = ("", "") if sites else (data["client_field"], data["owner_field"])
    whose = f"at sites that the field {field!r} names" if field else "whom the sites' own files hold"
    named = f"owners whom the field {owner!r} names, " if field and owner else "owners "
    words = {
        "generated": f"{unit}s of generated sites of the embedded world",
        "named": (named if unit == "owner" else "single records ") + whose,
    }
    kinds = {site["owners"] for site in sites} or {"generated" if is_embedded(data["source"]) else "named"}
    return "; ".join(words.get(kind, "units of an unknown kind") for kind in sorted(kinds))


def owners_of(recipe: dict, sites: list[dict]) -> str:
    """Who the clients are: of a federation as its sites say, else as the recipe does."""
    if recipe["privacy"]["unit"] != "client":
        return units_of_sites(recipe, sites)
    words = {
        "generated": "generated clients of the embedded world",
        "named": "owners whom the sites' own files name",
        "simulated": "simulated owners",
    }
    if sites:
        return "; ".join(
            words.get(kind, "owners of an unknown kind") for kind in sorted({site["owners"] for site in sites})
        )
    data = recipe["data"]
    if is_embedded(data["source"]):
        return "generated clients of the embedded world"
    return f"owners whom the field {data['client_field']!r} names" if data["client_field"] else "simulated owners"


def evaluation_of(recipe: dict) -> str:
    """Whose text the loss was measured on."""
    data, evaluation = recipe["data"], recipe["evaluation"]
    if evaluation["data"] == "none":
        return NO_EVALUATION
    if evaluation["data"] and not is_embedded(evaluation["data"]):
        return f"The loss is measured on {evaluation['data']!r}, which the server owns."
    if evaluation["data"] or is_embedded(data["source"]):
        return "The loss is measured on text that drencoder generated for the server; no client has any of it."
    share, unit = recipe["data"]["held_out_share"], recipe["privacy"]["unit"]
    if share and unit == "record":
        return (
            f"The loss is measured on a share of {share:.3g} of the records, which no site trains on; their people must have agreed, "
            "and epsilon does not cover them."
        )
    if not data["client_field"] and unit == "client":
        return (
            f"The loss is measured on a share of {share or 0.05:.3g} of the records, set aside before the owners were simulated; no "
            "client has any of them, and epsilon does not cover them."
        )
    if not share:
        return NO_EVALUATION
    return (
        f"The loss is measured on the text of a share of {share:.3g} of the owners, who are no clients and must have agreed; "
        "epsilon does not cover them."
    )


def verdict_of(outcomes: dict, uniform_loss: float) -> str:
    """Whether the adapter learned, from its own loss and the base model's, text by text."""
    base, run = outcomes["base model"], outcomes["this run"]
    if not base["losses"]:
        return NO_EVALUATION
    before, after = ratio(base["losses"], base["targets"]), ratio(run["losses"], run["targets"])
    changes = [b - a for a, b in zip(base["losses"], run["losses"], strict=True)]
    change = ratio(changes, base["targets"])
    numbers = (
        f"held-out loss {before['value']:.3f} -> {after['value']:.3f} (95 % interval of the difference {change['low']:+.3f} to "
        f"{change['high']:+.3f}; guessing uniformly gives {uniform_loss:.3f})"
    )
    if len(changes) < 8:
        return f"Whether the adapter learned cannot be told from {len(changes)} texts: {numbers}."
    if change["high"] < 0:
        return f"The adapter learned: {numbers}."
    if change["low"] > 0 or not any(changes):
        return f"The adapter did not learn: {numbers}."
    return f"Whether the adapter learned cannot be told: {numbers}."


def file_troubles(run: Path, records: list[dict], certificate: dict, recipe: dict) -> list[str]:
    """Rounds, bytes, results, adapter and digests against the ledger's last line."""
    closed, plan, found = records[-1], records[0]["plan"], []
    rounds, head = closed["rounds"], certificate["ledger_head"]
    later = records[head["seq"] + 1 :] if head["seq"] >= 0 else records
    if not later or any(r["kind"] != "closed" for r in later) or later[0]["prev"] != head["sha256"]:
        found.append("the certificate belongs to another state of the ledger")
    metrics = [parse(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    if certificate["rounds"] != rounds or [row["round"] for row in metrics] != list(range(rounds + 1)):
        found.append(f"certificate or metrics do not have the {rounds} rounds with which the ledger closes")
    charged = {r["slot"] for r in records if r["kind"] == "charge"}
    told = {r["slot"] for r in records if r["kind"] in ("release", "abandoned", "lost")}
    done = [slot for slot in slots_of(plan) if slot <= rounds]
    silent = {0} if "stage1" in plan["non_private"] else set()
    silent |= set(done) - {0} if "round" in plan["non_private"] else set()
    if bare := [slot for slot in done if slot not in charged or slot not in told | silent]:
        found.append(f"slot {bare[0]} is done without a charge, or without a word on what it released")

    releases, contributors = {}, {}
    for record in records:
        if record["kind"] == "release":
            releases[record["slot"]] = record["sha256"]
        elif record["kind"] in ("lost", "abandoned"):
            releases.pop(record["slot"], None)
        elif record["kind"] == "contributors":
            slot, count = record["slot"], record["contributors"]
            contributors[slot] = min(count, contributors.get(slot, count))
    sent = certificate["bytes"]
    totals = [row["bytes_up"] for row in metrics]
    if totals != sorted(totals) or totals[-1] != sent["uploaded"]:
        found.append("the certificate's bytes are not those of the metrics")
    words = "counted" if plan["trust"] != "central" else "expected: the size of a secret cohort is not published"
    if sent["counted"] != words:
        found.append("the certificate says otherwise how bytes were counted than this trust allows")
    if plan["trust"] == "local":
        code, bits, key = certificate["encoder"]["code_size"], sent["bits_per_value"], records[0]["sampler_key"]
        counted = [slot for slot in releases if 0 < slot <= rounds]
        least = (20 + math.ceil(code * bits / 8)) * sum(contributors.get(slot, 0) for slot in counted)
        # A clip that follows the norms sends one value more, a scale takes four bytes, and rejected messages count, too.
        longest = 24 + math.ceil((code + 1) * bits / 8)
        most = longest * sum(cohort_size(plan, bytes.fromhex(key), slot) for slot in counted)
        if not least <= sent["uploaded"] - sent["stage1"] <= most:
            found.append(
                f"the rounds' contributors sent {least:,} to {most:,} bytes, and the certificate has another number"
            )

    outcomes = parse((run / "outcomes.json").read_bytes())
    if outcomes.keys() != certificate["results"].keys():
        found.append("outcomes.json is of other models than the certificate's results")
    for name, outcome in outcomes.items():
        stated = certificate["results"][name]
        rows, flat = result_of(outcome), {"loss": stated["loss"], **stated["accuracy"]}
        if flat["loss"] is None:
            del flat["loss"]
        if rows.keys() != flat.keys() or not all(agree(flat[k].get(e), rows[k][e]) for k in rows for e in rows[k]):
            found.append(f"the certificate's results of {name} are not those of outcomes.json")

    size = math.exp(certificate["uniform_loss"])
    if size < 1.5 or not math.isclose(size, round(size), rel_tol=1e-9):
        found.append("the certificate's uniform_loss is not the logarithm of a vocabulary's size")
    if certificate["verdict"] != (sentence := verdict_of(outcomes, certificate["uniform_loss"])):
        found.append(f"the certificate's verdict is not what outcomes.json gives: {sentence}")
    if (sentence == NO_EVALUATION) != (evaluation_of(recipe) == NO_EVALUATION):
        found.append("outcomes.json has the loss of other text than the recipe's evaluation data")

    tensors, facts = read_tensors(run / "checkpoints" / "latest.safetensors")
    digest = hashlib.sha256(tensors["state.adapter"]).hexdigest()
    known = [slot for slot in releases if 0 < slot <= rounds]
    seq, line = facts["ledger_head"]
    if facts["slot"] != rounds or not 0 <= seq < len(records) - 1 or records[seq + 1]["prev"] != line:
        found.append("the checkpoint is of another state of the ledger")
    encoder, stage1 = certificate["encoder"], facts["stage1"] or {}
    gate = {f"gate_{kind}_{key}": value for kind, row in (facts["gate"] or {}).items() for key, value in row.items()}
    for name, stated, kept in (
        ("bytes uploaded", sent["uploaded"], facts["bytes_up"]),
        ("bytes downloaded", sent["downloaded"], facts["bytes_down"]),
        ("bytes of stage 1", sent["stage1"], stage1.get("bytes", 0)),
        ("stage 1", {k: v for k, v in certificate["stage1"].items() if k != "prior"}, stage1),
        ("gate", {k: v for k, v in encoder.items() if k.startswith("gate_")}, gate),
        ("encoder's update_size", encoder["update_size"], len(tensors["state.adapter"]) // 4),
    ):
        if stated != kept:
            found.append(f"the certificate's {name} is not what the checkpoint has")
    if known and releases[max(known)] != digest:
        found.append("the checkpoint's adapter is not the one that the ledger says was released")
    parts, _ = read_tensors(run / "adapter" / "adapter_model.safetensors")
    if hashlib.sha256(b"".join(parts[k] for k in sorted(parts, key=natural))).hexdigest() != digest:
        found.append("the adapter folder's adapter is not the checkpoint's")

    found += claim_troubles(run, certificate, recipe, facts)
    card = run / "adapter" / "README.md"
    if not card.is_file() or " ".join(certificate["statement"].split()) not in card.read_text("utf-8"):
        found.append("the adapter's model card has not the certificate's statement")

    names = [
        "recipe.resolved.toml",
        "metrics.jsonl",
        "outcomes.json",
        "samples.json",
        "certificate.json",
        "report.html",
    ]
    names += [
        p.relative_to(run).as_posix() for d in ("checkpoints", "adapter") for p in (run / d).rglob("*") if p.is_file()
    ]
    present = {n: hashlib.sha256((run / n).read_bytes()).hexdigest() for n in names if (run / n).is_file()}
    for name in sorted(present.keys() | closed["files"].keys()):
        if present.get(name) != closed["files"].get(name):
            found.append(f"{name:.80} is not the file that the run left")
    return found
