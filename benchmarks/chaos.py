"""Many rounds on the loopback while nodes are killed, hung and lie at random; then what is left is compared with a calm run.

    python benchmarks/chaos.py [--rounds 30] [--nodes 3] [--seed 0] [--out docs/results/chaos.json]

Real processes, TLS, node keys, secure noise, local trust, the quickstart with 75 clients a round at epsilon 30. Every few seconds one node is killed (kill -9; started again later) or
stopped (SIGSTOP; continued later); one node lies by itself in half of its answers. At the end the ledger must hold every charge,
the run's own verification must hold, and the held-out loss is set beside that of calm runs with other noise.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the deployment that the tests start, too

import psutil

from deployment import Deployment, deployed
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.runs import run as experiment
from drencoder.runs.verify import verify_run


def lie(folder: Path, number: int, port: int, seed: int) -> None:
    """A node whose answers are cut, changed, repeated or made of noise half of the time."""
    from drencoder.federated.remote.frames import Kind
    from drencoder.flower.client_app import open_site
    from drencoder.flower.deploy import SiteEndpoint, run_site

    own = folder / "certs" / f"node{number}"
    site = open_site(
        str(folder / "recipe.toml"), (own / "clients").read_text().strip(), data=None, state=own / "state", say=print
    )
    honest, chance, kept = site.answer, random.Random(seed), [b""]

    def answer(data: bytes) -> bytes:
        sound = honest(data)
        if data[5:6] == bytes([Kind.HELLO]) or chance.random() < 0.5:
            kept[0] = sound
            return sound
        place = chance.randrange(60, len(sound))
        lies = (
            sound[:place],
            sound[:place] + chance.randbytes(8) + sound[place + 8 :],
            chance.randbytes(len(sound)),
            kept[0],
            sound[:80] + b"\x00\x00\xc0\x7f" * ((len(sound) - 80) // 4),
        )
        return chance.choice(lies)

    site.answer = answer  # type: ignore[method-assign]
    run_site(site, SiteEndpoint(f"127.0.0.1:{port}", own / "ca.crt", own / "key", own / "state", 0.1))


class Weather:
    """What befalls the nodes; node 0 is the liar and is left to itself."""

    def __init__(self, place: Deployment, seed: int) -> None:
        self.place, self.chance = place, random.Random(seed)
        self.down: dict[int, float] = {}  # node -> when it is started again
        self.stopped: dict[int, float] = {}
        self.kills = self.hangs = 0

    def blow(self) -> None:
        now = time.monotonic()
        for number in [n for n, when in self.down.items() if when < now]:
            del self.down[number]
            self.place.node(number)
        for number in [n for n, when in self.stopped.items() if when < now]:
            del self.stopped[number]
            self.place.processes[f"node{number}"].send_signal(signal.SIGCONT)
        standing = [n for n in range(1, self.place.nodes) if n not in self.down and n not in self.stopped]
        if len(standing) < self.place.nodes - 1 or self.chance.random() > 0.15:
            return
        number = self.chance.choice(standing)
        process = self.place.processes[f"node{number}"]
        if self.chance.random() < 0.5:
            process.kill()
            process.wait()
            self.down[number], self.kills = now + self.chance.uniform(1, 10), self.kills + 1
        else:
            process.send_signal(signal.SIGSTOP)
            self.stopped[number], self.hangs = now + self.chance.uniform(3, 15), self.hangs + 1

    def clear(self) -> None:
        for number in self.stopped:
            self.place.processes[f"node{number}"].send_signal(signal.SIGCONT)


def memory(pid: int) -> list[int]:
    """Resident bytes of the server and of its SuperLink."""
    found = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children()]:
        try:
            found.append(process.memory_info().rss)
        except psutil.Error:
            continue
    return found


def chaos(folder: Path, recipe: Recipe, nodes: int, seed: int) -> dict[str, object]:
    samples: list[list[int]] = []
    with deployed(folder, recipe, nodes) as place:
        server = place.server("--quorum", "0.2", "--round-timeout", "8")
        for number in range(1, nodes):
            place.node(number)
        with place.log("node0").open("ab") as log:
            place.processes["node0"] = subprocess.Popen(
                [sys.executable, __file__, "--liar", str(folder), "0", str(place.port), str(seed)],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        weather, end = Weather(place, seed), time.monotonic() + 900
        while server.poll() is None and time.monotonic() < end:
            if "round 0:" in place.log("server").read_text():
                weather.blow()
                samples.append(memory(server.pid))
            time.sleep(1.0)
        weather.clear()
        text = place.log("server").read_text()
        assert server.wait(10) == 0, text[-3000:]
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    half = [sample for sample in samples if len(sample) == 2][len(samples) // 3 :]
    return {
        "rounds": recipe.federation.rounds,
        "nodes": nodes,
        "kills": weather.kills,
        "hangs": weather.hangs,
        "lies_found": text.count("answer thrown away"),
        "missing_answers": len(re.findall(r"no answer within|Flower's error", text)),
        "abandoned": sum(row["kind"] == "abandoned" for row in rows),
        "charges": [row["slot"] for row in rows if row["kind"] == "charge"],
        "verified": verify_run(run).trouble == "",
        "loss": json.loads((run / "certificate.json").read_text())["results"]["this run"]["loss"]["value"],
        "server_mib": [_median_mib([s[0] for s in part]) for part in (half[:10], half[-10:])],
        "superlink_mib": [_median_mib([s[1] for s in part]) for part in (half[:10], half[-10:])],
        "seconds": len(samples),
    }


def _median_mib(sizes: Sequence[int]) -> int | None:
    """In MiB; None of a run that was over before it was looked at."""
    return round(statistics.median(sizes) / 2**20) if sizes else None


def main() -> None:
    if sys.argv[1:2] == ["--liar"]:
        lie(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calm", type=int, default=4, help="undisturbed runs, for the spread")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.nodes, arguments.calm = 1, 2, 1
    recipe = load_recipe(
        "quickstart",
        [
            f"federation.rounds={arguments.rounds}", "federation.population=3000", "federation.sampling_rate=0.025",
            "privacy.epsilon=30", "evaluation.examples=64",
            *(["federation.population=60", "federation.sampling_rate=0.2", "privacy.delta=1e-3"] if arguments.smoke else []),
        ],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        calm = []
        for number in range(arguments.calm):
            result = experiment.run(recipe, Path(folder) / f"calm{number}")
            calm.append(result.certificate["results"]["this run"]["loss"]["value"])
        start = result.certificate["results"]["zero update"]["loss"]["value"]
        found = chaos(Path(folder) / "place", recipe, arguments.nodes, arguments.seed)
    found |= {"calm_losses": calm, "start_loss": start, "seed": arguments.seed}
    complete = found["charges"] == list(range(arguments.rounds + 1))
    for key, value in found.items():
        print(f"{key:16} {'0..' + str(arguments.rounds) if key == 'charges' and complete else value}")
    print(f"{'ledger':16} {'complete' if complete else 'NOT complete'}")
    if arguments.out:
        found["charges"] = f"0..{arguments.rounds}" if complete else found["charges"]
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
