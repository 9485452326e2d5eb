"""What an objective reads and returns. B sequences, n Monte Carlo samples in this chunk, N in all, L completion length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.likelihood import elbo_terms
from dllm_rl.errors import check
from dllm_rl.objectives.aggregation import AGGREGATIONS

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 before exp, as in verl: e^20 is 5e8."""


@dataclass(frozen=True)
class LossInputs:
    """One chunk of Monte Carlo samples.

    Example: one sequence, two samples of three positions: `logps` [1, 2, 3], `weights=[[3.0, 1.5]]`, `advantages=[1.0]`
    """

    logps: Tensor
    """[B, n, L]: current log-probabilities, 0 where a sample does not score a position. Carries the graph."""
    old_logps: Tensor
    """[B, n, L]: the same corruptions under the policy that sampled; no graph."""
    scored: Tensor
    """[B, n, L] bool: where a sample scores a position."""
    weights: Tensor
    """[B, n]: weight of each ELBO term."""
    advantages: Tensor
    """[B]."""
    coefficients: Tensor
    """[B]: what one unit of a sequence's token-summed loss counts in the loss of the whole update (see `aggregation`)."""
    region: Tensor
    """[B, L] bool: the positions that count."""
    num_samples: int
    """N of the whole update, over all chunks."""
    ref_logps: Tensor | None = None
    """[B, n, L]: the same corruptions under the reference policy; None without a KL term."""
    divergence: Tensor | None = None
    """[B, n, L]: divergence from the policy that sampled, for objectives that name one; None on-policy, where it is 0."""

    @property
    def delta(self) -> Tensor:
        """δ_j = l_j − l_old,j in nats: [B, n]. Exactly 0 where the log-probabilities are equal."""
        return elbo_terms(self.logps, self.weights) - elbo_terms(self.old_logps, self.weights)

    def reduce(self, per_sequence: Tensor) -> Tensor:
        """The chunk's share of the loss: [B] token-summed losses -> scalar."""
        return (self.coefficients * per_sequence).sum()


class Share(NamedTuple):
    """A chunk's share of a mean: sums add up over chunks, and the engine divides at the end."""

    total: Tensor
    number: Tensor


class LossOutput(NamedTuple):
    """The chunk's share of the loss (minimised), and its share of each metric."""

    loss: Tensor
    metrics: Mapping[str, Share]


@dataclass
class Objective(ABC):
    """A pure function of log-probabilities and advantages: a member of the Hydra group `objective`."""

    aggregation: str = "seq-mean-token-sum"
    """How token losses become one number: token-mean, seq-mean-token-mean, seq-mean-token-sum or seq-mean-token-sum-norm."""
    horizon: int | None = None
    """H of seq-mean-token-sum-norm; null: the canvas length."""

    def __post_init__(self) -> None:
        check(self.aggregation in AGGREGATIONS, "objective.aggregation", self.aggregation, ", ".join(AGGREGATIONS))
        check(self.horizon is None or self.horizon >= 1, "objective.horizon", self.horizon, "an integer >= 1, or null")
        normed = self.aggregation == "seq-mean-token-sum-norm"
        check(self.horizon is None or normed, "objective.horizon", self.horizon,
              f"null with objective.aggregation={self.aggregation}: only seq-mean-token-sum-norm has a horizon")

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over Monte Carlo samples of functions of one sample each."""
        return False

    @property
    def ratio_only(self) -> bool:
        """Whether the loss depends on the current values only through their difference from the old ones (and the reference
        ones), so that it is known at θ = θ_old without evaluating them."""
        return False

    @property
    def uses_old(self) -> bool:
        """Whether the loss reads `old_logps`."""
        return True

    @property
    def uses_reference(self) -> bool:
        """Whether the loss reads `ref_logps`."""
        return False

    @property
    def measured_divergence(self) -> str | None:
        """The divergence that needs whole distributions, so that the engine must measure it: topk_tv, topk_kl, exact_tv,
        exact_kl or None."""
        return None

    @property
    def support_size(self) -> int:
        """Tokens per position that topk divergences keep of the policy that sampled; 0: none."""
        return 0

    @property
    def binary_divergence(self) -> str:
        """The binary divergence that the diagnostics show where none is measured: tv or kl."""
        return "tv"

    def check_likelihood(self, likelihood: Likelihood) -> None:
        """Raises UserError if the objective cannot work with these corruptions."""
        del likelihood

    def prepare(self, advantages: Tensor, valid: Tensor, group_size: int) -> Tensor:
        """What the loss uses in place of the advantages: [B] -> [B], groups side by side, `valid` [B] bool."""
        del valid, group_size
        return advantages

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput: ...


def share(values: Tensor, where: Tensor) -> Share:
    """The mean of `values` over the True entries of `where`, as a share."""
    return Share(torch.where(where, values.detach().double(), 0.0).sum(), where.sum())


def weighted_logp_loss(inputs: LossInputs, omega: Tensor) -> Tensor:
    """−Σ_b c_b A_b 1/N Σ_j w_bj Σ_t sg(ω_bjt) log p_bjt: the form that DPPO, DRPO, SPO and REINFORCE share.

    Only the detached factor ω [B, n, L] differs between them; ω = 1 is REINFORCE on the ELBO.
    """
    terms = elbo_terms(omega.detach() * inputs.logps, inputs.weights).sum(1) / inputs.num_samples
    return -inputs.reduce(inputs.advantages * terms)


def log_ratio(inputs: LossInputs) -> Tensor:
    """log π/μ per (sample, token), clamped: [B, n, L]."""
    return (inputs.logps - inputs.old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def column(per_sequence: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`."""
    return rearrange(per_sequence, "b -> b" + " 1" * (like.dim() - 1))


def check_unnormalised(likelihood: Likelihood, why: str) -> None:
    """Raises UserError if ELBO terms come divided by the length already."""
    valid = f"none: {why}"
    check(likelihood.length_norm == "none", "likelihood.length_norm", likelihood.length_norm, valid)


def exp_with_tangent(x: Tensor, limit: float) -> Tensor:
    """exp(x), continued above `limit` by its tangent there, so that value and gradient stay finite."""
    capped = x.clamp(max=limit)
    return capped.exp() * (1 + (x - capped))
