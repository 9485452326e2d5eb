"""What the objectives for scored data share: the log-ratio of a whole completion to the reference policy.

    ℓ = 1/N Σ_j (l_j − l_ref,j),  the same corruptions for both;  log_ratio=mean: divided by the number of tokens

ELBOs stand for log-likelihoods, so ℓ is a difference of lower bounds. All of these losses bend in ℓ, a mean over samples:
the engine takes their gradient in two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.likelihood import elbo_terms
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, Objective, Traits, check_unnormalised

LOG_RATIOS = ("sum", "mean")


@dataclass
class LogRatio(Objective):
    """An objective of ℓ and the reward."""

    log_ratio: str = "sum"
    """sum: ℓ of the sequence. mean: ℓ per token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.log_ratio in LOG_RATIOS, "objective.log_ratio", self.log_ratio, " or ".join(LOG_RATIOS))
        valid = "seq-mean-token-sum: the loss of a completion is one number (objective.log_ratio has the lengths)"
        check(self.aggregation == "seq-mean-token-sum", "objective.aggregation", self.aggregation, valid)

    @property
    def traits(self) -> Traits:
        return Traits(couples_sequences=True, reads_rewards=True, uses_old=False, uses_reference=True)

    def check_likelihood(self, likelihood: Likelihood) -> None:
        check_unnormalised(likelihood, "objective.log_ratio says how lengths count")

    def sequence(self, terms: Tensor, lengths: Tensor) -> Tensor:
        """The estimate of log π of each completion, or of a difference of two: [B, n] terms and [B] lengths -> [B]."""
        total = terms.mean(1)
        return total if self.log_ratio == "sum" else total / lengths.clamp(min=1)

    def ell(self, inputs: LossInputs) -> Tensor:
        """ℓ of each completion, [B]; carries the graph."""
        assert inputs.ref_logps is not None, "objectives of a log-ratio are given the reference"
        return self.sequence(elbo_terms(inputs.logps - inputs.ref_logps, inputs.weights), inputs.region.sum(1))
