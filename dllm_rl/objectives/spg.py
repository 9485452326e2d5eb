"""Sandwiched policy gradient: raise a lower bound of good completions, lower an upper bound of bad ones.

    A >= 0:   −A ELBO,   ELBO = 1/N Σ_j w_j Σ_t log p_jt
    A <  0:   −A EUBO,   EUBO = 1/β Σ_t log( 1/N Σ_j w_j p_jt^β )       (up to a constant)
              or the mix  −A ( ω EUBO + (1 − ω) ELBO )

The sum of the EUBO runs over the tokens that some sample scores and is scaled to all n tokens, as in the source's code.
The logarithm of a mean over samples is not a sum over samples, and it depends on the values themselves: two passes, also
on-policy. Source: arXiv 2510.09541, eq. 8-11, and its code (weights n/|M|, token-mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.likelihood import elbo_terms
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, check_unnormalised

NEGATIVES = ("mix", "eubo", "elbo", "zero")


@dataclass
class SPG(Objective):
    """SPG (`objective=spg`)."""

    aggregation: str = "token-mean"
    negative: str = "mix"
    """What stands for the log-likelihood where A < 0: mix | eubo | elbo | zero (drop such completions)."""
    beta: float = 1.5
    """β of the EUBO, >= 1: the bound is tightest at 1 and looser as it grows."""
    mix_weight: float = 0.5
    """ω: the share of the EUBO in mix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.negative in NEGATIVES, "objective.negative", self.negative, ", ".join(NEGATIVES))
        check(self.beta >= 1, "objective.beta", self.beta, "a number >= 1")
        check(0 <= self.mix_weight <= 1, "objective.mix_weight", self.mix_weight, "a number from 0 to 1")

    @property
    def traits(self) -> Traits:
        return Traits(uses_old=False)

    def check_likelihood(self, likelihood: Likelihood) -> None:
        check_unnormalised(likelihood, "the weights of objective=spg enter a logarithm")

    def prepare(self, advantages: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """With negative=zero, completions below average have no gradient and cost no pass: [B] -> [B]."""
        del valid, groups
        return advantages.clamp(min=0) if self.negative == "zero" else advantages

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Minus A x the bound that fits the sign of A. See `LossInputs` for shapes."""
        elbo = elbo_terms(inputs.logps, inputs.weights).sum(1) / inputs.num_samples
        share_of_eubo = {"mix": self.mix_weight, "eubo": 1.0, "elbo": 0.0, "zero": 0.0}[self.negative]
        negative = share_of_eubo * eubo(inputs, self.beta) + (1 - share_of_eubo) * elbo
        if self.negative == "zero":
            negative = torch.zeros_like(elbo)
        bound = torch.where(inputs.advantages >= 0, elbo, negative)
        return LossOutput(-inputs.reduce(inputs.advantages * bound), {})


def eubo(inputs: LossInputs, beta: float) -> Tensor:
    """The upper bound of each sequence, up to a constant: [B]."""
    logs = beta * inputs.logps + rearrange(inputs.weights.log(), "b n -> b n 1")
    seen = inputs.scored.any(1)
    # Tokens that no sample scores are given log-mean 0 before the logarithm of a sum of nothing can turn into NaN.
    logs = torch.where(inputs.scored, logs, -torch.inf).masked_fill(rearrange(~seen, "b l -> b 1 l"), 0.0)
    per_token = torch.where(seen, logs.logsumexp(1) - log(inputs.num_samples), 0.0) / beta
    return per_token.sum(1) * inputs.region.sum(1) / seen.sum(1).clamp(min=1)
