"""From rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.groups import group_max, group_sum

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
    rewards: Tensor, valid: Tensor, groups: Tensor, kind: str = "group_standardised", epsilon: float = 1e-6
) -> Tensor:
    """Advantages of the completions of one step. Standard deviations are the unbiased ones, as in verl and TRL.

    Args:
        rewards: [B].
        valid: [B] bool; False leaves a completion out of the statistics and gives it advantage 0 (a grader that failed says
            nothing about the completion).
        groups: [B] int64: completions of the same prompt share a number.
        kind: see `AdvantageConfig`.

    Returns:
        [B] float32. What is compared (a group; for z_score the batch) gives exact zeros if its rewards are all equal, or if
        fewer than two of its completions are valid.
    """
    rewards = rewards.double()
    compared = torch.zeros_like(groups) if kind == "z_score" else groups
    count = group_sum(valid.double(), compared)
    centred = (rewards - group_sum(rewards.where(valid, 0.0), compared) / count.clamp(min=1)).where(valid, 0.0)
    if kind == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    elif kind != "mean_only":
        centred = centred / ((group_sum(centred.square(), compared) / (count - 1).clamp(min=1)).sqrt() + epsilon)
    # Comparing the rewards themselves: rounding of the mean must not turn equal rewards into a signal.
    least = -group_max(-rewards.where(valid, torch.inf), compared)
    differs = group_sum(((rewards > least) & valid).long(), compared) > 0
    return torch.where(differs, centred, 0.0).float()


def has_signal(advantages: Tensor) -> Tensor:
    """Whether a completion has an advantage at all: [B] or [B, L] -> [B] bool."""
    return advantages != 0 if advantages.dim() == 1 else (advantages != 0).any(1)
