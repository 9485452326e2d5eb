"""Rewards made of parts, by hand; no way to profit from not answering; graders that fail; groups that differ in form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.errors import UserError
from dllm_rl.experience import Failures, Rollouts, collect
from dllm_rl.models.composed_reward import ComposedGrader, ComposedReward, LengthPenalty
from dllm_rl.models.tiny import build_tokenizer
from dllm_rl.task import Prompt, Reward, Split, Task
from tests.conftest import make_policy
from tests.test_reward_model import save_reward_model

TOKENIZER = build_tokenizer([])
CPU = torch.device("cpu")


@dataclass
class Letters(Task):
    """Right: "yes". `style` is 1 for lower case. Grading "broken" fails."""

    completion_length: int = 10

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(f"{split}/{n}", "q" * (n + 1)) for n in range(4)]

    def score(self, prompt: Prompt, completion: str) -> Reward:
        del prompt
        parts = {"style": float(completion.islower())}
        if completion == "broken":
            return Reward(0.0, "infra_error", note="out of order")
        if not completion:
            return Reward(0.0, "no_answer", {"style": 1.0})  # a careless task rewards the form of an empty answer
        return Reward(float(completion == "yes"), "correct" if completion == "yes" else "wrong", parts)


def graded(config: ComposedReward, *texts: str) -> list[Reward]:
    task = Letters()
    return config.grader(task, CPU, TOKENIZER).score_batch([task.prompts("test")[0]] * len(texts), texts)


def test_weighted_parts_by_hand() -> None:
    rewards = graded(ComposedReward(weights={"task": 2.0, "style": 0.5}), "yes", "no", "NO")
    assert [reward.value for reward in rewards] == [2.5, 0.5, 0.0]
    assert rewards[0].parts == {"style": 1.0, "task": 1.0} and rewards[0].verdict == "correct"


@pytest.mark.parametrize(("length", "expected"), [
    (LengthPenalty("linear", 0.5), [1 - 0.15, -0.5 * 8 / 10]),
    (LengthPenalty("overlong", 0.5, free_tokens=4), [1.0, -0.5 * 4 / 6]),
    (LengthPenalty("none", 0.5), [1.0, 0.0]),
])
def test_length_penalties_by_hand(length: LengthPenalty, expected: list[float]) -> None:
    rewards = graded(ComposedReward(length=length), "yes", "a" * 8)
    assert [reward.value for reward in rewards] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["none", "linear", "overlong"])
def test_not_answering_is_never_better_than_a_wrong_answer(kind: str) -> None:
    config = ComposedReward(weights={"task": 1.0, "style": 0.3}, length=LengthPenalty(kind, 0.4, free_tokens=2))
    nothing, *wrong = graded(config, "", "x", "a" * 10, "NO", "A" * 10)
    assert nothing.verdict == "no_answer"
    assert all(nothing.value <= reward.value for reward in wrong)


def test_running_out_of_time_is_not_paid_for_its_parts() -> None:
    config = ComposedReward(weights={"task": 1.0, "style": 0.5})
    late = ComposedGrader(config, SimpleNamespace(score_batch=lambda *_: [Reward(0.0, "timeout", {"style": 0.8})]), 10, None)
    assert late.score_batch([], ["x"])[0].value == 0.0


def test_the_learned_reward_is_a_part(tmp_path: Path) -> None:
    save_reward_model(tmp_path / "rm")
    config = ComposedReward(weights={"task": 1.0, "learned": 0.25})
    config.learned.path = str(tmp_path / "rm")
    alone = config.learned.grader(Letters(), CPU).score_batch([Letters().prompts("test")[0]], ["yes"])[0]
    both = graded(config, "yes")[0]
    assert both.value == pytest.approx(1.0 + 0.25 * alone.value)
    assert both.parts == pytest.approx({"style": 1.0, "task": 1.0, "learned": alone.value})


def test_a_failure_of_the_grader_stays_one() -> None:
    (reward,) = graded(ComposedReward(), "broken")
    assert (reward.verdict, reward.note) == ("infra_error", "out of order")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ComposedReward(weights={}), "reward.weights=.*: must be at least one weight"),
    (lambda: ComposedReward(weights={"beauty": 1}), "reward.weights=beauty: must be names among task, learned, style"),
    (lambda: ComposedReward(length=LengthPenalty("square")), "reward.length.kind=square: must be none, linear, overlong"),
    (lambda: ComposedReward(length=LengthPenalty("overlong", free_tokens=10)), "less than task.completion_length=10"),
    (lambda: ComposedReward(weights={"learned": 1}), "reward.path=None"),
])
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        graded(make(), "yes")


def test_R13_groups_that_differ_in_form_only_are_counted() -> None:
    """R13: format rewards give all-wrong groups a gradient. Group 0 is all wrong and differs, 1 has a right answer, 2 is all
    wrong and does not differ, 3 differs only by a completion that could not be graded."""
    policy, task = make_policy(torch.float32), Letters()
    found = collect(policy, task, task, LowConfidence(), task.prompts("train"), 2, seed=0, step=1)
    wrong, styled, right = Reward(0.0, "wrong"), Reward(0.5, "wrong"), Reward(1.0, "correct")
    failed = Reward(9.0, "infra_error")
    rewards = [wrong, styled, right, wrong, styled, styled, wrong, failed]
    again = Rollouts(**{**found.__dict__, "graded": rewards})
    assert again.format_only_groups() == 1
    assert again.metrics()["reward/format_only_groups"] == 1


def test_a_grader_that_often_fails_stops_the_run() -> None:
    good, bad = Reward(1.0, "correct"), Reward(0.0, "infra_error", note="no space left")
    failures = Failures(0.1)
    failures.count([good] * 7 + [bad])  # a single failure is an accident
    failures.count([good] * 32 + [bad] * 2)
    with pytest.raises(UserError, match=r"max_infra_errors=0.1: the grader failed on 5 of the last 47 .*no space left"):
        failures.count([good] * 3 + [bad] * 2)
    patient = Failures(0.5)
    for _ in range(30):
        patient.count([good, bad])
    with pytest.raises(UserError):
        patient.count([bad, bad, bad])
