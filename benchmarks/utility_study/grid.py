"""What the utility study runs: settings, arms, the recipe of each cell, and how learning rate and clip are tuned. No torch.

A *setting* is a trust model, a task, an adapter and a cohort. An *arm* is a method with its code size. Cells, tracks and the ladder of
learning rates are those of `drencoder.study`: a track is an arm at one epsilon in a setting.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from drencoder.encoders.code_sizes import SMALL_RATIO
from drencoder.encoders.planning import wire_dtype
from drencoder.encoders.registry import declaration_of
from drencoder.recipe.recipe import Recipe, load_recipe
from drencoder.study.cells import Cell, Track
from drencoder.study.tuning import TuningPlan

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
    examples_per_client: int = 1


def scale_of(known: Mapping[str, int]) -> Scale:
    """The scale of a stored study; older archives hold more."""
    return Scale(**{declared.name: known[declared.name] for declared in fields(Scale) if declared.name in known})


@dataclass(frozen=True)
class Setting:
    """Everything of a track but its arm and its epsilon."""

    trust: str
    task: str
    adapter: str
    cohort: int

    def __str__(self) -> str:
        return f"{self.trust}/{self.task}/{self.adapter}/n{self.cohort}"

    def track(self, arm: str, epsilon: float | None) -> Track:
        return Track(arm, epsilon, str(self))

    @property
    def plan(self) -> TuningPlan:
        """How every arm is tuned here, and on which seeds it is judged."""
        trust = "central" if self.trust == "non-private" else self.trust
        tuning, judged = SEEDS[trust, self.adapter, self.cohort]
        return TuningPlan(
            seeds=range(FIRST_JUDGED_SEED, FIRST_JUDGED_SEED + judged),
            tuning_seeds=range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning),
            least_rates=LEAST_RATES,
            most_rates=MOST_RATES,
            rate_factor=RATE_FACTOR,
            margin=CLEARLY,
            clip_steps=CLIP_STEPS,
            clip_factor=CLIP_FACTOR,
        )

    @property
    def adapter_size(self) -> int:
        """D."""
        return ADAPTER_SIZES[self.adapter]


def setting_of(track: Track) -> Setting:
    """The setting that a track's name stands for."""
    trust, task, adapter, cohort = track.setting.split("/")
    return Setting(trust, task, adapter, int(cohort.removeprefix("n")))


@dataclass(frozen=True)
class Arm:
    """A method with its code size, and where it runs.

    Args:
      first_rate: the learning rate that tuning starts from at n = 64; found in exploratory runs on other seeds.
      rank: settings of a smaller one come first.
      reason: why these cohorts and adapters and not all.
      retired: this version cannot run it any more; the rows that earlier versions stored stay on the page.
    """

    name: str
    knobs: Mapping[str, Any]
    first_rate: float
    public: bool = False
    places: tuple[Place, ...] = EVERYWHERE
    trusts: tuple[str, ...] = TRUSTS
    rank: int = 0
    reason: str = "decides the study: everywhere"
    retired: bool = False

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
_ELSEWHERE = {"places": (("small", 8), ("large", 64)), "reason": "hybrid-64 in two more places"}
_PART: dict[str, Any] = _MIDDLE | {"rank": 2}
# Size, start and bits from the plan; the base recipe has a size.
_PLANNED: dict[str, Any] = {"encoder.name": "hybrid", "encoder.ratio": 0.0, "encoder.wire_dtype": "auto"}
# Four bits a value: a little fewer bytes than 1/64 of the values in float32, so that headers have room.
_SMALL: dict[str, Any] = {"encoder.name": "hybrid", "encoder.ratio": SMALL_RATIO, "encoder.wire_dtype": "rotated4"}
_SILENT: dict[str, Any] = {"privacy.trust": "non-private", "encoder.name": "identity"}


def _variant(name: str, first_rate: float, reason: str, *, retired: bool = False, **knobs: Any) -> Arm:
    """The default encoder at 1/80 of the bytes with one thing changed."""
    changed = {f"{section}.{key}": value for section, part in knobs.items() for key, value in part.items()}
    return Arm(name, _SMALL | changed, first_rate, public=True, retired=retired, **_PART | {"reason": reason})


_ALL = (
    Arm("dp-lora", {"encoder.name": "identity"}, 0.75),
    Arm("hybrid", _PLANNED, 3.0, public=True),
    Arm("hybrid-10", _SMALL, 3.0, public=True, **_SMALL_CODE | {"reason": "equal bytes"}),
    _coded("hybrid-64", 3.0, "hybrid", 64, **_SMALL_CODE | {"reason": "equal bytes, in float32"}),
    _coded("hybrid-64-fresh", 3.0, "hybrid", 64, **_SMALL_CODE | _ELSEWHERE),
    Arm("lora", _SILENT, 0.75, **_MIDDLE | {"trusts": ("non-private",), "rank": 2, "reason": "how far training comes"}),
    _variant("both-tensors", 1.5, "LoRA's A sent as well", retired=True),
    _variant("self-written", 3.0, "public text by the base model itself", prior={"public": "self"}),
    _variant("no-refresh", 3.0, "bases of the start in all rounds", retired=True),
    _variant("adaptive-clip", 3.0, "what a clip that follows is worth", privacy={"clip": "adaptive"}),
    _variant("preconditioned", 6.0, "a decoding that knows prior and noise", retired=True),
    _variant("wiener-decoding", 3.0, "shrinkage in every round", retired=True),
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
    Arm("dp-lora-singular", {"encoder.name": "identity"}, 3.0, retired=True, **_MIDDLE),
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
FOUR_BITS = OURS[:2]  # what the product sends under a trusted server if nobody says otherwise


# --- recipes ---------------------------------------------------------------------------------------------


def base_recipe(track: Track, seed: int, scale: Scale) -> Recipe:
    """Everything but the method: the same for all arms of a setting."""
    setting = setting_of(track)
    population = POPULATIONS[setting.trust]
    privacy: dict[str, Any] = {"privacy.trust": setting.trust, "privacy.clip_l2": BASE_CLIP}
    if track.epsilon is not None:
        privacy["privacy.epsilon"] = track.epsilon
    return load_recipe("paper/embedded-crowd").changed(
        {
            "name": "utility",
            "seed": seed,
            "data.source": f"embedded:{setting.task}",
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
            "evaluation.examples": scale.examples,
            # Benchmarks ask for letters; the other tasks teach what they do not measure.
            "evaluation.benchmarks": ["auto"] if asks_letters(setting) else [],
            **ADAPTERS[setting.adapter],
            **privacy,
        }
    )


def wire_dtype_of(track: Track) -> str:
    """The type of a value on the wire; "auto" resolved."""
    return wire_dtype(base_recipe(track, 0, Scale()).changed(dict(ARMS[track.method].knobs)))


def asks_letters(setting: Setting) -> bool:
    """Whether the task teaches what the multiple-choice benchmarks ask, so that their accuracy says something."""
    return setting.task == "letters"


def noise_scale(k_star: float) -> float:
    """Factor on every arm's first learning rate under this much noise; a power of two."""
    exact = 1.0 / (1.0 + NOISY_DIRECTIONS / k_star)
    return max(SMALLEST_SCALE, 2.0 ** round(math.log2(exact)))


def rate_and_clip(cell: Cell, k_star: float) -> tuple[float, float]:
    """The server's learning rate and the clip of a cell."""
    plan, first = setting_of(cell.track).plan, ARMS[cell.track.method].first_rate_at(k_star)
    return plan.rate(first, cell), plan.clip(BASE_CLIP, cell)


def recipe_of(cell: Cell, scale: Scale, k_star: float) -> Recipe:
    """The recipe of one cell."""
    arm = ARMS[cell.track.method]
    rate, clip = rate_and_clip(cell, k_star)
    changes = {**arm.knobs, "server.learning_rate": rate, "privacy.clip_l2": clip}
    if arm.public:
        changes["prior.public"] = "embedded"
    return base_recipe(cell.track, cell.seed, scale).changed(changes)


# --- order -----------------------------------------------------------------------------------------------


def tracks(only: Mapping[str, Sequence[str]]) -> list[Track]:
    """All tracks that pass the filter, the cheap and telling ones first; retired arms are among them."""

    def passes(kind: str, value: object) -> bool:
        return kind not in only or str(value) in only[kind]

    passing = []
    for setting, epsilon in settings():
        if not all(passes(f"{kind}s", value) for kind, value in _filters(setting, epsilon).items()):
            continue
        arms = (arm.name for arm in _ALL if arm.runs_in(setting) and passes("arms", arm.name))
        passing += [setting.track(arm, epsilon) for arm in arms]
    return sorted(passing, key=_order)


def plans_of(tracks: Sequence[Track]) -> dict[Track, TuningPlan]:
    """How each of these tracks is tuned."""
    return {track: setting_of(track).plan for track in tracks}


def _filters(setting: Setting, epsilon: float | None) -> dict[str, str]:
    words = {kind: str(value) for kind, value in asdict(setting).items()}
    return words | {"epsilon": "none" if epsilon is None else f"{epsilon:g}"}


def filter_values() -> dict[str, set[str]]:
    """What a filter of `tracks` can name, by its kind."""
    known: dict[str, set[str]] = {"arms": set(ARMS)}
    for setting, epsilon in settings():
        for kind, value in _filters(setting, epsilon).items():
            known.setdefault(f"{kind}s", set()).add(value)
    return known


def settings() -> Iterator[tuple[Setting, float | None]]:
    """Every setting with every epsilon that the study has there."""
    for adapter, cohort in HELD_BACK_PLACES:
        yield from ((Setting("central", HELD_BACK, adapter, cohort), epsilon) for epsilon in EPSILONS)
    for task in TASKS:
        for adapter, cohort in EVERYWHERE:
            yield Setting("non-private", task, adapter, cohort), None
            for trust in TRUSTS:
                if trust == "local" and (adapter, cohort) not in LOCAL_PLACES:
                    continue
                yield from ((Setting(trust, task, adapter, cohort), epsilon) for epsilon in EPSILONS)


def _order(track: Track) -> tuple[Any, ...]:
    """What decides before comparators, a trusted server before none, the small adapter before the large one, small cohorts before
    large ones; the largest cohort of the large adapter last."""
    setting, arm = setting_of(track), ARMS[track.method]
    large, most, local = setting.adapter == "large", setting.cohort == max(COHORTS), setting.trust == "local"
    place = (large and most, local and most, arm.rank > 0, local, large, arm.rank, setting.cohort)
    return (*place, setting.task, track.epsilon or 0.0, list(ARMS).index(arm.name))
