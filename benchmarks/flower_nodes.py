"""Seconds and bytes of a round on a loopback deployment, by number of nodes, with and without secure aggregation.

    python benchmarks/flower_nodes.py [--nodes 3 10 30] [--rounds 6] [--trust local secure-aggregation] [--out docs/results/flower-nodes.json]

Every node is two processes (drencoder client and its SuperNode) with TLS and a key of its own. A proxy between the nodes and the
server counts what passes, TLS and HTTP included; the payload is what the server's engine hands over; the estimate is the
recipe's plan. The first round is left out of the medians: encoders are built in it. CPU seconds are those of all processes, sites among
them. Payload and codes are totals of the run,
stage 1 included; under secure aggregation `codes_up_total` counts all of the protocol's messages.
"""

import argparse
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the deployment that the tests start, too

from speed_parts.machine import tree_cpu_seconds

from deployment import deployed, find_free_port, small_recipe
from drencoder.runs.plan_overview import survey


class CountingProxy:
    """Forwards connections to a port of the loopback and counts bytes towards the server (up) and the nodes (down)."""

    def __init__(self, target: int) -> None:
        self.port, self.target = find_free_port(), target
        self.up = self.down = 0
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inside, _ = self._listener.accept()
                outside = socket.create_connection(("127.0.0.1", self.target), timeout=30)
            except OSError:
                continue
            threading.Thread(target=self._pump, args=(inside, outside, "up"), daemon=True).start()
            threading.Thread(target=self._pump, args=(outside, inside, "down"), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


def rounds_of(server: subprocess.Popen[bytes], log: Path, count: int, seconds: float = 3600.0) -> Iterator[float]:
    """The time at which each round's line appears in the log of the server, which must not end before the last one, from round 0 on."""
    end, seen = time.monotonic() + seconds, 0
    while seen <= count:
        running = server.poll() is None
        found = len(re.findall(r"round \d+: .* up\b", log.read_text() if log.exists() else ""))
        for _ in range(seen, found):
            yield time.monotonic()
        seen = max(seen, found)
        if seen <= count and (not running or time.monotonic() > end):
            raise TimeoutError(log.read_text()[-3000:])
        time.sleep(0.02)


def measure(nodes: int, rounds: int, trust: str, folder: Path) -> dict[str, object]:
    recipe = small_recipe(
        "privacy.noise=replay", "federation.population=60", f"federation.rounds={rounds}", "adapter.rank=8",
        "encoder.name=random", "encoder.ratio=64", f"privacy.trust={trust}", f"federation.nodes={nodes}", f"privacy.participation_cap={rounds + 1}", "evaluation.every=0",
    )  # fmt: skip
    plan = survey(recipe)
    with deployed(folder, recipe, nodes) as place:
        proxy, start = CountingProxy(place.port), time.monotonic()
        server = place.server("--quorum", "1", "--round-timeout", "120")
        direct, place.port = place.port, proxy.port
        for number in range(nodes):
            place.node(number)
        place.port = direct
        marks = [
            (moment, proxy.up, proxy.down, tree_cpu_seconds())
            for moment in rounds_of(server, place.log("server"), rounds)
        ]
        assert server.wait(120) == 0, place.log("server").read_text()[-3000:]
        payload = re.search(r"payload: ([\d,]+) bytes down, ([\d,]+) up", place.log("server").read_text())
        certificate = json.loads((folder / "run" / "certificate.json").read_text())
    assert payload is not None
    steps = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(marks)][1:]
    return {
        "rounds": rounds,
        "trust": trust,
        "nodes": nodes,
        "cohort": plan.privacy.expected_cohort,
        "start_s": round(marks[0][0] - start, 1),
        "round_s": round(statistics.median(step[0] for step in steps), 2),
        "round_cpu_s": round(statistics.median(step[3] for step in steps), 2),
        "load": round(os.getloadavg()[0], 1),
        "wire_up": round(statistics.median(step[1] for step in steps)),
        "wire_down": round(statistics.median(step[2] for step in steps)),
        "payload_up_total": int(payload[2].replace(",", "")),
        "payload_down_total": int(payload[1].replace(",", "")),
        "codes_up_total": certificate["bytes"]["uploaded"],
        "planned_up_total": plan.total_bytes,
        "message_bytes": plan.message_bytes,
        "adapter_bytes": 4 * (plan.adapter_size or 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--trust", nargs="+", default=["local", "secure-aggregation"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.nodes, arguments.rounds, arguments.trust = [2], 2, ["local"]
    rows = []
    print(
        "trust               nodes  start s  round s  round CPU s  wire up/round  wire down/round  payload up  codes up  planned up"
    )
    for nodes, trust in itertools.product(arguments.nodes, arguments.trust):
        with tempfile.TemporaryDirectory() as folder:
            row = measure(nodes, arguments.rounds, trust, Path(folder) / "place")
        rows.append(row)
        print(
            f"{trust:19} {nodes:5d} {row['start_s']:8} {row['round_s']:8} {row['round_cpu_s']:12} {row['wire_up']:14,} {row['wire_down']:16,} "
            f"{row['payload_up_total']:11,} {row['codes_up_total']:9,} {row['planned_up_total']:11,}",
            flush=True,
        )
        if arguments.out:
            arguments.out.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
