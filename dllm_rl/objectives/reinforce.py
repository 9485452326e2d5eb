"""REINFORCE on the ELBO: the objective A x ELBO, with no ratio and no trust region.

    loss = −A 1/N Σ_j l_j

Linear in the samples. At θ = θ_old its gradient is that of BGPO and of every other objective here that forms a ratio.
Source: Williams 1992, with the ELBO in place of the log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, weighted_logp_loss


@dataclass
class Reinforce(Objective):
    """REINFORCE (`objective=reinforce`)."""

    @property
    def traits(self) -> Traits:
        return Traits(separable=True, token_level=True, uses_old=False)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Minus the weighted ELBO. See `LossInputs` for shapes."""
        return LossOutput(weighted_logp_loss(inputs, torch.ones_like(inputs.logps)), {})
