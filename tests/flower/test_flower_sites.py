"""Sites behind Flower's messages whose own records or owners are the units of privacy: each has its own file, ledger and draw."""

import json
from pathlib import Path
from typing import Any

import pytest

from deployment import small_recipe
from drencoder.federated import site_round
from drencoder.federated.remote.engine import RoundTimeouts, make_remote_engine
from drencoder.federated.remote.frames import Kind, unpack_frame
from drencoder.federated.remote.roster import named_keys
from drencoder.flower.client_app import make_client_app, open_site
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.flower.transport import GridTransport
from drencoder.privacy.ledger import Ledger
from drencoder.privacy.site_epsilons import site_epsilons
from drencoder.recipe.recipe import Recipe
from drencoder.runs import run as experiment
from flower_grid import InProcessGrid
from tampering import reaccount, verdict

SITES, BIG = 3, 1 << 24
SIZES = (4, 9, 40)  # owners of each site: nobody's business


def recipe_of(*overrides: str) -> Recipe:
    return small_recipe(
        "privacy.unit=owner", "data.owner_field=patient", "data.source=notes.jsonl", "evaluation.data=none",
        "evaluation.benchmarks=[]", f"federation.population={SITES}", "federation.units_per_site=10", "federation.sampling_rate=0.5",
        f"federation.nodes={SITES}", "encoder.gate=warn", "encoder.name=random", *overrides,
    )  # fmt: skip


class Silos:
    """Three sites in this process, each with a file of its own; the server has none."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe, self.said = folder, recipe, list[str]()
        self.heard = [list[str]() for _ in range(SITES)]
        (folder / "recipe.toml").write_text(recipe.to_toml())
        self.keys: dict[str, bytes] = {}
        if recipe.privacy.trust == "secure-aggregation":
            make_certificates(folder / "certs", SITES, [])
            self.keys = named_keys(recipe, read_public_keys(folder / "certs" / "nodes"))
        for site, owners in enumerate(SIZES):
            rows = [
                {"instruction": f"note {number}", "response": "all well", "patient": f"zzyzx{owner}"}
                for owner in range(owners)
                for number in range(1 + owner % 2)
            ]
            (folder / f"site{site}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.sites = [self.site(number) for number in range(SITES)]
        self.answers: list[list[bytes]] = [[] for _ in range(SITES)]
        self.grid = InProcessGrid([self._app(number) for number in range(SITES)])

    def site(self, number: int) -> Any:
        key = {"key": self.folder / "certs" / f"node{number}" / "key"} if self.keys else {}
        return open_site(
            str(self.folder / "recipe.toml"), str(number), data=str(self.folder / f"site{number}.jsonl"),
            state=self.folder / f"state{number}", say=self.heard[number].append, **key,
        )  # fmt: skip

    def _app(self, number: int) -> Any:
        class Recorded:
            def answer(_, data: bytes) -> bytes:  # noqa: N805
                answer = self.sites[number].answer(data)
                self.answers[number].append(answer)
                return answer

        app = make_client_app(lambda context: Recorded())  # type: ignore[arg-type,return-value]
        return app

    def run(self) -> experiment.RunResult:
        patience = RoundTimeouts(quorum=0.5, round_timeout=60, wait=0.5, nodes=SITES)
        engine = make_remote_engine(
            GridTransport(self.grid, self.said.append), patience, self.said.append, self.keys or None
        )
        return experiment.run(self.recipe, self.folder / "run", Lines(self), engine)


class Lines:
    """A listener; once a round is done, the last site goes away."""

    def __init__(self, silos: Silos) -> None:
        self.say, self._silos = silos.said.append, silos

    def planned(self, overview: Any) -> None: ...
    def round_done(self, row: Any) -> None:
        if row["round"] == 1 and not self._silos.keys:
            self._silos.grid.dead.add(2)

    def finished(self, certificate: Any) -> None: ...


@pytest.fixture(scope="module", params=["local", "secure-aggregation"])
def finished(request: Any, tmp_path_factory: Any) -> tuple[Silos, experiment.RunResult]:
    silos = Silos(
        tmp_path_factory.mktemp("silos"), recipe_of(f"privacy.trust={request.param}", "privacy.honest_share=1.0")
    )
    return silos, silos.run()


def test_a_run_over_flower_holds_and_names_the_unit(finished: tuple[Silos, experiment.RunResult]) -> None:
    _, result = finished
    certificate = result.certificate
    assert certificate["unit"] == "owner"
    assert certificate["owners"] == "owners whom the sites' own files hold"
    assert [site["clients"] for site in certificate["sites"]] == ["0", "1", "2"]
    assert verdict(result.folder) == ""
    assert reaccount(result.folder) == 0


def test_a_site_that_was_not_there_has_spent_less_by_both_ledgers(
    finished: tuple[Silos, experiment.RunResult],
) -> None:
    silos, result = finished
    with Ledger.open(result.ledger, read_only=True) as ledger:
        rows = {site: row for row in site_epsilons(ledger) for site in row["sites"]}
    slots = [3, 3, 3] if silos.keys else [3, 3, 2]  # stage 1 and two rounds
    assert [rows[site]["slots"] for site in range(SITES)] == slots
    for site in range(SITES):
        assert len([line for line in silos.heard[site] if line.startswith("epsilon of one owner here")]) == slots[site]
        spent = silos.sites[site]._ledger.spent()
        stated = rows[site]["epsilon"]["add_remove"]
        for observer in ("server", "clients", "public"):  # a site cannot count on others whom it did not see
            assert spent[observer] >= stated[observer] - 2e-3
        assert spent["server"] == pytest.approx(stated["server"], rel=2e-3) or silos.keys


def test_no_answer_tells_how_many_owners_a_site_has_or_drew(finished: tuple[Silos, experiment.RunResult]) -> None:
    silos, _ = finished
    asked = min(map(len, silos.answers))
    for answers in zip(*(silos.answers[site][:asked] for site in range(SITES)), strict=True):
        kinds = {answer[5] for answer in answers}
        assert len(kinds) == 1
        if kinds != {Kind.QUERY_ANSWER}:
            continue
        frames = [unpack_frame(answer, Kind.QUERY_ANSWER, first=BIG, second=0) for answer in answers]
        assert {frame.head["nonfinite"] for frame in frames} == {0}
        assert len({len(frame.first) for frame in frames}) == 1
        for site, frame in enumerate(frames):
            assert set(frame.head) == {"nonce", "refusal", "clients", "nonfinite"}
            assert frame.head["clients"] in ([site], [])
    for site in range(SITES):
        for answer in silos.answers[site]:
            assert b"zzyzx" not in answer


def test_a_sites_ledger_names_no_owner_and_no_number_of_them(finished: tuple[Silos, experiment.RunResult]) -> None:
    silos, _ = finished
    for site in range(SITES):
        lines = [json.loads(line) for line in (silos.folder / f"state{site}" / "site.jsonl").read_text().splitlines()]
        assert {line["kind"] for line in lines} == {"header", "run", "answer"}
        for line in lines:
            if line["kind"] == "answer":
                assert set(line) == {"kind", "slot", "attempt", "clients"}
                assert line["clients"] == [site]


def test_nothing_that_is_said_anywhere_follows_the_draw(
    finished: tuple[Silos, experiment.RunResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same run again with an empty draw at every site: what server and sites say is the same but for noised numbers."""
    silos, _ = finished

    def words(lines: list[str]) -> list[str]:
        return ["".join(letter for letter in line if not letter.isdigit()) for line in lines]

    if silos.keys:
        pytest.skip("one of the two is enough")
    monkeypatch.setattr(site_round.SiteCurator, "draw", lambda *arguments: [])
    empty = Silos(tmp_path, silos.recipe)
    empty.run()
    for site in range(SITES):
        assert words(empty.heard[site]) == words(silos.heard[site])
    # Bytes down hold the digits of a prior that was made of noised numbers; bytes up are what the sites sent.
    told, before = ([line.partition("down, ")[2] for line in one.said if "slot" in line] for one in (empty, silos))
    assert told == before
    assert any(told)
