"""`drencoder simulate`: the same run on Flower's simulation engine. The one door to Ray, through flwr.

Ray listens on all of a machine's addresses without authentication. Where Linux lets us, the simulation therefore runs in a
network of its own, which has a loopback and nothing else.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from drencoder.errors import DrencoderError, EngineError
from drencoder.federated.remote.roster import is_secure
from drencoder.federated.remote.site import Site
from drencoder.flower.client_app import make_client_app, open_site
from drencoder.flower.server_app import ServerOptions, serve
from drencoder.runs import run as experiment
from drencoder.runs.run_folder import RunFolder

_ISOLATED = "DRENCODER_ALONE"
_SITES: dict[tuple[str, str], Site] = {}


def simulate_run(options: ServerOptions, nodes: int) -> experiment.RunResult:
    """Runs or resumes a run with `nodes` simulated sites: node i hosts the clients i, i + nodes, ... Two processes or more train.

    The recipe's own data source is every site's, and their ledgers lie in the folder RUN.sites.

    Raises:
      DrencoderError: as `experiment.run`.
    """
    if is_secure(options.config):
        raise EngineError(
            "secure aggregation needs nodes that remember a round from one message to the next, and Ray's workers do not: "
            "drencoder run has the same protocol in one process, drencoder server and client over the network."
        )
    cores = os.cpu_count() or 1
    sites = options.out.with_name(f"{options.out.name}.sites")
    recipe = sites / "recipe.toml"
    if options.recipe is not None:
        RunFolder(sites).write(recipe, options.recipe.to_toml().encode())
    cards = 0 if options.config.model.device == "cpu" else torch.cuda.device_count()
    results: list[experiment.RunResult] = []
    refused: list[DrencoderError] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            results.append(serve(grid, options))
        except DrencoderError as error:  # one sentence for the user, not a traceback of a thread
            refused.append(error)

    clients = make_client_app(partial(_site_of_node, str(recipe.resolve()), str(sites.resolve())))
    run_simulation(
        server,
        clients,
        nodes,
        backend_config={
            # Ray shows a card only to workers that ask for one, and each loads a base model of its own: one worker a card.
            "client_resources": {"num_cpus": 1, "num_gpus": float(cards > 0)},
            "init_args": {"num_cpus": cores, "num_gpus": cards, "include_dashboard": False},
        },
    )
    if refused:
        raise refused[0]
    if not results:
        raise EngineError("the simulation ended before the run did: its log above says why.")
    return results[0]


def _site_of_node(recipe: str, sites: str, context: Context) -> Site:
    """Returns the site of a simulated node, in one of Ray's processes. All sites of a process share the base model."""
    index, count = context.node_config["partition-id"], context.node_config["num-partitions"]
    key = (recipe, f"{index}/{count}")
    if key not in _SITES:
        _SITES[key] = open_site(recipe, key[1], data=None, state=Path(sites) / str(index))
    return _SITES[key]


def isolate_network() -> None:
    """Starts this command again in a network of its own, if that can be done; else warns of what is open.

    The restarted command finds itself isolated, and this function returns at once.
    """
    if os.environ.get(_ISOLATED):
        return
    unshare, ip = shutil.which("unshare"), shutil.which("ip")
    if unshare and ip and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0:
        command = [sys.executable, "-m", "drencoder", *sys.argv[1:]]
        script = 'ip link set lo up && exec "$@"'
        os.environ[_ISOLATED] = "1"
        os.execv(unshare, [unshare, "-rn", "sh", "-c", script, "sh", *command])
    print(
        "Ray listens on all addresses of this machine while the simulation runs, without a password: use a machine behind a "
        "firewall.",
        file=sys.stderr,
    )
