"""The critic's loss: PPO's clipped squared error, per token.

    1/2 max( (V − R)², (V_old + clip(V − V_old, −value_clip, value_clip) − R)² )

A sum over trajectory states or Monte Carlo samples of functions of one each: one pass, constant memory. Sources: Schulman
et al. 2017; value clipping as in OpenAI baselines and TRL's PPO; TraceRL, arXiv 2509.06949 (0.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_rl.diffusion.likelihood import elbo_terms
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, column, share


@dataclass
class ValueLoss(Objective):
    """What a critic minimises: `logps` are its values, `old_logps` those it had at the rollout, `advantages` the returns
    R."""

    aggregation: str = "token-mean"
    value_clip: float | None = 0.2
    """null: none."""

    @property
    def traits(self) -> Traits:
        return Traits(separable=True, token_level=True)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The clipped squared error of every scored position. See `LossInputs` for shapes."""
        values, old, target = inputs.logps, inputs.old_logps, column(inputs.advantages, inputs.logps)
        plain = bounded = (values - target).square()
        if self.value_clip is not None:
            bounded = (old + (values - old).clamp(-self.value_clip, self.value_clip) - target).square()
        losses = torch.where(inputs.scored, torch.maximum(plain, bounded) / 2, 0.0)
        return LossOutput(inputs.reduce(elbo_terms(losses, inputs.weights).sum(1) / inputs.num_samples), {
            "clipped": share(bounded > plain, inputs.scored), "error": share((values - target).square(), inputs.scored),
        })
