"""DRPO and SPO: a quadratic penalty on the ratio, weighted by |A|, in place of clipping or masking.

Per (sample, token) with π the current policy, μ the policy that sampled and r = π/μ:

    DRPO   −A r + |A| μ (r − 1)² / (2 δ)      gradient −A r w ∇log π,  w = 1 − sign(A(r − 1)) |π − μ| / δ
    SPO    −A r + |A|   (r − 1)² / (2 ε)      gradient −A r w ∇log π,  w = 1 − sign(A(r − 1)) |r − 1| / ε

Moving away from μ, w falls to 0 at the boundary and corrects beyond it; DRPO's w stays within 1 ± 1/δ. Both are written here
with the detached weight, which has the same gradient and is a sum over samples: one pass. |π − μ| <= 1, so with the paper's
δ = 12.5 w stays within [0.92, 1.08] and DRPO is nearly the importance-weighted policy gradient; boundaries need δ < 1.

Sources: DRPO, arXiv 2606.09821, eq. 8 (UniRL); SPO, Simple Policy Optimization, arXiv 2401.16025.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Objective, Traits, column, log_ratio, share, weighted_logp_loss


@dataclass
class SPO(Objective):
    """Simple Policy Optimization (`objective=spo`)."""

    aggregation: str = "seq-mean-token-sum-norm"
    radius: float = 12.5
    """ε of SPO, δ of DRPO. inf: the importance-weighted policy gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.radius > 0, "objective.radius", self.radius, "a number > 0 (inf for no penalty)")

    @property
    def traits(self) -> Traits:
        return Traits(separable=True, token_level=True)

    def distance(self, log_r: Tensor, old_logps: Tensor) -> Tensor:
        """|r − 1|."""
        del old_logps
        return log_r.expm1().abs()

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The detached-weight form of the penalised surrogate. See `LossInputs` for shapes."""
        log_r = log_ratio(inputs).detach()
        distance = self.distance(log_r, inputs.old_logps)
        away = (column(inputs.advantages, log_r) * log_r).sign()
        weight = 1 - away * distance / self.radius
        return LossOutput(weighted_logp_loss(inputs, log_r.exp() * weight), {
            "objective/clipped": share(weight < 0, inputs.scored),
            "divergence/mean": share(distance, inputs.scored),
        })


@dataclass
class DRPO(SPO):
    """DRPO (`objective=drpo`): the penalty of each token is weighted by the probability μ it was sampled with."""

    def distance(self, log_r: Tensor, old_logps: Tensor) -> Tensor:
        """|π − μ|."""
        return old_logps.exp() * log_r.expm1().abs()
