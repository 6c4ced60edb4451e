"""Why a site does not answer: a number that travels, and what it means. No torch."""

from enum import IntEnum

from drencoder.errors import CodeError
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame


class Refusal(IntEnum):
    """Why a site does not answer. The number travels and nothing else does.

    `words` are for the server's log. `lasting`: whether the site will say the same to every question of this run, until somebody
    starts it anew.
    """

    words: str
    lasting: bool

    def __new__(cls, number: int, words: str = "", lasting: bool = False) -> "Refusal":
        refusal = int.__new__(cls, number)
        refusal._value_, refusal.words, refusal.lasting = number, words, lasting
        return refusal

    NONE = 0, "answered"
    FOREIGN = 1, "cannot read the message: another version, or damaged"
    RECIPE = 2, "has another recipe", True
    RUN = (
        3,
        "belongs to another run: its clients must consent to this one, which then needs a --state folder of its own there",
        True,
    )
    PLAN = 4, "has another plan: trust, noise multiplier, kind of noise or slot", True
    CLIENTS = 5, "does not host these clients", True
    ANSWERED = 6, "has answered this slot already"
    ADAPTER = 7, "got an adapter of another size, or one that is not finite"
    ENCODER_NEEDED = 8, "needs the encoder"
    ENCODER = 9, "cannot build the encoder, or builds another one"
    CLIP = 10, "got an impossible clip norm"
    STORAGE = 11, "cannot write its ledger", True
    FAILED = 12, "failed"
    APP = 13, "allows no other app than drencoder's own", True
    ROSTER = 14, "has pinned other node keys: its --roster and the server's --nodes must be the same", True
    ROUND = 15, "is not in this round: it was started again, or has refused before"
    SECURE = 16, "found a message of secure aggregation that an honest node must not answer"
    VOID = 17, "counts too few nodes or clients: the round is void"
    MODEL = (
        18,
        "has another base model than the server (other weights or config.json): give all machines the same files",
        True,
    )
    TOKENIZER = 19, "has another tokenizer than the server: give all machines the same tokenizer files", True


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
