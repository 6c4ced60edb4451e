"""Which tokens a client's text holds, read from its message by a network that learned to.

Legend: N victims, M shadow clients, K values of a message, P principal directions, V tokens.

The attacker trains make-believe clients on text that it has, sees what their codes look like through the run's own encoder and clip,
adds noise of the promised size anew in every step, and fits a network from a noised code to the tokens of its text. Learning against
the noise makes it the strongest reader of codes here: it knows which directions of a code the text moves and how much of each the
noise leaves. (A learned inversion of gradients: Wu et al. 2023, "Learning to invert", https://arxiv.org/abs/2210.10880; training with the
defence in place: Balunovic et al. 2022, https://arxiv.org/abs/2111.04706.) `span.SpanAttack` is the other attack: it learns nothing
and reads the algebra of LoRA's first layer.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from drencoder.data.tokenization import Example
from drencoder.rng import derive_seed

_DIRECTIONS = 256  # of the shadows' codes, those with most energy
_HIDDEN = 256
_BATCH = 64


def present_tokens(texts: Sequence[Example], vocabulary: int) -> Tensor:
    """Which tokens stand in each text before its last place, (N, V) bool; the last one is predicted only."""
    present_NV = torch.zeros(len(texts), vocabulary, dtype=torch.bool)
    for row, text in enumerate(texts):
        present_NV[row, list(text.tokens[:-1])] = True
    return present_NV


def share_of_tokens_found(score_NV: Tensor, present_NV: Tensor) -> float:
    """The share of a text's tokens among its own n best-scored ones, n the number of tokens looked for; mean over texts.

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


@final
class CodeReader:
    """Reads the tokens of a text from a noised code.

    Args:
      code_MK: the shadows' codes without noise, clipped.
      present_MV: which tokens their texts hold; a token that fewer than two of them hold, or all, is not looked for.
      noise_std: of the noise on each value of a code, as it will be read.
      steps: of training; a few thousand small ones take seconds.
    """

    def __init__(self, code_MK: Tensor, present_MV: Tensor, noise_std: float, *, seed: int, steps: int = 1500) -> None:
        self._centre_K = code_MK.mean(0)
        count_V = present_MV.sum(0)
        self._known_V = ((count_V >= 2) & (count_V < len(present_MV))).nonzero()[:, 0]
        self._vocabulary = present_MV.shape[1]
        basis = torch.linalg.svd(code_MK - self._centre_K, full_matrices=False).Vh
        self._basis_PK = basis[:_DIRECTIONS]
        clean_MP = self._project(code_MK)
        self._scale = float(clean_MP.square().mean().sqrt().clamp(min=1e-12)) + noise_std
        # A projection on orthonormal directions keeps the noise as it is.
        self._network = _fit(clean_MP, present_MV[:, self._known_V].float(), noise_std, self._scale, seed, steps)

    def _project(self, code_NK: Tensor) -> Tensor:
        return (code_NK - self._centre_K) @ self._basis_PK.T

    @torch.no_grad()
    def scores(self, code_NK: Tensor) -> Tensor:
        """How likely each token is in each text, (N, V), on a log-odds scale; the lowest for tokens that are not looked for."""
        known = self._network(self._project(code_NK) / self._scale)
        score_NV = torch.full((len(code_NK), self._vocabulary), float(known.min()) - 1.0 if known.numel() else 0.0)
        score_NV[:, self._known_V] = known
        return score_NV


def _fit(clean_MP: Tensor, present_MV: Tensor, noise_std: float, scale: float, seed: int, steps: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(derive_seed(seed, "audit-reader"))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "audit-reader-start") % 2**63)
        last = nn.Linear(_HIDDEN, present_MV.shape[1])
        network = nn.Sequential(nn.Linear(clean_MP.shape[1], _HIDDEN), nn.GELU(), last)
    share_V = present_MV.mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():
        last.bias.copy_(torch.log(share_V / (1 - share_V)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(steps):
        rows = torch.randint(len(clean_MP), (_BATCH,), generator=generator)
        noised = clean_MP[rows] + noise_std * torch.randn(_BATCH, clean_MP.shape[1], generator=generator)
        loss = functional.binary_cross_entropy_with_logits(network(noised / scale), present_MV[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network
