"""A KL penalty in the reward: r − coef (log π − log π_ref), with a coefficient that can steer the KL to a target.

    coef ← coef (1 + clip(KL/target − 1, −0.2, 0.2) n / horizon)      after every n completions

Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2; TRL's and verl's adaptive controllers. The estimator is k1 with
the log-probabilities of the policy that sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm_rl.errors import check


@dataclass
class KLRewardConfig:
    """A penalty for leaving the reference, taken off the reward before advantages are formed."""

    coef: float = 0.0
    """0: none, and no reference policy is loaded for it. With a target: where the coefficient starts."""
    target: float | None = None
    """KL per completion, in nats, that the coefficient steers to. null: the coefficient stays as it is."""
    horizon: int = 10_000
    """Completions over which the coefficient can change by a fifth, about."""

    def __post_init__(self) -> None:
        check(self.coef >= 0, "kl_reward.coef", self.coef, "a number >= 0")
        check(self.target is None or self.target > 0, "kl_reward.target", self.target, "a number > 0, or null")
        check(self.target is None or self.coef > 0, "kl_reward.coef", self.coef, "a number > 0 with kl_reward.target")
        check(self.horizon >= 1, "kl_reward.horizon", self.horizon, "an integer >= 1")


class KLReward:
    """The coefficient of a run; it is part of the run's state."""

    def __init__(self, config: KLRewardConfig) -> None:
        self.config, self.coef = config, config.coef

    def adapt(self, kl: float, completions: int) -> None:
        """Moves the coefficient after `completions` completions of mean KL `kl`."""
        if self.config.target is not None:
            error = min(0.2, max(-0.2, kl / self.config.target - 1))
            self.coef *= 1 + error * completions / self.config.horizon
