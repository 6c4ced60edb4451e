"""The commands that span machines: certs, server, client, simulate. Parsing only; Flower is imported where it is needed."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from drencoder.errors import ArtifactError, EngineError, RecipeError
from drencoder.recipe.recipe import Recipe, load_recipe

__all__ = ["add_flower_commands"]

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="TOML file or shipped recipe; none = the embedded quickstart")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one knob")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="run folder to make; default runs/NAME, runs/NAME-2, ...")
]
ResumeOption = Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="go on with a killed run")]
QuorumOption = Annotated[
    float, typer.Option("--quorum", help="share of the cohort (central trust: of the population) that must answer")
]
TimeoutOption = Annotated[float, typer.Option("--round-timeout", help="seconds until a round goes on without the rest")]
WaitOption = Annotated[float, typer.Option("--wait", help="seconds to wait for enough nodes before a round is charged")]


def add_flower_commands(app: typer.Typer) -> None:
    """Adds certs, server, client and simulate."""
    app.command()(certs)
    app.command()(server)
    app.command()(client)
    app.command()(simulate)


def _needs_flower() -> None:
    from drencoder.flower.processes import QUIET

    os.environ.update(QUIET)
    if importlib.util.find_spec("flwr") is None:
        raise EngineError("flwr is not installed here: pip install 'drencoder[flower]'.")


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to make")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="how many sites")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="DNS name or IP address of the server; may be repeated")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, help="until the certificates expire")] = 825,
) -> None:
    """Makes an authority, the server's certificate, and a key for each site."""
    from drencoder.flower.keys import make_certificates

    written = make_certificates(folder, nodes, host or [], days=days)
    console = Console()
    console.print(f"{len(written)} files in {escape(str(folder))}.", highlight=False)
    console.print(
        "Server: ca.crt, server.crt, server.key and nodes/. Site i: node[i]/. Keep ca.key off both.", markup=False
    )


def server(
    recipe: RecipeArgument = None,
    certs: Annotated[
        Path, typer.Option("--certs", metavar="DIR", help="folder of ca.crt, server.crt and server.key")
    ] = Path("certs"),
    nodes: Annotated[
        Path | None,
        typer.Option("--nodes", metavar="DIR|KEY", help="public keys (.pub) of the sites; default DIR/nodes"),
    ] = None,
    set_: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on; 0.0.0.0 = all")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8443,
    quorum: QuorumOption = 0.5,
    round_timeout: TimeoutOption = 600.0,
    wait: WaitOption = 600.0,
) -> None:
    """The main job with its clients on other machines (drencoder client)."""
    _needs_flower()
    from drencoder.federated.remote.engine import Patience
    from drencoder.flower.keys import node_public_keys

    keys = node_public_keys(nodes or certs / "nodes")
    patience = Patience(quorum, round_timeout, wait, len(keys))
    folder, wanted = _run_of(recipe, set_, out, resume)
    from drencoder.flower.deploy import ServerPlace, run_server
    from drencoder.flower.server_app import ServerOptions
    from drencoder.runs.display import interrupted

    # Not into the run folder, which must be new; beside it, where an operator looks.
    log = folder.parent / f"{folder.name}.superlink" / "superlink.log"
    place = ServerPlace(certs, keys, host, port, log)
    try:
        result = run_server(ServerOptions(wanted, folder, patience), place)
    except KeyboardInterrupt:
        Console().print(interrupted("server", folder))
        raise SystemExit(130) from None
    Console().print(
        f"Run folder: {escape(str(result.folder))}  (adapter/, ledger.jsonl, certificate.json, report.html)"
    )


def client(
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="where drencoder server listens")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="this site's private key")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="what this site agrees to; none = the embedded quickstart")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="CA", help="the authority; default ca.crt beside the key")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="this site's text (.jsonl); default the recipe's")
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(
            "--clients", metavar="LIST", help="0-9,12 or 1/3 (every third from 1); default: the file beside the key"
        ),
    ] = None,
    roster: Annotated[
        Path | None,
        typer.Option(
            "--roster", metavar="FILE", help="secure aggregation: all nodes' public keys; default roster beside the key"
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", help="this site's ledger; one run each; default state/ beside the key"),
    ] = None,
    min_noise: Annotated[
        float,
        typer.Option("--min-noise", min=0.0, help="take no part below this noise multiplier (not under central trust)"),
    ] = 0.0,
    poll: Annotated[float, typer.Option("--poll", min=0.05, max=3.0, help="seconds between two looks for work")] = 0.5,
) -> None:
    """A site: answers the server's questions for its clients, and keeps a ledger of its own."""
    _needs_flower()
    if clients is None:
        beside = key.parent / "clients"
        if not beside.is_file():
            raise RecipeError(f"which clients are at this site? {beside} is not there: give --clients, say 0-9 or 0/3.")
        clients = beside.read_text("utf-8").strip()
    from drencoder.flower.deploy import SitePlace, run_site

    place = SitePlace(server, root or key.parent / "ca.crt", key, state or key.parent / "state", poll)
    place.check()
    from drencoder.flower.client_app import open_site

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say("loading the model")
    site = open_site(
        recipe, clients, data=data, state=place.state, min_noise=min_noise, key=key, roster=roster, say=say
    )
    say(f"ready: clients {site.hosted}, ledger {place.state / 'site.jsonl'}")
    try:
        run_site(site, place)
    except KeyboardInterrupt:
        say("stopped")
        raise SystemExit(130) from None


def simulate(
    recipe: RecipeArgument = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="simulated machines")] = 3,
    set_: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
) -> None:
    """The main job on Flower's simulation engine (Ray), in processes of this machine."""
    _needs_flower()
    from drencoder.federated.remote.engine import Patience

    folder, wanted = _run_of(recipe, set_, out, resume)
    from drencoder.flower.simulation import alone_on_the_network, run_simulated

    alone_on_the_network()
    from drencoder.flower.server_app import ServerOptions

    result = run_simulated(ServerOptions(wanted, folder, Patience(nodes=nodes)), nodes)
    Console().print(
        f"Run folder: {escape(str(result.folder))}  (adapter/, ledger.jsonl, certificate.json, report.html)"
    )


def _run_of(
    recipe: str | None, set_: list[str] | None, out: Path | None, resume: Path | None
) -> tuple[Path, Recipe | None]:
    """(run folder, recipe; None = the folder's own goes on)."""
    from drencoder.runs.run_folder import RunFolder

    if resume is not None:
        if recipe is not None or set_ or out is not None:
            raise RecipeError("--resume continues a run with its own recipe: give no recipe, --set or --out beside it.")
        if not (resume / "ledger.jsonl").exists():
            raise ArtifactError(
                f"{resume} has no ledger: give the folder of a started run, or start anew without --resume."
            )
        RunFolder.open(resume)
        return resume, None
    wanted = load_recipe(recipe, set_ or ())
    folder, number = out or Path("runs") / wanted.name, 1
    while out is None and folder.exists():
        number += 1
        folder = Path("runs") / f"{wanted.name}-{number}"
    RunFolder.check_free(folder)
    return folder, wanted
