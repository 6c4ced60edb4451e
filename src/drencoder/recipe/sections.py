"""The sections of a recipe: every knob of a run, as frozen dataclasses that are checked at birth.

Knobs under `[speed]` change how fast a run is and never what it computes (up to float rounding and dropout's draws).
"""

from dataclasses import dataclass

from drencoder.errors import RecipeError
from drencoder.reading import shown
from drencoder.recipe.knobs import Checked, knob


@dataclass(frozen=True)
class Model(Checked):
    """The frozen base model."""

    # fmt: off
    source: str = knob("embedded", "`embedded`, a local Hugging Face folder, a .gguf file, or a hub id")
    revision: str = knob("", "of a hub id: branch, tag or commit; empty = its main branch")
    dtype: str = knob("float32", "type of the frozen weights; int8 and nf4 (4 bits) need bitsandbytes (extra quant), and are slow "
        "on a CPU; adapters are float32 with all", choices=("float32", "bfloat16", "int8", "nf4"))
    device: str = knob("auto", "`auto` takes a GPU when there is one; `spread` spreads a model that does not fit one over all "
        "GPUs, then main memory, then leaves it on the disk (accelerate); `shard` splits each layer over all GPUs, which train clients "
        "at the same time (FSDP)", choices=("auto", "cpu", "cuda", "spread", "shard"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "shard" and self.dtype in ("int8", "nf4"):
            raise RecipeError(
                f"model.device = 'shard' cannot split weights of model.dtype = {self.dtype!r}: set model.dtype = 'bfloat16' or 'float32', "
                "or model.device = 'spread'."
            )


@dataclass(frozen=True)
class Adapter(Checked):
    """The LoRA adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    # fmt: off
    rank: int = knob(8, "rank r of every LoRA pair", low=1)
    alpha: float = knob(16.0, "LoRA alpha: the product B A is scaled by alpha / rank", above=0)
    dropout: float = knob(0.0, "dropout on the input of A while training", low=0, below=1)
    targets: tuple[str, ...] = knob(("auto",), "linear layers that get a LoRA pair; auto: PEFT's choice for the model's family, "
        "in attention with k_proj and the output projection, too; all-linear: all but the output head; or names, whole or their "
        "last parts (layers.0.self_attn.q_proj: of one layer)")
    start: str = knob("auto", "where A starts; peft: PEFT's random values; orthonormal: their rows made orthonormal, of the same "
        "total length (as FedSVD's first round, Lee et al. 2025, https://arxiv.org/abs/2505.12805); public: the leading "
        "directions of a layer's inputs over public text (`prior.public`; as EVA, Paischer et al. 2024, "
        "https://arxiv.org/abs/2410.07170); auto: peft, but public for hybrid where the plan's noise lets a round learn few "
        "coordinates (k* < 512)", choices=("auto", "peft", "orthonormal", "public"))
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise RecipeError(
                "adapter.targets is empty: set it to 'auto', to 'all-linear' or to names of linear layers."
            )
        if len(self.targets) > 1 and {"auto", "all-linear"} & set(self.targets):
            raise RecipeError(
                f"adapter.targets = {list(self.targets)} has a rule among names: give 'auto' or 'all-linear' alone, or names."
            )


@dataclass(frozen=True)
class Data(Checked):
    """Where the clients' text comes from, and how it is spread over them."""

    # fmt: off
    source: str = knob("embedded", "`embedded`, a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, `hub:ORG/NAME`, "
        "`mmlu:FOLDER` or `ceval:FOLDER` (FOLDER may be hub:ORG/NAME); all but files may end in `:SPLIT` (else train; of mmlu "
        "auxiliary_train, of ceval dev); embedded clients teach the letter of the right option, with `embedded:next` the words "
        "of the option after it, with `embedded:facts` new facts")
    fields: tuple[tuple[str, str], ...] = knob((), "which field of a record is what, where its name does not say so: { "
        'instruction = "title", response = "body" }; others: context, category, system, messages, text (alone)',
        choices=("instruction", "context", "response", "category", "system", "messages", "text"))
    examples_per_client: int = knob(8, "records a client holds (embedded) or uses at most", low=1)
    client_field: str = knob("", "field that names a record's owner, or its site where privacy.unit is inside a site; empty: the "
        "owners are simulated (a Dirichlet split)")
    owner_field: str = knob("", "privacy.unit = owner: field that names a record's owner inside its site, say the patient")
    template: str = knob("auto", "how a record becomes a text; chat: the tokenizer's chat template; plain: instruction, context, "
        "`Answer:`, response; auto: chat where the tokenizer has a template; or a .jinja file")
    max_tokens: int = knob(512, "tokens of an example; a longer one loses earlier turns, the end of its context, then of its "
        "response", low=8)
    held_out_share: float = knob(0.0, "share of the owners of data.client_field who are set aside for evaluation: they are no "
        "clients, epsilon does not cover them, and they must have agreed. Where owners are simulated: share of the records that "
        "no client gets; 0 = 5 % there", low=0, below=1)
    # fmt: on

    @property
    def is_embedded(self) -> bool:
        """Whether the clients are those of the embedded world, whatever they teach."""
        return self.source.partition(":")[0] == "embedded"


@dataclass(frozen=True)
class Federation(Checked):
    """Who takes part, and how often."""

    # fmt: off
    population: int = knob(0, "registered clients N, which everybody may know; 0 = as many as the data have (10,000 of the "
        "embedded world)", low=0, high=10**12)
    sampling_rate: float = knob(0.0, "chance q of a client to be in a round; 0 = 0.02, or what makes 32 clients a round, if that "
        "is more and privacy.participation_cap leaves room for it", low=0, high=1)
    rounds: int = knob(20, "rounds T of stage 2", low=1, high=1_000_000)
    units_per_site: int = knob(0, "privacy.unit = record or owner: how many of them everybody may take a site to have, a number "
        "that does not come from the records; means are divided by q times the number of sites times this", low=0, high=2**32)
    nodes: int = knob(4, "secure aggregation: how many machines add up the codes: the sites of a federation; drencoder run "
        "spreads the clients over as many (client number modulo nodes)", low=2)


@dataclass(frozen=True)
class Local(Checked):
    """What a client computes."""

    # fmt: off
    upload: str = knob("gradient", "gradient: mean gradient; pseudo-gradient: SGD path / (lr * steps); increment: AdamW "
        "increment; zero: nothing at all (a control: what noise alone does)",
        choices=("gradient", "pseudo-gradient", "increment", "zero"))
    epochs: int = knob(1, "local epochs (not for `gradient`); stage 1 asks for statistics, or gradients, of each", low=1)
    batch_size: int = knob(8, "examples of a local step", low=1)
    learning_rate: float = knob(0.01, "local learning rate (not for `gradient`)", above=0)


@dataclass(frozen=True)
class Server(Checked):
    """The server's optimiser (FedOpt, Reddi et al. 2021, https://arxiv.org/abs/2003.00295)."""

    # fmt: off
    optimizer: str = knob("fedadam", "the server's step", choices=("fedavg", "fedavgm", "fedadam"))
    learning_rate: float = knob(0.0, "server learning rate; 0 = 0.02, or less with fedadam where the plan's noise lets a round "
        "learn few coordinates (k*)", low=0)
    final_share: float = knob(1.0, "the last round's share of the learning rate; falls linearly to it", low=0, high=1)
    momentum: float = knob(0.9, "momentum, or beta1 of fedadam; with fedavgm 0.5 or less suits runs of few rounds (docs/log.md)",
        low=0, below=1)


@dataclass(frozen=True)
class Encoder(Checked):
    """How an update becomes a code."""

    # fmt: off
    name: str = knob("hybrid", "how updates are encoded")
    ratio: float = knob(0.0, "adapter values per code value, 1 or more, where the encoder lets one choose; 0: from the privacy "
        "plan, by how many coordinates its noise lets a round learn (k*)", low=0)
    wire_dtype: str = knob("auto", "type of a code on the wire; auto: rotated4 for hybrid with a trusted server, else float32, "
        "where a code that carries its own noise is integers of 16, 24 or 32 bits, as the plan needs; rotated4, rotated2 and "
        "rotated1 turn a code at random and send 4, 2 or 1 bits a value; under local trust they leave the public no better "
        "epsilon than the server", choices=("auto", "float32", "rotated4", "rotated2", "rotated1"))
    gate: str = knob("refuse", "what to do if the check before the rounds finds that the encoder carries nothing", choices=("refuse", "warn"))


@dataclass(frozen=True)
class Prior(Checked):
    """Stage 1: the random prior that the encoder is made from."""

    # fmt: off
    source: str = knob("moments", "moments: a charged, noised query; gradients: real gradients, un-noised (FedCG, NOT private); "
        "none: no stage 1", choices=("moments", "gradients", "none"))
    sampling_rate: float = knob(0.0, "chance of a client to be in stage 1; 0 = as in a round", low=0, high=1)
    public: str = knob("", "public text for the structured prior: `embedded` (what the embedded model was trained on), `self` "
        "(written by the base model, the same in all rounds), or a file, folder or `hub:ORG/NAME` as in data.source; empty = "
        "self for an encoder made from public text, none for others")
    provenance: str = knob("", "whose text `public` is and why the server may look at it; the certificate repeats it")


@dataclass(frozen=True)
class Privacy(Checked):
    """The promise. See docs/guarantee.md."""

    # fmt: off
    epsilon: float = knob(8.0, "target epsilon against the strongest untrusted observer", above=0, high=1e6)
    delta: float = knob(1e-5, "delta of the promise; far below 1 / population", above=0, below=1)
    unit: str = knob("client", "what epsilon protects; client: all text of a client; record: one record of a site; owner: one "
        "owner of data.owner_field, with all its records at a site; with the last two, meant for 3 to 50 sites, population counts "
        "sites and sampling_rate is that of records or owners", choices=("client", "record", "owner"))
    noise_multiplier: float = knob(0.0, "noise std / clip_l2; 0 = calibrate to epsilon; any other must cost at most epsilon",
        low=0, high=1e6)
    trust: str = knob("local", "local: the server is not trusted, each client adds full noise; central: the server adds it; "
        "secure-aggregation: the server sees only sums, clients add shares of the noise; non-private: no noise and no guarantee, "
        "for baselines only", choices=("local", "central", "secure-aggregation", "non-private"))
    dropout_share: float = knob(0.25, "secure aggregation: share of the nodes, and of the clients, that a round can lose",
        low=0, below=0.5)
    honest_share: float = knob(0.75, "secure aggregation: share of the contributors assumed to add their noise and to keep it to "
        "themselves", above=0, high=1)
    noise_in: str = knob("code", "code: encode, clip, noise; update: clip, noise, encode (as published)",
        choices=("code", "update"))
    relation: str = knob("add_remove", "adjacency that epsilon is calibrated for; both are reported",
        choices=("add_remove", "replace_one"))
    clip_l2: float = knob(0.0, "L2 bound of a client's contribution, where the noise is added, and of its statistics in stage 1; "
        "0 = the median length of what make-believe clients with public text would send at the start", low=0)
    clip: str = knob("fixed", "fixed: clip_l2 in all rounds; adaptive: starts there and follows the median of the codes' norms, "
        "which a noised value of each message tells", choices=("fixed", "adaptive"))
    participation_cap: int = knob(1, "releases of one client at most, stage 1 included (local trust and secure aggregation)",
        low=1)
    noise: str = knob("secure", "secure: from the operating system; replay: from the seed, for tests only, NOT private",
        choices=("secure", "replay"))


@dataclass(frozen=True)
class Evaluation(Checked):
    """What is measured, on data that the server holds."""

    # fmt: off
    data: str = knob("", "the server's own text, on which it measures the loss: any place that data.source may name; its records "
        "need no owner; none: measure no loss; empty: what data.held_out_share sets aside, or the server's own part of the embedded "
        "world")
    every: int = knob(1, "rounds between two evaluations; 0 = only at the end", low=0)
    examples: int = knob(1024, "held-out examples of the final table, and zero-shot questions of each benchmark; an eighth "
        "between rounds", low=1)
    benchmarks: tuple[str, ...] = knob(("auto",), "multiple-choice benchmarks: `mmlu=PLACE` or `ceval=PLACE`, where PLACE is a "
        "folder, `hub:ORG/NAME` or `embedded`, which may be left out; auto: both embedded ones where model and data are "
        "embedded, else none")
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in self.benchmarks:
            name, equals, place = item.partition("=")
            if name not in ("mmlu", "ceval", "auto") or (name == "auto" and equals) or (equals and not place):
                raise RecipeError(
                    f"evaluation.benchmarks = {shown(item)} is not known: write auto, mmlu=PLACE or ceval=PLACE, where PLACE is a "
                    "folder, hub:ORG/NAME or embedded."
                )
        names = [item.partition("=")[0] for item in self.benchmarks]
        if len(set(names)) < len(names):
            raise RecipeError(
                f"evaluation.benchmarks = {list(self.benchmarks)} names a benchmark twice: name each once."
            )

    @property
    def progress_examples(self) -> int:
        """Examples and questions of an evaluation between rounds."""
        return max(1, self.examples // 8)


@dataclass(frozen=True)
class Speed(Checked):
    """How fast, never what: with another number of clients in a batch every update is the same, bit for bit."""

    # fmt: off
    tokens: int = knob(0, "tokens of clients that train as one batch, padding included; a client is never cut; 0 = as few as "
        "keep a core busy, on a GPU as many as fit into half of its free memory (docs/models.md)", low=0)
    parallel_clients: int = knob(32, "clients that train as one batch at most", low=1)
    threads: int = knob(0, "CPU threads of torch; 0 = all cores, or as OMP_NUM_THREADS says", low=0, high=1024)
