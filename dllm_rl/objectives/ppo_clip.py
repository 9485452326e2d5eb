"""PPO's clipped surrogate, and GRPO as PPO's surrogate with group advantages.

With r the ratio of a unit (see `levels`), minimised per unit:

    max( −A r, −A clip(r, 1 − clip_low, 1 + clip_high) )  +  kl_coef KL(log π/π_ref)
    A < 0 with dual_clip = c:   min( the above, −A c )

Sources: Schulman et al. 2017, eq. 7; GRPO, arXiv 2402.03300, eq. 3; dual clip, arXiv 1912.09729, eq. 5; clip-higher, DAPO,
arXiv 2503.14476. The gradient is 0 where A > 0 and r > 1 + clip_high or A < 0 and r < 1 − clip_low, and
−A r ∇log π elsewhere (for log-ratios above 20 with r continued as its tangent). Clipping acts only off-policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.base import MAX_LOG_RATIO, LossInputs, LossOutput, Traits, exp_with_tangent, share
from dllm_rl.objectives.kl import KLObjective
from dllm_rl.objectives.levels import LEVELS, SEPARABLE_LEVELS, TOKEN_LEVELS, units


@dataclass
class PPOClip(KLObjective):
    """PPO clip (`objective=ppo_clip`)."""

    level: str = "sample_token"
    """Where ratios are formed: sample_token | sample | token | sequence (see `levels`)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Above clip_low it is clip-higher (DAPO uses 0.28)."""
    dual_clip: float | None = None
    """c > 1 bounds the loss of A < 0; verl uses 3. null: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.level in LEVELS, "objective.level", self.level, ", ".join(LEVELS))
        check(self.clip_low >= 0, "objective.clip_low", self.clip_low, "a number >= 0")
        check(self.clip_high >= 0, "objective.clip_high", self.clip_high, "a number >= 0")
        check(self.dual_clip is None or self.dual_clip > 1, "objective.dual_clip", self.dual_clip, "a number > 1, or null")

    @property
    def traits(self) -> Traits:
        return super().traits._replace(
            separable=self.level in SEPARABLE_LEVELS, token_level=self.level in TOKEN_LEVELS, ratio_only=True
        )

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The clipped surrogate and the KL term of every unit. See `LossInputs` for shapes."""
        unit = units(inputs, self.level)
        losses, clipped = clipped_surrogate(unit.delta, unit.advantage, self.clip_low, self.clip_high, self.dual_clip)
        exists = unit.weight > 0
        metrics = {"objective/clipped": share(clipped, exists)}
        losses = losses + self.penalty(unit, exists, metrics)
        return LossOutput(inputs.reduce((unit.weight * losses).sum(1)), metrics)


@dataclass
class GRPO(PPOClip):
    """GRPO (`objective=grpo`): every sequence counts the same, KL coefficient 0.04 (DeepSeekMath, arXiv 2402.03300)."""

    aggregation: str = "seq-mean-token-mean"
    kl_coef: float = 0.04


def clipped_surrogate(
    delta: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of each unit, and whether its gradient is clipped away: log-ratios [B, U] and A [B, 1] or [B, U]."""
    ratio = exp_with_tangent(delta, MAX_LOG_RATIO)
    plain, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)
    losses, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual is not None:
        ceiling = -advantage * dual
        too_far = (advantage < 0) & (losses > ceiling)
        losses, clipped = torch.where(too_far, ceiling, losses), clipped | too_far
    return losses, clipped
