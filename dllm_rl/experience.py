"""From prompts to advantages: everything that happens before a gradient is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_rl.advantages import AdvantageConfig, compute_advantages
from dllm_rl.diffusion.noise import Purpose, make_key, uniform
from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.models.policy import Policy
from dllm_rl.task import Prompt, Reward, Task
from dllm_rl.types import Completions


@dataclass(frozen=True)
class Experience:
    """Scored completions of one step. The G completions of a prompt lie side by side."""

    prompts: list[Prompt]
    """B entries: each prompt repeated G times."""
    completions: Completions
    texts: list[str]
    rewards: list[Reward]
    advantages: Tensor
    """[B]."""
    group_size: int

    @property
    def values(self) -> Tensor:
        """[B] float64 reward values."""
        return torch.tensor([reward.value for reward in self.rewards], dtype=torch.float64)

    @property
    def valid(self) -> Tensor:
        """[B] bool: False where the grader, not the completion, failed."""
        return torch.tensor([reward.verdict != "infra_error" for reward in self.rewards])

    def metrics(self) -> dict[str, float]:
        """The `reward/` and `rollout/` figures of metrics.jsonl; rewards are over the completions that could be graded."""
        values, valid = self.values, self.valid
        kept = values[valid]
        groups = self.advantages.view(-1, self.group_size)
        unique = {(prompt.id, text) for prompt, text in zip(self.prompts, self.texts, strict=True)}
        return {
            "reward/mean": float(kept.mean()) if len(kept) else float("nan"),
            "reward/std": float(kept.std(correction=0)) if len(kept) else float("nan"),
            "reward/zero_advantage_groups": int((groups == 0).all(1).sum()),
            "reward/no_answer": sum(reward.verdict == "no_answer" for reward in self.rewards),
            "reward/timeout": sum(reward.verdict == "timeout" for reward in self.rewards),
            "reward/infra_error": int((~valid).sum()),
            "rollout/unique": len(unique),
            "rollout/count": len(self.texts),
            "rollout/length": sum(map(len, self.texts)) / len(self.texts),
        }

    def records(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines of rollouts.jsonl: everything about each completion, with the order of its tokens."""
        orders, advantages = self.completions.unmask_step.tolist(), self.advantages.tolist()
        for index, (prompt, text, reward) in enumerate(zip(self.prompts, self.texts, self.rewards, strict=True)):
            yield {
                "step": step, "prompt_id": prompt.id, "prompt": prompt.text, "completion": text, "reward": reward.value,
                "verdict": reward.verdict, "parts": dict(reward.parts), "advantage": advantages[index],
                "unmask_step": orders[index],
            }


def pick_prompts(prompts: Sequence[Prompt], count: int, *, seed: int, step: int) -> list[Prompt]:
    """The `count` prompts of a step, a pure function of (seed, step): passes over the whole set, each in a new order."""
    positions = range(step * count, (step + 1) * count)
    orders: dict[int, list[int]] = {}
    for epoch in {position // len(prompts) for position in positions}:
        noise = uniform(make_key(seed, Purpose.PROMPT_ORDER, epoch), len(prompts))
        orders[epoch] = noise.argsort().tolist()
    return [prompts[orders[position // len(prompts)][position % len(prompts)]] for position in positions]


def rollout(
    policy: Policy, task: Task, sampler: LowConfidence, prompts: Sequence[Prompt], *, seed: int, step: int
) -> tuple[Completions, list[str]]:
    """One completion per entry of `prompts`; entry i has sample id i."""
    batch = policy.encode_prompts([prompt.text for prompt in prompts], torch.arange(len(prompts)))
    completions = sampler.sample(policy, batch, task.completion_length, seed=seed, step=step)
    return completions, policy.decode(completions.ids)


def collect(
    policy: Policy, task: Task, sampler: LowConfidence, prompts: Sequence[Prompt], group_size: int,
    advantage: AdvantageConfig, *, seed: int, step: int,
) -> Experience:
    """Samples `group_size` completions per prompt, scores them and compares each with its group.

    Raises:
        RuntimeError: the grader failed on more than half of the completions.
    """
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    completions, texts = rollout(policy, task, sampler, repeated, seed=seed, step=step)
    rewards = task.score_batch(repeated, texts)
    experience = Experience(repeated, completions, texts, rewards, torch.zeros(len(texts)), group_size)
    if 2 * experience.valid.sum() < len(texts):
        raise RuntimeError(f"the grader failed on {int((~experience.valid).sum())} of {len(texts)} completions")
    advantages = compute_advantages(
        experience.values, experience.valid, group_size, advantage.kind, advantage.epsilon
    )
    return Experience(repeated, completions, texts, rewards, advantages.to(policy.device), group_size)
