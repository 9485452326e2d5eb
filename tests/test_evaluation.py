"""What is sampled, what is left out and what is reported, against values computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_rl.diffusion.sampler import LowConfidence
from dllm_rl.errors import UserError
from dllm_rl.evaluation import EvaluationConfig, Sample, compared, evaluate, regraded, summarised
from dllm_rl.evaluation_report import SampleLog
from dllm_rl.task import Prompt, Reward, Split, Task
from dllm_rl.tracking import RunFolder
from tests.conftest import make_policy


@dataclass
class HalfBroken(Task):
    """Every third completion cannot be graded; the rest are right."""

    completion_length: int = 4
    every: int = 3

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(f"{split}/{index}", "ab") for index in range(9)]

    def score(self, prompt: Prompt, completion: str) -> Reward:
        del completion
        if int(prompt.id.split("/")[1]) % self.every == 0:
            return Reward(0.0, "infra_error", note="broken")
        return Reward(1.0, "correct", {"cell": 0.5})


def test_infra_errors_are_counted_and_left_out() -> None:
    tolerant = EvaluationConfig(max_infra_errors=0.4)
    result = evaluate(make_policy(torch.float32), HalfBroken(), LowConfidence(), tolerant, seed=0)
    assert result.summary()["infra_errors"] == 6  # three of nine, greedy and sampled
    assert [(row.metric, row.n, row.value) for row in result.estimates] == [
        ("greedy/reward", 6, 1.0), ("sampled/reward", 6, 1.0), ("greedy/cell", 6, 0.5), ("sampled/cell", 6, 0.5),
    ]
    assert result.summary()["metric"] == "greedy/reward"
    assert result.verdicts()["sampled"] == {"correct": 6, "wrong": 0, "no_answer": 0, "timeout": 0, "infra_error": 3}


def test_a_grader_that_often_fails_is_refused() -> None:
    with pytest.raises(UserError, match=r"failed on 6 of 18 completions \(such as: broken"):
        evaluate(make_policy(torch.float32), HalfBroken(), LowConfidence(), EvaluationConfig(), seed=0)


def test_only_the_first_prompts_are_used() -> None:
    config = EvaluationConfig(num_prompts=2, max_infra_errors=0.5)
    result = evaluate(make_policy(torch.float32), HalfBroken(), LowConfidence(), config, seed=0)
    assert {sample.id for sample in result.samples} == {"test/0", "test/1"}


def test_evaluations_are_paired_and_do_not_depend_on_batches() -> None:
    policy, config = make_policy(torch.float32), EvaluationConfig(samples=3, max_infra_errors=0.5)
    first, second = (evaluate(policy, HalfBroken(), LowConfidence(batch_size=size), config, seed=4) for size in (128, 5))
    assert [replace(sample, seconds=0) for sample in first.samples] == [
        replace(sample, seconds=0) for sample in second.samples]
    texts = {sample.completion for sample in first.samples if sample.mode == "sampled" and sample.id == "test/1"}
    assert len(texts) > 1  # the completions of a prompt have noise of their own
    fewer = evaluate(policy, HalfBroken(), LowConfidence(), replace(config, samples=1), seed=4)
    assert {sample.key: sample.completion for sample in fewer.samples}.items() <= {
        sample.key: sample.completion for sample in first.samples}.items()


def test_what_could_not_be_graded_is_graded_again() -> None:
    config, broken = EvaluationConfig(max_infra_errors=0.5), HalfBroken()
    samples = evaluate(make_policy(torch.float32), broken, LowConfidence(), config, seed=0).samples
    mended = regraded(samples, HalfBroken(every=100))
    assert [sample.verdict for sample in mended].count("infra_error") == 2  # test/0 in both modes
    assert [sample.completion for sample in mended] == [sample.completion for sample in samples]


def sample(mode: str, prompt: str, index: int, value: float, **parts: float) -> Sample:
    return Sample(mode, prompt, index, "q", "a", 4, 2, 0.5, value, "correct" if value == 1 else "wrong", parts, "")


def test_summary_by_hand() -> None:
    """Two prompts, two samples each: the first has 2 right, the second 1."""
    samples = [sample("greedy", "a", 0, 1.0), sample("greedy", "b", 0, 0.5),
               *(sample("sampled", "a", n, 1.0) for n in range(2)), *(sample("sampled", "b", n, float(n)) for n in range(2))]
    result = summarised(samples, EvaluationConfig(samples=2))
    assert (result.value("greedy/reward"), result.value("greedy/correct")) == (0.75, 0.5)
    assert result.value("sampled/reward") == 0.75
    assert [(k, row.value) for k, row in result.pass_at.items()] == [(1, 0.75), (2, 1.0)]
    summary = result.summary()
    assert (summary["nfe"], summary["tokens_per_second"], summary["tokens"]) == (2, 8.0, {"mean": 4, "max": 4})


def test_comparison_by_hand() -> None:
    """Six prompts of which the model has five more right than the baseline and one fewer."""
    config = EvaluationConfig(samples=0)
    ours, theirs = ([sample("greedy", str(n), 0, float((n > 0) == first)) for n in range(6)] for first in (True, False))
    found = compared(summarised(ours, config), summarised(theirs[1:] + theirs[:1], config))["greedy/reward"]
    assert found["delta"] == pytest.approx(4 / 6) and found["n"] == 6 and found["test"] == "McNemar"
    assert found["p"] == pytest.approx(2 * 7 / 64)


@pytest.mark.parametrize(("settings", "message"), [
    ({"samples": 0, "greedy": False}, "evaluation.samples=0: must be an integer >= 1"),
    ({"samples": 4, "k": [5]}, r"evaluation.k=.5.: must be integers from 1 to evaluation.samples=4"),
    ({"max_infra_errors": 1}, "evaluation.max_infra_errors=1: must be"),
    ({"num_prompts": 0}, "evaluation.num_prompts=0: must be"),
])
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**settings)
    assert EvaluationConfig(samples=6).ks == [1, 2, 4]


def test_a_share_of_right_answers_is_compared_even_where_the_baseline_has_none() -> None:
    config = EvaluationConfig(samples=0)
    ours = summarised([sample("greedy", "a", 0, 1.0), sample("greedy", "b", 0, 0.5)], config)
    theirs = summarised([sample("greedy", "a", 0, 0.0), sample("greedy", "b", 0, 0.0)], config)
    assert compared(ours, theirs)["greedy/correct"]["delta"] == 0.5


def test_samples_survive_every_line_separator(tmp_path: Path) -> None:
    log, odd = SampleLog(tmp_path), replace(sample("greedy", "a", 0, 1.0), completion="a\u2028b\u0085c\u2029\x0bd")
    log.append("task", "model", [odd])
    log.replace("task", "model", log.read("task", "model"))
    assert log.read("task", "model") == [odd]
    folder = RunFolder.open(tmp_path / "run", {}, from_step=0)
    folder.log("rollouts.jsonl", [{"step": 1, "completion": odd.completion}])
    folder = RunFolder.open(tmp_path / "run", {}, from_step=1)
    assert folder.read("rollouts.jsonl") == [{"step": 1, "completion": odd.completion}]
