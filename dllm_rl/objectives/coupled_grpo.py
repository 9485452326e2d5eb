"""coupled-GRPO: PPO's clip with one ratio per token, of the coupled estimate of its log-probability.

    loss of a token = max( −A r, −A clip(r) ) + kl_coef k3,    r = exp(φ − φ_old),  φ from `likelihood=coupled_full`

The estimate is a mean over three corruptions, so ratios are formed after it: level=token. Source: DiffuCoder, arXiv
2506.20639, and its code (clip 0.5, KL 0.01, token-mean).
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm_rl.objectives.ppo_clip import PPOClip


@dataclass
class CoupledGRPO(PPOClip):
    """coupled-GRPO (`objective=coupled_grpo`)."""

    aggregation: str = "token-mean"
    level: str = "token"
    clip_low: float = 0.5
    clip_high: float = 0.5
    kl_coef: float = 0.01
