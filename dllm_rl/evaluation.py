"""Accuracy with 95 % intervals, from the same sampler and the same reward that training uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.errors import check
from dllm_rl.experience import rollout
from dllm_rl.models.policy import Policy
from dllm_rl.task import Reward, Task

EVALUATION_STEP = -1
"""Step in the keys of evaluation noise: the same at every evaluation, so that before and after are paired."""


@dataclass
class EvaluationConfig:
    """How a policy is evaluated."""

    num_prompts: int | None = 256
    """Test prompts, from the first one on. null: all of them."""

    def __post_init__(self) -> None:
        valid = "an integer >= 1, or null for the whole test set"
        check(self.num_prompts is None or self.num_prompts >= 1, "evaluation.num_prompts", self.num_prompts, valid)


@dataclass(frozen=True)
class Estimate:
    """A mean over n prompts with its 95 % interval.

    Example: `Estimate("greedy/reward", 256, 0.5, 0.439, 0.561)`
    """

    metric: str
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Results of one policy on one task."""

    estimates: list[Estimate]
    """greedy/reward and sampled/reward first, then the task's named parts."""
    infra_errors: int
    """Completions that the grader could not grade; they are in no estimate."""
    answers: list[dict[str, object]]
    """One record per completion."""

    def value(self, metric: str) -> float:
        return next(estimate.value for estimate in self.estimates if estimate.metric == metric)

    def line(self, step: int) -> str:
        greedy, sampled = self.estimates[:2]
        return (f"step {step:>4}  test reward: greedy {greedy.value:.3f} [{greedy.low:.3f}, {greedy.high:.3f}]  "
                f"sampled {sampled.value:.3f} [{sampled.low:.3f}, {sampled.high:.3f}]  ({greedy.n} prompts)")

    def record(self, step: int) -> dict[str, object]:
        """The line of evaluations.jsonl."""
        return {"step": step, "n": self.estimates[0].n, **{row.metric: row.value for row in self.estimates},
                "intervals": {row.metric: [row.low, row.high] for row in self.estimates}}

    def summary(self) -> dict[str, object]:
        """The content of results.json for a task: the first estimate, and all of them under `metrics`."""
        rows = [asdict(estimate) for estimate in self.estimates]
        return {**rows[0], "infra_errors": self.infra_errors, "metrics": rows}


def evaluate(
    policy: Policy, task: Task, sampler: LowConfidence, config: EvaluationConfig, *, seed: int
) -> Evaluation:
    """Greedy and sampled (at the sampler's temperature) completions of the test prompts, one of each per prompt."""
    prompts = list(task.prompts("test"))[: config.num_prompts]
    estimates: list[Estimate] = []
    answers: list[dict[str, object]] = []
    infra_errors = 0
    for mode, temperature in (("greedy", 0.0), ("sampled", sampler.temperature)):
        settings = replace(sampler, temperature=temperature)
        _, texts = rollout(policy, task, settings, prompts, seed=seed, step=EVALUATION_STEP)
        rewards = task.score_batch(prompts, texts)
        graded = [reward for reward in rewards if reward.verdict != "infra_error"]
        infra_errors += len(rewards) - len(graded)
        estimates += _estimates(mode, graded)
        answers += [
            {"mode": mode, "id": prompt.id, "prompt": prompt.text, "completion": text, **asdict(reward)}
            for prompt, text, reward in zip(prompts, texts, rewards, strict=True)
        ]
    estimates.sort(key=lambda estimate: not estimate.metric.endswith("/reward"))
    return Evaluation(estimates, infra_errors, answers)


def _estimates(mode: str, rewards: Sequence[Reward]) -> list[Estimate]:
    if not rewards:
        raise RuntimeError("the grader failed on every completion")
    columns = {"reward": [reward.value for reward in rewards]}
    for name in rewards[0].parts:
        columns[name] = [reward.parts[name] for reward in rewards if name in reward.parts]
    return [
        Estimate(f"{mode}/{name}", len(values), sum(values) / len(values), *interval(values))
        for name, values in columns.items()
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's score interval for 0/1 values, the normal approximation for others."""
    n, z = len(values), 1.959964
    mean = sum(values) / n
    if set(values) <= {0.0, 1.0}:
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        # At a mean of exactly 0 or 1 rounding would leave the end of the interval beside it.
        return min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = z * math.sqrt(variance / n)
    return mean - half, mean + half
