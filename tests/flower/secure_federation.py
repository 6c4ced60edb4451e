"""Four sites of secure aggregation in this process, and what their frames and ledgers hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployment import small_recipe
from drencoder.federated.remote.engine import RoundTimeouts, make_remote_engine
from drencoder.federated.remote.frames import Kind, unpack_frame
from drencoder.federated.remote.instruction import Answer
from drencoder.federated.remote.refusal import Refusal
from drencoder.federated.remote.roster import named_keys
from drencoder.federated.remote.site import Site
from drencoder.flower.client_app import make_client_app, open_site
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.flower.transport import GridTransport
from drencoder.recipe.recipe import Recipe
from drencoder.runs import run as experiment
from flower_grid import InProcessGrid

BIG = 1 << 24


NODES = 4  # of which three must stay to the end


EVERY_NODE = "federation.sampling_rate=0.9"  # 15 clients on each: a cohort misses a node once in 10^15 draws


def secure_recipe(*overrides: str) -> Recipe:
    return small_recipe(
        "privacy.trust=secure-aggregation", f"federation.nodes={NODES}", "evaluation.every=0", "federation.population=60",
        *overrides,
    )  # fmt: skip


def stage_of(data: bytes) -> int:
    """Of a frame on its way to a site: 1 for a question, 2 to 5 for a later stage, 0 for anything else."""
    if data[5] == Kind.STAGE:
        return int(unpack_frame(data, Kind.STAGE, first=BIG, second=0).head["stage"])
    return int(data[5] == Kind.QUERY)


class Federation:
    """Four sites in this process, with keys and rosters from files. `lost(number, data)`: the site never sees this frame."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe, self.said = folder, recipe, list[str]()
        self.frames: list[bytes] = []  # all that travelled, both ways
        self.lost: Callable[[int, bytes], bool] = lambda number, data: False
        (folder / "recipe.toml").write_text(recipe.to_toml())
        make_certificates(folder / "certs", NODES, [])
        self.keys = named_keys(recipe, read_public_keys(folder / "certs" / "nodes"))
        self.sites = [self.site(number) for number in range(NODES)]
        self.grid = InProcessGrid([self._app(number) for number in range(NODES)])

    def site(self, number: int, **more: Any) -> Site:
        key = self.folder / "certs" / f"node{number}" / "key"
        settings: dict[str, Any] = {"data": None, "state": self.folder / f"site{number}", "key": key, **more}
        return open_site(str(self.folder / "recipe.toml"), f"{number}/{NODES}", **settings)

    def _app(self, number: int) -> Any:
        class Recorded:
            def answer(_, data: bytes) -> bytes:  # noqa: N805
                self.frames.append(data)
                if self.lost(number, data):
                    raise ConnectionError
                answer = self.sites[number].answer(data)
                self.frames.append(answer)
                return answer

        app = make_client_app(lambda context: Recorded())  # type: ignore[arg-type,return-value]
        return app

    def run(self, name: str = "run", **more: Any) -> experiment.RunResult:
        patience = RoundTimeouts(quorum=0.5, round_timeout=30, wait=0.5)
        keys = more.get("keys", self.keys)
        engine = make_remote_engine(GridTransport(self.grid, self.said.append), patience, self.said.append, keys)
        if more.get("resume"):
            return experiment.resume(self.folder / name, Lines(self.said), engine)
        return experiment.run(self.recipe, self.folder / name, Lines(self.said), engine)


class Lines:
    """A listener that keeps what is said."""

    def __init__(self, said: list[str]) -> None:
        self.say = said.append

    def planned(self, overview: Any) -> None: ...
    def round_done(self, row: Any) -> None: ...
    def finished(self, certificate: Any) -> None: ...


def refusal(data: bytes) -> Refusal:
    return Refusal(Answer.of(unpack_frame(data, Kind.QUERY_ANSWER, first=BIG, second=0).head).refusal)


def site_rows(made: Federation, number: int) -> list[dict[str, Any]]:
    lines = (made.folder / f"site{number}" / "site.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "answer"]
