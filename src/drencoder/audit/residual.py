"""Membership by projection residual: how much of a candidate's update lies outside of what was released.

Legend: N candidates, R releases, V values.

A client that took part pulled the released sum towards its own update, so that its update has a little more of its length inside the
span of the releases than that of somebody who did not. The attacker needs the candidate's update (its text) and the releases, and
knows nothing about the other clients: a weaker and more realistic adversary than that of the canaries.
"""

import torch
from torch import Tensor


def score_by_residual(candidate_NV: Tensor, released_RV: Tensor) -> Tensor:
    """Minus the share of each candidate's squared length that is outside of the span of the releases, float64 (N,); higher for members.

    What all candidates have in common is taken off first: it says nothing about any of them.
    """
    own_NV = candidate_NV.double() - candidate_NV.double().mean(0)
    basis_VR, _ = torch.linalg.qr(released_RV.double().T)
    inside_NR = own_NV @ basis_VR
    length_N = own_NV.square().sum(1).clamp(min=1e-30)
    sign_N = torch.sign(own_NV @ released_RV.double().sum(0))  # a pull, not a push
    return sign_N * inside_NR.square().sum(1) / length_N - 1.0
