"""What the utility study runs: settings, arms, cells, the recipe of each, and how learning rate and clip are tuned. No torch.

A *setting* is a trust model, a task, an adapter, a cohort and an epsilon. An *arm* is a method with its code size. A *track* is an
arm in a setting; a *cell* is one run of a track: a seed, a step of the learning rate and a step of the clip.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from drencoder.encoders.code_sizes import SMALL_RATIO
from drencoder.encoders.planning import wire_dtype
from drencoder.encoders.registry import declaration_of
from drencoder.recipe.recipe import Recipe, load_recipe

TRUSTS = ("central", "local")
# Without trust 8 clients a round leave k* at 0.3 and 3, with which next to nothing is learned; and each draws its own secure
# noise: too slow here for 512 clients, or for the large adapter.
LOCAL_PLACES = (("small", 64),)
TASKS = ("letters", "facts")
# Of the embedded world, too, and looked at by no choice since momentum 1/4: whether the result is tuned to the others.
HELD_BACK, HELD_BACK_PLACES = "next", (("small", 8), ("small", 64))
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "small": {"adapter.rank": 8, "adapter.targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},  # D = 32,768
    "large": {  # D = 315,392
        "adapter.rank": 32,
        "adapter.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}
ADAPTER_SIZES = {"small": 32_768, "large": 315_392}
COHORTS = (8, 64, 512)
Place = tuple[str, int]  # an adapter and a cohort
# 512 clients with the large adapter are left out: some 80 s a run (an estimate), an hour and a half for the two methods alone.
EVERYWHERE: tuple[Place, ...] = tuple(
    (adapter, cohort) for adapter in ADAPTERS for cohort in COHORTS if (adapter, cohort) != ("large", 512)
)
EPSILONS = (1.0, 4.0)
# On how many seeds rates and clips are tuned, and on how many others they are judged: small cohorts and clients' own noise differ
# more from run to run, and small cohorts take less time. One tuning seed is little; it is what two cores had the time for.
SEEDS = {
    ("central", "small", 8): (8, 48),
    ("central", "small", 64): (2, 6),
    ("central", "small", 512): (1, 3),
    ("central", "large", 8): (12, 48),
    ("central", "large", 64): (2, 6),
    ("local", "small", 64): (8, 24),
}
FIRST_TUNING_SEED, FIRST_JUDGED_SEED = 100, 1000

# A trusted server samples from few clients; without trust a client answers once, so there must be more than rounds x cohort.
POPULATIONS = {"central": 2_000, "local": 10_000, "non-private": 2_000}

RATE_FACTOR, CLIP_FACTOR = 2.0, 4.0
# Learning rates that a track tries: 0, -1, +1, then a half step inside, or on beyond the edge while that is the better side.
LEAST_RATES, MOST_RATES = 4, 6
# A larger rate, or another clip, has to be better by more than this: of two that are alike the larger rate is the one whose
# seeds diverge.
CLEARLY = 0.01
# Clips tried at the best rate, with the rate the other way. At the base clip all clients' updates are longer than it, and a
# smaller one would be the same run; a larger one shortens the steps as the updates do.
CLIP_STEPS = (1,)
BASE_CLIP = 1.0
MOMENTUM = 0.25  # of 0, 1/4, 1/2, 0.8 and 0.9 the best for DP-LoRA on seeds 100 to 102 (docs/log.md)

# Noise asks for smaller steps: a quadratic with the curvature of this many equal directions has its best rate at
# 1 / (1 + directions / k*) of the noiseless one; 100 fits what exploratory runs found best at k* of 73 and 1,698. The same
# factor for every arm, as a power of two, so that few tuning runs are enough.
NOISY_DIRECTIONS = 100.0
SMALLEST_SCALE = 2.0**-5


@dataclass(frozen=True)
class Scale:
    """How much each cell computes. A study folder holds cells of one scale."""

    rounds: int = 16
    examples: int = 256
    questions: int = 128
    examples_per_client: int = 1
    public_clients: int = 16


@dataclass(frozen=True)
class Setting:
    """`epsilon` is None without noise."""

    trust: str
    task: str
    adapter: str
    cohort: int
    epsilon: float | None

    def __str__(self) -> str:
        budget = "no-noise" if self.epsilon is None else f"eps{self.epsilon:g}"
        return f"{self.trust}/{self.task}/{self.adapter}/n{self.cohort}/{budget}"

    @property
    def seeds(self) -> range:
        """Those that are judged."""
        return range(FIRST_JUDGED_SEED, FIRST_JUDGED_SEED + self._seeds[1])

    @property
    def tuning_seeds(self) -> range:
        """Those that rate and clip are tuned on."""
        return range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self._seeds[0])

    @property
    def _seeds(self) -> tuple[int, int]:
        trust = "central" if self.trust == "non-private" else self.trust
        return SEEDS[trust, self.adapter, self.cohort]

    @property
    def adapter_size(self) -> int:
        """D."""
        return ADAPTER_SIZES[self.adapter]


@dataclass(frozen=True)
class Arm:
    """A method with its code size, and where it runs.

    Args:
      first_rate: the learning rate that tuning starts from at n = 64; found in exploratory runs on other seeds.
      rank: settings of a smaller one come first.
      reason: why these cohorts and adapters and not all.
    """

    name: str
    knobs: Mapping[str, Any]
    first_rate: float
    public: bool = False
    places: tuple[Place, ...] = EVERYWHERE
    trusts: tuple[str, ...] = TRUSTS
    rank: int = 0
    reason: str = "decides the study: everywhere"

    def runs_in(self, setting: Setting) -> bool:
        if setting.task == HELD_BACK and self.rank:
            return False
        return (setting.adapter, setting.cohort) in self.places and setting.trust in self.trusts

    def first_rate_at(self, k_star: float) -> float:
        """The learning rate that tuning starts from under this much noise."""
        return self.first_rate * noise_scale(k_star)


def _coded(name: str, first_rate: float, encoder: str | None = None, ratio: int | None = None, **where: Any) -> Arm:
    encoder = encoder or name
    knobs = {"encoder.name": encoder} | ({} if ratio is None else {"encoder.ratio": float(ratio)})
    return Arm(name, knobs, first_rate, declaration_of(encoder).public_text == "required", **where)


_TRUSTED: dict[str, Any] = {"trusts": ("central",)}
_MIDDLE: dict[str, Any] = _TRUSTED | {"places": (("small", 64),), "rank": 3, "reason": "comparator: the middle cohort"}
_FEWER: dict[str, Any] = _MIDDLE | {"places": (("small", 8), ("small", 64)), "reason": "comparator: two cohorts"}
_SMALL_CODE: dict[str, Any] = _TRUSTED | {"places": (("small", 64), ("small", 512)), "rank": 1}
TEST_ARM = "hybrid-64-fresh"
_ELSEWHERE = {"places": (("small", 8), ("large", 64)), "reason": "hybrid-64 elsewhere: a test of the forecast"}
_PART: dict[str, Any] = _MIDDLE | {"rank": 2}
# Size, start and bits from the plan; the base recipe has a size.
_PLANNED: dict[str, Any] = {"encoder.name": "hybrid", "encoder.ratio": 0.0, "encoder.wire_dtype": "auto"}
# Four bits a value: a little fewer bytes than 1/64 of the values in float32, so that headers have room.
_SMALL: dict[str, Any] = {"encoder.name": "hybrid", "encoder.ratio": SMALL_RATIO, "encoder.wire_dtype": "rotated4"}
_SILENT: dict[str, Any] = {"privacy.trust": "non-private", "encoder.name": "identity"}


def _variant(name: str, first_rate: float, reason: str, **knobs: Any) -> Arm:
    """The default encoder at 1/80 of the bytes with one thing changed."""
    changed = {f"{section}.{key}": value for section, part in knobs.items() for key, value in part.items()}
    return Arm(name, _SMALL | changed, first_rate, public=True, **_PART | {"reason": reason})


_ALL = (
    Arm("dp-lora", {"encoder.name": "identity"}, 0.75),
    Arm("hybrid", _PLANNED, 3.0, public=True),
    Arm("hybrid-10", _SMALL, 3.0, public=True, **_SMALL_CODE | {"reason": "equal bytes"}),
    _coded("hybrid-64", 3.0, "hybrid", 64, **_SMALL_CODE | {"reason": "equal bytes, in float32"}),
    _coded(TEST_ARM, 3.0, "hybrid", 64, **_SMALL_CODE | _ELSEWHERE),
    Arm("lora", _SILENT, 0.75, **_MIDDLE | {"trusts": ("non-private",), "rank": 2, "reason": "how far training comes"}),
    _variant("both-tensors", 1.5, "LoRA's A sent as well", encoder={"tensors": "both"}),
    _variant("self-written", 3.0, "public text by the base model itself", prior={"public": "self"}),
    _variant("no-refresh", 3.0, "bases of the start in all rounds", prior={"refresh": 1000}),
    _variant("adaptive-clip", 3.0, "what a clip that follows is worth", privacy={"clip": "adaptive"}),
    _variant("preconditioned", 6.0, "a decoding that knows prior and noise", server={"decoding": "precondition"}),
    _variant("wiener-decoding", 3.0, "shrinkage in every round", server={"decoding": "wiener"}),
    _coded("kronecker-64", 1.5, "kronecker", 64, **_PART | {"reason": "the head of hybrid alone, of both tensors"}),
    _coded("ffa", 1.5, **_FEWER),
    _coded("random-64", 16.0, "random", 64, **_FEWER),
    _coded("top-k-64", 1.5, "top-k", 64, **_FEWER),
    _coded("power-64", 3.0, "power", 64, **_FEWER),
    _coded("core", 1.5, **_FEWER),
    Arm("ffa-orthonormal", {"encoder.name": "ffa", "adapter.start": "orthonormal"}, 1.5, **_MIDDLE),
    Arm(
        "dp-lora-adam",
        {"encoder.name": "identity", "server.optimizer": "fedadam", "server.momentum": 0.9},
        0.016,
        **_MIDDLE,
    ),
    Arm(
        "dp-lora-public",
        {"encoder.name": "identity", "adapter.start": "public"},
        0.75,
        public=True,
        **_MIDDLE | {"places": (("small", 8),), "reason": "comparator: whole updates from hybrid's start"},
    ),
    Arm("dp-lora-4-bits", {"encoder.name": "identity", "encoder.wire_dtype": "rotated4"}, 0.75, **_MIDDLE),
    Arm("dp-lora-singular", {"encoder.name": "identity", "server.decoding": "singular"}, 3.0, **_MIDDLE),
    _coded("scalars-2048", 32.0, "random", 2048, **_MIDDLE),  # FedKSeed's idea without its finite differences
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ALL}
COMPARATORS = (
    "random-64", "dp-lora-public", "dp-lora-4-bits", "dp-lora-adam", "dp-lora-singular", "ffa", "ffa-orthonormal", "core", "top-k-64", "power-64", "scalars-2048",
)  # fmt: skip
PARTS = (
    "both-tensors", "self-written", "no-refresh", "adaptive-clip", "preconditioned", "wiener-decoding", "kronecker-64",
)  # fmt: skip
EQUAL_BYTES_ARMS = ("hybrid-10", "hybrid-64")  # of a size of their own; 512 codes are as many bytes as 8 whole updates
OURS = ("hybrid", *EQUAL_BYTES_ARMS)
FORESEEN = (*OURS, TEST_ARM)  # whose duels with DP-LoRA the formula is asked about
FOUR_BITS = OURS[:2]  # what the product sends under a trusted server if nobody says otherwise


@dataclass(frozen=True)
class Track:
    arm: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.setting}/{self.arm}"


@dataclass(frozen=True)
class Cell:
    """Rate: `Arm.first_rate_at` x RATE_FACTOR ** rate_step / CLIP_FACTOR ** clip_step; clip: x CLIP_FACTOR ** clip_step."""

    track: Track
    seed: int
    rate_step: float
    clip_step: int

    @property
    def key(self) -> str:
        return f"{self.track}/seed{self.seed}/rate{self.rate_step:+g}/clip{self.clip_step:+d}"


# --- recipes ---------------------------------------------------------------------------------------------


def base_recipe(setting: Setting, seed: int, scale: Scale) -> Recipe:
    """Everything but the method: the same for all arms of a setting."""
    population = POPULATIONS[setting.trust]
    privacy: dict[str, Any] = {"privacy.trust": setting.trust, "privacy.clip_l2": BASE_CLIP}
    if setting.epsilon is not None:
        privacy["privacy.epsilon"] = setting.epsilon
    return load_recipe("paper/embedded-crowd").changed(
        {
            "name": "utility",
            "seed": seed,
            "data.task": setting.task,
            "data.examples_per_client": scale.examples_per_client,
            "federation.population": population,
            "federation.sampling_rate": setting.cohort / population,
            "federation.rounds": scale.rounds,
            "server.optimizer": "fedavgm",
            "server.momentum": MOMENTUM,
            "server.final_share": 0.05,
            "encoder.gate": "warn",
            "encoder.wire_dtype": "float32",
            "prior.source": "none",
            "privacy.participation_cap": 1,
            "evaluation.every": 0,
            "evaluation.progress_examples": 1,  # of the first row only, which nobody reads
            "evaluation.examples": scale.examples,
            # Benchmarks ask for letters; other tasks teach what they do not measure, and a report wants one question.
            "evaluation.questions": scale.questions if asks_letters(setting) else 1,
            **ADAPTERS[setting.adapter],
            **privacy,
        }
    )


def wire_dtype_of(track: Track) -> str:
    """The type of a value on the wire; "auto" resolved."""
    return wire_dtype(base_recipe(track.setting, 0, Scale()).changed(dict(ARMS[track.arm].knobs)))


def asks_letters(setting: Setting) -> bool:
    """Whether the task teaches what the multiple-choice benchmarks ask, so that their accuracy says something."""
    return setting.task == "letters"


def noise_scale(k_star: float) -> float:
    """Factor on every arm's first learning rate under this much noise; a power of two."""
    exact = 1.0 / (1.0 + NOISY_DIRECTIONS / k_star)
    return max(SMALLEST_SCALE, 2.0 ** round(math.log2(exact)))


def rate_and_clip(cell: Cell, k_star: float) -> tuple[float, float]:
    """The server's learning rate and the clip of a cell."""
    longer = CLIP_FACTOR**cell.clip_step
    first = ARMS[cell.track.arm].first_rate_at(k_star)
    return first * RATE_FACTOR**cell.rate_step / longer, BASE_CLIP * longer


def recipe_of(cell: Cell, scale: Scale, k_star: float) -> Recipe:
    """The recipe of one cell."""
    arm = ARMS[cell.track.arm]
    rate, clip = rate_and_clip(cell, k_star)
    changes = {**arm.knobs, "server.learning_rate": rate, "privacy.clip_l2": clip}
    if arm.public:
        changes["prior.public"] = "embedded"
    return base_recipe(cell.track.setting, cell.seed, scale).changed(changes)


# --- order and tuning ------------------------------------------------------------------------------------


def tracks(only: Mapping[str, Sequence[str]]) -> list[Track]:
    """All tracks that pass the filter, the cheap and telling ones first."""

    def wanted(kind: str, value: object) -> bool:
        return kind not in only or str(value) in only[kind]

    found = []
    for setting in settings():
        if not all(wanted(f"{kind}s", value) for kind, value in _filters(setting).items()):
            continue
        found += [Track(arm.name, setting) for arm in _ALL if arm.runs_in(setting) and wanted("arms", arm.name)]
    return sorted(found, key=_order)


def _filters(setting: Setting) -> dict[str, str]:
    epsilon = "none" if setting.epsilon is None else f"{setting.epsilon:g}"
    return {**{kind: str(value) for kind, value in asdict(setting).items()}, "epsilon": epsilon}


def filter_values() -> dict[str, set[str]]:
    """What a filter of `tracks` can name, by its kind."""
    known: dict[str, set[str]] = {"arms": set(ARMS)}
    for setting in settings():
        for kind, value in _filters(setting).items():
            known.setdefault(f"{kind}s", set()).add(value)
    return known


def settings() -> Iterator[Setting]:
    for adapter, cohort in HELD_BACK_PLACES:
        yield from (Setting("central", HELD_BACK, adapter, cohort, epsilon) for epsilon in EPSILONS)
    for task in TASKS:
        for adapter, cohort in EVERYWHERE:
            yield Setting("non-private", task, adapter, cohort, None)
            for trust in TRUSTS:
                if trust == "local" and (adapter, cohort) not in LOCAL_PLACES:
                    continue
                for epsilon in EPSILONS:
                    yield Setting(trust, task, adapter, cohort, epsilon)


def _order(track: Track) -> tuple[Any, ...]:
    """What decides before comparators, a trusted server before none, the small adapter before the large one, small cohorts before
    large ones; the largest cohort of the large adapter last."""
    setting, arm = track.setting, ARMS[track.arm]
    large, most, local = setting.adapter == "large", setting.cohort == max(COHORTS), setting.trust == "local"
    place = (large and most, local and most, arm.rank > 0, local, large, arm.rank, setting.cohort)
    return (*place, setting.task, setting.epsilon or 0.0, list(ARMS).index(arm.name))


Losses = Mapping[Cell, float]


def next_cells(track: Track, losses: Losses) -> list[Cell]:
    """The cells that a track needs next, given the losses of those that are done; empty when it is done.

    Tuning, on seeds of its own: LEAST_RATES to MOST_RATES learning rates, then CLIP_STEPS at the best of them.
    """

    def missing(steps: Iterable[tuple[float, int]], of: Sequence[int]) -> list[Cell]:
        cells = [Cell(track, seed, rate, clip) for rate, clip in steps for seed in of]
        return [cell for cell in cells if cell not in losses]

    tuning_seeds, rates = track.setting.tuning_seeds, tried(track, losses)
    if opening := [step for step in (0.0, -1.0, 1.0) if step not in rates]:
        return missing([(step, 0) for step in opening], tuning_seeds)
    if len(rates) < LEAST_RATES or (len(rates) < MOST_RATES and at_edge(track, losses)):
        return missing([(_next_step(rates), 0)], tuning_seeds)
    best = _best(rates)
    return missing([(best, step) for step in CLIP_STEPS], tuning_seeds) or missing(
        [tuned(track, losses)], track.setting.seeds
    )


def tuned(track: Track, losses: Losses) -> tuple[float, int]:
    """(rate step, clip step): the smallest of those whose mean held-out loss on the tuning seeds is within CLEARLY of the least."""
    best = _best(tried(track, losses))
    clips = {step: tried(track, losses, step).get(best, math.inf) for step in (0, *CLIP_STEPS)}
    return best, _best(clips)


def at_edge(track: Track, losses: Losses) -> bool:
    """Whether the best learning rate is the smallest or largest that was tried."""
    rates = tried(track, losses)
    return _best(rates) in (min(rates), max(rates))


def tried(track: Track, losses: Losses, clip_step: int = 0) -> dict[float, float]:
    """Rate step -> mean loss over the tuning seeds, where all of them are done."""
    seeds, found = track.setting.tuning_seeds, dict[float, list[float]]()
    for cell, loss in losses.items():
        if cell.track == track and cell.seed in seeds and cell.clip_step == clip_step:
            found.setdefault(cell.rate_step, []).append(loss)
    return {step: fmean(values) for step, values in found.items() if len(values) == len(seeds)}


def _best(means: Mapping[Any, float]) -> Any:
    """The smallest step whose mean is within CLEARLY of the least."""
    least = min(means.values())
    return min(step for step, mean in means.items() if mean <= (1 + CLEARLY) * least)


def _next_step(rates: Mapping[float, float]) -> float:
    """Beyond the better edge; half a step towards the better neighbour if the best lies inside."""
    ordered, best = sorted(rates), _best(rates)
    place = ordered.index(best)
    if place == 0:
        return best - 1.0
    if place == len(ordered) - 1:
        return best + 1.0
    below, above = ordered[place - 1], ordered[place + 1]
    return (best + (below if rates[below] < rates[above] else above)) / 2


def most_cells(found: Iterable[Track]) -> int:
    """The most cells that these tracks can need."""
    settings_of = [track.setting for track in found]
    return sum(len(one.tuning_seeds) * (MOST_RATES + len(CLIP_STEPS)) + len(one.seeds) for one in settings_of)
