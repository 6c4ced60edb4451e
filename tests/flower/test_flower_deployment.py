"""Processes on the loopback with TLS and node keys: kills, strangers, wrong authorities, and traffic that means harm."""

import http.client
import importlib
import io
import json
import random
import signal
import socket
import ssl
import stat
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from safetensors.torch import load_file

from deployment import Deployment, deployed, small_recipe, wait_for
from drencoder.cli import main as cli
from drencoder.errors import ArtifactError, DataError, RecipeError
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.federated.remote.engine import RoundTimeouts
from drencoder.flower.keys import make_certificates, read_public_keys
from drencoder.flower.server_app import ServerOptions
from drencoder.flower.superlink import Guard
from drencoder.flower.tasks import build_app_bundle, digest_app
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run


@pytest.mark.slow
def test_killed_server_and_killed_node_lose_nothing(tmp_path: Path) -> None:
    """kill -9 of the server in mid-run and of a node; then --resume: the ledger goes on, the nodes come back by themselves,
    and with replayable noise the adapter is the one of a run that nobody disturbed."""
    recipe = small_recipe("privacy.noise=replay", "federation.rounds=4", "privacy.participation_cap=5")
    undisturbed = experiment.run(recipe, tmp_path / "undisturbed")
    with deployed(tmp_path / "place", recipe) as place:
        server = place.server("--quorum", "1")
        nodes = [place.node(number) for number in range(3)]
        wait_for(place.log("server"), "round 1:")
        server.kill()
        server.wait()
        nodes[2].kill()
        nodes[2].wait()
        place.node(2)
        again = place.server("--resume", "run", "--quorum", "1")
        assert again.wait(600) == 0, place.log("server").read_text()
    run = place.folder / "run"
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [row["slot"] for row in rows if row["kind"] == "charge"] == [0, 1, 2, 3, 4]
    assert verify_run(run).trouble == ""
    for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items():
        expected = load_file(undisturbed.adapter / "adapter_model.safetensors")[name]
        assert (tensor - expected).abs().max() < 1e-4, name


def request(place: Deployment, method: str, path: str, body: bytes = b"", host: str = "127.0.0.1") -> int:
    """The status of one HTTPS request; 0 if the connection just ended."""
    context = ssl.create_default_context(cafile=str(place.folder / "certs" / "ca.crt"))
    context.check_hostname = host == "127.0.0.1"
    connection = http.client.HTTPSConnection(host, place.port, context=context, timeout=60)
    try:
        connection.request(method, path, body=body, headers={"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


@pytest.mark.slow
def test_strangers_and_broken_traffic_are_refused_counted_and_survived(tmp_path: Path) -> None:
    recipe = small_recipe()
    with deployed(tmp_path / "place", recipe, nodes=1) as place:
        other = tmp_path / "other"
        make_certificates(other, 1, [])
        server = place.server("--quorum", "1")
        wait_for(place.log("server"), "Plan of")
        while request(place, "GET", "/health") != 200:
            assert server.poll() is None
            time.sleep(0.1)
        # An unknown key, with the right authority.
        stranger = place.node(
            7, "--clients", "0-9", "--root", "certs/ca.crt", "--state", "stranger", key=str(other / "node0" / "key")
        )
        # A server that the site's own authority did not sign.
        misled = place.node(8, "--clients", "0-9", "--root", str(other / "ca.crt"), key="certs/node0/key")
        assert misled.wait(300) == 2
        assert "did not sign" in place.log("node8").read_text()
        fuzz(place)
        wait_for(place.log("node7"), "does not let this key in")
        assert stranger.poll() is None
        stranger.terminate()
        place.node(0)  # and the run is unharmed
        assert server.wait(600) == 0, place.log("server").read_text()
        counts = json.loads((place.folder / "run.superlink" / "requests.json").read_text())
    assert counts.get("413", 0) >= 1
    assert counts["401"] + counts.get("400", 0) >= 40
    assert verify_run(place.folder / "run").trouble == ""


def fuzz(place: Deployment) -> None:
    """A bounded number of requests that nobody should believe."""
    chance = random.Random(0)
    fleet = (
        "register-node", "activate-node", "unregister-node", "send-node-heartbeat", "pull-messages", "push-messages",
        "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
    )  # fmt: skip
    for name in fleet:
        for size in (0, 1, 200, 5000):
            status = request(place, "POST", f"/v1/fleet/{name}", chance.randbytes(size))
            assert 400 <= status < 500, (name, size, status)
    assert request(place, "POST", "/v1/fleet/push-object", b"\0" * (17 << 20)) in (0, 413)
    assert request(place, "POST", "/v1/runtime/acquire-task") in (401, 403)
    for _ in range(20):  # not even TLS
        with socket.create_connection(("127.0.0.1", place.port), timeout=60) as raw:
            raw.sendall(chance.randbytes(chance.randrange(1, 2000)))
    held = [socket.create_connection(("127.0.0.1", place.port), timeout=60) for _ in range(30)]  # open and silent
    assert request(place, "GET", "/health") == 200
    for connection in held:
        connection.close()


def test_the_guard_keeps_everything_but_the_nodes_business_on_this_machine() -> None:
    import asyncio

    async def passed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(path: str, client: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        scope = {"type": "http", "path": path, "client": (client, 1), "headers": headers}
        asyncio.run(Guard(passed, None)(scope, receive, send))
        return int(sent[0]["status"])

    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/", "/v1/fleet"):
        assert status(path, "192.0.2.7") == 404
        assert status(path, "127.0.0.1") == 200
    assert status("/v1/fleet/pull-messages", "192.0.2.7") == 200
    assert status("/v1/fleet/push-object", "192.0.2.7", ((b"content-length", b"99999999"),)) == 413
    assert status("/v1/fleet/push-object", "192.0.2.7", ((b"content-length", b"-5"),)) == 413


def test_certs_are_private_complete_and_for_the_named_hosts(tmp_path: Path) -> None:
    from cryptography import x509

    folder = tmp_path / "certs"
    make_certificates(folder, 2, ["drencoder.example.org", "192.0.2.5"])
    for name in ("ca.key", "server.key", "node0/key", "node1/key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    names = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["drencoder.example.org", "localhost"]
    assert "192.0.2.5" in map(str, names.value.get_values_for_type(x509.IPAddress))
    assert list(read_public_keys(folder / "nodes")) == ["node0", "node1"]
    assert (folder / "node1" / "clients").read_text() == "1/2\n"
    with pytest.raises(ArtifactError, match="already there"):
        make_certificates(folder, 2, [])
    (folder / "nodes" / "twin.pub").write_bytes((folder / "nodes" / "node0.pub").read_bytes())
    with pytest.raises(ArtifactError, match="another node"):
        read_public_keys(folder / "nodes")


@pytest.mark.parametrize(
    ("text", "clients"),
    [("0-3,7", (0, 1, 2, 3, 7)), ("1/3", (1, 4, 7)), ("0/1", tuple(range(10))), ("5", (5,)), (" 2 , 2-3 ", (2, 3))],
)
def test_client_sets(text: str, clients: tuple[int, ...]) -> None:
    found = ClientSet.parse(text, 10)
    assert found.clients == clients
    assert ClientSet.parse(str(found), 10) == found


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-10", "-1", "3/3", "1/0", "9/11 ", "0-3;4", "1" * 30])
def test_client_sets_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        ClientSet.parse(text, 10) if text != "9/11 " else ClientSet.parse("10/11", 10)


def test_the_agreement_covers_what_protects_and_leaves_places_free() -> None:
    base = small_recipe()
    free = [
        "speed.parallel_clients=2",
        "data.source=x.jsonl",
        "data.fields={text='body'}",
        "model.source=/m",
        "server.learning_rate=0.5",
        "name=other",
    ]
    for change in free:
        assert agreement(small_recipe(change)) == agreement(base), change
    for change in ["privacy.epsilon=4", "federation.population=31", "seed=1", "encoder.ratio=4", "privacy.clip_l2=2",
                   "local.upload=zero", "privacy.participation_cap=4", "privacy.trust=central", "data.max_tokens=25", "data.template=plain"]:  # fmt: skip
        assert agreement(small_recipe(change)) != agreement(base), change


def test_a_template_is_agreed_on_wherever_its_file_lies(tmp_path: Path) -> None:
    for name, text in {"a": "one", "b": "one", "c": "two"}.items():
        (tmp_path / f"{name}.jinja").write_text(text)
    one, same, other = (agreement(small_recipe(f"data.template={tmp_path / name}.jinja")) for name in "abc")
    assert one == same != other
    with pytest.raises(DataError, match="cannot be read"):
        agreement(small_recipe("data.template=absent.jinja"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["server", "--certs", "nowhere"], "cannot be read"),
        (["server", "--certs", "certs", "--quorum", "2"], "is not a share"),
        (["server", "--certs", "certs", "--resume", "nowhere"], "has no ledger"),
        (["server", "--certs", "certs", "--resume", "x", "--set", "seed=1"], "with its own recipe"),
        (["client", "--server", "h:1", "--key", "certs/node0/nokey"], "is not there"),
        (["client", "--server", "nohost", "--key", "certs/node0/key"], "is not HOST:PORT"),
        (["client", "--server", "127.0.0.1:9", "--key", "certs/node0/key", "--clients", "0-99999999"], "population"),
        (["client", "--server", "127.0.0.1:9", "--key", "certs/node0/key", "--min-noise", "99"], "below --min-noise"),
        (["client", "--server", "127.0.0.1:9", "--key", "certs/node0/key", "--data", "no.jsonl"], "does not exist"),
        (["certs", "certs", "--nodes", "1"], "already there"),
        (["certs", "new", "--nodes", "1", "--host", ""], "names no host"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_certificates(tmp_path / "certs", 1, [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["drencoder", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert words in said
    assert "Traceback" not in said


def test_a_taken_port_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_certificates(tmp_path / "certs", 1, [])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["drencoder", "server", "--port", str(taken.getsockname()[1])])
        with pytest.raises(SystemExit):
            cli.main()
    assert "is in use" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    with deployed(tmp_path / "place", small_recipe(), nodes=1) as place:
        server = place.server()
        wait_for(place.folder / "run" / "ledger.jsonl", "\n")  # the plan's table is shown before anything has begun
        server.send_signal(signal.SIGINT)
        assert server.wait(300) == 130
        assert "--resume" in place.log("server").read_text()


def test_the_packaged_app_points_at_installed_code_and_is_the_same_each_time() -> None:
    bundle = build_app_bundle()
    assert digest_app(bundle) == digest_app(build_app_bundle())
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        assert not [name for name in files.namelist() if name.endswith(".py")]  # no code travels
        project = tomllib.loads(files.read("pyproject.toml").decode())
    assert project["project"]["dependencies"] == []  # so that nothing is ever installed at run time
    app = project["tool"]["flwr"]["app"]
    for reference, kind in ((app["components"]["serverapp"], ServerApp), (app["components"]["clientapp"], ClientApp)):
        module, name = reference.split(":")
        assert isinstance(getattr(importlib.import_module(module), name), kind)
    options = ServerOptions.from_run_config({**app["config"], "out": "runs/x"})
    assert (options.out, options.patience) == (Path("runs/x"), RoundTimeouts())
    with pytest.raises(RecipeError, match="one of them"):
        ServerOptions.from_run_config(app["config"])


def test_a_run_with_another_app_is_refused_by_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site's worker answers only for the digest that it has pinned; what it pushes has no text."""
    from types import SimpleNamespace

    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from drencoder.flower import tasks

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(RecordDict({}), 1, "query", group_id="g")
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    pushed, asked = [], []

    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def PushTaskOutput(self, request: object) -> None: ...

    monkeypatch.setattr(tasks.TaskClient, "_client", lambda self, *_: Client())
    monkeypatch.setattr(tasks, "HeartbeatSender", lambda _: SimpleNamespace(start=lambda: None, stop=lambda: None))
    monkeypatch.setattr(tasks, "make_task_heartbeat_fn_http", lambda _: None)
    monkeypatch.setattr(tasks, "push_message", lambda client, reply, context: pushed.append(reply))
    made = ClientApp()

    @made.query()
    def ask(message: Message, context: Context) -> Message:
        asked.append(message)
        raise ValueError("the patient in room 12")

    office = tasks.TaskClient("127.0.0.1:1", b"secret")
    for content, code in ((b"another app", 1013), (build_app_bundle(), 2)):
        given = (message, context, None, SimpleNamespace(content=content))
        monkeypatch.setattr(tasks, "pull_task_input", lambda client, given=given: given)
        office.answer_client_task("token", made, frozenset({digest_app(build_app_bundle())}))
        assert pushed[-1].error.code == code
        assert pushed[-1].error.reason == ""
    assert len(asked) == 1
