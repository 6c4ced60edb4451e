"""Leakage 1: which tokens a client's text holds, read from what the client uploads.

Legend: N clients, M shadow clients, D adapter values, K values of a message, V vocabulary, H hidden size, r rank.

The attacker is the server: it knows the model and the adapter, and decodes codes. Two attacks, each scoring every
token of the vocabulary for every client:

* `span`. The gradient of a linear layer is a sum of outer products with its inputs, so the rows of A's gradient in the
  first layer's q, k and v lie in the span of the text's normalised token embeddings. A token's score is the share of
  its own input inside that span. It is the span check of DAGER (Petrov et al., NeurIPS 2024,
  https://arxiv.org/abs/2405.15586), taken from full weights to LoRA's A, where 3 r rows are all there is.
* `shadow`. The server trains make-believe clients on text of its own, sees what their messages look like (by the arm's
  own encoder and clip, without the noise), and scores a token by the inner product of a message with the mean
  message of the shadow clients whose text holds the token. It needs no structure and no decoder.

Scores are compared within a token, between clients: then no frequent token wins by itself, and for a release under
mu-GDP for replacing a client no attack passes `auc.gaussian_max_auc(mu)`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from drencoder.audit.arms import Arm, bound_mu, expected_messages, open_channel
from drencoder.audit.auc import estimate_clustered_auc, gaussian_max_auc
from drencoder.audit.findings import Finding
from drencoder.audit.setup import AuditSetup
from drencoder.data.tokenization import Example
from drencoder.errors import ModelError
from drencoder.federated.query import Query
from drencoder.models.adapter_layout import Segment
from drencoder.models.lora import LoraModel

__all__ = ["SpanAttack", "mark_present_tokens", "score_by_shadow_clients", "share_of_tokens_found", "token_findings"]

_FIRST_INPUT = re.compile(r"(?P<module>.*\.layers\.0\.\w+\.(q|k|v)_proj)\.lora_A\.weight")
_RANK_TOLERANCE = 1e-5  # singular values below this share of the largest are rounding
_PEFT_PREFIX = "base_model.model."


def mark_present_tokens(texts: Sequence[Example], vocabulary: int) -> Tensor:
    """Returns which tokens stand in each text before its last place, (N, V) bool; the last one is predicted only."""
    present_NV = torch.zeros(len(texts), vocabulary, dtype=torch.bool)
    for row, text in enumerate(texts):
        present_NV[row, list(text.tokens[:-1])] = True
    return present_NV


@final
@dataclass(frozen=True)
class SpanAttack:
    """What the span attack needs of the model: where A's first rows lie, and every token's first input (V, H)."""

    segments: tuple[Segment, ...]
    input_VH: Tensor

    @classmethod
    def of(cls, lora: LoraModel) -> "SpanAttack":
        """Prepares the attack on this model.

        Raises:
          ModelError: no first-layer q, k or v is adapted, or its input is not a function of the token alone.
        """
        segments = tuple(segment for segment in lora.layout.segments if _FIRST_INPUT.fullmatch(segment.name))
        if not segments:
            raise ModelError(
                "The token attack reads the first layer's q, k or v and the adapter has none of them: add q_proj, k_proj or "
                "v_proj to adapter.targets."
            )
        return cls(segments, functional.normalize(_compute_first_inputs(lora, segments[0]), dim=1))

    def scores(self, update_ND: Tensor) -> Tensor:
        """Returns the share of each token's input inside the span of the update's rows, (N, V)."""
        rows_NRH = torch.cat(
            [update_ND[:, one.start : one.stop].reshape(-1, *one.shape) for one in self.segments], dim=1
        )
        _, strength_NR, basis_NRH = torch.linalg.svd(rows_NRH.float(), full_matrices=False)
        keep_NR = strength_NR > _RANK_TOLERANCE * strength_NR[:, :1]
        return torch.stack(
            [
                (self.input_VH @ basis_RH[keep_R].T).square().sum(1)
                for basis_RH, keep_R in zip(basis_NRH, keep_NR, strict=True)
            ]
        )


def score_by_shadow_clients(query: Query, value_NK: Tensor, shadow_MD: Tensor, shadow_MV: Tensor) -> Tensor:
    """Returns the inner products of messages with the shadow clients' mean message per token, (N, V); zero for unseen tokens.

    Without noise the length of an update says nothing about a single token, and both sides are taken to length 1.
    """
    shadow_MK = expected_messages(query, shadow_MD)
    holds_MV = shadow_MV.float()
    count_V = holds_MV.sum(0)
    template_VK = holds_MV.T @ functional.normalize(shadow_MK, dim=1) / count_V.clamp(min=1)[:, None]
    centre_K = functional.normalize(shadow_MK, dim=1).mean(0)
    template_VK = (template_VK - centre_K) * (count_V > 0)[:, None]
    return functional.normalize(value_NK, dim=1) @ template_VK.T


def share_of_tokens_found(score_NV: Tensor, present_NV: Tensor) -> float:
    """Returns the share of a text's tokens among its own n best-scored ones, n the number of tokens looked for; mean over clients.

    Tokens that all texts share are known beforehand and count on neither side.
    """
    known_V = present_NV.all(0)
    shares = []
    for score_V, present_V in zip(score_NV, present_NV & ~known_V, strict=True):
        count = int(present_V.sum())
        if count:
            best = score_V.masked_fill(known_V, float("-inf")).topk(count).indices
            shares.append(float(present_V[best].float().mean()))
    return sum(shares) / max(1, len(shares))


def token_findings(setup: AuditSetup, arms: Sequence[Arm], span: SpanAttack) -> tuple[list[Finding], dict[str, Any]]:
    """Runs both attacks on every arm's messages and on stage 1's.

    Returns the findings, and one text beside what was read of it unprotected.
    """
    subjects, vocabulary = setup.subjects, len(span.input_VH)
    present_NV = mark_present_tokens(subjects.target_texts, vocabulary)
    shadow_MV = mark_present_tokens(subjects.shadow_texts, vocabulary)
    findings: list[Finding] = []
    example: dict[str, Any] = {}

    def add(arm: str, sees: str, attack: str, score_NV: Tensor, mu: float | None) -> None:
        bound = None if mu is None else gaussian_max_auc(mu)
        auc, tokens_found = (
            estimate_clustered_auc(score_NV, present_NV, setup.seed),
            share_of_tokens_found(score_NV, present_NV),
        )
        findings.append(Finding("tokens", arm, sees, attack, auc, bound, tokens_found))

    for arm in arms:
        query, mu = arm.query(setup.components.recipe, 1), arm.max_mu("replace_one")
        with open_channel(arm.plan(len(present_NV), 1), setup.seed) as channel:
            message_NK = channel.messages(query, subjects.target_ND)
        by_span_NV = span.scores(query.decode(message_NK))
        by_shadow_NV = score_by_shadow_clients(query, message_NK, subjects.shadow_MD, shadow_MV)
        # FedCG's stage 1 uploads the very values of an unprotected update, whatever its stage 2 does.
        names = [(arm.name, arm.sees)] + ([] if example else [("FedCG, stage 1", "real gradient")])
        for name, sees in names:
            add(name, sees, "span", by_span_NV, mu)
            add(name, sees, "shadow", by_shadow_NV, mu)
        example = example or _decode_example(setup, by_span_NV[0], subjects.target_texts[0])
    for sees, sigma in (("statistics, no noise", None), ("noised statistics", setup.stage1_sigma)):
        query, plan = setup.make_moment_query(setup.segments), setup.make_stage1_plan(len(present_NV), sigma)
        with open_channel(plan, setup.seed) as channel:
            statistic_NV = channel.messages(query, subjects.target_ND)
        by_shadow_NV = score_by_shadow_clients(query, statistic_NV, subjects.shadow_MD, shadow_MV)
        add("DR-Encoder, stage 1", sees, "shadow", by_shadow_NV, bound_mu(plan, "replace_one", slot=0))
    return findings, example


def _decode_example(setup: AuditSetup, score_V: Tensor, text: Example) -> dict[str, Any]:
    """Returns a text beside its n best-scored tokens, best first."""
    tokenizer, tokens = setup.components.lora.base.tokenizer, list(text.tokens[:-1])
    best = score_V.topk(len(set(tokens))).indices.tolist()
    return {
        "text": tokenizer.decode(tokens),
        "recovered": [tokenizer.decode([token]) for token in best],
        "right": len(set(best) & set(tokens)),
        "num_tokens": len(best),
    }


@torch.no_grad()
def _compute_first_inputs(lora: LoraModel, segment: Segment) -> Tensor:
    """Computes every token's input (V, H) to the first layer's projections: its embedding after the layer's own norm.

    The result is checked against what the layer is really given: a model that adds positions or scales is refused.
    """
    base, match = lora.base.model, _FIRST_INPUT.fullmatch(segment.name)
    assert match is not None
    layer = base.get_submodule(match["module"].removeprefix(_PEFT_PREFIX).rsplit(".", 2)[0])
    projection = base.get_submodule(match["module"].removeprefix(_PEFT_PREFIX))
    norm = getattr(layer, "input_layernorm", None)
    if norm is None:
        raise _unsupported_model(lora)
    input_VH = norm(base.get_input_embeddings().weight)
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    probe = torch.arange(8, device=lora.device).remainder(len(input_VH))
    try:
        base(input_ids=probe[None], use_cache=False)
    finally:
        handle.remove()
    if not torch.allclose(seen[0][0].float(), input_VH[probe].float(), rtol=1e-2, atol=1e-2):
        raise _unsupported_model(lora)
    return input_VH.float().cpu()


def _unsupported_model(lora: LoraModel) -> ModelError:
    kind = lora.base.model.config.model_type
    return ModelError(
        f"The token attack knows models whose first layer is given the normalised token embedding alone (Llama, Qwen, "
        f"Mistral), and {lora.base.source!r} is of type {kind!r}: audit one of those."
    )
