"""Tasks of a SuperLink or a SuperNode, done in this process: the base model stays loaded and no downloaded code is run.

Flower's own way starts a process per message, which would import torch and load the model each time. With
`--isolation process` its servers hand tasks to whoever knows a secret; that is this module. It runs the *installed* apps and
sends no text of an exception. It uses internal modules of flwr 1.42 (`superlink.check_version`).
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import final

import httpx
from flwr.app import Context, Error, Message
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from drencoder.federated.remote.refusal import Refusal
from drencoder.flower.transport import REFUSED

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_SERVER_RETRY_SECONDS = 60.0  # s of trying again
_SITE_RETRY_SECONDS = 10.0


def build_app_bundle() -> bytes:
    """Returns the app that a run is started with: a pyproject.toml that points at this package, and nothing else."""
    return build_fab_from_disk(Path(str(resources.files("drencoder.flower") / "template")))


def digest_app(bundle: bytes) -> str:
    """Returns the SHA-256 of the app in hex, as Flower names it and as a site pins it."""
    return hashlib.sha256(bundle).hexdigest()


@final
@dataclass(frozen=True)
class TaskClient:
    """A client of the interface by which one SuperLink or SuperNode on this machine hands out tasks.

    `certificates`: of the authority (PEM), None = without TLS (a SuperNode's interface is on the loopback).
    """

    address: str
    secret: bytes
    certificates: bytes | None = None

    def acquire(self, kind: str) -> str | None:
        """Returns the token of a waiting task, or None. Raises httpx.HTTPError when nobody is there."""
        guard = SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=frozenset({_ACQUIRE}))
        with self._client(None, RuntimeVersionHttpInterceptor(component_name="SuperExec"), guard) as client:
            response = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
            return response.token if response.HasField("task") and response.token else None

    @contextlib.contextmanager
    def open_server_task(self, token: str) -> Iterator[HttpGrid]:
        """Yields a grid for one run, whose task is alive until the block ends."""
        grid = HttpGrid(
            self.address, insecure=self.certificates is None, root_certificates=self.certificates, token=token
        )
        grid._retry_invoker = _retry_for(_SERVER_RETRY_SECONDS)
        client = grid._runtime_client
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        status, context = SubStatus.FAILED, None
        try:
            task = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            context = context_from_proto(task.context)
            grid.set_run(run_from_proto(task.run))
            yield grid
            status = SubStatus.COMPLETED
        finally:
            grid._retry_invoker.max_tries = 1  # the SuperLink may be gone
            with contextlib.suppress(Exception):
                client.PushTaskOutput(
                    PushTaskOutputRequest(
                        context=context_to_proto(context) if context else None, sub_status=status, details=""
                    )
                )
            heartbeat.stop()
            grid.close()

    def answer_client_task(self, token: str, app: ClientApp, allowed: frozenset[str]) -> None:
        """Answers one message with `app`; a run whose app has none of the allowed digests is refused by a number."""
        version, bearer = (
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        )
        with self._client(_retry_for(_SITE_RETRY_SECONDS), version, bearer) as client:
            heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
            heartbeat.start()
            try:
                message, context, _, bundle = pull_task_input(client)
                if hashlib.sha256(bundle.content).hexdigest() in allowed:
                    reply, status = _call_app(app, message, context)
                else:
                    print("refused: the run's app is not drencoder's own", file=sys.stderr)
                    reply = Message(Error(code=REFUSED + Refusal.APP, reason=""), reply_to=message)
                    status = SubStatus.COMPLETED
                returned = context_to_proto(context)
                push_message(client, reply, context)
                client.PushTaskOutput(PushTaskOutputRequest(context=returned, sub_status=status, details=""))
            finally:
                heartbeat.stop()

    def _client(self, retry: RetryInvoker | None, *interceptors: object) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificates is None,
            root_certificates=self.certificates,
            interceptors=list(interceptors),  # type: ignore[arg-type]  # each is one
            retry_invoker=retry,
        )


def _retry_for(seconds: float) -> RetryInvoker:
    """Returns a policy that tries again for so long while nobody listens.

    Flower's own tries for ever, and sends this process SIGINT when a token has run out.
    """
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=2),
        recoverable_exceptions=httpx.TransportError,
        max_tries=None,
        max_time=seconds,
    )


def _call_app(app: ClientApp, message: Message, context: Context) -> tuple[Message, str]:
    """Returns the app's reply and status. Any exception, also one that asks to end the process, becomes a number without text."""
    try:
        return app(message=message, context=context), SubStatus.COMPLETED
    except BaseException as error:
        print(f"failed: {type(error).__name__}", file=sys.stderr)
        reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=""), reply_to=message)
        if isinstance(error, KeyboardInterrupt):
            raise
        return reply, SubStatus.FAILED
