"""DRO, Direct Reward Optimisation: the same regression as RPO with a learned value in place of the partition.

    policy   1/(2τ) ( r − V − τ ℓ )²        gradient −(r − V − τ ℓ) ∇ log π: REINFORCE with baseline V and a KL penalty
    value    1/2 ( V − (r − τ ℓ) )²         ℓ detached

Both are zero at the joint optimum (π*, V*). V is a critic that sees the prompt only (`critic.mdp=bandit`); the paper finds a
network of its own far better than one shared with the policy. value=group_mean needs no critic: V is the mean of r − τ ℓ
over the responses to the prompt, and the loss half their variance.

Sources: DRO-V, arXiv 2405.19107, eq. 5-8 (τ = 1, separate networks); RPO's own DRO baseline has log-probabilities per token,
standardised rewards and a value on the policy's encoder (`variant=official`). Not the token loss called dro in verl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_rl.errors import check
from dllm_rl.objectives.base import LossInputs, LossOutput, Traits, share
from dllm_rl.objectives.groups import group_sum
from dllm_rl.objectives.log_ratio import LogRatio

VALUES = ("network", "group_mean")


@dataclass
class DRO(LogRatio):
    """DRO (`objective=dro`)."""

    tau: float = 1.0
    """τ, the strength of the pull towards the reference."""
    value: str = "network"
    """network: a critic (needs critic.mdp=bandit). group_mean: no critic, V from the responses to the same prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.tau > 0, "objective.tau", self.tau, "a number > 0")
        check(self.value in VALUES, "objective.value", self.value, " or ".join(VALUES))

    @property
    def traits(self) -> Traits:
        return super().traits._replace(needs_critic="bandit" if self.value == "network" else None)

    @property
    def least_group(self) -> tuple[int, str]:
        if self.value == "network":
            return 1, ""
        return 2, "alone, a response is its own mean, whatever its reward"

    def value_targets(self, returns: Tensor, difference: Tensor, lengths: Tensor) -> Tensor:
        """r − τ ℓ."""
        return returns - self.tau * self.sequence(difference, lengths)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Half the squared residual over τ; `advantages` are r − V, or r with value=group_mean. See `LossInputs` for
        shapes."""
        ell = self.ell(inputs)
        residual = inputs.advantages - self.tau * ell
        if self.value == "group_mean":
            assert inputs.extras.groups is not None
            groups, fixed = inputs.extras.groups, residual.detach()
            residual = residual - group_sum(fixed, groups) / group_sum(torch.ones_like(fixed), groups)
        everywhere = torch.ones_like(residual, dtype=torch.bool)
        return LossOutput(inputs.reduce(residual.square() / (2 * self.tau)), {
            "log_ratio/mean": share(ell, everywhere), "dro/residual": share(residual.abs(), everywhere),
        })
