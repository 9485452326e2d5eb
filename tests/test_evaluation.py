"""Intervals against known values, and graders that fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.evaluation import EvaluationConfig, evaluate, interval
from dllm_rl.task import Prompt, Reward, Split, Task
from tests.conftest import make_policy


@pytest.mark.parametrize(("successes", "n", "low", "high"), [
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (128, 256, 0.4392, 0.5608),
    (1, 20, 0.0089, 0.2361),
])
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    assert interval([1.0] * successes + [0.0] * (n - successes)) == pytest.approx((low, high), abs=1e-4)


def test_the_mean_is_never_outside_its_interval() -> None:
    for n in range(1, 40):
        assert interval([0.0] * n)[0] == 0.0
        assert interval([1.0] * n)[1] == 1.0


def test_normal_interval() -> None:
    # mean 0.5, unbiased variance 1/12 x 4/3... by hand: deviations 0.25, 0.25, 0.25, 0.25 -> 0.25/3 = 0.08333
    half = 1.959964 * (0.25 / 3 / 4) ** 0.5
    assert interval([0.25, 0.75, 0.25, 0.75]) == pytest.approx((0.5 - half, 0.5 + half))


@dataclass
class HalfBroken(Task):
    """Every third completion cannot be graded; the rest are right."""

    completion_length: int = 4

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(f"{split}/{index}", "ab") for index in range(9)]

    def score(self, prompt: Prompt, completion: str) -> Reward:
        del completion
        if int(prompt.id.split("/")[1]) % 3 == 0:
            return Reward(0.0, "infra_error")
        return Reward(1.0, "correct", {"cell": 0.5})


def test_infra_errors_are_counted_and_left_out() -> None:
    result = evaluate(make_policy(torch.float32), HalfBroken(), LowConfidence(), EvaluationConfig(), seed=0)
    assert result.infra_errors == 6  # three of nine, greedy and sampled
    assert [(row.metric, row.n, row.value) for row in result.estimates] == [
        ("greedy/reward", 6, 1.0), ("sampled/reward", 6, 1.0), ("greedy/cell", 6, 0.5), ("sampled/cell", 6, 0.5),
    ]
    assert result.summary()["metric"] == "greedy/reward"


def test_only_the_first_prompts_are_used() -> None:
    result = evaluate(make_policy(torch.float32), HalfBroken(), LowConfidence(), EvaluationConfig(num_prompts=2), seed=0)
    assert {answer["id"] for answer in result.answers} == {"test/0", "test/1"}


def test_evaluations_are_paired() -> None:
    policy = make_policy(torch.float32)
    first, second = (evaluate(policy, HalfBroken(), LowConfidence(), EvaluationConfig(), seed=4) for _ in range(2))
    assert first.answers == second.answers
