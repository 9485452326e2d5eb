"""wd1: weighted log-likelihood, with no ratio and no old or reference policy.

    loss = 1/G Σ_i ( −w_i⁺ + w_i⁻ ) log π(o_i),    w⁺ = softmax(ψ A),  w⁻ = softmax(−ψ A) over the group

Good completions are pulled up and bad ones pushed down, each side with total weight 1. Linear in the samples.
Source: arXiv 2507.08838. Its code takes the softmax over the local batch; this one over the group, as the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, weighted_logp_loss
from dllm_rl.objectives.groups import group_log_softmax


@dataclass
class WD1(Objective):
    """wd1 (`objective=wd1`)."""

    psi: float = 1.0
    """ψ: how sharply advantages turn into weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.psi > 0, "objective.psi", self.psi, "a number > 0")

    @property
    def traits(self) -> Traits:
        return Traits(separable=True, uses_old=False)

    def prepare(self, advantages: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """w⁺ − w⁻: [B] -> [B]; exactly 0 in a group of equal advantages and for completions without a grade."""
        up, down = (
            group_log_softmax(torch.where(valid, sign * self.psi * advantages, -torch.inf), groups).exp() for sign in (1, -1)
        )
        return up - down

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Minus the weighted ELBO. See `LossInputs` for shapes."""
        return LossOutput(weighted_logp_loss(inputs, torch.ones_like(inputs.logps)), {})
