"""Whole runs whose unit is inside a site: certificate, card, report and both verifiers know the unit, and what was forged is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import tiny_overrides
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from tampering import Forgery, reaccount, verdict

SITES, OWNERS = 4, 6
KINDS = {
    "owner, local": ["privacy.unit=owner", "privacy.trust=local"],
    "record, secure aggregation": ["privacy.unit=record", "privacy.trust=secure-aggregation", "privacy.relation=replace_one"],
    "owner, local, adaptive clip": ["privacy.unit=owner", "privacy.trust=local", "privacy.clip=adaptive", "data.held_out_share=0.2"],
}  # fmt: skip


def recipe_of(folder: Path, tiny: Path, *settings: str) -> Recipe:
    rows = [
        {"instruction": f"ask {site} {owner} {number}", "response": "all well", "ward": f"w{site}", "patient": f"zzyzx{owner}"}
        for site in range(SITES)
        for owner in range(OWNERS + 3 * site)
        for number in range(1 + owner % 2)
    ]  # fmt: skip
    path = folder / "notes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_recipe(
        "quickstart",
        [
            *tiny_overrides(tiny), f"data.source={path}", "data.client_field=ward", "data.owner_field=patient",
            f"federation.population={SITES}", "federation.units_per_site=17", "federation.sampling_rate=0.5", "federation.rounds=2",
            "evaluation.benchmarks=[]", "encoder.gate=warn", *settings,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for number, settings in enumerate(KINDS.values()):
        experiment.run(recipe_of(folder, tiny_folder, *settings), folder / str(number))
    return {kind: folder / str(number) for number, kind in enumerate(KINDS)}


def certificate_of(run: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((run / "certificate.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_run_holds(runs: dict[str, Path], kind: str) -> None:
    assert verdict(runs[kind]) == ""
    assert reaccount(runs[kind]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_handed_over_names_the_unit(runs: dict[str, Path], kind: str) -> None:
    certificate = certificate_of(runs[kind])
    unit, secure = kind.split(",")[0], "secure" in kind
    protects = {
        "owner": "one owner inside a site, with all its records there",
        "record": "one record of a site",
    }[unit]
    assert certificate["unit"] == unit
    statement = certificate["statement"]
    words = "replacing" if secure else "adding or removing"
    assert f"differential privacy for {words} {protects}. " in statement
    assert "Each site is trusted with its own records" in statement
    assert ("Against the other sites: (" in statement) == secure
    others = float(certificate["observers"]["clients"]["epsilon_pld"])
    assert ("another site, which knows its own noise" in statement) != secure
    assert f"{others:.3f}" in statement
    terms = certificate["unit_terms"]
    assert ("each site in each slot" in terms["sees"]["server"]) != secure
    assert terms["not_protected"].startswith("An owner at two sites" if unit == "owner" else "A person with several")
    assert terms["assumed_public"]["units_per_site"] == 17
    assert terms["by_site"][0]["sites"] == list(range(SITES))
    card, report = (runs[kind] / "adapter" / "README.md").read_text(), (runs[kind] / "report.html").read_text()
    for text in (card, report):
        assert protects in text
        assert "Taken to be public: 4 sites, 17 units a site" in text
        assert terms["not_protected"] in text
        assert "one client with all its text" not in text
    assert "Epsilon of each site" in report
    bound = certificate["observers"]["clients" if secure else "server"]
    relation = certificate["relation"]
    assert float(bound["epsilon_pld"]) == terms["by_site"][0]["epsilon"][relation]["clients" if secure else "server"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_count_and_no_name_of_a_unit_is_in_any_file(runs: dict[str, Path], kind: str) -> None:
    """The ledger has one line for each charge, and no number beside the plan's and how many sites are in a sum."""
    for path in runs[kind].rglob("*"):
        if path.is_file() and path.suffix != ".toml":
            assert b"zzyzx" not in path.read_bytes(), path
    records = [json.loads(line) for line in (runs[kind] / "ledger.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in records} == {"header", "charge", "contributors", "release", "closed"}
    assert {r["contributors"] for r in records if r["kind"] == "contributors"} == {SITES}


def test_the_bytes_of_a_run_are_those_of_its_sites(runs: dict[str, Path]) -> None:
    certificate = certificate_of(runs["owner, local"])
    code = certificate["encoder"]["code_size"]
    rounds = certificate["bytes"]["uploaded"] - certificate["bytes"]["stage1"]
    assert 2 * SITES * 2 * code < rounds <= 2 * SITES * (64 + 4 * code)


# --- forgeries -------------------------------------------------------------------------------------


def another_unit(run: Forgery) -> None:
    run.certificate["unit"] = "client"


def another_number(run: Forgery) -> None:
    run.certificate["unit_terms"]["assumed_public"]["units_per_site"] = 20


def cheaper_site(run: Forgery) -> None:
    run.certificate["unit_terms"]["by_site"][0]["epsilon"]["add_remove"]["server"] /= 2


def fewer_slots(run: Forgery) -> None:
    run.certificate["unit_terms"]["by_site"][0]["slots"] -= 1


def less_noise_in_what_is_composed(run: Forgery) -> None:
    run.certificate["unit_terms"]["by_site"][0]["events"]["public"][0]["noise_multiplier"] *= 1.5


def another_view(run: Forgery) -> None:
    run.certificate["unit_terms"]["sees"]["server"] = "nothing"


def a_person_at_two_sites_is_protected(run: Forgery) -> None:
    run.certificate["unit_terms"]["not_protected"] = "Nobody."


def no_terms(run: Forgery) -> None:
    del run.certificate["unit_terms"]


def unasked_site_of_nobody(run: Forgery) -> None:
    place = next(n for n, record in enumerate(run.records) if record["kind"] == "charge" and record["slot"] == 1)
    run.records.insert(place + 1, {"kind": "unasked", "slot": 1, "sites": [SITES]})


def more_units_in_the_plan(run: Forgery) -> None:
    run.records[0]["plan"]["site_units"] = 40


def unit_in_the_plan(run: Forgery) -> None:
    run.records[0]["plan"]["unit"] = "record"


def less_noise(run: Forgery) -> None:
    run.of("charge", 2)["event"]["noise_multiplier"] = 0.2


def smaller_rate(run: Forgery) -> None:
    run.of("charge", 2)["event"]["sampling_rate"] = 0.1


@pytest.mark.parametrize(
    "forge",
    [
        another_unit, another_number, cheaper_site, fewer_slots, no_terms, unasked_site_of_nobody, more_units_in_the_plan,
        unit_in_the_plan, less_noise, smaller_rate, less_noise_in_what_is_composed, another_view, a_person_at_two_sites_is_protected,
    ],
)  # fmt: skip
def test_what_was_forged_is_found(runs: dict[str, Path], tmp_path: Path, forge: Callable[[Forgery], None]) -> None:
    forged = Forgery(runs["owner, local"], tmp_path / "run")
    forge(forged)
    assert verdict(forged.mend()) != ""
    assert reaccount(forged.path) == 1


def test_a_killed_run_goes_on_without_a_second_sum_of_any_site(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, tiny_folder, *KINDS["owner, local"])

    class KilledError(Exception):
        pass

    real, calls = experiment.save_checkpoint, []

    def dies(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:  # of round 1: after stage 1 and the fitted encoder
            raise KilledError
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "save_checkpoint", dies)
        with pytest.raises(KilledError):
            experiment.run(recipe, tmp_path / "run")
    result = experiment.resume(tmp_path / "run")
    records = [json.loads(line) for line in result.ledger.read_text().splitlines()]
    assert [r["slot"] for r in records if r["kind"] == "charge"] == [0, 1, 2]
    assert [r["slot"] for r in records if r["kind"] == "lost"] == [1]
    assert verdict(result.folder) == ""
