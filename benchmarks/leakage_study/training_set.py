"""Leakage 2: was this client's gradient in the auto-encoder's training set?

Legend: N members, M non-members, D values of the sub-adapter, S segments.

The attacker holds the encoder, which is public, and a client's gradient, and looks at how well the one reconstructs the
other: a network has seen its training set. Two scores, higher for members:

* `error`: minus the squared error, in units of the gradient's own energy.
* `calibrated`: how much smaller that error is than under a reference encoder, trained in the same way on other
  clients, which takes off what makes a gradient easy for any encoder (Watson et al. 2022,
  https://arxiv.org/abs/2111.08440; the likelihood-ratio attack of Carlini et al. 2022,
  https://arxiv.org/abs/2112.03570, with one reference instead of many).

Members, non-members and reference clients are disjoint and of one distribution. The encoder is trained on the first two
LoRA pairs only, so that a network has fewer values to learn than it has weights, and, besides the published schedule
with early stopping, until it has learnt its training set by heart: the auditor's best case.
"""

import math
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from drencoder.audit.auc import Auc, estimate_auc, gaussian_max_auc
from drencoder.encoders.contract import Encoder
from drencoder.published.fitting import AutoencoderOptions
from leakage_study.findings import Finding
from leakage_study.setup import AuditSetup

_PAIRS = 2  # LoRA pairs of the sub-adapter; they lie at the start of an update
_OVERFIT_RATE = 2e-3  # ten times the published learning rate
_OVERFIT_LENGTH = 3  # times the published number of steps


@final
@dataclass(frozen=True)
class TrainingSetScores:
    """The AUC of both scores, and the mean relative error (1 = nothing is reconstructed) of members and of others."""

    error: Auc
    calibrated: Auc
    member_error: float
    other_error: float

    def note(self) -> str:
        """Returns the two errors in words."""
        return f"error {self.member_error:.3f} in, {self.other_error:.3f} out"


def training_set_findings(setup: AuditSetup) -> list[Finding]:
    """Trains every encoder twice, on the collected and on the reference clients, and attacks the first."""
    segments, steps, subjects = setup.segments[: 2 * _PAIRS], setup.options.steps, setup.subjects
    size = segments[-1].stop
    groups = [group_ND[:, :size] for group_ND in (subjects.collected_ND, subjects.reference_ND)]
    other_ND = subjects.target_ND[:, :size]
    findings: list[Finding] = []

    def add(arm: str, sees: str, encoder: Encoder, reference: Encoder, seen_ND: Tensor, bound: float | None) -> None:
        recalled = attack_training_set(encoder, reference, seen_ND, other_ND)
        for attack, auc in (("error", recalled.error), ("calibrated", recalled.calibrated)):
            findings.append(Finding("training set", arm, sees, attack, auc, bound, note=recalled.note()))

    real = [setup.collect_gradients(group_ND) for group_ND in groups]
    quick = AutoencoderOptions(steps=steps, name="autoencoder-cnn1d")  # the one that remembers most
    length = _OVERFIT_LENGTH * steps
    long = replace(quick, steps=length, check_every=max(1, length // 4), learning_rate=_OVERFIT_RATE)
    for words, options in (
        ("resnet, early stopping", replace(quick, name="autoencoder")),
        ("cnn1d, early stopping", quick),
        ("cnn1d, by heart", long),
    ):
        fitted = [setup.fit_on_gradients(segments, gradients, options, overfit=options is long) for gradients in real]
        (encoder, seen_ND), (reference, _) = fitted
        add("FedCG", words, encoder, reference, seen_ND, None)
    for words, sigma in (("statistics, no noise", None), ("noised statistics", setup.stage1_sigma)):
        priors = [setup.fit_prior(group_ND, segments, sigma) for group_ND in groups]
        ours, theirs = (setup.fit_on_prior(prior, long, overfit=True) for prior in priors)
        # An encoder is a function of the sum of the noised statistics: all but the server see each behind all noises.
        bound = None if sigma is None else gaussian_max_auc(1 / (sigma * math.sqrt(len(groups[0]))))
        add("DR-Encoder", f"cnn1d, by heart, {words}", ours, theirs, groups[0], bound)
    sketch, other_sketch = (setup.build_sketch(prior) for prior in priors)  # of the noised statistics
    add("drencoder", "sketch laid out by noised statistics", sketch, other_sketch, groups[0], bound)
    return findings


def attack_training_set(encoder: Encoder, reference: Encoder, member_ND: Tensor, other_MD: Tensor) -> TrainingSetScores:
    """Attacks `encoder`, with a `reference` encoder that saw neither group."""
    member_N, other_M = _relative_error(encoder, member_ND), _relative_error(encoder, other_MD)
    return TrainingSetScores(
        error=estimate_auc(-member_N, -other_M),
        calibrated=estimate_auc(
            _relative_error(reference, member_ND) - member_N, _relative_error(reference, other_MD) - other_M
        ),
        member_error=float(member_N.mean()),
        other_error=float(other_M.mean()),
    )


def _relative_error(encoder: Encoder, update_ND: Tensor) -> Tensor:
    """Returns |u - decode(encode(u))|^2 / |u|^2 per row, float64 (N,); 0 for a row of zeros."""
    rest_ND = (update_ND - encoder.decode(encoder.encode(update_ND, 0), 0)).double()
    energy_N = update_ND.double().square().sum(1).clamp(min=1e-30)
    return rest_ND.square().sum(1) / energy_N
