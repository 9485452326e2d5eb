"""From rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.errors import check

KINDS = ("group_standardised", "mean_only", "leave_one_out", "z_score")


@dataclass
class AdvantageConfig:
    """How rewards become advantages."""

    kind: str = "group_standardised"
    """group_standardised: (r − mean) / (std + ε) within the group (GRPO; BGPO eq. 18). mean_only: r − mean (Dr. GRPO, d1).
    leave_one_out: r − mean of the others (RLOO). z_score: (r − mean) / (std + ε) over the whole batch (TraceRL)."""
    epsilon: float = 1e-6
    """ε."""

    def __post_init__(self) -> None:
        check(self.kind in KINDS, "advantage.kind", self.kind, ", ".join(KINDS))
        check(self.epsilon >= 0, "advantage.epsilon", self.epsilon, "a number >= 0")


def compute_advantages(
    rewards: Tensor, valid: Tensor, group_size: int, kind: str = "group_standardised", epsilon: float = 1e-6
) -> Tensor:
    """Advantages of the completions of one step. Standard deviations are the unbiased ones, as in verl and TRL.

    Args:
        rewards: [B] with the `group_size` completions of one prompt side by side.
        valid: [B] bool; False leaves a completion out of the statistics and gives it advantage 0 (a grader that failed says
            nothing about the completion).
        group_size: G; B is a multiple of it.
        kind: see `AdvantageConfig`.

    Returns:
        [B] float32. What is compared (a group; for z_score the batch) gives exact zeros if its rewards are all equal, or if
        fewer than two of its completions are valid.
    """
    size = len(rewards) if kind == "z_score" else group_size
    grouped = rearrange(rewards.double(), "(p g) -> p g", g=size)
    kept = rearrange(valid, "(p g) -> p g", g=size)
    count = kept.sum(1, keepdim=True)
    mean = grouped.where(kept, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (grouped - mean).where(kept, 0.0)
    if kind == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    elif kind != "mean_only":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + epsilon)
    lowest = grouped.where(kept, torch.inf).amin(1, keepdim=True)
    highest = grouped.where(kept, -torch.inf).amax(1, keepdim=True)
    # Comparing the rewards themselves: rounding of the mean must not turn equal rewards into a signal.
    return rearrange(torch.where(highest > lowest, centred, 0.0), "p g -> (p g)").float()
