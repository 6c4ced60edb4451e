"""A federation of three sites in this process, with Flower's own messages between them and the server."""

from pathlib import Path
from typing import Any

from drencoder.federated.remote.engine import RoundTimeouts, make_remote_engine
from drencoder.federated.remote.site import Site
from drencoder.flower.client_app import make_client_app, open_site
from drencoder.flower.transport import GridTransport
from drencoder.recipe.recipe import Recipe
from drencoder.runs import run as experiment
from flower_grid import InProcessGrid


class Lines:
    """A listener that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def planned(self, overview: Any) -> None: ...
    def say(self, text: str) -> None:
        self.said.append(text)

    def round_done(self, row: Any) -> None: ...
    def finished(self, certificate: Any) -> None: ...

    @property
    def text(self) -> str:
        return "\n".join(self.said)


class Federation:
    """Three sites in this process; one recipe."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe, self.lines = folder, recipe, Lines()
        (folder / "recipe.toml").write_text(recipe.to_toml())
        self.sites = [self.site(number) for number in range(3)]

        def app_of(number: int):  # type: ignore[no-untyped-def]
            return make_client_app(lambda _: self.sites[number])

        self.grid = InProcessGrid([app_of(number) for number in range(3)])

    def site(self, number: int, prefix: str = "", **more: Any) -> Site:
        recipe = str(self.folder / "recipe.toml")
        return open_site(recipe, f"{number}/3", data=None, state=self.folder / f"{prefix}site{number}", **more)

    def run(self, quorum: float = 0.5, name: str = "run", **more: Any) -> experiment.RunResult:
        if (self.folder / "run").exists() or name != "run":  # a site's ledger serves one run
            self.sites = [self.site(number, name) for number in range(3)]
        patience = RoundTimeouts(quorum=quorum, round_timeout=0.3, wait=0.5, nodes=more.pop("nodes", 0))
        engine = make_remote_engine(GridTransport(self.grid, self.lines.say), patience, self.lines.say, **more)
        return experiment.run(self.recipe, self.folder / name, self.lines, engine)
