"""Bytes in a Flower message, in how many parts they travel, and how soon Flower looks again for a part that is not there yet."""

import importlib.util
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_MAX_TRIES_PER_OBJECT
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from drencoder.errors import EngineError
from drencoder.flower import backoff, deploy, superlink
from drencoder.flower.transport import read_payload, wrap_payload

SMALL = 1 << 18


def sent(data: bytes) -> tuple[bytes, int]:
    """What arrives, and in how many parts, the message itself among them: taken apart and put together as Flower does it."""
    content = wrap_payload(data)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
    count = 1 + len(parts)
    again = inflatable_utils.inflate_object_from_contents(content.object_id, parts)
    assert isinstance(again, RecordDict)
    return read_payload(again), count


@pytest.mark.parametrize("size", [0, 1, 1000, SMALL, SMALL + 1, 6 << 20])
def test_bytes_arrive_as_they_were(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    arrived, parts = sent(data)
    assert arrived == data
    assert (parts == 3) if size <= SMALL else (parts >= 5)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"frame": b"text"})}),
        RecordDict({"drencoder": ConfigRecord({"other": b"text"})}),
        RecordDict({"drencoder": ConfigRecord({"frame": "text"})}),
        RecordDict({"drencoder": ConfigRecord({"frame": [b"text"]})}),
        RecordDict({"drencoder": MetricRecord({"frame": 1})}),
        RecordDict({"drencoder": ArrayRecord()}),
        RecordDict({"drencoder": ArrayRecord({"frame": Array("uint8", (4,), "numpy.ndarray", b"text")})}),
    ],
)
def test_any_other_content_is_no_bytes(content: RecordDict) -> None:
    assert read_payload(content) == b""


class _Watched(threading.Event):
    """An event on which nobody waits in vain."""

    waits: ClassVar[list[float]] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.is_set()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every wait between two looks. Flower's own times are from a fresh copy of its module: another test of this process that
    starts a server has changed them in the one that is in use."""
    spec = importlib.util.find_spec(inflatable_utils.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        knobs = dict(getattr(fresh, function.__name__).__kwdefaults__)
        monkeypatch.setattr(function, "__kwdefaults__", knobs)
    watched = type("Watched", (_Watched,), {"waits": []})
    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Lock=threading.Lock, Event=watched))
    found: list[float] = watched.waits
    return found


def pull_after(misses: int) -> dict[str, bytes]:
    """Pulls one object that is there after so many looks."""
    looks = [0]

    def pull(name: str) -> bytes:
        looks[0] += 1
        if looks[0] <= misses:
            raise inflatable_utils.ObjectUnavailableError(name)
        return b"text"

    return inflatable_utils.pull_objects(["a"], pull)


def test_a_part_that_comes_a_moment_later_is_looked_for_at_once(waits: list[float]) -> None:
    pull_after(1)
    flowers_own = list(waits)
    waits.clear()
    backoff.shorten_backoff()
    assert pull_after(1) == {"a": b"text"}
    assert flowers_own[0] >= 0.8
    assert waits[0] <= 0.06
    waits.clear()
    assert pull_after(600) == {"a": b"text"}  # Flower's own 500 tries are made up for
    assert 0.4 <= max(waits) <= 0.6


def test_nobody_gives_up_earlier_than_flower_does(waits: list[float]) -> None:
    backoff.shorten_backoff()
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        knobs: dict[str, Any] = function.__kwdefaults__
        assert knobs["max_tries_per_object"] * knobs["backoff_cap"] >= PULL_MAX_TRIES_PER_OBJECT * PULL_BACKOFF_CAP


def test_server_and_site_shorten_it_first_and_only_for_the_version_that_was_read(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "version", lambda name: "1.43.0")
    for start in (deploy.run_server, deploy.run_site, lambda *_: backoff.shorten_backoff()):
        with pytest.raises(EngineError, match=r"flwr 1\.43\.0 is installed"):
            start(None, None)  # type: ignore[arg-type]  # nothing of them is looked at before
    assert inflatable_utils.pull_objects.__kwdefaults__["initial_backoff"] == 1
