"""`drencoder server` and `drencoder client`: Flower's processes around a run, and around a site."""

import contextlib
import secrets
import shutil
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from drencoder.errors import EngineError
from drencoder.federated.remote.roster import named_keys
from drencoder.federated.remote.site import Site
from drencoder.flower.backoff import shorten_backoff
from drencoder.flower.client_app import make_client_app
from drencoder.flower.endpoints import ServerEndpoint, SiteEndpoint, watch
from drencoder.flower.processes import ChildProcess, find_free_port
from drencoder.flower.server_app import ServerOptions, serve
from drencoder.flower.superlink import COUNTS
from drencoder.flower.supernode import POLL
from drencoder.flower.tasks import TaskClient, build_app_bundle, digest_app
from drencoder.runs import run as experiment

_START_TIMEOUT = 120.0
_POLL = 0.1
_RESTART_PAUSES = (1.0, 2.0, 5.0, 10.0)  # s between two starts of a SuperNode that ends by itself
_UNKNOWN_KEY = "code: 2004"


def run_server(options: ServerOptions, endpoint: ServerEndpoint) -> experiment.RunResult:
    """Starts the SuperLink, lets the nodes in, and runs (or resumes) in this process.

    Raises:
      DrencoderError: the port is taken, a file is missing, too few nodes come, or the run itself is refused.
    """
    shorten_backoff()
    options = replace(options, keys=named_keys(options.config, endpoint.nodes), clients=endpoint.clients)
    with _private_folder() as (work, secret), _run_superlink(endpoint, work) as authority:
        run = _start_run(endpoint)
        tasks = TaskClient(endpoint.local, secret, authority)
        token = _wait_for_task(tasks, run)
        try:
            with tasks.open_server_task(token) as grid:
                return serve(grid, options)
        except httpx.HTTPError:
            raise EngineError(
                f"the SuperLink ended in the middle of the run (its log is {endpoint.log}): go on with --resume {options.out}."
            ) from None


@contextlib.contextmanager
def _private_folder() -> Iterator[tuple[Path, bytes]]:
    """Yields a private folder for Flower's files and the secret that guards its tasks. The folder is removed afterwards."""
    work = Path(tempfile.mkdtemp(prefix="drencoder-"))
    secret = secrets.token_bytes(32)
    (work / "secret").touch(mode=0o600)
    (work / "secret").write_bytes(secret)
    try:
        yield work, secret
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _run_superlink(endpoint: ServerEndpoint, work: Path) -> Iterator[bytes]:
    """Runs a SuperLink and yields the authority's certificate (PEM). The SuperLink keeps everything in memory: no update is on its disk."""
    files = endpoint.certificates
    arguments = [
        "--host", endpoint.host, "--port", str(endpoint.port), "--ssl-ca-certfile", str(files / "ca.crt"),
        "--ssl-certfile", str(files / "server.crt"), "--ssl-keyfile", str(files / "server.key"),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--isolation", "process", "--superexec-auth-secret-file", str(work / "secret"),
    ]  # fmt: skip
    child = ChildProcess(
        "drencoder.flower.superlink", arguments, home=work / "flwr", log=endpoint.log,
        extra={COUNTS: str(endpoint.log.with_name("requests.json"))},
    )  # fmt: skip
    try:
        trust = ssl.create_default_context(cafile=str(files / "ca.crt"))
        end = time.monotonic() + _START_TIMEOUT
        while not _is_healthy(endpoint.local, trust):
            if child.exit_code() is not None or time.monotonic() > end:
                raise EngineError(_explain_failed_start(endpoint, child))
            time.sleep(_POLL)
        if child.exit_code() is not None:  # another server answered on this port
            raise EngineError(_explain_failed_start(endpoint, child))
        yield (files / "ca.crt").read_bytes()
    finally:
        child.stop(signal.SIGKILL)


def _is_healthy(address: str, trust: ssl.SSLContext) -> bool:
    try:
        return httpx.get(f"https://{address}/health", verify=trust, timeout=2.0).is_success
    except httpx.HTTPError:
        return False


def _explain_failed_start(endpoint: ServerEndpoint, child: ChildProcess) -> str:
    if "in use" in child.read_log_end():
        return f"{endpoint.host}:{endpoint.port} is in use by another program: give another --port, or stop that one."
    return f"the SuperLink did not start on {endpoint.host}:{endpoint.port}: its log is {endpoint.log}."


def _start_run(endpoint: ServerEndpoint) -> int:
    """Registers the nodes' keys, starts the run and returns its number. The guard lets both pass, from the loopback only."""
    control = ControlHttpClient.from_server_address(
        endpoint.local,
        insecure=False,
        root_certificates=str(endpoint.certificates / "ca.crt"),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        for name, key in endpoint.nodes.items():
            control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        bundle = build_app_bundle()
        return int(control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest_app(bundle), bundle, {})))).run_id)
    finally:
        control.close()


def _wait_for_task(tasks: TaskClient, run: int) -> str:
    end = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < end:
        token = tasks.acquire("flwr-serverapp")
        if token is not None:
            return token
        time.sleep(_POLL)
    raise EngineError(f"the SuperLink did not hand out run {run} within {_START_TIMEOUT:.0f} s: start again.")


# --- a site ----------------------------------------------------------------------------------------


def run_site(site: Site, endpoint: SiteEndpoint) -> None:
    """Answers the server's questions until it is stopped. Comes back after losing the server, or its own SuperNode.

    Raises:
      EngineError: a SuperNode cannot be started at all.
    """
    shorten_backoff()
    app, allowed = make_client_app(lambda _: site), frozenset({digest_app(build_app_bundle())})
    with _private_folder() as (work, secret):
        port, starts, since = find_free_port(), 0, time.monotonic()
        tasks = TaskClient(f"127.0.0.1:{port}", secret)
        node, watching = _start_supernode(endpoint, work, port), watch(endpoint)
        try:
            while True:
                if node.exit_code() is not None:
                    _explain_end(node, endpoint)
                    starts = 0 if time.monotonic() - since > 120 else min(starts + 1, len(_RESTART_PAUSES) - 1)
                    time.sleep(_RESTART_PAUSES[starts])
                    since, node = time.monotonic(), _start_supernode(endpoint, work, port)
                try:
                    token = tasks.acquire("flwr-clientapp")
                    if token is not None:
                        tasks.answer_client_task(token, app, allowed)
                        continue
                except httpx.TransportError:
                    time.sleep(0.5)  # the SuperNode is starting
                except Exception as error:
                    # The run was stopped, or the message is gone: a site outlives both.
                    print(f"a message was lost: {type(error).__name__}", file=sys.stderr)
                    time.sleep(1.0)
                time.sleep(_POLL)
        finally:
            watching.set()
            node.stop()


def _start_supernode(endpoint: SiteEndpoint, work: Path, port: int) -> ChildProcess:
    arguments = [
        "--superlink", endpoint.server, "--root-certificates", str(endpoint.root), "--auth-supernode-private-key", str(endpoint.key),
        "--host", "127.0.0.1", "--port", str(port),
        "--isolation", "process", "--superexec-auth-secret-file", str(work / "secret"),
    ]  # fmt: skip
    return ChildProcess(
        "drencoder.flower.supernode", arguments, home=work / "flwr", log=endpoint.state / "supernode.log",
        extra={POLL: str(endpoint.poll)},
    )  # fmt: skip


def _explain_end(node: ChildProcess, endpoint: SiteEndpoint) -> None:
    if _UNKNOWN_KEY in node.read_log_end():
        print(
            f"{endpoint.server} does not let this key in: it is not among the server's --nodes, or the server still counts an "
            "earlier start of this site as online (for up to a minute). Trying again.",
            file=sys.stderr,
        )
    else:
        print(f"the connection ended (exit code {node.exit_code()}), starting it again", file=sys.stderr)
