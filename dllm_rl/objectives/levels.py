"""At which level likelihood ratios are formed. l_jt: log-probability of token t in sample j; w_j: weight of the sample.

    sample_token   one ratio per sample and token: exp(l_jt − l_old,jt), weight w_j/N           separable
    sample         one per sample: exp(Σ_t l_jt − Σ_t l_old,jt), weight w_j/N                    separable
    token          one per token of the mean over samples: l_t = 1/N Σ_j w_j l_jt
    sequence       one per sequence: exp(ELBO − ELBO_old), ELBO = Σ_t l_t

At θ = θ_old all four have the gradient A ∇ELBO.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from dllm_rl.objectives.base import LossInputs

LEVELS = ("sample_token", "sample", "token", "sequence")
SEPARABLE_LEVELS = ("sample_token", "sample")
TOKEN_LEVELS = ("sample_token", "token")
"""Levels with units that belong to one token, which may have an advantage of its own."""


class Units(NamedTuple):
    """U ratios for each of B sequences."""

    delta: Tensor
    """[B, U]: log-ratio to the old policy; carries the graph."""
    advantage: Tensor
    """[B, 1], or [B, U] where each token has its own."""
    reference: Tensor | None
    """[B, U]: log-ratio to the reference policy, or None."""
    weight: Tensor
    """[B, U] float64: what the unit's loss counts in the token-summed loss of its sequence; 0 where there is no unit."""


def units(inputs: LossInputs, level: str) -> Units:
    """The ratios of a chunk. The levels that are not separable need all N samples in the chunk."""
    delta = _collect(inputs.logps - inputs.old_logps, inputs, level)
    reference = None if inputs.ref_logps is None else _collect(inputs.logps - inputs.ref_logps, inputs, level)
    return Units(delta, _advantage(inputs, level), reference, _weights(inputs, level))


def _advantage(inputs: LossInputs, level: str) -> Tensor:
    if inputs.advantages.dim() == 1:
        return rearrange(inputs.advantages, "b -> b 1")
    if level not in TOKEN_LEVELS:
        raise ValueError(f"objective.level={level} has one advantage per sequence, not one per token")
    if level == "token":
        return inputs.advantages
    return repeat(inputs.advantages, "b l -> b (n l)", n=inputs.logps.shape[1])


def _collect(difference: Tensor, inputs: LossInputs, level: str) -> Tensor:
    """[B, n, L] -> [B, U]."""
    if level == "sample_token":
        return rearrange(difference, "b n l -> b (n l)")
    if level == "sample":
        return difference.sum(-1)
    weights = inputs.weights / inputs.num_samples
    per_token = einsum(weights, difference.to(weights.dtype), "b n, b n l -> b l")
    return per_token if level == "token" else per_token.sum(-1, keepdim=True)


def _weights(inputs: LossInputs, level: str) -> Tensor:
    weights = inputs.weights / inputs.num_samples
    if level == "sample_token":
        return rearrange(rearrange(weights, "b n -> b n 1") * inputs.scored, "b n l -> b (n l)")
    if level == "sample":
        return weights * inputs.scored.any(-1)
    if level == "token":
        return inputs.region.to(weights.dtype)
    return torch.ones_like(weights[:, :1])
