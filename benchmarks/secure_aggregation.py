"""What secure aggregation costs: seconds and bytes of a node and of the server in one round, with it and without.

    OMP_NUM_THREADS=1 python benchmarks/secure_aggregation.py --json docs/results/secure-aggregation.json

One client a node, threshold as the default recipe has it (a quarter of the nodes may drop out). "without" is a node that
sends its float32 code as it is (`encoders.wire`) and a server that unpacks and adds up. "with" is the whole protocol of
`secure_aggregation/` in one process and one thread: five steps, their messages as bytes, nothing left out. Rounding and noise of a code
have a column of their own: distributed noise costs them whatever protocol carries the sum. Printed are medians over
repeats, of the nodes' the median node's; nothing is asserted but that the sum is the right one.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from drencoder.encoders.code_sizes import bytes_text
from drencoder.encoders.wire import WireFormat, pack_rows, unpack_rows
from drencoder.secure_aggregation.client import SecAggClient
from drencoder.secure_aggregation.crypto import NodeKey
from drencoder.secure_aggregation.discrete import discrete_gaussian
from drencoder.secure_aggregation.messages import ProtocolStep, RoundSettings
from drencoder.secure_aggregation.quantise import Quantiser
from drencoder.secure_aggregation.server import SecAggServer, aggregate

NODES = (3, 10, 30)
VALUES = (2_048, 131_072, 8_388_608)
SHARE = 0.1  # noise std of a share over the sensitivity: about that of 36 honest contributors at epsilon 8


def system_words(count: int) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * count), dtype="<u8")


def clipped_code(values: int) -> np.ndarray:
    code = np.random.default_rng(0).standard_normal(values).astype(np.float32)
    return code * np.float32(0.999 / np.linalg.norm(code))


def protocol(nodes: int, quantiser: Quantiser, dropped: int) -> dict[str, float]:
    """One round; `dropped` nodes vanish when their masked vector is due, the dearest moment for the server."""
    keys = [NodeKey.generate() for _ in range(nodes)]
    threshold = nodes - nodes // 4
    settings = RoundSettings(
        "benchmark", 1, 0, quantiser.values, quantiser.bits, threshold, 1, (1,) * nodes, tuple(k.public for k in keys)
    )
    # All nodes have the same vector, so that 30 of them fit into memory; the masks are their own all the same.
    vector_V = quantiser.to_residues(np.random.default_rng(1).integers(-1000, 1000, quantiser.values))
    party = [SecAggClient(settings, node, keys[node], lambda: vector_V) for node in range(nodes)]
    spent = dict.fromkeys(range(nodes), 0.0)

    def exchange(step: ProtocolStep, requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = {}
        for node, request in requests.items():
            if step >= ProtocolStep.MASK and node < dropped:
                continue
            started = time.perf_counter()
            answers[node] = party[node].answer(step, request)
            spent[node] += time.perf_counter() - started
        return answers

    started = time.perf_counter()
    found = aggregate(SecAggServer(settings), exchange)
    whole = time.perf_counter() - started
    modulus = np.uint32((1 << quantiser.bits) - 1)
    assert np.array_equal(found.sum_V, (vector_V * np.uint32(nodes - dropped)) & modulus)
    stayed = [spent[node] for node in range(dropped, nodes)]
    return {
        "node_seconds": statistics.median(stayed),
        "server_seconds": whole - sum(spent.values()),
        "node_bytes_up": sum(found.bytes_up.values()) / nodes,
        "node_bytes_down": sum(found.bytes_down.values()) / nodes,
    }


def plainly(nodes: int, code_V: np.ndarray) -> dict[str, float]:
    """Without secure aggregation: pack, unpack, add up."""
    wire = WireFormat(code_V.size, 1)
    started = time.perf_counter()
    message = pack_rows(torch.from_numpy(code_V)[None], wire, 1)[0]
    packed = time.perf_counter()
    total_V = torch.zeros(code_V.size, dtype=torch.float64)
    for _ in range(nodes):
        total_V += unpack_rows([message], wire, 1).code_NK[0]
    return {
        "plain_node_seconds": packed - started,
        "plain_server_seconds": time.perf_counter() - packed,
        "plain_node_bytes_up": len(message),
    }


def noising(quantiser: Quantiser, code_V: np.ndarray) -> dict[str, float]:
    started = time.perf_counter()
    quantiser.round_and_noise(code_V, system_words)
    return {"noise_seconds": time.perf_counter() - started}


def measured(nodes: int, values: int, repeats: int) -> dict[str, Any]:
    code_V = clipped_code(values)
    quantiser = Quantiser.shared(values=values, clip_l2=1.0, share_multiplier=SHARE, most_clients=nodes)
    started = time.perf_counter()
    discrete_gaussian(quantiser.std_steps)
    table = time.perf_counter() - started
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        lost = protocol(nodes, quantiser, nodes // 4)
        runs.append(
            plainly(nodes, code_V)
            | noising(quantiser, code_V)
            | protocol(nodes, quantiser, 0)
            | {"server_seconds_most_lost": lost["server_seconds"]}
        )
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    facts = {"nodes": nodes, "values": values, "bits": quantiser.bits, "threshold": nodes - nodes // 4}
    return facts | {"repeats": repeats, "table_seconds": table} | medians


def shown(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "values", "nodes", "bits", "noise s", "node s with", "without", "server s with", "most lost", "without",
        "node up with", "without", "protocol up", "down",
    )  # fmt: skip
    for row in rows:
        vector = row["values"] * row["bits"] // 8
        table.add_row(
            f"{row['values']:,}", str(row["nodes"]), str(row["bits"]), f"{row['noise_seconds']:.3f}",
            f"{row['node_seconds']:.3f}", f"{row['plain_node_seconds']:.4f}", f"{row['server_seconds']:.3f}",
            f"{row['server_seconds_most_lost']:.3f}", f"{row['plain_server_seconds']:.3f}",
            bytes_text(round(row["node_bytes_up"])), bytes_text(round(row["plain_node_bytes_up"])),
            bytes_text(round(row["node_bytes_up"] - vector)), bytes_text(round(row["node_bytes_down"])),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--values", type=int, nargs="+", default=VALUES)
    parser.add_argument("--repeats", type=int, default=5, help="of sizes above a million: 3 at most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    args = parser.parse_args()
    if args.smoke:
        args.nodes, args.values, args.repeats = [4], [64], 1
    torch.set_num_threads(1)
    rows = []
    for values in args.values:
        for nodes in args.nodes:
            rows.append(measured(nodes, values, min(args.repeats, 3) if values > 1_000_000 else args.repeats))
            print(json.dumps(rows[-1]), flush=True)
    Console(width=160).print(shown(rows))
    if args.json:
        machine = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "threads": 1,
        }
        args.json.write_text(json.dumps({"machine": machine, "share": SHARE, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
