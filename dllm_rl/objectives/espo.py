"""ESPO: PPO's clip on one ratio per sequence, of ELBOs divided by the length.

    loss = max( −A ρ, −A clip(ρ, 1 − clip_low, 1 + clip_high) ) + kl_coef (ELBO − ELBO_ref)² / (2 n)
    ρ = exp( (ELBO − ELBO_old) / n ),   n tokens

Source: arXiv 2512.03759 and its code; the KL estimator is k2, whose gradient is that of the reverse KL.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Traits, check_unnormalised, column, share
from dllm_rl.objectives.kl import KLObjective
from dllm_rl.objectives.levels import units
from dllm_rl.objectives.ppo_clip import clipped_surrogate


@dataclass
class ESPO(KLObjective):
    """ESPO (`objective=espo`)."""

    kl_coef: float = 1e-3
    """The source uses 1e-3 for math, 3e-3 for Countdown, 1e-2 for Sudoku and code."""
    kl_estimator: str = "k2"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.clip_low >= 0, "objective.clip_low", self.clip_low, "a number >= 0")
        check(self.clip_high >= 0, "objective.clip_high", self.clip_high, "a number >= 0")

        valid = "seq-mean-token-sum: the ratio of a sequence is one number, its length is in the exponent"
        check(self.aggregation == "seq-mean-token-sum", "objective.aggregation", self.aggregation, valid)

    @property
    def traits(self) -> Traits:
        return super().traits._replace(ratio_only=True)

    def check_likelihood(self, likelihood: Likelihood) -> None:
        check_unnormalised(likelihood, "objective=espo divides by the number of tokens itself")

    def loss(self, inputs: LossInputs) -> LossOutput:
        """One clipped ratio per sequence. See `LossInputs` for shapes."""
        unit = units(inputs, "sequence")
        length, everywhere = column(inputs.region.sum(1), unit.delta), unit.weight > 0
        losses, clipped = clipped_surrogate(unit.delta / length, unit.advantage, self.clip_low, self.clip_high)
        metrics = {"objective/clipped": share(clipped, everywhere)}
        losses = losses + self.penalty(unit, everywhere, metrics, per=length)
        return LossOutput(inputs.reduce(losses.sum(1)), metrics)
