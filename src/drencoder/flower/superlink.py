"""`flower-superlink` behind a guard: `python -m drencoder.flower.superlink`, with flower-superlink's own arguments.

Flower serves its control interface, which has no authentication, on the port that the nodes use. The guard answers everything
but the nodes' signed requests to this machine only, refuses large bodies before they are read, and counts what was refused.
It replaces one name in a module of flwr 1.42; any other version is refused.
"""

import importlib
import json
import os
import signal
import time
import types
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn

from drencoder.errors import EngineError, hide_crash_messages
from drencoder.flower.processes import die_with_parent

COUNTS = "DRENCODER_GUARD_COUNTS"  # environment: a file that the counts are written to
_VERSION = "1.42."
_LOOPBACK = ("127.0.0.1", "::1")
_MAX_BODY = 16 << 20  # Flower cuts arrays into 5 MiB pieces
_EVERY = 0.5  # s between two writings of the counts

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def check_version() -> None:
    """Checks that the installed flwr is the version that this engine was made for, and raises EngineError otherwise."""
    installed = version("flwr")
    if not installed.startswith(_VERSION):
        raise EngineError(
            f"flwr {installed} is installed and this engine is made for {_VERSION}x: pip install 'flwr==1.42.0'."
        )


class Guard:
    """An ASGI application in front of the SuperLink's. `counts`: requests by outcome."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], counts_file: Path | None) -> None:
        self._app, self._file, self._written = app, counts_file, 0.0
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            self._count("websocket")
            await send({"type": "websocket.close"})
        elif (refused := self._refusal(scope)) is not None:
            await self._refuse(refused, send)
        else:
            await self._pass(scope, receive, send)

    def _refusal(self, scope: Scope) -> int | None:
        local = (scope.get("client") or ("",))[0] in _LOOPBACK
        if not (local or scope["path"].startswith("/v1/fleet/") or scope["path"] == "/health"):
            return 404
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > _MAX_BODY:
            return 413
        return None

    async def _refuse(self, status: int, send: Send) -> None:
        self._count(str(status))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands the request on; a body that turns out too long, though it said nothing, ends the connection."""
        taken = 0

        async def count_received() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > _MAX_BODY:
                self._count("413")
                return {"type": "http.disconnect"}
            return message

        async def count_status(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._count(str(message["status"]))
            await send(message)

        await self._app(scope, count_received, count_status)

    def _count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        if self._file is not None and time.monotonic() > self._written + _EVERY:
            self._written = time.monotonic()
            self._file.write_text(json.dumps(self.counts))


def main() -> None:
    """Starts the SuperLink with the guard in front."""
    die_with_parent(signal.SIGKILL)  # it holds nothing that must be kept, and its port must be free for a restart
    check_version()
    module = importlib.import_module("flwr.superlink.cli.flower_superlink")  # the package's attribute is a function
    counts = os.environ.get(COUNTS)

    def run(app: Any, **settings: Any) -> None:
        guarded = Guard(app, Path(counts) if counts else None)
        # Without an access log, which would grow with every poll.
        uvicorn.run(guarded, proxy_headers=False, **{**settings, "access_log": False})

    module.uvicorn = types.SimpleNamespace(run=run)  # type: ignore[attr-defined]
    module.flower_superlink()


if __name__ == "__main__":
    with hide_crash_messages():
        main()
