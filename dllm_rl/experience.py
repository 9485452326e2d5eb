"""From prompts to graded completions: what a step learns from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dllm_rl.diffusion.noise import Purpose, make_key, uniform
from dllm_rl.diffusion.sampler import Sampler
from dllm_rl.drift import Variety, disagreement, effort
from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy
from dllm_rl.task import Grader, Prompt, Reward, Task
from dllm_rl.types import Completions

Item = TypeVar("Item")


@dataclass(frozen=True)
class Experience:
    """Graded completions of one step, fresh or from a file. Completions of a prompt lie side by side."""

    completions: Completions
    rewards: Tensor
    """[B] float64."""
    valid: Tensor
    """[B] bool: False where the grader, not the completion, failed."""
    groups: Tensor
    """[B] int64: completions of the same prompt share a number."""
    advantages: Tensor
    """[B], or [B, L] from a critic on the trajectory; 0 until they are assessed."""
    mask_step: int
    """The step in the keys of the corruptions: equal numbers see equal masks."""

    def metrics(self) -> dict[str, float]:
        """The `reward/` figures of metrics.jsonl, over the completions that could be graded."""
        kept = self.rewards[self.valid]
        return {
            "reward/mean": float(kept.mean()) if len(kept) else float("nan"),
            "reward/std": float(kept.std(correction=0)) if len(kept) else float("nan"),
        }

    def records(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines of rollouts.jsonl: none for completions that were read from a file."""
        del step
        return iter(())


@dataclass(frozen=True)
class Rollouts(Experience):
    """Completions that the policy has just sampled."""

    prompts: list[Prompt]
    """B entries: each prompt repeated G times."""
    texts: list[str]
    graded: list[Reward]
    drift: Mapping[str, float] = field(default_factory=dict)
    """How far an approximate sampler is from the exact one."""

    def metrics(self) -> dict[str, float]:
        """The `reward/` and `rollout/` figures of metrics.jsonl."""
        unique = {(prompt.id, text) for prompt, text in zip(self.prompts, self.texts, strict=True)}
        by_task = [reward.parts["task"] for reward in self.graded if "task" in reward.parts]
        return {
            **super().metrics(),
            **({"reward/task": sum(by_task) / len(by_task)} if by_task else {}),
            "reward/no_answer": sum(reward.verdict == "no_answer" for reward in self.graded),
            "reward/timeout": sum(reward.verdict == "timeout" for reward in self.graded),
            "reward/infra_error": int((~self.valid).sum()),
            "reward/format_only_groups": self.format_only_groups(),
            "rollout/unique": len(unique),
            "rollout/count": len(self.texts),
            "rollout/length": sum(map(len, self.texts)) / len(self.texts),
            **effort(self.completions),
            **self.drift,
        }

    def format_only_groups(self) -> int:
        """Groups whose rewards differ although all their answers are right, or none is: they learn something else."""
        correct: dict[int, set[bool]] = {}
        values: dict[int, set[float]] = {}
        for group, reward in zip(self.groups.tolist(), self.graded, strict=True):
            if reward.verdict != "infra_error":
                correct.setdefault(group, set()).add(reward.verdict == "correct")
                values.setdefault(group, set()).add(reward.value)
        return sum(len(values[group]) > 1 and len(found) == 1 for group, found in correct.items())

    def records(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines of rollouts.jsonl: everything about each completion, with the order of its tokens."""
        orders, logps = self.completions.unmask_step.tolist(), self.completions.behaviour_logps
        advantages = (self.advantages if self.advantages.dim() == 1 else self.advantages.mean(1)).tolist()
        for index, (prompt, text, reward) in enumerate(zip(self.prompts, self.texts, self.graded, strict=True)):
            yield {
                "step": step, "prompt_id": prompt.id, "prompt": prompt.text, "completion": text, "reward": reward.value,
                "verdict": reward.verdict, "parts": dict(reward.parts), "advantage": advantages[index],
                "unmask_step": orders[index],
                **({} if logps is None else {"behaviour_logps": [round(value, 6) for value in logps[index].tolist()]}),
            }


class Source(Protocol):
    """Where the experience of a step comes from; the loop does not know whether it is fresh."""

    def experience(self, step: int) -> Experience:
        """The completions of step `step` (1, 2, ...), a pure function of it and of the policy's weights."""

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps of the source."""


class Failures:
    """Stops a run whose grader fails often: completions that cannot be graded are left out, so nothing else would show it.

    Example: `Failures(0.1)` allows 10 % of the completions of the last ten batches.
    """

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed
        self._recent: deque[tuple[int, int]] = deque(maxlen=10)

    def count(self, graded: Sequence[Reward]) -> None:
        """Takes in the rewards of one batch.

        Raises:
            UserError: too many completions could not be graded.
        """
        notes = [reward.note for reward in graded if reward.verdict == "infra_error"]
        self._recent.append((len(notes), len(graded)))
        failed, total = map(sum, zip(*self._recent, strict=True))
        if failed > max(1, self._allowed * total):  # a single failure is an accident
            reason = next((f" (such as: {note})" for note in notes if note), "")
            raise UserError(f"trainer.max_infra_errors={self._allowed:g}: the grader failed on {failed} of the last {total} "
                            f"completions{reason}; resume=auto continues from the last checkpoint")


@dataclass(frozen=True)
class RolloutSource:
    """Samples `group_size` completions of each of `prompts_per_step` training prompts and grades them."""

    policy: Policy
    task: Task
    prompts: Sequence[Prompt]
    """What it samples from."""
    grader: Grader
    sampler: Sampler
    prompts_per_step: int
    group_size: int
    seed: int
    failures: Failures
    variety: Variety = field(default_factory=lambda: Variety(0))
    check_prompts: int = 0
    """Prompts per step on which an approximate sampler is compared with the exact one."""

    def experience(self, step: int) -> Rollouts:
        """Fresh completions of the prompts whose turn it is."""
        chosen = pick(self.prompts, self.prompts_per_step, seed=self.seed, step=step - 1)
        prepared = self.sampler.prepared(self.policy)  # once a step
        found = collect(prepared, self.task, self.grader, self.sampler, chosen, self.group_size, seed=self.seed, step=step)
        self.failures.count(found.graded)
        self.variety.count(found.groups.tolist(), found.texts)
        if not (self.check_prompts and self.sampler.approximates(self.policy)):
            return found
        few = found.completions.prompts.rows(slice(0, self.check_prompts * self.group_size, self.group_size))
        drift = disagreement(self.policy, self.sampler, few, self.task.completion_length, prepared)
        return replace(found, drift=drift)

    def state_dict(self) -> dict[str, int]:
        """How many of the last steps had no variety."""
        return {"identical_steps": self.variety.steps}


def pick(items: Sequence[Item], count: int, *, seed: int, step: int) -> list[Item]:
    """The `count` items of a step, a pure function of (seed, step): passes over the whole set, each in a new order."""
    positions = range(step * count, (step + 1) * count)
    orders: dict[int, list[int]] = {}
    for epoch in {position // len(items) for position in positions}:
        noise = uniform(make_key(seed, Purpose.PROMPT_ORDER, epoch), len(items))
        orders[epoch] = noise.argsort().tolist()
    return [items[orders[position // len(items)][position % len(items)]] for position in positions]


def rollout(
    policy: Policy, task: Task, sampler: Sampler, prompts: Sequence[Prompt], *, seed: int, step: int,
    sample_ids: Tensor | None = None,
) -> tuple[Completions, list[str]]:
    """One completion per entry of `prompts`; entry i has sample id i unless `sample_ids` [B] says otherwise."""
    batch = policy.encode_prompts(prompts, torch.arange(len(prompts)) if sample_ids is None else sample_ids)
    completions = sampler.sample(policy, batch, task.completion_length, seed=seed, step=step)
    return completions, policy.decode(completions.ids)


def collect(
    policy: Policy, task: Task, grader: Grader, sampler: Sampler, prompts: Sequence[Prompt], group_size: int, *,
    seed: int, step: int,
) -> Rollouts:
    """Samples `group_size` completions per prompt and grades them."""
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    completions, texts = rollout(policy, task, sampler, repeated, seed=seed, step=step)
    graded = grader.score_batch(repeated, texts)
    rewards = torch.tensor([reward.value for reward in graded], dtype=torch.float64, device=policy.device)
    valid = torch.tensor([reward.verdict != "infra_error" for reward in graded], device=policy.device)
    groups = torch.arange(len(prompts), device=policy.device).repeat_interleave(group_size)
    unassessed = torch.zeros(len(texts), device=policy.device)
    return Rollouts(completions, rewards, valid, groups, unassessed, step, repeated, texts, graded)
