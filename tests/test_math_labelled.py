"""The math graders against answers labelled by hand."""

from __future__ import annotations

from dllm_rl.task import Prompt, Task
from dllm_rl.tasks.math.competition import Math
from dllm_rl.tasks.math.gsm8k import GSM8K as GSM8KTask
from tests.answers_labelled import GSM8K, MATH, Labelled


def disagreements(task: Task, cases: list[Labelled]) -> list[str]:
    prompts = [Prompt(f"test/{index}", case.question, {"answer": case.gold}) for index, case in enumerate(cases)]
    rewards = task.score_batch(prompts, [case.completion for case in cases])
    assert all(reward.value == float(reward.verdict == "correct") for reward in rewards)
    return [f"{case.gold} | {case.completion} | {case.why}: {reward.verdict}, not {case.verdict}"
            for case, reward in zip(cases, rewards, strict=True) if reward.verdict != case.verdict]


def test_there_are_enough_labels_of_both_kinds() -> None:
    assert len({(case.gold, case.completion, case.question) for case in MATH}) == len(MATH)
    assert len(MATH) >= 200
    assert len(MATH) + len(GSM8K) >= 260
    for cases in (MATH, GSM8K):
        assert sum(case.verdict == "correct" for case in cases) > len(cases) / 3
        assert sum(case.verdict == "wrong" for case in cases) > len(cases) / 3


def test_math_agrees_with_every_label() -> None:
    assert disagreements(Math(), MATH) == []


def test_gsm8k_agrees_with_every_label() -> None:
    assert disagreements(GSM8KTask(), GSM8K) == []
