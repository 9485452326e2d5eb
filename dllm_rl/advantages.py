"""From rewards to advantages."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def group_standardised(rewards: Tensor, valid: Tensor, group_size: int, epsilon: float = 1e-6) -> Tensor:
    """A = (r − mean) / (std + ε) within each group (GRPO; BGPO eq. 18), with the unbiased standard deviation.

    Args:
        rewards: [B] with the `group_size` completions of one prompt side by side.
        valid: [B] bool; False leaves a completion out of its group's statistics and gives it advantage 0 (a grader that
            failed says nothing about the completion).
        group_size: G; B is a multiple of it.

    Returns:
        [B] advantages. A group whose rewards are all equal, or with fewer than two valid completions, gets exact zeros.
    """
    grouped = rearrange(rewards.double(), "(p g) -> p g", g=group_size)
    kept = rearrange(valid, "(p g) -> p g", g=group_size)
    count = kept.sum(1, keepdim=True)
    mean = grouped.where(kept, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (grouped - mean).where(kept, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    lowest = grouped.where(kept, torch.inf).amin(1, keepdim=True)
    highest = grouped.where(kept, -torch.inf).amax(1, keepdim=True)
    # Comparing the rewards themselves: rounding of the mean must not turn equal rewards into a signal.
    advantages = torch.where(highest > lowest, centred / (std + epsilon), 0.0)
    return rearrange(advantages, "p g -> (p g)").float()
