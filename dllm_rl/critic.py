"""The critic of PPO: what it sees, how it judges a step's completions, and how it learns.

    mdp=trajectory   a decision is one slice of denoising steps, its state the canvas before it; advantages per token
    mdp=bandit       a decision is the whole completion, its state the fully masked canvas; V(x) is the mean over the canvas

The values go through the gradient engine like log-probabilities do: one chunk of states has a live graph at a time.
Sources: PPO, Schulman et al. 2017; denoising MDP, TraceRL, arXiv 2509.06949; separate trunk and bandit, DRO, 2405.19107.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dllm_rl.accumulate import Engine
from dllm_rl.diffusion.corruption import Likelihood
from dllm_rl.diffusion.estimators import OneStep, Trajectory
from dllm_rl.diffusion.likelihood import token_values
from dllm_rl.errors import check
from dllm_rl.gae import explained_variance, token_advantages, whiten
from dllm_rl.models.policy import Policy
from dllm_rl.models.value_head import TRUNKS, ValueModel
from dllm_rl.objectives.aggregation import Totals
from dllm_rl.objectives.value import ValueLoss
from dllm_rl.optimization import Optimizer, OptimizerConfig
from dllm_rl.scoring import Masks, Old, Scores
from dllm_rl.types import Completions

MDPS = ("none", "bandit", "trajectory")


@dataclass
class CriticConfig:
    """The value function beside the policy."""

    mdp: str = "none"
    """none: advantages come from comparing rewards (see advantage). bandit | trajectory: a critic."""
    trunk: str = "separate"
    """separate: a network of its own, started from the policy's weights. shared: a head on the policy."""
    gamma: float = 1.0
    """γ, per slice of the trajectory."""
    lam: float = 1.0
    """λ of generalised advantage estimation."""
    steps_per_slice: int = 1
    """Denoising steps per decision; TraceRL's shrinkage."""
    value_clip: float | None = 0.2
    """Values move at most this far from those of the rollout before their loss stops falling. null: no limit."""
    whiten: bool = True
    """Advantages of a step are shifted and scaled to mean 0 and variance 1."""
    lr_scale: float = 5.0
    """Learning rate of a separate critic over that of the policy (TraceRL 5, verl 10)."""
    value_coef: float = 0.1
    """Weight of the critic's loss in the gradient of a shared trunk (TRL 0.1)."""

    def __post_init__(self) -> None:
        check(self.mdp in MDPS, "critic.mdp", self.mdp, ", ".join(MDPS))
        check(self.trunk in TRUNKS, "critic.trunk", self.trunk, " or ".join(TRUNKS))
        for name in ("gamma", "lam"):
            check(0 <= getattr(self, name) <= 1, f"critic.{name}", getattr(self, name), "a number from 0 to 1")
        check(self.steps_per_slice >= 1, "critic.steps_per_slice", self.steps_per_slice, "an integer >= 1")
        check(self.value_clip is None or self.value_clip > 0, "critic.value_clip", self.value_clip, "a number > 0, or null")
        check(self.lr_scale > 0, "critic.lr_scale", self.lr_scale, "a number > 0")
        check(self.value_coef > 0, "critic.value_coef", self.value_coef, "a number > 0")


@dataclass(frozen=True)
class Appraisal:
    """What the critic made of the completions of a step."""

    advantages: Tensor
    """[B, L] (trajectory) or [B] (bandit)."""
    returns: Tensor
    """What it is to learn, in the same shape."""
    values: Scores
    """Its values before it learned: `logps` [B, N, L], one state per decision."""
    engine: Engine
    """The states."""

    def metrics(self, returns: Tensor) -> dict[str, float]:
        """critic/explained_variance (where the returns vary), critic/value, critic/return; `returns` is what it is to
        learn."""
        scored = self.values.scored.any(1)
        values = self.values.logps.sum(1)
        if returns.dim() == 1:
            values = values.mean(1)
        else:
            values, returns = values[scored], returns[scored]
        explained = explained_variance(values, returns)
        return {
            **({} if explained is None else {"critic/explained_variance": explained}),
            "critic/value": float(values.mean()), "critic/return": float(returns.mean()),
        }


class Critic:
    """A value model with its optimizer.

    Args:
        policy: gives the trunk.
        optimizer: of the policy; a separate critic has the same with `lr_scale`.
        total_steps: of the learning-rate schedule.
    """

    def __init__(
        self, config: CriticConfig, policy: Policy, optimizer: OptimizerConfig, total_steps: int, accelerator: Accelerator,
        micro_samples: int,
    ) -> None:
        self.config, self.micro_samples = config, micro_samples
        self.model = ValueModel(policy, config.trunk)
        self._backward: Callable[[Tensor], None] = accelerator.backward
        self._optimizer: Optimizer | None = None
        if self.model.separate:
            scaled = replace(optimizer, lr=optimizer.lr * config.lr_scale)
            self._optimizer = Optimizer(scaled, self.model.parameters(), total_steps)

    @property
    def on_trajectory(self) -> bool:
        return self.config.mdp == "trajectory"

    def decisions(self, completions: Completions) -> Tensor:
        """[B, L] int64: the decision that wrote each token; -1 for tokens that are no action."""
        if not self.on_trajectory:
            return torch.zeros_like(completions.ids)
        step = completions.unmask_step
        return torch.where(step >= 0, step // self.config.steps_per_slice, -1)

    def states(self, completions: Completions) -> Likelihood:
        """The corruptions that show the state of every decision."""
        if not self.on_trajectory:
            return OneStep(num_samples=1, region="canvas", prompt_mask_prob=0.0)
        count = max(1, int(self.decisions(completions).max()) + 1)
        return Trajectory(num_samples=count, steps_per_slice=self.config.steps_per_slice)

    def appraise(self, completions: Completions, rewards: Tensor, *, seed: int) -> Appraisal:
        """Values, advantages and returns: B completions and their rewards [B, S] per decision."""
        engine = Engine(completions, Masks(self.states(completions), seed, 0), self.micro_samples, token_values)
        values = engine.score(self.model)
        advantages, returns = token_advantages(
            values.logps.sum(1), self.decisions(completions), rewards, self.config.gamma, self.config.lam
        )
        if not self.on_trajectory:
            advantages, returns = advantages.mean(1), returns[:, 0]
        if self.config.whiten:
            advantages = whiten(advantages, values.scored.any(1) if self.on_trajectory else torch.ones_like(returns).bool())
        return Appraisal(advantages, returns, values, engine)

    def learn(self, appraisal: Appraisal, targets: Tensor) -> dict[str, float]:
        """Adds the gradient of the value loss, and takes a step with it if the trunk is separate.

        Args:
            targets: in the shape of `appraisal.returns`.
        """
        scale = 1.0 if self.model.separate else self.config.value_coef
        ids = appraisal.engine.completions.ids
        _, figures = appraisal.engine.backward(
            self.model, ValueLoss(value_clip=self.config.value_clip), targets,
            Totals(len(ids), int(appraisal.values.scored.sum()), ids.shape[1]), old=Old(appraisal.values),
            run_backward=lambda loss: self._backward(scale * loss),
        )
        metrics = {f"critic/{name}": value for name, value in figures.items()}
        return metrics if self._optimizer is None else {**metrics, "critic/grad_norm": self._optimizer.step()}

    def state_dict(self) -> dict[str, Any]:
        """The state of its own optimizer; the weights are saved beside the policy's."""
        return {} if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state)
