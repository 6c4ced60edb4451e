"""Re-accounts a run from its files alone: imports nothing of drencoder, only Python, numpy, scipy and dp_accounting.

    python tools/reaccount.py RUN [PUBLIC_KEY_FILE ...]

Checks the ledger's chain of hashes, each line against the plan, the plan against the recipe, the whole privacy part of the
certificate against what dp_accounting makes of the ledger's charges, and every other file against the ledger's last line.
Prints a table and what does not hold, and exits with 1 if anything does not. `docs/verify.md` lists what is checked.
The signatures in RUN/signatures.jsonl are checked if `cryptography` is installed; each PUBLIC_KEY_FILE must have signed.
Copy it together with reaccount_ledger.py, reaccount_files.py and reaccount_claims.py.
"""

import base64
import hashlib
import json
import sys
import tomllib
from pathlib import Path

from reaccount_files import evaluation_of, file_troubles, owners_of, sites_of
from reaccount_ledger import (
    RELATIONS,
    agree,
    budget_events,
    composition_delta,
    compositions,
    epsilon,
    is_curated,
    line_troubles,
    other_numbers,
    parse,
    read_ledger,
    same_events,
    site_rows,
    slots_of,
    units_of,
)

TRUSTED = "The server adds the noise, keeps cohorts and sums secret, and does not collude."
ASSUMPTIONS = {
    ("central", "server"): "No guarantee: the server is trusted, it sees the un-noised sum of a round.",
    ("central", "clients"): TRUSTED,
    ("central", "public"): TRUSTED,
    ("local", "server"): "No assumption about others: each client adds its full noise itself and keeps to the cap.",
    ("local", "clients"): "All other contributors of a round add their noise honestly; the observer is one "
    "client, knows its own noise, and colludes neither with the server nor with another client.",
    ("local", "public"): "All other contributors of a round add their noise honestly; the observer sees only sums "
    "and the model, and colludes neither with the server nor with a client.",
    ("secure-aggregation", "server"): "The stated share of a round's contributors add their noise and keep it to "
    "themselves; the others may tell the server everything. Fewer nodes collude than secure aggregation's threshold allows.",
    ("secure-aggregation", "clients"): "The observer is one of the honest contributors, who knows its own noise; the "
    "others are as against the server.",
    ("secure-aggregation", "public"): "As against the server: all that the public sees, the server has seen.",
}
OWN_SITE = "The unit's own site keeps its records and its draw to itself, clips each unit's code, and "
SITE_ASSUMPTIONS = {
    ("local", "server"): f"{OWN_SITE}adds its full noise. Nothing is assumed of other sites.",
    (
        "local",
        "clients",
    ): f"{OWN_SITE}adds its full noise, and so do all other sites of a slot; the observer is one site, knows "
    "its own noise, and colludes neither with the server nor with another site.",
    (
        "local",
        "public",
    ): f"{OWN_SITE}adds its full noise, and so do all other sites of a slot; the observer sees only sums and the "
    "model, and colludes neither with the server nor with a site.",
    (
        "secure-aggregation",
        "server",
    ): f"{OWN_SITE}adds its share of the noise. The stated share of a slot's sites add theirs and "
    "keep them to themselves; the others may tell the server everything. Fewer nodes collude than secure aggregation's threshold allows.",
    (
        "secure-aggregation",
        "clients",
    ): f"{OWN_SITE}adds its share of the noise. The observer is one of the honest sites, which "
    "knows its own noise; the others are as against the server.",
    ("secure-aggregation", "public"): "As against the server: all that the public sees, the server has seen.",
}
UNITS = {
    "client": "one client with all its text",
    "record": "one record of a site",
    "owner": "one owner inside a site, with all its records there",
}
SITE_TRUST = "Each site is trusted with its own records: it draws who takes part, clips, adds the noise, and sends one sum a slot."
OTHER_SITE = "another site: the adapter of each round, and its own"
PUBLIC = "the model, and at most the noised sum of all sites in each slot"
SEES = {
    "local": {
        "server": "one noised sum of each site in each slot, and which site sent it",
        "clients": f"{OTHER_SITE} noise",
        "public": PUBLIC,
    },
    "secure-aggregation": {
        "server": "the noised sum of all sites in each slot, and which sites answered",
        "clients": f"{OTHER_SITE} share of the noise",
        "public": PUBLIC,
    },
}
TIME = "How long a site computes is not hidden: whoever measures that is trusted."
NOT_PROTECTED = {
    "record": f"A person with several records: epsilon is that of each record, and larger for all together. {TIME}",
    "owner": f"An owner at two sites, or under two names, as one: epsilon is that of each, and larger for both together. {TIME}",
}

SIMULATED = (
    "The owners of this run are simulated: records were dealt out at random, so nothing is promised to those who wrote them. With "
    "as many real owners the same numbers would mean:"
)


def plan_troubles(header: dict, recipe: dict) -> list[str]:
    """The plan against the recipe: its single numbers, and the epsilon that its noise was calibrated to."""
    plan, privacy, federation, prior = header["plan"], recipe["privacy"], recipe["federation"], recipe["prior"]
    silent = privacy["trust"] == "non-private"
    secure = privacy["trust"] == "secure-aggregation"
    # A recipe that names no rate means 2 % of the clients (or other units), or 32 of them a round, if that is more and the cap leaves room for it.
    of_sites = privacy.get("unit", "client") != "client"
    few = min(1.0, 32 / (federation["population"] * (federation["units_per_site"] if of_sites else 1)))
    if privacy["trust"] in ("local", "secure-aggregation") and not of_sites:
        slots = federation["rounds"] + (prior["source"] != "none")
        few = min(few, 1.0 / -(-slots // privacy["participation_cap"]))
    rate = federation["sampling_rate"] or max(0.02, few)
    wanted = {
        "trust": "central" if silent else privacy["trust"],
        "population": federation["population"],
        "sampling_rate": rate,
        "rounds": federation["rounds"],
        "stage1_rate": 0.0 if prior["source"] == "none" else prior["sampling_rate"] or rate,
        "delta": privacy["delta"],
        "relation": privacy["relation"],
        "noise": privacy["noise"],
        "participation_cap": privacy["participation_cap"],
        "non_private": ["stage1", "round"] if silent else ["stage1"] if prior["source"] == "gradients" else [],
        "target_epsilon": None if silent else privacy["epsilon"],
    }
    if privacy["unit"] != "client":  # all sites are in every slot
        wanted |= {"unit": privacy["unit"], "site_units": federation["units_per_site"]}
        wanted["participation_cap"] = federation["rounds"] + (wanted["stage1_rate"] > 0)
    if privacy["trust"] == "local":  # else it makes no difference
        encoder = recipe["encoder"]
        one_by_one = encoder["name"] == "autoencoder" or privacy["noise_in"] == "update"
        wanted["nonlinear_decoding"] = one_by_one or encoder["wire_dtype"] not in ("auto", "float32")
    if secure:
        wanted |= {"dropout_share": privacy["dropout_share"], "honest_share": privacy["honest_share"]}
    ratio = 0.0 if "stage1" in wanted["non_private"] or not wanted["stage1_rate"] else 1.0
    sigma = plan["noise_multiplier"]
    wanted["stage1_noise_multiplier"] = sigma * ratio
    if silent or privacy["noise_multiplier"]:
        wanted["noise_multiplier"] = 0.0 if silent else privacy["noise_multiplier"]
    found = [f"the plan's {key} is not the recipe's" for key in wanted if not agree(plan.get(key), wanted[key], 1e-6)]
    tables = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items() if k not in ("speed", "compare")}
    tables["model"].pop("device")
    if header["recipe"] != hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest():
        found.append("the recipe is not the one with which the ledger was started")
    if not found and wanted["target_epsilon"] is not None:
        target = wanted["target_epsilon"]
        planned = epsilon(budget_events(plan, slots_of(plan)), composition_delta(plan), plan["relation"])
        least = 0.0 if privacy["noise_multiplier"] else target - max(2e-3, 2e-3 * target)
        if not least <= planned <= target + 1e-6 * max(1.0, target):
            found.append(f"the plan costs epsilon {planned:.6f}, and the recipe's target is {target:g}")
    return found


def statement(plan: dict, costs: dict[str, float], owners: str) -> str:
    """The promise; where the owners are simulated, after a sentence that says so."""
    if "simulated owners" in owners.split("; ") and plan["noise"] == "secure" and not plan["non_private"]:
        return f"{SIMULATED} {promise(plan, costs)}"
    return promise(plan, costs)


def promise(plan: dict, costs: dict[str, float]) -> str:
    """What holds against whom; `costs`: observer -> epsilon under the plan's adjacency."""
    if "round" in plan["non_private"]:
        return "This run added no noise: it has no privacy guarantee of any kind and is a baseline only."
    if plan["non_private"]:
        return (
            "Stage 1 used clients' real gradients without noise, so this run has no privacy guarantee of any kind, "
            "whatever noise its rounds had: it is a baseline only."
        )
    if plan["noise"] == "replay":
        return "This run's noise can be computed again: it has no privacy guarantee and is a test only."
    words = {"add_remove": "adding or removing", "replace_one": "replacing"}[plan["relation"]]
    cost = costs[{"local": "server", "central": "public", "secure-aggregation": "clients"}[plan["trust"]]]
    bound = f"({cost:.3f}, {plan['delta']:g})-differential privacy for {words} {UNITS[plan.get('unit', 'client')]}"
    site = f" {SITE_TRUST}" if is_curated(plan) else ""
    if plan["trust"] == "local":
        rest = f"Against those who see only sums and the model: epsilon {costs['public']:.3f}"
        if is_curated(plan):
            rest += f"; against another site, which knows its own noise: {costs['clients']:.3f}"
        return f"Against the server: {bound}. {rest}.{site}"
    if plan["trust"] == "secure-aggregation":
        others, honest = ("sites", "sites") if is_curated(plan) else ("clients", "contributors")
        return (
            f"Against the other {others}: {bound}. Against the server, which saw only sums, and the public: epsilon "
            f"{costs['server']:.3f}. At least {plan['honest_share']:.0%} of the {honest} are taken to be honest.{site}"
        )
    return f"Against everyone but the server: {bound}. The server is trusted: there is no guarantee against it."


def unit_terms(records: list[dict]) -> dict:
    """What the certificate says beside epsilon where the unit is inside a site."""
    plan = records[0]["plan"]
    return {
        "protects": UNITS[plan["unit"]],
        "sites": plan["population"],
        "assumed_public": {
            "units_per_site": plan["site_units"],
            "sampling_rate": plan["sampling_rate"],
            "stage1_rate": plan["stage1_rate"],
            "mean_divided_by": plan["sampling_rate"] * units_of(plan),
            "stage1_mean_divided_by": plan["stage1_rate"] * units_of(plan),
        },
        "private": f"How many {plan['unit']}s a site has and which of them took part: no number here comes from them.",
        "amplification": "Each unit takes part by a draw that its site keeps secret, so sub-sampling counts against every observer.",
        "sees": SEES[plan["trust"]],
        "not_protected": NOT_PROTECTED[plan["unit"]],
    }


def site_troubles(records: list[dict], terms: dict) -> list[str]:
    """The part of the certificate on sites whose units are protected; prints each site's epsilon."""
    found = [f"the certificate's {name} of units is not that of the plan" for name, value in unit_terms(records).items()
             if terms.get(name) != value]  # fmt: skip
    rows, stated = site_rows(records), terms["by_site"]
    same = [row["sites"] for row in stated] == [row["sites"] for row in rows]
    if not same or set(terms) != {*unit_terms(records), "by_site"}:
        return [*found, "the certificate's rows of sites are not those of the ledger"]
    for row, expected in zip(stated, rows, strict=True):
        numbers = row["epsilon"][records[0]["plan"]["relation"]]
        print(
            f"sites {', '.join(map(str, row['sites']))}: {', '.join(f'{k} {float(v):.6f}' for k, v in numbers.items())}"
        )
        wrong = row["slots"] != expected["slots"] or any(
            not agree(row["epsilon"][relation].get(name), value)
            for relation, spent in expected["epsilon"].items()
            for name, value in spent.items()
        )
        wrong = wrong or row.keys() != expected.keys() or not same_events(row["events"], expected["events"])
        if wrong:
            found.append(f"the certificate's epsilon of site {row['sites'][0]} is not that of the ledger")
    return found


def certificate_troubles(records: list[dict], certificate: dict, recipe: dict) -> list[str]:
    """The privacy part, field by field; prints the table of epsilons."""
    plan, found, costs = records[0]["plan"], [], {}
    delta = composition_delta(plan)
    prefix = f"NON-PRIVATE, no noise in {' and '.join(plan['non_private'])}. " if plan["non_private"] else ""
    if plan["noise"] == "replay":
        prefix += "NOT PRIVATE, replayable noise: these numbers hold for secure noise only. "

    def check(name: str, stated: object, expected: object) -> None:
        if not agree(stated, expected):
            found.append(f"the certificate's {name} is {stated!r:.80}, and the ledger gives {expected!r:.80}")

    print(f"{'observer':10} {'adjacency':12} {'certificate':>14} {'re-computed':>14}")
    if set(certificate["observers"]) != {"server", "clients", "public"}:
        found.append("the certificate has other observers than server, clients and public")
    for observer, events in compositions(records).items():
        row = certificate["observers"][observer]
        for relation in RELATIONS:
            numbers = {"epsilon_pld": epsilon(events, delta, relation), **other_numbers(events, delta, relation)}
            stated, before = row["by_relation"][relation], len(found)
            for name, value in numbers.items():
                check(f"{observer}, {relation}, {name}", stated[name], value)
                if relation == plan["relation"]:
                    check(f"{observer}, {name}", row[name], value)
            mark = "   DIFFERS" if len(found) > before else ""
            print(
                f"{observer:10} {relation:12} {float(stated['epsilon_pld']):14.8f} {numbers['epsilon_pld']:14.8f}{mark}"
            )
            if relation == plan["relation"]:
                costs[observer] = float(stated["epsilon_pld"]) if not mark else numbers["epsilon_pld"]
        for name, value in (("observer", observer), ("delta", plan["delta"]), ("relation", plan["relation"])):
            check(f"{observer}, {name}", row[name], value)
        check(
            f"{observer}, assumption",
            row["assumption"],
            prefix + (SITE_ASSUMPTIONS if is_curated(plan) else ASSUMPTIONS)[plan["trust"], observer],
        )
    sites = sites_of(records)
    private = plan["noise"] == "secure" and not plan["non_private"]
    for name, value in {
        "version": 1, "unit": plan.get("unit", "client"), "run_id": records[0]["run_id"], "private": private, "delta": plan["delta"],
        "relation": plan["relation"], "plan": plan, "charges": sum(r["kind"] == "charge" for r in records),
        "slots_without_result": {
            kind: sorted({r["slot"] for r in records if r["kind"] == kind}) for kind in ("abandoned", "lost")
        },
        "name": recipe["name"], "model": recipe["model"]["source"], "owners": owners_of(recipe, sites), "sites": sites, "evaluation_rests_on": evaluation_of(recipe),
        "statement": statement(plan, costs, owners_of(recipe, sites)),
    }.items():  # fmt: skip
        check(name, certificate[name], value)
    if is_curated(plan) != ("unit_terms" in certificate):
        found.append("the certificate has terms of sites' units where there are none, or lacks them")
    elif is_curated(plan):
        found += site_troubles(records, certificate["unit_terms"])
    check("encoder", certificate["encoder"]["name"], recipe["encoder"]["name"])
    check("stage 1", certificate["stage1"]["prior"], recipe["prior"]["source"])
    return found


def signature_troubles(run: Path, records: list[dict], head: str, demanded: list[Path]) -> list[str]:
    """Each line of signatures.jsonl is an Ed25519 signature of the ledger's last line; each demanded key has one."""
    file = run / "signatures.jsonl"
    if not file.exists() and not demanded:
        return []
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    except ImportError:
        return ["the signatures were not checked: install cryptography"]
    message = f"drencoder ledger 1\n{records[0]['run_id']}\n{len(records) - 1} {head}\n".encode()
    found, signers = [], set()
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], start=1):
        try:
            record = parse(line)
            load_ssh_public_key(record["key"].encode()).verify(base64.b64decode(record["signature"]), message)
            signers.add(record["key"].split()[1])
            print(f"signed by {record['key']:.120}")
        except (ValueError, TypeError, LookupError, AttributeError, InvalidSignature):
            found.append(f"line {number} of signatures.jsonl is no signature of this ledger's last line")
    return found + [f"{key} has not signed" for key in demanded if key.read_text().split()[1] not in signers]


def troubles(run: Path, demanded: list[Path]) -> list[str]:
    """All that does not hold, in an order in which each part may rely on the ones before."""
    records, head = read_ledger(run / "ledger.jsonl")
    recipe = tomllib.loads((run / "recipe.resolved.toml").read_text("utf-8"))
    if found := plan_troubles(records[0], recipe) or line_troubles(records):
        return found
    if records[-1]["kind"] != "closed":
        return ["the run is unfinished: its ledger has no line that closes it"]
    certificate = parse((run / "certificate.json").read_bytes())
    print(f"{len(records)} lines, chain intact, delta {records[0]['plan']['delta']:g}")
    found = certificate_troubles(records, certificate, recipe) + file_troubles(run, records, certificate, recipe)
    return found + signature_troubles(run, records, head, demanded)


def one_line(text: str) -> str:
    """At most 400 characters that a terminal shows as they are: a file may hold anything."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:400])
    return shown if len(text) <= 400 else f"{shown} ..."


def main(run: str | Path, *demanded: str | Path) -> int:
    try:
        found = troubles(Path(run), [Path(key) for key in demanded])
    except OSError as error:
        found = [f"{error.filename} cannot be read: {error.strerror}"]
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        found = [f"a file is damaged or incomplete ({type(error).__name__}: {str(error)[:160]})"]
    for trouble in found:
        print(f"FAILED: {one_line(trouble)}")
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/reaccount.py RUN [PUBLIC_KEY_FILE ...]")
    sys.exit(main(*sys.argv[1:]))
