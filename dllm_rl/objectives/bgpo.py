"""Boundary-Guided Policy Optimization: a lower bound of the ELBO-ratio objective that is linear in the samples.

With l_j the ELBO terms of one completion, δ_j = l_j − l_old,j on the same masks, N samples and advantage A
(arXiv 2510.11683, eq. 13-14):

    A ≥ 0:   g_j = A (1 + δ_j) / N          since exp(x) ≥ 1 + x at x = mean δ
    A < 0:   g_j = A exp(δ_j) / N           since exp(mean δ) ≤ mean exp(δ)     (Jensen)
    Σ_j g_j  ≤  A exp(mean_j δ_j),          equal in value and gradient where δ = 0 (on-policy)

The loss is −Σ_j g_j averaged over completions. No clipping and no KL term, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.likelihood import elbo_terms
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput


@dataclass
class BGPO:
    """BGPO (`objective=bgpo`)."""

    max_delta: float = 20.0
    """Above it, exp(δ) of the A < 0 branch goes on as its tangent, which keeps loss and gradients finite for any δ. The
    bound is lost there; such samples are counted in `delta/above_max`. inf: the paper's formula everywhere."""
    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self.max_delta > 0, "objective.max_delta", self.max_delta, "a number > 0 (inf for no limit)")

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Minus the bound, for the given samples. See `LossInputs` for shapes."""
        delta = elbo_terms(inputs.logps, inputs.weights) - elbo_terms(inputs.old_logps, inputs.weights)
        advantage = rearrange(inputs.advantages, "b -> b 1")
        bound = bgpo_terms(delta, advantage, self.max_delta)
        above = (delta > self.max_delta) & (advantage < 0)
        return LossOutput(-bound.sum() / inputs.num_terms, {"delta/above_max": above.sum() / inputs.num_terms})


def bgpo_terms(delta: Tensor, advantage: Tensor, max_delta: float) -> Tensor:
    """N g_j for every sample: δ [B, n] and A [B, 1] -> [B, n].

    Each branch is fed zeros where the other one applies: `where` alone would pass the NaN gradient of an overflowing exp
    into rows that do not use it.
    """
    gains = advantage >= 0
    linear = 1 + torch.where(gains, delta, 0.0)
    losing = torch.where(gains, 0.0, delta)
    capped = losing.clamp(max=max_delta)
    # exp(capped) is constant above the limit, so its tangent there adds (δ - limit) exp(limit).
    exponential = capped.exp() * (1 + (losing - capped))
    return advantage * torch.where(gains, linear, exponential)
