"""Why a site and its server cannot meet: each reason in a sentence of its own, within seconds and before any model is loaded."""

import contextlib
import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from drencoder.errors import ArtifactError, EngineError
from drencoder.flower.endpoints import ServerEndpoint, SiteEndpoint, bypass_proxies, watch
from drencoder.flower.keys import make_certificates


@pytest.fixture
def certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "")  # so that what the endpoints put there is taken back afterwards
    monkeypatch.setenv("NO_PROXY", "")
    make_certificates(tmp_path / "certs", 1, [])
    return tmp_path / "certs"


def reissue(certs: Path, *, start: int, end: int, names: list[x509.GeneralName] | None = None) -> None:
    """Another server certificate of the same authority, good from `start` to `end` days from now."""
    authority = x509.load_pem_x509_certificate((certs / "ca.crt").read_bytes())
    key = serialization.load_pem_private_key((certs / "ca.key").read_bytes(), None)
    old, now = x509.load_pem_x509_certificate((certs / "server.crt").read_bytes()), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(authority.subject)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=start))
        .not_valid_after(now + timedelta(days=end))
    )
    for extension in old.extensions:
        if names is None or extension.oid != x509.SubjectAlternativeName.oid:
            made = made.add_extension(extension.value, extension.critical)
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signed = made.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    (certs / "server.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


class Unwilling(Healthy):
    status = 403

    def do_CONNECT(self) -> None:
        self.send_response(self.status, "text of the proxy")
        self.end_headers()


class Busy(Unwilling):
    status = 503


@contextlib.contextmanager
def listening(handler: type[Healthy], certs: Path | None = None) -> Iterator[int]:
    """A server on a free loopback port, with TLS if there are certificates."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if certs is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certs / "server.crt", certs / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def site(certs: Path, server: str) -> SiteEndpoint:
    return SiteEndpoint(server, certs / "node0" / "ca.crt", certs / "node0" / "key", certs / "state")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# --- certificates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "words"),
    [((-10, -1), r"server\.crt has expired on \d{4}-"), ((1, 10), r"server\.crt is not valid before \d{4}-")],
)
def test_a_server_does_not_start_with_a_certificate_that_is_not_valid_today(
    days: tuple[int, int], words: str, certs: Path
) -> None:
    reissue(certs, start=days[0], end=days[1])
    with pytest.raises(ArtifactError, match=words):
        ServerEndpoint(certs, {}).check()


def test_a_server_does_not_start_with_files_that_do_not_belong_together(certs: Path, tmp_path: Path) -> None:
    ServerEndpoint(certs, {}).check()
    make_certificates(tmp_path / "other", 1, [])
    for name, words in (("server.key", "is not the key of"), ("ca.crt", "did not sign")):
        own = (certs / name).read_bytes()
        (certs / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ArtifactError, match=words):
            ServerEndpoint(certs, {}).check()
        (certs / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ArtifactError, match="is not a"):
            ServerEndpoint(certs, {}).check()
        (certs / name).write_bytes(own)
    (certs / "server.key").unlink()
    with pytest.raises(ArtifactError, match=r"has no server\.key"):
        ServerEndpoint(certs, {}).check()


def test_a_server_says_which_name_its_certificate_lacks(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match=r"does not have the name 192\.0\.2\.7, .* it has localhost, 127\.0\.0\.1"):
        ServerEndpoint(certs, {}, host="192.0.2.7").check()
    ServerEndpoint(certs, {}, host="0.0.0.0").check()
    assert "names this machine only as localhost" in capsys.readouterr().err
    reissue(certs, start=-1, end=9, names=[x509.DNSName("drencoder.example.org"), x509.DNSName("127.0.0.1")])
    reissue(certs, start=-1, end=9, names=[x509.DNSName("drencoder.example.org")])
    with pytest.raises(ArtifactError, match=r"does not have the name 127\.0\.0\.1"):
        ServerEndpoint(certs, {}, host="0.0.0.0").check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("none", ""),
        ("expired", "has expired: its operator must make another one"),
        ("early", "is not valid yet"),
        ("name", r"does not have the name '127\.0\.0\.1'"),
        ("authority", "did not sign"),
    ],
)
def test_a_site_says_what_is_wrong_with_the_servers_certificate(
    change: str, words: str, certs: Path, tmp_path: Path
) -> None:
    if change == "expired":
        reissue(certs, start=-10, end=-1)
    if change == "early":
        reissue(certs, start=1, end=9)
    if change == "name":
        reissue(certs, start=-1, end=9, names=[x509.DNSName("drencoder.example.org")])
    shown = certs
    if change == "authority":
        shown = tmp_path / "other"
        make_certificates(shown, 1, [])
    with listening(Healthy, shown) as port:
        endpoint = site(certs, f"127.0.0.1:{port}")
        if not words:
            endpoint.check()
            return
        with pytest.raises(EngineError, match=words):
            endpoint.check()


# --- names and proxies -----------------------------------------------------------------------------


def test_a_name_that_nobody_knows_is_said(
    certs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(EngineError, match=r"the name 'drencoder\.invalid' cannot be resolved"):
        site(certs, "drencoder.invalid:8443").check()

    def silent(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    site(certs, "drencoder.invalid:8443").check()  # the network may come back
    assert "the name 'drencoder.invalid' cannot be resolved" in capsys.readouterr().err


def test_a_name_service_that_hangs_is_waited_for_only_seconds(
    certs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()
    monkeypatch.setattr("drencoder.flower.endpoints._PATIENCE", 0.2)
    monkeypatch.setattr(SiteEndpoint, "find_trouble", lambda self: released.wait(60) and None)
    site(certs, "drencoder.invalid:8443").check()
    released.set()
    assert "nor the name service says anything" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_a_proxy_that_does_not_answer_is_named_without_its_password(
    variable: str, certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"http://anna:secret@127.0.0.1:{free_port()}")
    with pytest.raises(
        EngineError, match=rf"the proxy http://127\.0\.0\.1:\d+ of {variable} does not answer.*no_proxy"
    ) as refused:
        site(certs, "192.0.2.7:8443").check()
    assert "secret" not in str(refused.value)


def test_a_proxy_that_refuses_is_named(
    certs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(Unwilling) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(EngineError, match=r"answers 403 when it is asked for 192\.0\.2\.7:8443") as refused:
            site(certs, "192.0.2.7:8443").check()
        assert "text of the proxy" not in str(refused.value)
    with listening(Busy) as port:  # as proxies say while the server is not there yet
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        site(certs, "192.0.2.7:8443").check()
        assert "answers 503" in capsys.readouterr().err


def test_a_server_on_this_machine_is_reached_without_the_proxy(
    certs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "example.org")
    with listening(Healthy, certs) as port:
        site(certs, f"localhost:{port}").check()
    assert "https_proxy is set; a server on this machine is reached without that proxy" in capsys.readouterr().err
    assert os.environ["no_proxy"].split(",") == ["example.org", "localhost", "127.0.0.1", "::1"]
    assert bypass_proxies("192.0.2.7") == "https_proxy"
    assert bypass_proxies("192.0.2.7") is None  # it is known by now


def test_a_silent_site_says_when_its_server_goes_and_comes(certs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, end = "", time.monotonic() + 60
    with listening(Healthy, certs) as port:
        pass
    watching = watch(site(certs, f"127.0.0.1:{port}"), every=0.05)
    while "does not answer yet" not in said and time.monotonic() < end:
        said += capsys.readouterr().err
        time.sleep(0.05)
    assert said.count("does not answer yet") == 1
    watching.set()


def test_the_command_says_so_within_seconds(certs: Path) -> None:
    """A process of its own, with the start of Python: no model and no Flower is loaded before the sentence."""
    arguments = ["client", "--server", "192.0.2.7:8443", "--key", "certs/node0/key", "--clients", "0"]
    environment = {**os.environ, "https_proxy": f"http://127.0.0.1:{free_port()}", "PYTHONPROFILEIMPORTTIME": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "drencoder", *arguments],
        cwd=certs.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "of https_proxy does not answer" in ended.stderr
    modules = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "httpx" in modules
    assert not modules & {"torch", "transformers", "flwr"}
