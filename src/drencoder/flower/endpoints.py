"""Where the server listens and where a site finds it, and in one sentence why they cannot meet. No torch, no flwr.

Everything here is checked before a model is loaded, so that a person reads within seconds that a certificate has expired,
that a name is missing or that a proxy stands in between.
"""

import ipaddress
import os
import socket
import ssl
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final
from urllib.parse import urlsplit

import httpx

from drencoder.errors import ArtifactError, EngineError
from drencoder.federated.remote.agreement import ClientSet
from drencoder.flower.keys import check_authority, check_server_certificate

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TIMEOUT = 4.0  # s for one step of reaching the server
_PATIENCE = 8.0  # s for all of them
_WATCH_EVERY = 60.0  # s
_BUSY = ("500", "502", "503", "504")  # what a proxy says while the server behind it is not there


@final
@dataclass(frozen=True)
class ServerEndpoint:
    """Where the server listens and whom it lets in.

    Args:
      certificates: folder with `ca.crt`, `server.crt` and `server.key`.
      nodes: name -> public key of each site.
      clients: name -> the clients that the server's list gives to this site; a site that is not there may host any that
        the list gives to nobody.
    """

    certificates: Path
    nodes: Mapping[str, bytes]
    host: str = "127.0.0.1"
    port: int = 8443
    log: Path = Path("superlink.log")
    clients: Mapping[str, ClientSet] = field(default_factory=dict)

    @property
    def local_host(self) -> str:
        """The name or address by which this machine reaches the server."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def local(self) -> str:
        """HOST:PORT by which this machine reaches the server."""
        return f"{self.local_host}:{self.port}"

    def check(self) -> None:
        """Checks the certificates, and that this machine reaches itself without a proxy.

        Raises:
          ArtifactError: a file is missing, expired, not the other's, or without the name of this machine.
        """
        bypass_proxies(self.local_host)
        names = check_server_certificate(self.certificates, self.local_host)
        if self.host not in _LOOPBACK and all(_is_loopback(name) for name in names):
            print(
                f"{self.certificates / 'server.crt'} names this machine only as {', '.join(names)}: sites on other machines will "
                "refuse it. Make TLS certificates with drencoder certs --host NAME.",
                file=sys.stderr,
            )


@final
@dataclass(frozen=True)
class Trouble:
    """Why a server cannot be reached, in a sentence. `lasting`: waiting will not help."""

    text: str
    lasting: bool = True


@final
@dataclass(frozen=True)
class SiteEndpoint:
    """Where a site finds the server (`HOST:PORT`), whom it believes (`root`), and its own key and folder."""

    server: str
    root: Path
    key: Path
    state: Path
    poll: float = 0.5

    @property
    def host(self) -> str:
        """The server's name or address, without the port."""
        return self.server.rpartition(":")[0].strip("[]")

    def check(self) -> None:
        """Checks what can be seen to be wrong before the model is loaded; says so where the server does not answer yet.

        Raises:
          ArtifactError: a file is missing, or the authority's certificate has expired.
          EngineError: the server's certificate is not good for this site, its name is unknown, or a proxy is in the way.
        """
        for path, what in ((self.root, "TLS certificate of the authority"), (self.key, "node's private key")):
            if not path.is_file():
                raise ArtifactError(f"{path} is not there: give the {what} that drencoder certs made.")
        port = self.server.rpartition(":")[2]
        if not self.host or not port.isdigit() or not 0 < int(port[:6]) < 65536:
            raise EngineError(
                f"--server {self.server[:80]!r} is not HOST:PORT: write, say, drencoder.example.org:8443."
            )
        check_authority(self.root)
        if _is_loopback(self.host) and (passed := bypass_proxies(self.host)):
            print(f"{passed} is set; a server on this machine is reached without that proxy", file=sys.stderr)
        bypass_proxies()
        trouble = self._find_trouble_in_time()
        if trouble is not None and trouble.lasting:
            raise EngineError(trouble.text)
        if trouble is not None:
            print(f"{trouble.text} Waiting for it.", file=sys.stderr)

    def find_trouble(self) -> Trouble | None:
        """Asks the server whether it is there; None if it is. Takes a few seconds at most."""
        trust = ssl.create_default_context(cafile=str(self.root))
        proxy = _proxy_of(self.host)
        if proxy is not None and not _answers(proxy[1]):
            return Trouble(
                f"the proxy {_shown(proxy[1])} of {proxy[0]} does not answer, so the server at {self.server} cannot be reached: "
                f"unset {proxy[0]}, mend the proxy, or add {self.host} to no_proxy."
            )
        try:
            httpx.get(f"https://{self.server}/health", verify=trust, timeout=_TIMEOUT)
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:
            return self._explain(error, proxy)
        return None

    def _find_trouble_in_time(self) -> Trouble | None:
        """`find_trouble`, or that it took too long: nothing bounds the time that a name service takes."""
        found: list[Trouble | None] = []
        asking = threading.Thread(target=lambda: found.append(self.find_trouble()), daemon=True)
        asking.start()
        asking.join(_PATIENCE)
        silent = Trouble(
            f"neither the server at {self.server} nor the name service says anything within {_PATIENCE:.0f} s.",
            lasting=False,
        )
        return found[0] if found else silent

    def _explain(self, error: Exception, proxy: tuple[str, str] | None) -> Trouble:
        said = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return Trouble(self._explain_certificate(said))
        unresolved = next((cause for cause in _causes(error) if isinstance(cause, socket.gaierror)), None)
        if unresolved is not None:
            return Trouble(
                f"the name {self.host!r} cannot be resolved: check --server, or ask whoever runs this network's name service.",
                lasting=unresolved.errno != socket.EAI_AGAIN,
            )
        if proxy is not None:
            status = said[:3] if isinstance(error, httpx.ProxyError) and said[:3].isdigit() else ""
            answer = f"answers {status}" if status else f"fails ({type(error).__name__})"
            return Trouble(
                f"the proxy {_shown(proxy[1])} of {proxy[0]} {answer} when it is asked for {self.server}: the server may not be "
                f"there yet; else let the proxy pass it, or add {self.host} to no_proxy.",
                lasting=not (status in _BUSY or (isinstance(error, httpx.TransportError) and not status)),
            )
        return Trouble(f"the server at {self.server} does not answer yet ({type(error).__name__}).", lasting=False)

    def _explain_certificate(self, said: str) -> str:
        if "expired" in said:
            return (
                f"the TLS certificate of the server at {self.server} has expired: its operator must make another one with drencoder "
                "certs. If it has not, the clock of this machine is wrong."
            )
        if "not yet valid" in said:
            return (
                f"the TLS certificate of the server at {self.server} is not valid yet: check the clock of this machine."
            )
        if "ismatch" in said or "not valid for" in said:
            return (
                f"the TLS certificate of the server at {self.server} does not have the name {self.host!r}: give --server one of its "
                "names, or let its operator make TLS certificates with drencoder certs --host NAME."
            )
        return (
            f"the server at {self.server} shows a TLS certificate that {self.root} did not sign: check --root and --server; do not "
            "go on if neither is wrong."
        )


def watch(endpoint: SiteEndpoint, every: float = _WATCH_EVERY) -> threading.Event:
    """Looks in the background whether the server can be reached, and says so when that changes. Set the event to end it."""
    ended = threading.Event()

    def look() -> None:
        last = ""
        while not ended.wait(every):
            trouble = endpoint.find_trouble()
            text = trouble.text if trouble else ""
            if text != last:
                print(text or f"the server at {endpoint.server} answers again", file=sys.stderr)
            last = text

    threading.Thread(target=look, daemon=True).start()
    return ended


# --- proxies ---------------------------------------------------------------------------------------


def bypass_proxies(*hosts: str) -> str | None:
    """Lets this process and its children reach this machine, and `hosts`, without a proxy; returns the variable that would have
    named one for the first of them.

    Server and site talk to processes of their own on the loopback, where a proxy has no business.
    """
    found = _proxy_of(hosts[0]) if hosts else None
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name for name in known.split(",") if name.strip()]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*names, *_LOOPBACK, *hosts]))
    return found[0] if found else None


def _proxy_of(host: str) -> tuple[str, str] | None:
    """(variable, URL) of the proxy that the environment names for a host."""
    proxies = urllib.request.getproxies_environment()
    if urllib.request.proxy_bypass_environment(host, proxies):  # type: ignore[attr-defined]  # not in typeshed
        return None
    for kind in ("https", "all"):
        if proxies.get(kind):
            name = next((name for name in os.environ if name.lower() == f"{kind}_proxy"), f"{kind}_proxy")
            return name, proxies[kind]
    return None


def _answers(proxy: str) -> bool:
    """Whether somebody listens where the proxy should be."""
    place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        address = (place.hostname or "", place.port or (443 if place.scheme == "https" else 80))
        socket.create_connection(address, timeout=_TIMEOUT).close()
    except (OSError, ValueError):
        return False
    return True


def _shown(proxy: str) -> str:
    """A proxy's URL without the user and password that may stand in it."""
    place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return f"{place.scheme}://{place.netloc.rpartition('@')[2]}"[:120]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
