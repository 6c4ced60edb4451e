"""The commands that span machines: certs, server, client, simulate. Parsing only; Flower is imported where it is needed."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from drencoder.cli.options import (
    JsonOption,
    OutOption,
    QuietOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    choose_run,
    print_result,
    tell_interrupted,
)
from drencoder.errors import EngineError, RecipeError
from drencoder.reading import printable, read_text, reason, shown

_MOST_CLIENTS = 1 << 20  # bytes of the file that names a site's clients
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


def _check_flower() -> None:
    """Turns Flower's telemetry off and raises EngineError where Flower is not installed."""
    from drencoder.flower.processes import QUIET_ENVIRONMENT

    os.environ.update(QUIET_ENVIRONMENT)
    if importlib.util.find_spec("flwr") is None:
        raise EngineError("flwr is not installed here: pip install 'drencoder[flower]'.")


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to make")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=10_000, help="how many sites")],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="DNS name or IP address of the server; may be repeated")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=36_500, help="until the TLS certificates expire")] = 825,
) -> None:
    """Makes an authority, the server's TLS certificate, a key for each site, and keys to sign finished runs with."""
    from drencoder.flower.keys import make_certificates
    from drencoder.runs.display import make_console

    written = make_certificates(folder, nodes, host or [], days=days)
    console = make_console()
    console.print(f"{len(written)} files in {printable(folder)}.")
    console.print(
        "Server: ca.crt, server.crt, server.key, signing.key, nodes/. Site i: node[i]/. Keep ca.key off both."
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
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """The main job with its clients on other machines (drencoder client)."""
    _check_flower()
    from drencoder.federated.remote.engine import RoundTimeouts
    from drencoder.flower.endpoints import ServerEndpoint
    from drencoder.flower.keys import read_client_sets, read_public_keys

    listed = nodes or certs / "nodes"
    keys = read_public_keys(listed)
    ServerEndpoint(certs, keys, host, port).check()
    patience = RoundTimeouts(quorum, round_timeout, wait, len(keys))
    folder, config = choose_run(recipe, set_, out, resume, needs_ledger=True)
    given = read_client_sets(listed, config.federation.population)
    from drencoder.flower.deploy import run_server
    from drencoder.flower.server_app import ServerOptions

    # Not into the run folder, which must be new; beside it, where an operator looks.
    log = folder.parent / f"{folder.name}.superlink" / "superlink.log"
    endpoint = ServerEndpoint(certs, keys, host, port, log, given)
    try:
        options = ServerOptions(None if resume else config, folder, patience, quiet=quiet or json_)
        result = run_server(options, endpoint)
    except KeyboardInterrupt:
        raise tell_interrupted("server", folder, to_stderr=quiet or json_) from None
    print_result(result, quiet=quiet, json_=json_)


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
        str | None,
        typer.Option("--data", metavar="PATH", help="this site's text, a file or a folder; default the recipe's"),
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
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="show nothing but errors")] = False,
) -> None:
    """A site: answers the server's questions for its clients, and keeps a ledger of its own."""
    _check_flower()
    if clients is None:
        beside = key.parent / "clients"
        if not beside.is_file():
            raise RecipeError(f"which clients are at this site? {beside} is not there: give --clients, say 0-9 or 0/3.")
        try:
            clients = read_text(beside, _MOST_CLIENTS).strip()
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"{shown(beside)} cannot be read ({reason(error)}): give --clients, say 0-9 or 0/3."
            ) from None
    from drencoder.flower.endpoints import SiteEndpoint

    endpoint = SiteEndpoint(server, root or key.parent / "ca.crt", key, state or key.parent / "state", poll)
    endpoint.check()
    from drencoder.flower.client_app import open_site
    from drencoder.flower.deploy import run_site
    from drencoder.runs.display import make_console

    console = make_console(quiet=quiet)

    def say(text: str) -> None:
        console.print(printable(text))

    say("loading the model")
    site = open_site(
        recipe, clients, data=data, state=endpoint.state, min_noise=min_noise, key=key, roster=roster, say=say
    )
    say(f"ready: clients {site.own_clients}, ledger {endpoint.state / 'site.jsonl'}")
    try:
        run_site(site, endpoint)
    except KeyboardInterrupt:
        say("stopped")
        raise SystemExit(130) from None


def simulate(
    recipe: RecipeArgument = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=10_000, help="simulated machines")] = 3,
    set_: SetOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """The main job on Flower's simulation engine (Ray), in processes of this machine."""
    _check_flower()
    from drencoder.federated.remote.engine import RoundTimeouts

    folder, config = choose_run(recipe, set_, out, resume, needs_ledger=True)
    from drencoder.flower.simulation import isolate_network, simulate_run

    isolate_network()
    from drencoder.flower.server_app import ServerOptions

    options = ServerOptions(None if resume else config, folder, RoundTimeouts(nodes=nodes), quiet=quiet or json_)
    print_result(simulate_run(options, nodes), quiet=quiet, json_=json_)
