"""The ServerApp: a whole run of drencoder over a Flower grid. Name `drencoder.flower.server_app:app` in your pyproject.toml.

The run's configuration (`[tool.flwr.app.config]`, `flwr run -c`) names the recipe and the run folder; see `ServerOptions`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from drencoder.errors import DrencoderError, RecipeError, describe_crash
from drencoder.federated.remote.agreement import ClientSet
from drencoder.federated.remote.engine import RoundTimeouts, make_remote_engine
from drencoder.flower.transport import GridTransport
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.display import RunDisplay, make_console
from drencoder.runs.run_folder import RunFolder


@final
@dataclass(frozen=True)
class ServerOptions:
    """A new run of `recipe` into the folder `out`, or (`recipe` None) the run in `out` goes on.

    `quiet`: shows nothing. `keys`: name -> public key (49 bytes) of every node, for secure aggregation; `clients`: name -> the clients that the server's
    list of keys gives to a node.
    """

    recipe: Recipe | None
    out: Path
    patience: RoundTimeouts = field(default_factory=RoundTimeouts)
    keys: Mapping[str, bytes] = field(default_factory=dict)
    clients: Mapping[str, ClientSet] = field(default_factory=dict)
    quiet: bool = False

    @property
    def config(self) -> Recipe:
        """The recipe of the run: the new one's, or what the run folder says."""
        return self.recipe or load_recipe(RunFolder.open(self.out).recipe)

    @classmethod
    def from_run_config(cls, settings: Mapping[str, Any]) -> "ServerOptions":
        """Reads a run's configuration: `recipe` (a file, or a shipped one; "" = the quickstart), `out`, or `resume` instead of
        both; `quorum`, `round-timeout`, `wait`, `nodes`. Raises RecipeError."""
        resumed, out = str(settings.get("resume", "")), str(settings.get("out", ""))
        if bool(resumed) == bool(out):
            raise RecipeError(
                "a run needs out = a new folder, or resume = the folder of a started run: give one of them."
            )
        given = {
            key.replace("-", "_"): float(settings[key])
            for key in ("quorum", "round-timeout", "wait")
            if key in settings
        }
        patience = RoundTimeouts(**given, nodes=int(settings.get("nodes", 0)))
        recipe = None if resumed else load_recipe(str(settings.get("recipe", "")) or None)
        return cls(recipe, Path(resumed or out), patience)


def serve(grid: Grid, options: ServerOptions) -> experiment.RunResult:
    """Runs or resumes a run over the grid, and shows it.

    Raises:
      DrencoderError: as `experiment.run` and `experiment.resume`.
    """
    config = options.config
    console, rounds = make_console(quiet=options.quiet), config.federation.rounds
    display = RunDisplay(console, rounds=rounds, encoder=config.encoder.name, name=config.name)
    transport = GridTransport(grid, display.say)
    engine = make_remote_engine(transport, options.patience, display.say, options.keys, options.clients)
    try:
        if options.recipe is None:
            return experiment.resume(options.out, display, engine)
        return experiment.run(options.recipe, options.out, display, engine)
    finally:
        display.close()
        sent = transport.traffic
        display.say(
            f"payload: {sent.down:,} bytes down, {sent.up:,} up, {sent.answered} of {sent.asked} messages answered"
        )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The entry point that Flower calls.

    Raises:
      DrencoderError: as `serve`.
      RuntimeError: anything else went wrong; it says what and where without the message, which Flower would log.
    """
    try:
        serve(grid, ServerOptions.from_run_config(context.run_config))
    except DrencoderError:
        raise
    except Exception as error:
        raise RuntimeError(describe_crash(error)) from None
