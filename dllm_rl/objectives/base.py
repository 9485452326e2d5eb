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
class Extras:
    """What some objectives read of the whole update beside log-probabilities."""

    groups: Tensor | None = None
    """[B] int64: completions of the same prompt share a number."""
    mismatched: Tensor | None = None
    """[M] detached ELBO(θ) − ELBO(ref), in nats per sequence or per token as the objective has it, of completions under
    prompts that are not theirs (KTO)."""

    def rows(self, index: Tensor) -> Extras:
        return Extras(None if self.groups is None else self.groups[index], self.mismatched)


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
    """[B], or [B, L] where a critic gives each token its own; whatever `prepare` made of them."""
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
    extras: Extras = Extras()

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


class Traits(NamedTuple):
    """What a loss is and what it reads."""

    separable: bool = False
    """A sum over Monte Carlo samples of functions of one sample each: one pass."""
    ratio_only: bool = False
    """Depends on the current values only through their difference from the old ones (and the reference ones), so that it is
    known at θ = θ_old without evaluating them."""
    token_level: bool = False
    """Takes an advantage for each token, [B, L]."""
    couples_sequences: bool = False
    """The loss of a completion depends on the log-probabilities of others, so that it needs the whole batch."""
    uses_old: bool = True
    """Reads `old_logps`."""
    uses_reference: bool = False
    """Reads `ref_logps`."""
    reads_rewards: bool = False
    """Works on the rewards themselves instead of on advantages."""
    selects: bool = False
    """Completions that `prepare` gives 0 are left out altogether, from means too."""
    uses_mismatched: bool = False
    """Reads `extras.mismatched`."""
    needs_critic: str | None = None
    """The `critic.mdp` without which it makes no sense; None: any, or no critic."""


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
    def traits(self) -> Traits:
        """What the engine, the loop and the checks of a run need to know of the loss."""
        return Traits()

    @property
    def least_group(self) -> tuple[int, str]:
        """The fewest completions per prompt that make sense, and why."""
        return 1, ""

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

    def prepare(self, advantages: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """What the loss uses in place of the advantages (or rewards): [B] -> [B], `valid` [B] bool, `groups` [B] int64."""
        del valid, groups
        return advantages

    def advice(self, rewards: Tensor) -> str | None:
        """A line for the user about the rewards of a file, [B], where they call for another setting."""
        del rewards
        return None

    def value_targets(self, returns: Tensor, difference: Tensor, lengths: Tensor) -> Tensor:
        """What a critic that this objective needs is to learn: [B] returns, [B, N] terms l_j − l_ref,j and [B] tokens ->
        [B]."""
        del difference, lengths
        return returns

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput: ...


def share(values: Tensor, where: Tensor) -> Share:
    """The mean of `values` over the True entries of `where`, as a share."""
    return Share(torch.where(where, values.detach().double(), 0.0).sum(), where.sum())


def weighted_logp_loss(inputs: LossInputs, omega: Tensor) -> Tensor:
    """−Σ_b c_b A_b 1/N Σ_j w_bj Σ_t sg(ω_bjt) log p_bjt: the form that DPPO, DRPO, SPO and REINFORCE share.

    Only the detached factor ω [B, n, L] differs between them; ω = 1 is REINFORCE on the ELBO.
    """
    weighted = column(inputs.advantages, inputs.logps) * omega.detach() * inputs.logps
    return -inputs.reduce(elbo_terms(weighted, inputs.weights).sum(1) / inputs.num_samples)


def log_ratio(inputs: LossInputs) -> Tensor:
    """log π/μ per (sample, token), clamped: [B, n, L]."""
    return (inputs.logps - inputs.old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def column(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`; one value per token, [B, L], -> [B, 1, L]."""
    if values.dim() == 2:
        return rearrange(values, "b l -> b 1 l")
    return rearrange(values, "b -> b" + " 1" * (like.dim() - 1))


def check_unnormalised(likelihood: Likelihood, why: str) -> None:
    """Raises UserError if ELBO terms come divided by the length already."""
    valid = f"none: {why}"
    check(likelihood.length_norm == "none", "likelihood.length_norm", likelihood.length_norm, valid)


def exp_with_tangent(x: Tensor, limit: float) -> Tensor:
    """exp(x), continued above `limit` by its tangent there, so that value and gradient stay finite."""
    capped = x.clamp(max=limit)
    return capped.exp() * (1 + (x - capped))
