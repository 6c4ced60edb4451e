"""How soon Flower looks again for a part of a message that is not there yet.

A message of Flower's is announced before its parts are uploaded, so that whoever looks often comes too early nearly always.
flwr 1.42 then waits 1, 2, 4, up to 10 seconds. An exchange with sites took two to five seconds because of it, and a round of
secure aggregation is five exchanges (docs/log.md).
"""

from typing import Any

from flwr.supercore.inflatable import inflatable_utils

from drencoder.flower.superlink import check_version

_FIRST = 0.05  # s
_LONGEST = 0.5  # s
_TRIES = 10_000  # as long as Flower's own 500 tries, 10 s apart, would go on


def shorten_backoff() -> None:
    """Lets this process wait 0.05 s, doubling up to 0.5 s, and give up when Flower would.

    Flower binds the times as defaults of two functions, which are replaced here; versions other than 1.42 are refused.
    """
    check_version()
    functions: tuple[Any, ...] = (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree)
    for function in functions:
        function.__kwdefaults__.update(initial_backoff=_FIRST, backoff_cap=_LONGEST, max_tries_per_object=_TRIES)
