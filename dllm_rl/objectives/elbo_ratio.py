"""The sequence-level ratio of ELBOs: A exp(mean_j δ_j), what BGPO bounds from below.

    loss = −A exp( 1/N Σ_j (l_j − l_old,j) )  +  kl_coef KL(ELBO − ELBO_ref)

Without clipping it is VRPO-OL, the online VRPO baseline of BGPO (arXiv 2510.11683, eq. 6-7; VRPO: arXiv 2505.19223). With
clipping, a KL term and seq-mean-token-mean (the factor 1/|y|) it is GDPO (arXiv 2510.08554). The exponential of a mean is
not a sum over samples: the engine takes its exact gradient in two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Share, Traits, exp_with_tangent, share
from dllm_rl.objectives.kl import KLObjective
from dllm_rl.objectives.levels import units


@dataclass
class ELBORatio(KLObjective):
    """Exact ELBO ratio (`objective=elbo_ratio`)."""

    clip_low: float | None = None
    clip_high: float | None = None
    """PPO's clipping of the sequence-level ratio; null: none."""
    max_delta: float = 20.0
    """Above it, exp goes on as its tangent, so that loss and gradients stay finite; counted in `delta/above_max`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"objective.{name}", value, "a number >= 0, or null")
        check(self.max_delta > 0, "objective.max_delta", self.max_delta, "a number > 0 (inf for no limit)")

    @property
    def traits(self) -> Traits:
        return super().traits._replace(ratio_only=True)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The ratio of ELBOs of every sequence, clipped where asked. See `LossInputs` for shapes."""
        unit = units(inputs, "sequence")
        delta, advantage = unit.delta, unit.advantage
        ratio = exp_with_tangent(delta, self.max_delta)
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        high = float("inf") if self.clip_high is None else 1 + self.clip_high
        plain, bounded = -advantage * ratio, -advantage * ratio.clamp(low, high)
        losses, everywhere = torch.maximum(plain, bounded), unit.weight > 0
        metrics: dict[str, Share] = {
            "objective/clipped": share(bounded > plain, everywhere),
            "delta/above_max": share(delta > self.max_delta, everywhere),
        }
        losses = losses + self.penalty(unit, everywhere, metrics)
        return LossOutput(inputs.reduce(losses.sum(1)), metrics)
