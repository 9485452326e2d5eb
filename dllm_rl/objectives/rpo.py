"""RPO, Reward Partition Optimization: regress the log-ratio on the reward, with the partition function taken from the data.

The optimum of reward minus τ KL is log π*/π_ref = (r − V)/τ with V = τ log Z, Z = Σ_y π_ref(y) exp(r(y)/τ). DRO learns V;
RPO estimates Z from the responses to the same prompt that the data has:

    loss = 1/2 ( ℓ − r/τ + log Ẑ )²        gradient (ℓ − r/τ + log Ẑ) ∇ log π
    ref_weighted_sum          Ẑ = Σ_i π_ref(y_i) exp(r_i/τ)                          the authors' code
    ref_weighted_normalised   Ẑ = Σ_i π_ref(y_i) exp(r_i/τ) / Σ_i π_ref(y_i)
    mc_mean                   Ẑ = 1/n Σ_i exp(r_i/τ)                                 unbiased for Z if y ~ π_ref

With ref_weighted_sum the targets of a prompt's n responses are log-softmax(log π_ref + r/τ): all mass is asked for on them.
With log-probabilities per token that means token probabilities of about 1/n, above or below those of the reference.
Adding a constant to the rewards of a prompt changes nothing. Source: arXiv 2506.13702 and its code (log-probabilities per
token, rewards standardised over the data, τ = 5), which has ref_weighted_sum; the other two are derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.diffusion.likelihood import elbo_terms
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, share
from dllm_rl.objectives.groups import group_logsumexp
from dllm_rl.objectives.log_ratio import LogRatio

PARTITIONS = ("ref_weighted_sum", "mc_mean", "ref_weighted_normalised")


@dataclass
class RPO(LogRatio):
    """RPO (`objective=rpo`)."""

    log_ratio: str = "mean"
    partition: str = "ref_weighted_sum"
    """ref_weighted_sum | mc_mean | ref_weighted_normalised."""
    tau: float = 5.0
    """τ, the strength of the pull towards the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.partition in PARTITIONS, "objective.partition", self.partition, ", ".join(PARTITIONS))
        check(self.tau > 0, "objective.tau", self.tau, "a number > 0")

    @property
    def least_group(self) -> tuple[int, str]:
        target = "a log-probability of 0" if self.partition == "ref_weighted_sum" else "that of the reference"
        return 2, f"alone, a response has the target {target}, whatever its reward"

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Half the squared residual of every completion; `advantages` are the rewards. See `LossInputs` for shapes."""
        assert inputs.ref_logps is not None and inputs.extras.groups is not None
        ell = self.ell(inputs)
        reference = self.sequence(elbo_terms(inputs.ref_logps, inputs.weights), inputs.region.sum(1))
        scaled = inputs.advantages.double() / self.tau
        residual = ell - scaled + log_partition(scaled, reference, inputs.extras.groups, self.partition)
        everywhere = torch.ones_like(residual, dtype=torch.bool)
        return LossOutput(inputs.reduce(residual.square() / 2), {
            "log_ratio/mean": share(ell, everywhere), "rpo/residual": share(residual.abs(), everywhere),
        })


def log_partition(scaled: Tensor, reference: Tensor, groups: Tensor, partition: str) -> Tensor:
    """log Ẑ of each completion's prompt: r/τ [B], log π_ref [B] and group numbers [B] -> [B]."""
    if partition == "mc_mean":
        return group_logsumexp(scaled, groups) - group_logsumexp(torch.zeros_like(scaled), groups)
    total = group_logsumexp(reference + scaled, groups)
    return total if partition == "ref_weighted_sum" else total - group_logsumexp(reference, groups)
