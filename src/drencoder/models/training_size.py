"""How much memory training takes, and how many tokens train together: arithmetic on a model's shapes. No torch.

A batch of clients is cut by tokens: rows times padded length. Where the cut lies changes no bit of an update, so it may follow
from what this machine has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Multiplications of one matrix in one pass that keep a core busy: with less, the time goes into calling the operations, and with
# much more a batch leaves the caches (docs/log.md has the measurement; benchmarks/speed.py compares with other software).
_WORK = 80_000_000
# What a token leaves for the backward pass, in outputs of the linear layers, and in outputs of the head if it is predicted.
_SAVED, _SAVED_LOGITS = 3, 2
_LIBRARIES = 600 << 20  # torch and transformers themselves
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.55}  # of a weight of a linear layer
_LEAST_BYTES = 2.0  # of any other weight: fewer bits are for linear layers only, and not for the output head
_SHORT = 16  # tokens: hardly any client has less
_SHARE = 0.5  # of the free memory, for one batch


@dataclass(frozen=True)
class ModelSize:
    """What memory and time of a model depend on.

    `values` counts all weights; the others are of the linear layers without the output head: how many there are, their weights, and
    the sum of their widths (outputs).
    """

    values: int
    num_linear: int
    linear_values: int
    linear_outputs: int
    vocabulary: int = 0

    @classmethod
    def of(cls, values: int, matrices: Iterable[Sequence[int]], vocabulary: int = 0) -> "ModelSize":
        """`matrices`: the linear layers' (out, in)."""
        shapes = [tuple(shape) for shape in matrices]
        return cls(
            values, len(shapes), sum(out * width for out, width in shapes), sum(out for out, _ in shapes), vocabulary
        )

    @property
    def token_bytes(self) -> int:
        """Memory that a predicted token of a batch takes until the backward pass, float32."""
        return 4 * (_SAVED * self.linear_outputs + _SAVED_LOGITS * self.vocabulary)

    @property
    def busy_tokens(self) -> int:
        """How many tokens keep a core busy."""
        return max(1, _WORK * self.num_linear // max(1, self.linear_values))

    def way_to_train(self, tokens: int = 0) -> str:
        """How a CPU takes a cohort's clients, in words; `tokens` as `speed.tokens`. On a GPU the free memory decides, when a run begins."""
        together = tokens or self.busy_tokens
        why = "as speed.tokens says" if tokens else "which keep a core busy with this model"
        if together < _SHORT:
            return f"clients one by one: {together:,} tokens, {why}, are less than one client has"
        return f"clients together, up to {together:,} tokens a pass, {why}"

    def weight_bytes(self, dtype: str) -> int:
        """Memory of the weights in a type of `model.dtype`."""
        linear, others = _BYTES[dtype], max(_LEAST_BYTES, _BYTES[dtype])
        return round(self.linear_values * linear + (self.values - self.linear_values) * others)

    def training_bytes(self, tokens: int, dtype: str) -> int:
        """Memory of a process that trains `tokens` tokens at a time, with everything that it has loaded."""
        return _LIBRARIES + self.weight_bytes(dtype) + tokens * self.token_bytes

    def fit_tokens(self, free_bytes: int) -> int:
        """How many tokens half of the free memory holds in training."""
        return int(_SHARE * free_bytes / max(1, self.token_bytes))


def gigabytes(count: float) -> str:
    """Bytes in words, with one decimal."""
    return f"{count / 1e9:,.1f} GB"


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, within its container's limit; None where the system does not say."""
    amounts = []
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) << 10)
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        if limit.isdigit():
            used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
            amounts.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(amounts, default=None)
