"""The clients' side: one machine that answers for some clients, and what it refuses to answer.

A site trusts its own recipe and its own ledger. From the server it takes the adapter, the encoder and, where the clip was measured or
follows the codes' norms, the clip: all three are used before the clip and the noise, so whatever they are, what leaves is bounded and
noised as the site's own plan says. It answers with messages that its ledger has charged, or with a number that says why not.
"""

import sys
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from drencoder.encoders.contract import Encoder
from drencoder.encoders.gaussian_prior import GaussianPrior
from drencoder.errors import (
    ArtifactError,
    CodeError,
    DrencoderError,
    EngineError,
    PrivacyError,
    SecureError,
    VoidRoundError,
)
from drencoder.federated.adaptive_clip import AdaptiveClip
from drencoder.federated.client_side import ClientSide
from drencoder.federated.engine import RunComponents
from drencoder.federated.query import Query, gradient_query, moment_query, update_query
from drencoder.federated.remote.agreement import ClientSet, agreement
from drencoder.federated.remote.frames import Frame, Kind, pack_frame, unpack_frame
from drencoder.federated.remote.instruction import Answer, Instruction, adapter_of, encoder_of, fingerprint
from drencoder.federated.remote.refusal import Refusal, refusal_frame
from drencoder.federated.remote.session import SecAggSession
from drencoder.federated.secure_round import round_settings
from drencoder.privacy.ledger import Permit
from drencoder.privacy.site_ledger import AnsweredError, ForeignRunError, SiteLedger
from drencoder.reading import one_line
from drencoder.secure_aggregation.messages import ProtocolStep

_SAME = 1e-6  # relative; two calibrations of one plan differ by rounding only
_ENCODER_SLACK = 1 << 20  # bytes of names and of the prior
_PATH_FACTOR = 64  # an encoder may have this many times the adapter's bytes


class _RefusedError(Exception):
    def __init__(self, code: Refusal) -> None:
        super().__init__(code.words)
        self.code = code


@final
class Site:
    """A site answers frames. `session` is for secure aggregation, and needed there. `say` takes lines for the site's own log: slots and counts, never text of a client.

    Raises PrivacyError at birth if the recipe's plan has less noise than `min_noise` (all trust but central).
    """

    def __init__(
        self,
        components: RunComponents,
        own_clients: ClientSet,
        ledger: SiteLedger,
        *,
        min_noise: float = 0.0,
        session: SecAggSession | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        plan = components.plan
        weakest = min(map(plan.sigma, plan.slots))
        if plan.capped and weakest < min_noise:
            raise PrivacyError(
                f"The recipe's noise multiplier at this site is {weakest:.4g}, below --min-noise {min_noise:.4g}: do not take "
                "part, or lower --min-noise."
            )
        if (plan.trust == "secure-aggregation") != (session is not None):
            raise EngineError(
                "secure aggregation needs a session with the site's key, and other trust has none: see SecAggSession.open."
            )
        self._components, self._own_clients, self._ledger, self._say = components, own_clients, ledger, say
        self._recipe, self._session = agreement(components.recipe), session
        self._clients = frozenset(own_clients.clients)
        self._side = ClientSide(components.trainer, components.curator)
        self._whose = "clients" if components.curator is None else "sites"
        self._encoder_name = ""
        self._encoder: Encoder | None = None
        self._prior: GaussianPrior | None = None

    @property
    def own_clients(self) -> ClientSet:
        """The clients that this site answers for."""
        return self._own_clients

    def answer(self, data: bytes) -> bytes:
        """The answer to any bytes; never raises, and never says more about a failure than its number."""
        nonce = ""
        try:
            if data[5:6] == bytes([Kind.HELLO]):
                return self._answer_hello(data)
            if data[5:6] == bytes([Kind.STAGE]):
                return self._answer_step(data)
            frame = self._frame(data, Kind.QUERY)
            instruction = Instruction.of(frame.head)
            nonce = instruction.nonce
            return self._answer_query(frame, instruction)
        except _RefusedError as refused:
            return self._refuse(nonce, refused.code)
        except CodeError:
            return self._refuse(nonce, Refusal.FOREIGN)
        except VoidRoundError:
            return self._refuse(nonce, Refusal.VOID)
        except SecureError as error:
            self._say(str(error))  # of nodes and keys, never of a client's text
            return self._refuse(nonce, Refusal.SECURE)
        except Exception as error:
            # The text of an exception may quote a client's: it stays, even out of this site's log.
            self._say(f"failed: {type(error).__name__}")
            return self._refuse(nonce, Refusal.FAILED)

    def _refuse(self, nonce: str, code: Refusal) -> bytes:
        if code != Refusal.ENCODER_NEEDED:
            self._say(f"refused: {code.words}")
        return refusal_frame(code, nonce, self._recipe)

    def _frame(self, data: bytes, kind: Kind) -> Frame:
        adapter = 4 * self._components.lora.layout.size
        frame = unpack_frame(data, kind, first=adapter, second=_PATH_FACTOR * adapter + _ENCODER_SLACK)
        if frame.recipe != self._recipe:
            raise _RefusedError(Refusal.RECIPE)
        return frame

    def _answer_hello(self, data: bytes) -> bytes:
        """Which clients are here. The head's nonce comes back."""
        frame = self._frame(data, Kind.HELLO)
        self._check_base(frame.head.get("model"), frame.head.get("tokenizer"))
        text, owners = self._components.clients_text
        nonce = str(frame.head.get("nonce", ""))[:128]
        head = {"nonce": nonce, "clients": str(self._own_clients), "data": text, "owners": owners}
        return pack_frame(Frame(Kind.HELLO_ANSWER, self._recipe, head))

    def _answer_query(self, frame: Frame, asked: Instruction) -> bytes:
        """Checks everything, charges, and only then lets the clients compute."""
        self._check_base(asked.model, asked.tokenizer)
        self._check_plan(asked)
        if not asked.asks:  # the server only asks whether this site is there, and would answer
            self._check_run(asked)
            return self._pack_answer(Answer(asked.nonce, Refusal.NONE), b"")
        if not set(asked.clients) <= self._clients:
            raise _RefusedError(Refusal.CLIENTS)
        try:
            adapter_D = adapter_of(frame.first, self._components.lora.layout.size)
        except CodeError:
            raise _RefusedError(Refusal.ADAPTER) from None
        query = self._query(frame, asked)
        if self._session is not None:
            return self._begin_secure_round(self._session, query, adapter_D, asked)
        permit = self._charge(asked)
        uploads = list(self._side.uploads(query, adapter_D, asked.clients, permit, self._components.noise()))
        messages = b"".join(message for upload in uploads for message in upload.messages)
        nonfinite = sum(upload.nonfinite for upload in uploads)
        self._say(f"slot {query.spec.slot}: {len(asked.clients)} {self._whose} answered, {len(messages):,} bytes")
        self._say_spent()
        answer = Answer(asked.nonce, Refusal.NONE, asked.clients, nonfinite)
        return self._pack_answer(answer, messages)

    def _say_spent(self) -> None:
        """What this site's own ledger says that its units have spent, where they are the units of privacy."""
        if self._components.curator is not None:
            spent, plan = self._ledger.spent(), self._components.plan
            told = ", ".join(f"{value:.3f} against {name}" for name, value in spent.items())
            self._say(
                f"epsilon of one {plan.unit} here, at delta {plan.delta:g}: {told.replace('clients', 'other sites')}"
            )

    # --- secure aggregation -------------------------------------------------------------------

    def _begin_secure_round(self, session: SecAggSession, query: Query, adapter_D: Tensor, asked: Instruction) -> bytes:
        """The first step. The clients train before it, so that no later step waits for them."""
        if asked.roster != session.roster.digest:
            raise _RefusedError(Refusal.ROSTER)
        if len(asked.counts) != len(session.roster.keys) or asked.counts[session.number] != len(asked.clients):
            raise _RefusedError(Refusal.CLIENTS)
        try:
            request = bytes.fromhex(asked.request)
        except ValueError:
            raise CodeError("a request that is not hexadecimal") from None
        # First the charge: a node that does not exist cannot sign anything twice.
        permit = self._charge(asked)
        settings = round_settings(query, permit, asked.counts, session.roster.keys, session.threshold)
        share_V = self._side.node_share(query, adapter_D, asked.clients, permit, self._components.noise())
        answer = session.begin(asked.nonce, settings, asked.clients, share_V, request)
        self._say(f"slot {query.spec.slot}: takes part with {len(asked.clients)} {self._whose}")
        self._say_spent()
        return self._pack_answer(Answer(asked.nonce, Refusal.NONE, asked.clients), answer)

    def _answer_step(self, data: bytes) -> bytes:
        """A later stage: bytes of the open round to its node, and the node's answer."""
        if self._session is None:
            raise _RefusedError(Refusal.PLAN)
        frame = unpack_frame(data, Kind.STAGE, first=self._session.longest_request, second=0)
        nonce, number = frame.head.get("nonce"), frame.head.get("stage")
        if frame.recipe != self._recipe:
            raise _RefusedError(Refusal.RECIPE)
        if not isinstance(nonce, str) or not self._session.knows(nonce):
            raise _RefusedError(Refusal.ROUND)
        if number not in tuple(ProtocolStep):
            raise CodeError("a stage that there is none of")
        return self._pack_answer(Answer(nonce, Refusal.NONE), self._session.answer(ProtocolStep(number), frame.first))

    def _pack_answer(self, answer: Answer, first: bytes) -> bytes:
        return pack_frame(Frame(Kind.QUERY_ANSWER, self._recipe, answer.head(), first=first))

    # --- checks -------------------------------------------------------------------------------

    def _check_base(self, model: object, tokenizer: object) -> None:
        """Training on another base gives updates that mean nothing at the server; nothing private depends on it."""
        base = self._components.base_digests
        if model != base.model:
            raise _RefusedError(Refusal.MODEL)
        if tokenizer != base.tokenizer:
            raise _RefusedError(Refusal.TOKENIZER)

    def _check_run(self, asked: Instruction) -> None:
        try:
            run = self._ledger.run
        except ArtifactError:
            raise _RefusedError(Refusal.STORAGE) from None
        if run not in (None, asked.run):
            raise _RefusedError(Refusal.RUN)

    def _check_plan(self, asked: Instruction) -> None:
        plan = self._components.plan
        slot = asked.spec.slot
        if slot not in plan.slots or (asked.trust, asked.noise) != (plan.trust, plan.noise):
            raise _RefusedError(Refusal.PLAN)
        own = plan.sigma(slot)
        if not abs(asked.noise_multiplier - own) <= _SAME * own or bool(asked.counts) != (self._session is not None):
            raise _RefusedError(Refusal.PLAN)
        if not asked.spec.has_possible_clip:
            raise _RefusedError(Refusal.CLIP)

    def _charge(self, asked: Instruction) -> Permit:
        try:
            return self._ledger.charge(asked.run, asked.spec.slot, asked.attempt, asked.clients)
        except ForeignRunError:
            raise _RefusedError(Refusal.RUN) from None
        except AnsweredError:
            raise _RefusedError(Refusal.ANSWERED) from None
        except ArtifactError as error:
            print(f"drencoder: {one_line(error)}", file=sys.stderr)  # of this site's disk, not of a client's text
            raise _RefusedError(Refusal.STORAGE) from None

    def _query(self, frame: Frame, asked: Instruction) -> Query:
        """The query that this site's recipe makes for the slot; refused unless its spec is the one that was sent."""
        recipe, layout, spec = self._components.recipe, self._components.lora.layout, asked.spec
        if (spec.kind == "update") != (spec.slot > 0):
            raise _RefusedError(Refusal.PLAN)
        if spec.slot > 0:
            encoder = self._current_encoder(frame, asked)
            clip = self._adaptive_clip(asked)
            query = update_query(encoder, recipe, spec.slot, clip, self._prior, spec.clip_l2)
        elif recipe.prior.source == "gradients":
            query = gradient_query(layout.size, recipe.stage1_epochs)
        else:
            query = moment_query(layout.segments, recipe, spec.clip_l2)
        if spec.kind != query.spec.kind:
            raise _RefusedError(Refusal.PLAN)
        if not query.spec.same_clip(spec):
            raise _RefusedError(Refusal.CLIP)
        if not query.spec.same_but_for_clip(spec):
            raise _RefusedError(Refusal.ENCODER)
        return query

    def _adaptive_clip(self, asked: Instruction) -> AdaptiveClip | None:
        privacy, clip_l2 = self._components.recipe.privacy, asked.spec.adaptive_clip
        if (privacy.clip == "fixed") != (clip_l2 is None):
            raise _RefusedError(Refusal.CLIP)
        return None if clip_l2 is None else AdaptiveClip(clip_l2)

    def _current_encoder(self, frame: Frame, asked: Instruction) -> Encoder:
        """The encoder that the instruction names: the one of the last round, or made from the second part."""
        if self._encoder is not None and asked.encoder == self._encoder_name:
            return self._encoder
        if not frame.second:
            raise _RefusedError(Refusal.ENCODER_NEEDED)
        if fingerprint(frame.second) != asked.encoder:
            raise _RefusedError(Refusal.ENCODER)
        try:
            self._prior, state = encoder_of(frame.second, self._components.lora.layout.segments)
            self._encoder = self._components.encoder(self._prior, state)
        except (DrencoderError, KeyError, RuntimeError, ValueError, torch.OutOfMemoryError):
            raise _RefusedError(Refusal.ENCODER) from None
        self._encoder_name = asked.encoder
        return self._encoder
