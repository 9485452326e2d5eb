"""KTO: prospect-theoretic optimisation of completions labelled desirable or undesirable.

    desirable     λ_D ( 1 − σ( β (ℓ − z0) ) )           z0 = max(0, mean of ℓ over mismatched pairs), detached
    undesirable   λ_U ( 1 − σ( β (z0 − ℓ) ) )

The weights should satisfy λ_D n_D / (λ_U n_U) in [1, 4/3] (eq. 8): with many more undesirable completions than desirable
ones and λ_D = λ_U, everything is pushed down. A mismatched pair is a prompt with the completion of another one; z0
estimates KL(π || π_ref) and moves the point where the loss saturates. At θ = reference every loss is λ/2.

Sources: arXiv 2402.01306, eq. 7-8, and TRL (β = 0.1); ELBO-KTO, arXiv 2510.23658, for masked diffusion (z0 from the matched
pairs, 8 samples). RPO's own KTO baseline has log-probabilities per token, β = 1 and a matched z0 without the maximum
(`variant=official`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Traits, share
from dllm_rl.objectives.log_ratio import LogRatio

REFERENCE_POINTS = ("mismatched", "matched", "zero")


@dataclass
class KTO(LogRatio):
    """KTO (`objective=kto`)."""

    beta: float = 0.1
    """β: how quickly the loss saturates."""
    reference_point: str = "mismatched"
    """z0. mismatched: from prompts with completions of other prompts (paper; costs a pass of each policy). matched: the
    mean ℓ of the batch (RPO's code, ELBO-KTO). zero."""
    threshold: float = 0.0
    """A completion is desirable if its reward is at least this. 0 is the mean with offline.rewards=standardised."""
    desirable_weight: float | None = None
    """λ_D. null: λ_U n_U / n_D of each batch, so that both sides weigh the same (the paper's rule)."""
    undesirable_weight: float = 1.0
    """λ_U."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta > 0, "objective.beta", self.beta, "a number > 0")
        valid = ", ".join(REFERENCE_POINTS)
        check(self.reference_point in REFERENCE_POINTS, "objective.reference_point", self.reference_point, valid)
        given = self.desirable_weight
        check(given is None or given > 0, "objective.desirable_weight", given, "a number > 0, or null")
        check(self.undesirable_weight > 0, "objective.undesirable_weight", self.undesirable_weight, "a number > 0")

    @property
    def traits(self) -> Traits:
        return super().traits._replace(uses_mismatched=self.reference_point == "mismatched")

    def prepare(self, advantages: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
        """Rewards -> labels: 1 desirable, -1 undesirable, 0 without a grade; [B] -> [B]."""
        del groups
        labels = torch.where(advantages >= self.threshold, 1.0, -1.0)
        return torch.where(valid, labels, 0.0)

    def advice(self, rewards: Tensor) -> str | None:
        """The rule of the paper for λ_D and λ_U."""
        desirable = int((rewards >= self.threshold).sum())
        undesirable = len(rewards) - desirable
        if not desirable or not undesirable:
            return f"KTO: all rewards are on one side of objective.threshold={self.threshold}"
        if self.desirable_weight is None:
            return None
        share_of_weight = self.desirable_weight * desirable / (self.undesirable_weight * undesirable)
        if 1 <= share_of_weight <= 4 / 3:
            return None
        fitting = self.undesirable_weight * undesirable / desirable
        return (f"KTO: {desirable} desirable and {undesirable} undesirable completions; the paper advises "
                f"objective.desirable_weight from {fitting:.3g} to {fitting * 4 / 3:.3g}, it is {self.desirable_weight:g}")

    def loss(self, inputs: LossInputs) -> LossOutput:
        """λ (1 − value) of every completion; `advantages` are the labels. See `LossInputs` for shapes."""
        ell, label = self.ell(inputs), inputs.advantages
        z0 = self.z0(ell.detach(), inputs.extras.mismatched)
        good, bad = float((label > 0).sum()), float((label < 0).sum())
        balanced = self.undesirable_weight * (bad / good if good and bad else 1.0)
        desirable = balanced if self.desirable_weight is None else self.desirable_weight
        weight = torch.where(label > 0, desirable, self.undesirable_weight) * label.abs()
        losses = weight * torch.sigmoid(-self.beta * label * (ell - z0))
        return LossOutput(inputs.reduce(losses), {
            "log_ratio/desirable": share(ell, label > 0), "log_ratio/undesirable": share(ell, label < 0),
            "kto/z0": share(z0.expand_as(ell), label != 0),
        })

    def z0(self, matched: Tensor, mismatched: Tensor | None) -> Tensor:
        """The reference point, a scalar without gradient."""
        if self.reference_point == "zero":
            return matched.new_zeros(())
        if self.reference_point == "matched":
            return matched.mean()
        assert mismatched is not None, "z0 from mismatched pairs needs their log-ratios"
        return mismatched.mean().clamp(min=0)
