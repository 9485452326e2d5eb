"""SFT on scored data: maximise the ELBO of all completions, or of the best of each prompt (rejection sampling).

    loss = −ELBO / n of each chosen completion, n tokens

Linear in the samples: one pass. Source: LLaDA, arXiv 2502.09992, eq. 5 (masked-diffusion NELBO, divided by the answer
length).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, check_unnormalised, weighted_logp_loss
from dllm_rl.objectives.groups import first_best

SELECTIONS = ("all", "best")


@dataclass
class SFT(Objective):
    """SFT (`objective=sft`)."""

    aggregation: str = "seq-mean-token-mean"
    select: str = "best"
    """best: the completion of highest reward of each prompt (the first of equals). all."""
    threshold: float | None = None
    """Completions whose reward is not above this are left out. null: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.select in SELECTIONS, "objective.select", self.select, " or ".join(SELECTIONS))

    @property
    def traits(self) -> Traits:
        return Traits(separable=True, uses_old=False, reads_rewards=True, selects=True)

    def check_likelihood(self, likelihood: Likelihood) -> None:
        check_unnormalised(likelihood, "objective.aggregation says how lengths count")

    def prepare(self, advantages: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """Rewards -> 1 for the chosen completions, 0 for the rest; [B] -> [B]."""
        taken = valid if self.threshold is None else valid & (advantages > self.threshold)
        if self.select == "best":
            taken = first_best(advantages.where(taken, -torch.inf), groups)
        return taken.to(advantages.dtype)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Minus the ELBO of the chosen completions. See `LossInputs` for shapes."""
        return LossOutput(weighted_logp_loss(inputs, torch.ones_like(inputs.logps)), {})
