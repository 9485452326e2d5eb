"""Generalised advantage estimation over a denoising trajectory.

The MDP of TraceRL (arXiv 2509.06949 and its code): the state is the partly masked canvas, and the action of step i writes a
set of tokens. The critic gives every token about to be written a value V_t; V_i is their mean. With rewards r_i per step,

    advantage of step i   A_i = r_i + γ V_{i+1} + γλ A_{i+1} − V_i           (δ_i + γλ A_{i+1}; 0 after the last step)
    return of its tokens  R_t = r_i + γ V_{i+1} + γλ A_{i+1},    advantage A_t = R_t − V_t

γ = λ = 1: A_t = (sum of the rewards from step i on) − V_t. λ = 0: the one-step error r_i + γ V_{i+1} − V_t. For λ = 1 the
return is that of TraceRL's code, r_i + γ R_{i+1}. One step that writes the whole completion is the bandit: A = r − V.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_advantages(
    values: Tensor, steps: Tensor, rewards: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token.

    Args:
        values: [B, L], the critic's value of each token at the state in which it was written.
        steps: [B, L] int64, the step that wrote each token; -1 for tokens that are no action.
        rewards: [B, S], the reward of each step; 0 where a sequence wrote nothing (such a reward would be lost).
        gamma, lam: γ and λ, per step.

    Returns:
        Two [B, L]: advantages and returns, 0 for tokens that are no action. Steps that wrote nothing are passed over.
    """
    values, rewards = values.double(), rewards.double()
    returns = torch.zeros_like(values)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for step in reversed(range(rewards.shape[1])):
        written = steps == step
        count = written.sum(1)
        mean = torch.where(written, values, 0.0).sum(1) / count.clamp(min=1)
        target = rewards[:, step] + gamma * next_value + gamma * lam * next_advantage
        returns = torch.where(written, target.unsqueeze(1), returns)
        next_value = torch.where(count > 0, mean, next_value)
        next_advantage = torch.where(count > 0, target - mean, next_advantage)
    return torch.where(steps >= 0, returns - values, 0.0), returns


def whiten(values: Tensor, where: Tensor) -> Tensor:
    """(x − mean) / √(variance + 1e-8) over the True entries of `where` (verl's masked_whiten), 0 elsewhere; any shape."""
    chosen = values[where]
    if len(chosen) < 2:
        return torch.zeros_like(values)
    return torch.where(where, (values - chosen.mean()) * (chosen.var() + 1e-8).rsqrt(), 0.0)


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 − Var(returns − values) / Var(returns), of two [K]; None where the returns do not vary."""
    spread = returns.double().var(correction=0)
    if len(returns) < 2 or spread <= 1e-12:
        return None
    return float(1 - (returns.double() - values.double()).var(correction=0) / spread)
