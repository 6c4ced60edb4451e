"""`flower-supernode` that looks for messages more often: `python -m drencoder.flower.supernode`, with its own arguments.

flwr 1.42 sleeps three seconds between two looks, in a literal. This caps its sleeps (and see `backoff`); other versions are
refused.
"""

import importlib
import os
import signal
import time
import types

from drencoder.errors import hide_crash_messages
from drencoder.flower.backoff import shorten_backoff
from drencoder.flower.processes import die_with_parent

_RECONNECT = 5
POLL = "DRENCODER_POLL"  # environment: seconds between two looks at most


def main() -> None:
    """Starts the SuperNode."""
    die_with_parent(signal.SIGTERM)  # lets it sign off
    shorten_backoff()
    cap = float(os.environ.get(POLL, "0.5"))
    module = importlib.import_module("flwr.supernode.start_client_internal")
    module.time = types.SimpleNamespace(  # type: ignore[attr-defined]
        time=time.time,
        monotonic=time.monotonic,
        perf_counter=time.perf_counter,
        sleep=lambda s: time.sleep(min(s, cap)),
    )
    # It would wait up to 20 s between two attempts to find a server that comes back.
    importlib.import_module("flwr.supercore.retry.http_retry").MAX_RETRY_DELAY = _RECONNECT  # type: ignore[attr-defined]
    importlib.import_module("flwr.supernode.cli.flower_supernode").flower_supernode()


if __name__ == "__main__":
    with hide_crash_messages():
        main()
