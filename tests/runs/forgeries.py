"""What somebody may edit in a finished run: lines of its ledger, facts of its certificate, its other files."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from drencoder.data.evaluation_text import NO_EVALUATION
from tampering import Forgery

# --- lines of the ledger ------------------------------------------------------------------------------------


def less_noise(run: Forgery) -> None:
    run.of("charge", 2)["event"]["noise_multiplier"] = 0.05


def more_noise(run: Forgery) -> None:
    for record in run.records:
        if record["kind"] == "charge":
            record["event"]["noise_multiplier"] *= 2
    run.recertify()


def more_noise_in_the_plan_too(run: Forgery) -> None:
    plan = run.records[0]["plan"]
    plan["noise_multiplier"] *= 2
    plan["stage1_noise_multiplier"] *= 2
    more_noise(run)


def nothing_counted(run: Forgery) -> None:
    run.of("charge", 1)["event"]["count"] = 0


def other_event(run: Forgery) -> None:
    run.of("charge", 1)["event"] = {
        "kind": "poisson_gaussian",
        "noise_multiplier": 9.0,
        "sampling_rate": 0.01,
        "count": 1,
    }


def crowd(run: Forgery) -> None:
    run.of("contributors")["contributors"] = 1000
    run.recertify()


def nobody(run: Forgery) -> None:
    run.of("contributors")["contributors"] = -1


def one_charge_less(run: Forgery) -> None:
    run.remove("charge", "release", "contributors", slot=3)
    run.recertify()


def no_charge_at_all(run: Forgery) -> None:
    run.remove("charge", "release", "contributors")
    run.recertify()


def charge_without_release(run: Forgery) -> None:
    run.remove("release", slot=2)


def release_without_charge(run: Forgery) -> None:
    run.insert_after(run.of("release", 2), kind="release", slot=2, attempt=0, of="adapter", sha256="0" * 64)


def release_of_something_else(run: Forgery) -> None:
    run.of("release", 4)["sha256"] = "0" * 64


def release_before_its_charge(run: Forgery) -> None:
    charge = run.of("charge", 2)
    run.records.remove(charge)
    run.insert_after(run.of("release", 2), **charge)


def charged_twice(run: Forgery) -> None:
    run.insert_after(run.of("charge", 1), **{**run.of("charge", 1), "attempt": 1})


def charge_as_a_repeat(run: Forgery) -> None:
    charge = run.of("charge", 3)
    for key in ("attempt", "event"):
        del charge[key]
    charge["kind"] = "repeat"
    run.recertify()


def charge_of_a_slot_outside_the_plan(run: Forgery) -> None:
    run.of("charge", 4)["slot"] = 5


def other_attempt(run: Forgery) -> None:
    run.of("charge", 2)["attempt"] = 3


def other_trust(run: Forgery) -> None:
    run.of("charge", 2)["trust"] = "secure-aggregation"


def other_stage(run: Forgery) -> None:
    run.of("charge", 0)["stage"] = "round"


def header_delta(run: Forgery) -> None:
    run.records[0]["delta"] *= 10


def plan_delta(run: Forgery) -> None:
    run.records[0]["delta"] *= 10
    run.records[0]["plan"]["delta"] *= 10
    run.recertify()


def plan_population(run: Forgery) -> None:
    run.records[0]["plan"]["population"] += 10
    run.recertify()


def plan_cap(run: Forgery) -> None:
    run.records[0]["plan"]["participation_cap"] += 1
    run.recertify()


def plan_relation(run: Forgery) -> None:
    run.records[0]["plan"]["relation"] = "replace_one"
    run.recertify()


def other_key(run: Forgery) -> None:
    run.records[0]["sampler_key"] = None


def other_recipe_digest(run: Forgery) -> None:
    run.records[0]["recipe"] = "0" * 64


def unknown_kind(run: Forgery) -> None:
    run.insert_after(run.of("charge", 1), kind="bonus", slot=1)


def field_of_its_own(run: Forgery) -> None:
    run.of("charge", 1)["comment"] = "approved"


def abandoned_though_released(run: Forgery) -> None:
    run.insert_after(run.of("release", 2), kind="abandoned", slot=2)


def other_number_of_rounds(run: Forgery) -> None:
    run.of("closed")["rounds"] = 3


def rounds_everywhere(run: Forgery) -> None:
    run.of("closed")["rounds"] = run.certificate["rounds"] = 3


def line_after_the_end(run: Forgery) -> None:
    run.records.append({"kind": "note", "text": "all is well"})


def never_closed(run: Forgery) -> None:
    run.remove("closed")


# --- the certificate ----------------------------------------------------------------------------------------


def certificate_with(*path: str, value: Any) -> Callable[[Forgery], None]:
    def change(run: Forgery) -> None:
        place = run.certificate
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value

    change.__name__ = "certificate_" + "_".join(path)
    return change


CERTIFICATE = [
    certificate_with("statement", value=lambda text: text.replace("differential privacy", "perfect privacy")),
    certificate_with("statement", value=lambda text: text.replace("8.", "0.8")),
    certificate_with("owners", value="owners whom the field 'patient' names"),
    certificate_with("evaluation_rests_on", value="The loss is measured on 'public.jsonl', which the server owns."),
    certificate_with("verdict", value=lambda text: text.replace("held-out loss", "tuned loss")),
    certificate_with("verdict", value="The adapter learned."),
    certificate_with("uniform_loss", value=lambda loss: loss + 0.1),
    certificate_with("uniform_loss", value=0.0),
    certificate_with("uniform_loss", value="inf"),
    certificate_with("delta", value=1e-9),
    certificate_with("relation", value="replace_one"),
    certificate_with("run_id", value="another"),
    certificate_with("plan", "noise_multiplier", value=99.0),
    certificate_with("plan", "participation_cap", value=2),
    certificate_with("charges", value=1),
    certificate_with("rounds", value=3),
    certificate_with("private", value=False),
    certificate_with("unit", value="hospital"),
    certificate_with("name", value="another"),
    certificate_with("version", value=2),
    certificate_with("model", value="another"),
    certificate_with("encoder", "name", value="identity"),
    certificate_with("stage1", "prior", value="none"),
    certificate_with("observers", "public", "epsilon_pld", value=lambda e: e * 0.99),
    certificate_with("observers", "server", "by_relation", "add_remove", "epsilon_pld", value=lambda e: e - 1e-4),
    certificate_with("observers", "server", "by_relation", "replace_one", "epsilon_rdp", value=lambda e: e * 0.9),
    certificate_with("observers", "clients", "mu", value=lambda mu: mu * 0.9),
    certificate_with("observers", "clients", "by_relation", "add_remove", "epsilon_clt_approx", value=0.1),
    certificate_with("observers", "server", "assumption", value="None."),
    certificate_with("observers", "server", "delta", value=1e-9),
    certificate_with("observers", "server", "observer", value="public"),
    certificate_with("observers", value=lambda rows: {k: v for k, v in rows.items() if k != "server"}),
    certificate_with("observers", value=lambda rows: {**rows, "nobody": rows["public"]}),
    certificate_with("bytes", "uploaded", value=lambda count: count // 2),
    certificate_with("bytes", "downloaded", value=lambda count: count // 2),
    certificate_with("bytes", "stage1", value=0),
    certificate_with("bytes", "counted", value="estimated"),
    certificate_with("encoder", "gate_public_cosine", value=0.99),
    certificate_with("encoder", "code_size", value=1),
    certificate_with("encoder", "update_size", value=1),
    certificate_with("stage1", "message_bytes", value=1),
    certificate_with("results", "this run", "loss", "value", value=lambda loss: loss * 0.9),
    certificate_with("results", "this run", "accuracy", "mmlu", "low", value=lambda low: low + 0.01),
    certificate_with("results", value=lambda rows: {k: v for k, v in rows.items() if k != "base model"}),
]  # fmt: skip


# --- the other files ----------------------------------------------------------------------------------------


def recipe_with(old: str, new: str) -> Callable[[Forgery], None]:
    def change(run: Forgery) -> None:
        text = run.folder.recipe.read_text()
        assert old in text
        run.folder.recipe.write_text(text.replace(old, new, 1))

    change.__name__ = f"recipe {new}"
    return change


def other_outcomes(run: Forgery) -> None:
    outcomes = json.loads(run.folder.outcomes.read_text())
    outcomes["this run"]["losses"][0] *= 0.5
    run.folder.write_json(run.folder.outcomes, outcomes)


def no_outcomes(run: Forgery) -> None:
    nothing = {"losses": [], "targets": [], "right": {}}
    run.folder.write_json(run.folder.outcomes, dict.fromkeys(run.certificate["results"], nothing))
    run.certificate["results"] = {name: {"loss": None, "accuracy": {}} for name in run.certificate["results"]}
    run.certificate["verdict"] = NO_EVALUATION


def fewer_metrics(run: Forgery) -> None:
    lines = run.folder.metrics.read_bytes().splitlines(keepends=True)
    run.folder.metrics.write_bytes(b"".join(lines[:2] + lines[3:]))


def fewer_bytes_in_metrics_too(run: Forgery) -> None:
    rows = run.folder.read_metrics()
    for row in rows:
        row["bytes_up"] //= 2
    run.folder.keep_metrics(rows)
    run.certificate["bytes"]["uploaded"] = rows[-1]["bytes_up"]
    run.certificate["bytes"]["stage1"] //= 2


def other_adapter(run: Forgery) -> None:
    path = run.folder.adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def other_adapter_and_checkpoint(run: Forgery) -> None:
    other_adapter(run)
    tensors, facts = run.checkpoint()
    words = tensors["state.adapter"].view(np.uint8).copy()
    words[-1] ^= 1
    run.write_checkpoint({**tensors, "state.adapter": words.view(np.float32)}, facts)


def checkpoint_of_another_round(run: Forgery) -> None:
    tensors, facts = run.checkpoint()
    run.write_checkpoint(tensors, facts | {"slot": 3})


LEDGER = [
    less_noise, more_noise, more_noise_in_the_plan_too, nothing_counted, other_event, crowd, nobody, one_charge_less,
    no_charge_at_all, charge_without_release, release_without_charge, release_of_something_else, release_before_its_charge,
    charged_twice, charge_as_a_repeat, charge_of_a_slot_outside_the_plan, other_attempt, other_trust, other_stage, header_delta,
    plan_delta, plan_population, plan_cap, plan_relation, other_key, other_recipe_digest, unknown_kind, field_of_its_own,
    abandoned_though_released, other_number_of_rounds, rounds_everywhere, line_after_the_end, never_closed,
]  # fmt: skip


FILES = [
    recipe_with("seed = 0", "seed = 1"), recipe_with("clip_l2 = 1.0", "clip_l2 = 2.0"), recipe_with("epsilon = 8.0", "epsilon = 9.0"),
    recipe_with("rounds = 4", "rounds = 5"), other_outcomes, no_outcomes, fewer_metrics, fewer_bytes_in_metrics_too, other_adapter,
    other_adapter_and_checkpoint, checkpoint_of_another_round,
]  # fmt: skip


def size_of_a_secret_cohort(run: Forgery) -> None:
    run.insert_after(run.of("charge", 1), kind="contributors", slot=1, contributors=3)


def sampled_less(run: Forgery) -> None:
    run.of("charge", 1)["event"]["sampling_rate"] /= 2


def sampled_less_everywhere(run: Forgery) -> None:
    for record in run.records:
        if record["kind"] == "charge":
            record["event"]["sampling_rate"] /= 2
    run.records[0]["plan"]["sampling_rate"] /= 2
    run.records[0]["plan"]["stage1_rate"] /= 2


def key_in_the_header(run: Forgery) -> None:
    run.records[0]["sampler_key"] = "00" * 32


def more_bytes(run: Forgery) -> None:
    run.certificate["bytes"]["uploaded"] += 7


def private_after_all(run: Forgery) -> None:
    run.certificate["private"] = True


def replayed_as_secure(run: Forgery) -> None:
    run.records[0]["plan"]["noise"] = "secure"
    run.recertify()


def no_longer_marked(run: Forgery) -> None:
    for row in run.certificate["observers"].values():
        row["assumption"] = row["assumption"].partition("only. ")[2]
