"""What noise costs: floating-point normals as they were, one table of a discrete Gaussian searched as it was, and the sampler of today.

    python benchmarks/noise.py [--sizes 512,131072,8388608] [--repeats 3] [--json FILE]

All draw on the operating system's generator. *Floating point* is the sum of four normals from 64 bits each, halved (Holohan and
Braghin 2021), which local and central trust added before. *One table searched* inverts the distribution function by a
binary search with 64 bits for each value, as secure aggregation did before. *Today's* sampler is `secure_aggregation.discrete` at the
standard deviation that local and central trust have at this size. Times are of the process, so that a busy machine shows less.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from drencoder.privacy.mechanism import BoundedSum, clip_rows
from drencoder.secure_aggregation.discrete import discrete_gaussian
from drencoder.secure_aggregation.quantise import Quantiser

SIGMA = 1.0
_LOG_RISK = -70.0  # of a local message that wraps around: a plan of epsilon 8
_TABLE_STD = 4096.0


def system_words(count: int) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * count), dtype="<u8")


def floating_point(size: int) -> np.ndarray:
    out, step = np.empty(size), 1 << 20
    for start in range(0, size, step):
        count = min(step, size - start)
        words = system_words(4 * count).reshape(4, count)
        out[start : start + count] = ndtri(((words >> np.uint64(12)) + 0.5) * 2.0**-52).sum(0) / 2
    return out


def one_table_searched(size: int) -> np.ndarray:
    first = discrete_gaussian(_TABLE_STD)._tables[0]._first
    magnitude = np.searchsorted(first, system_words(size), side="right")
    signs = np.unpackbits(system_words(-(-size // 64)).view(np.uint8))[:size].astype(np.int64)
    return magnitude * (1 - 2 * signs)


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the process."""
    work()  # tables are made once
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(size: int, repeats: int) -> dict[str, float]:
    local = Quantiser.alone(values=size, clip_l2=1.0, noise_multiplier=SIGMA, log_wrap_risk=_LOG_RISK)
    central = Quantiser.fine(values=size, clip_l2=1.0, noise_multiplier=SIGMA)
    code_V = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    code_V *= np.float32(0.99 / np.linalg.norm(code_V))
    import torch

    torch.set_num_threads(1)
    codes = clip_rows(torch.from_numpy(code_V)[None], 1.0)
    total = BoundedSum.zero(size, 1.0)
    start = time.process_time()
    discrete_gaussian.__wrapped__(central.std_steps)
    return {
        "size": size,
        "table_seconds": time.process_time() - start,
        "floating_point": fastest(lambda: floating_point(size), repeats),
        "one_table_searched": fastest(lambda: one_table_searched(size), repeats),
        "one_table": fastest(lambda: discrete_gaussian(_TABLE_STD).sample(size, system_words), repeats),
        "local_noise": fastest(lambda: local.noise(system_words), repeats),
        "local_round_and_noise": fastest(lambda: local.round_and_noise(code_V, system_words), repeats),
        "central_noise": fastest(lambda: central.noise(system_words), repeats),
        "central_add_one_code": fastest(lambda: total.add(codes), repeats),
        "local_bits": local.bits,
        "local_std_steps": local.std_steps,
        "central_std_steps": central.std_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="512,131072,8388608")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, to see that the script works")
    options = parser.parse_args()
    if options.smoke:
        options.sizes, options.repeats = "512", 1
    rows = [measure(int(size), options.repeats) for size in options.sizes.split(",")]
    names = [name for name in rows[0] if name not in ("size", "table_seconds") and not name.endswith(("bits", "steps"))]
    print(f"{'milliseconds of':24}" + "".join(f"{row['size']:>14,}" for row in rows) + "   nanoseconds a value")
    for name in names:
        times = "".join(f"{1e3 * row[name]:>14.2f}" for row in rows)
        print(f"{name.replace('_', ' '):24}{times}{1e9 * rows[-1][name] / rows[-1]['size']:>14.0f}")
    print(f"bits of a local message   {', '.join(str(row['local_bits']) for row in rows)}")
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "sigma": SIGMA, "repeats": options.repeats}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
