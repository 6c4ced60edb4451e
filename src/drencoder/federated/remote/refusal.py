"""Why a site does not answer: a number that travels, and what it means. No torch."""

from enum import IntEnum

from drencoder.errors import CodeError
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame


class Refusal(IntEnum):
    """Why a site does not answer. The number travels and nothing else does."""

    NONE = 0
    FOREIGN = 1
    RECIPE = 2
    RUN = 3
    PLAN = 4
    CLIENTS = 5
    ANSWERED = 6
    ADAPTER = 7
    ENCODER_NEEDED = 8
    ENCODER = 9
    CLIP = 10
    STORAGE = 11
    FAILED = 12
    APP = 13
    ROSTER = 14
    ROUND = 15
    SECURE = 16
    VOID = 17
    MODEL = 18
    TOKENIZER = 19

    @property
    def words(self) -> str:
        """For the server's log."""
        return _WORDS[self]

    @property
    def lasting(self) -> bool:
        """Whether the site will say the same to every question of this run, until somebody starts it anew."""
        return self in _LASTING


_LASTING = frozenset(
    {
        Refusal.RECIPE, Refusal.RUN, Refusal.PLAN, Refusal.CLIENTS, Refusal.STORAGE, Refusal.APP,
        Refusal.ROSTER, Refusal.MODEL, Refusal.TOKENIZER,
    }
)  # fmt: skip

_WORDS = {
    Refusal.NONE: "answered",
    Refusal.FOREIGN: "cannot read the message: another version, or damaged",
    Refusal.RECIPE: "has another recipe",
    Refusal.RUN: "belongs to another run: its clients must consent to this one, which then needs a --state folder of its own there",
    Refusal.PLAN: "has another plan: trust, noise multiplier, kind of noise or slot",
    Refusal.CLIENTS: "does not host these clients",
    Refusal.ANSWERED: "has answered this slot already",
    Refusal.ADAPTER: "got an adapter of another size, or one that is not finite",
    Refusal.ENCODER_NEEDED: "needs the encoder",
    Refusal.ENCODER: "cannot build the encoder, or builds another one",
    Refusal.CLIP: "got an impossible clip norm",
    Refusal.STORAGE: "cannot write its ledger",
    Refusal.FAILED: "failed",
    Refusal.APP: "allows no other app than drencoder's own",
    Refusal.ROSTER: "has pinned other node keys: its --roster and the server's --nodes must be the same",
    Refusal.ROUND: "is not in this round: it was started again, or has refused before",
    Refusal.SECURE: "found a message of secure aggregation that an honest node must not answer",
    Refusal.VOID: "counts too few nodes or clients: the round is void",
    Refusal.MODEL: "has another base model than the server (other weights or config.json): give all machines the same files",
    Refusal.TOKENIZER: "has another tokenizer than the server: give all machines the same tokenizer files",
}


def refusal_frame(refusal: int, nonce: str = "", recipe: bytes = bytes(32)) -> bytes:
    """A whole answer that is a refusal and says nothing else."""
    head = {"nonce": nonce, "refusal": int(refusal), "clients": [], "nonfinite": 0}
    return pack_frame(Frame(Kind.QUERY_ANSWER, recipe, head))


def refusal_of(data: bytes) -> Refusal | None:
    """The refusal in an answer; None if it is anything else."""
    try:
        number = unpack_frame(data, Kind.QUERY_ANSWER, first=0, second=0).head.get("refusal")
        return Refusal(number) if isinstance(number, int) and number != Refusal.NONE else None
    except (CodeError, ValueError):
        return None
