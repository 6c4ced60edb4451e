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

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from drencoder.audit.auc import estimate_clustered_auc, gaussian_max_auc
from drencoder.audit.inversion import present_tokens, share_of_tokens_found
from drencoder.audit.span import SpanAttack
from drencoder.data.tokenization import Example
from drencoder.federated.query import Query
from leakage_study.arms import Arm, bound_mu, expected_messages, open_channel
from leakage_study.findings import Finding
from leakage_study.setup import AuditSetup


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


def token_findings(setup: AuditSetup, arms: Sequence[Arm], span: SpanAttack) -> tuple[list[Finding], dict[str, Any]]:
    """Runs both attacks on every arm's messages and on stage 1's.

    Returns the findings, and one text beside what was read of it unprotected.
    """
    subjects, vocabulary = setup.subjects, len(span.input_VH)
    present_NV = present_tokens(subjects.target_texts, vocabulary)
    shadow_MV = present_tokens(subjects.shadow_texts, vocabulary)
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
