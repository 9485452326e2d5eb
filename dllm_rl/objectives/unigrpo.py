"""UniGRPO: PPO's clip on the masked tokens of one random mask per update, averaged over those tokens.

    loss = 1/|M| Σ_{t in M} [ max( −A r_t, −A clip(r_t) ) + kl_coef k3 ],    r_t = p(y_t | y with M masked) / p_old(same)

With weight L/|M| per mask and seq-mean-token-mean that mean is what `likelihood=elbo likelihood.num_samples=1` gives.
Source: MMaDA, arXiv 2505.15809, section 3.3; its RL code was never released, and clip range and KL coefficient were not
recovered from the paper: 0.2 and 0.01 are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm_rl.objectives.ppo_clip import GRPO


@dataclass
class UniGRPO(GRPO):
    """UniGRPO (`objective=unigrpo`)."""

    kl_coef: float = 0.01
