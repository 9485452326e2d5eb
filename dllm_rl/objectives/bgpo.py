"""Boundary-Guided Policy Optimization: a lower bound of the ELBO-ratio objective that is linear in the samples.

With l_j the ELBO terms of one completion, δ_j = l_j − l_old,j on the same masks, N samples and advantage A
(arXiv 2510.11683, eq. 13-14):

    A ≥ 0:   g_j = A (1 + δ_j) / N          since exp(x) ≥ 1 + x at x = mean δ
    A < 0:   g_j = A exp(δ_j) / N           since exp(mean δ) ≤ mean exp(δ)     (Jensen)
    Σ_j g_j  ≤  A exp(mean_j δ_j),          equal in value and gradient where δ = 0 (on-policy)

The loss is −Σ_j g_j averaged over completions. The defaults are the paper's: no clipping, no KL term, chunk = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import reduce, repeat
from torch import Tensor

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, column, exp_with_tangent, share


@dataclass
class BGPO(Objective):
    """BGPO (`objective=bgpo`)."""

    max_delta: float = 20.0
    """Above it, exp(δ) of the A < 0 branch goes on as its tangent, which keeps loss and gradients finite for any δ. The
    bound is lost there; such samples are counted in `delta/above_max`. inf: the paper's formula everywhere."""
    chunk: int = 1
    """m: for A < 0, Jensen's inequality is applied to the means of m consecutive samples. 1 is BGPO, N the exact objective;
    the bound rises with every coarsening. Above 1 the engine needs a second pass."""
    clip_low: float | None = None
    """For A < 0 no gradient where exp(δ) < 1 − clip_low. null: no clipping (paper)."""
    clip_high: float | None = None
    """For A >= 0 no gradient where 1 + δ > 1 + clip_high. Both clips only lower the bound, and keep value and gradient at
    θ_old."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.max_delta > 0, "objective.max_delta", self.max_delta, "a number > 0 (inf for no limit)")
        check(self.chunk >= 1, "objective.chunk", self.chunk, "an integer >= 1 that divides likelihood.num_samples")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            check(value is None or value > 0, f"objective.{name}", value, "a number > 0, or null")

    @property
    def traits(self) -> Traits:
        return Traits(separable=self.chunk == 1, ratio_only=True)

    def check_likelihood(self, likelihood: Likelihood) -> None:
        valid = f"a divisor of likelihood.num_samples={likelihood.num_samples}"
        check(likelihood.num_samples % self.chunk == 0, "objective.chunk", self.chunk, valid)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Minus the bound, for the given samples. See `LossInputs` for shapes."""
        delta, advantage = inputs.delta, column(inputs.advantages, inputs.weights)
        factors = bgpo_factors(delta, advantage, self.max_delta, self.chunk)
        low = None if self.clip_low is None else 1 - self.clip_low
        high = None if self.clip_high is None else 1 + self.clip_high
        clipped = clip_factors(factors, advantage, low, high)
        bound = (advantage * clipped).sum(1) / inputs.num_samples
        everywhere = torch.ones_like(delta, dtype=torch.bool)
        return LossOutput(-inputs.reduce(bound), {
            "delta/above_max": share((delta > self.max_delta) & (advantage < 0), everywhere),
            "delta/below_minus_one": share((delta < -1) & (advantage >= 0), everywhere),
            "objective/clipped": share(clipped != factors, everywhere),
        })


def bgpo_factors(delta: Tensor, advantage: Tensor, max_delta: float, chunk: int = 1) -> Tensor:
    """N g_j / A for every sample: δ [B, n] and A [B, 1] -> [B, n].

    Each branch is fed zeros where the other one applies: `where` alone would pass the NaN gradient of an overflowing exp
    into rows that do not use it.
    """
    gains = advantage >= 0
    linear = 1 + torch.where(gains, delta, 0.0)
    losing = torch.where(gains, 0.0, delta)
    if chunk > 1:
        losing = repeat(reduce(losing, "b (c m) -> b c", "mean", m=chunk), "b c -> b (c m)", m=chunk)
    return torch.where(gains, linear, exp_with_tangent(losing, max_delta))


def clip_factors(factors: Tensor, advantage: Tensor, low: float | None, high: float | None) -> Tensor:
    """At most `high` where A >= 0, at least `low` where A < 0: A x factor can only fall."""
    gains = advantage >= 0
    if high is not None:
        factors = torch.where(gains, factors.clamp(max=high), factors)
    if low is not None:
        factors = torch.where(gains, factors, factors.clamp(min=low))
    return factors
