"""KL terms in the loss, from one log-ratio log π/π_ref per unit (Schulman 2020, http://joschu.net/blog/kl-approx.html).

    k1 = log π/π_ref                            gradient ∇log π: zero in expectation, so it regularises nothing
    k2 = (log π/π_ref)² / 2                     gradient log(π/π_ref) ∇log π: that of the reverse KL, on-policy (ESPO)
    k3 = π_ref/π − 1 + log π/π_ref              gradient (1 − π_ref/π) ∇log π: not that of the reverse KL, but >= 0 (GRPO)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.base import MAX_LOG_RATIO, Objective, Share, Traits, exp_with_tangent, share
from dllm_rl.objectives.levels import Units

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_ANCHORS = ("reference", "old")


def kl(ratio: Tensor, estimator: str) -> Tensor:
    """The estimate of each unit from its log π/π_ref. Any shape."""
    if estimator == "k1":
        return ratio
    if estimator == "k2":
        return ratio.square() / 2
    # The tangent keeps the slope's sign: clamping exp alone would leave a linear term that pushes away from the reference.
    return exp_with_tangent(-ratio, MAX_LOG_RATIO) - 1 + ratio


@dataclass
class KLObjective(Objective):
    """An objective with a KL term towards a fixed policy."""

    kl_coef: float = 0.0
    """0: no reference policy is loaded and no pass is made for it."""
    kl_estimator: str = "k3"
    """k1 | k2 | k3."""
    kl_anchor: str = "reference"
    """reference: the model that training started from. old (TraceRL): the policy that sampled; acts off-policy only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.kl_coef >= 0, "objective.kl_coef", self.kl_coef, "a number >= 0")
        check(self.kl_estimator in KL_ESTIMATORS, "objective.kl_estimator", self.kl_estimator, ", ".join(KL_ESTIMATORS))
        check(self.kl_anchor in KL_ANCHORS, "objective.kl_anchor", self.kl_anchor, " or ".join(KL_ANCHORS))

    @property
    def traits(self) -> Traits:
        return Traits(uses_reference=self.kl_coef > 0 and self.kl_anchor == "reference")

    def penalty(self, units: Units, exists: Tensor, metrics: dict[str, Share], per: Tensor | float = 1.0) -> Tensor | float:
        """kl_coef x KL / `per` of each unit, with its mean in `metrics`; 0 where there is nothing to pull towards."""
        ratio = units.delta if self.kl_anchor == "old" else units.reference
        if not self.kl_coef or ratio is None:
            return 0.0
        divergence = kl(ratio, self.kl_estimator) / per
        metrics["kl/mean"] = share(divergence, exists)
        return self.kl_coef * divergence
