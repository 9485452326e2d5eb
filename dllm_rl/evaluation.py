"""Accuracy with 95 % intervals, from the same sampler, the same prompts and the same reward that training uses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dllm_rl.diffusion.sampler import Sampler
from dllm_rl.errors import UserError, check
from dllm_rl.experience import rollout
from dllm_rl.models.policy import Policy
from dllm_rl.statistics import Interval, mean_interval, paired, pass_at_k
from dllm_rl.task import Prompt, Reward, Task, Verdict

EVALUATION_STEP = -1
"""Step in the keys of evaluation noise: the same at every evaluation, so that before and after are paired."""
VERDICTS: tuple[Verdict, ...] = ("correct", "wrong", "no_answer", "timeout", "infra_error")


@dataclass
class EvaluationConfig:
    """How a policy is evaluated."""

    num_prompts: int | None = 256
    """Test prompts, from the first one on. null: all of them."""
    greedy: bool = True
    """One completion per prompt at temperature 0."""
    samples: int = 1
    """Completions per prompt at the temperature of the sampler; pass@k needs k of them. 0: greedy only."""
    k: list[int] = field(default_factory=list)
    """The k of pass@k. Empty: the powers of 2 up to `samples`."""
    max_infra_errors: float = 0.1
    """The evaluation is refused when the grader failed on more than this share of the completions."""

    def __post_init__(self) -> None:
        valid = "an integer >= 1, or null for the whole test set"
        check(self.num_prompts is None or self.num_prompts >= 1, "evaluation.num_prompts", self.num_prompts, valid)
        least = 0 if self.greedy else 1
        check(self.samples >= least, "evaluation.samples", self.samples, f"an integer >= {least}")
        fits = all(1 <= k <= self.samples for k in self.k)
        check(fits, "evaluation.k", self.k, f"integers from 1 to evaluation.samples={self.samples}")
        share = self.max_infra_errors
        check(0 <= share < 1, "evaluation.max_infra_errors", share, "a number from 0 to below 1")

    @property
    def ks(self) -> list[int]:
        """The k of pass@k."""
        return self.k or [2**n for n in range(self.samples.bit_length())]


@dataclass(frozen=True)
class Sample:
    """One graded completion: a line of samples.jsonl."""

    mode: str
    """greedy | sampled"""
    id: str
    """Of the prompt."""
    index: int
    """0, 1, ... among the completions of the prompt in this mode."""
    prompt: str
    """What the model read, rendered."""
    completion: str
    tokens: int
    """Before the first EOS."""
    nfe: int
    """Forward passes of the network that wrote it, over the whole row or over a part of it (a cache)."""
    seconds: float
    """Its share of the time of its batch."""
    value: float
    verdict: Verdict
    parts: dict[str, float]
    note: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.mode, self.id, self.index


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
    """greedy/reward and sampled/reward first, then shares of right answers and the task's named parts."""
    pass_at: dict[int, Estimate]
    """pass@k of the sampled completions by k."""
    samples: list[Sample]

    def value(self, metric: str) -> float:
        return next(estimate.value for estimate in self.estimates if estimate.metric == metric)

    def line(self, step: int) -> str:
        parts = [f"{row.metric.split('/')[0]} {row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
                 for row in self.estimates if row.metric.endswith("/reward")]
        return f"step {step:>4}  test reward: {'  '.join(parts)}  ({self.estimates[0].n} prompts)"

    def record(self, step: int) -> dict[str, object]:
        """The line of evaluations.jsonl."""
        return {"step": step, "n": self.estimates[0].n, **{row.metric: row.value for row in self.estimates},
                "intervals": {row.metric: [row.low, row.high] for row in self.estimates}}

    def verdicts(self) -> dict[str, dict[str, int]]:
        """How many completions got each verdict, by mode."""
        counts = {mode: Counter(sample.verdict for sample in self.samples if sample.mode == mode)
                  for mode in dict.fromkeys(sample.mode for sample in self.samples)}
        return {mode: {verdict: found[verdict] for verdict in VERDICTS} for mode, found in counts.items()}

    def summary(self) -> dict[str, object]:
        """The content of results.json for a task: the first estimate, all of them under `metrics`, and what it took."""
        rows, samples = [asdict(estimate) for estimate in self.estimates], self.samples
        lengths = [sample.tokens for sample in samples]
        return {
            **rows[0], "infra_errors": sum(sample.verdict == "infra_error" for sample in samples), "metrics": rows,
            "pass@k": {str(k): asdict(row) for k, row in self.pass_at.items()},
            "verdicts": self.verdicts(),
            "nfe": sum(sample.nfe for sample in samples) / len(samples),
            "tokens_per_second": sum(lengths) / max(1e-9, sum(sample.seconds for sample in samples)),
            "tokens": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
        }


def evaluate(
    policy: Policy, task: Task, sampler: Sampler, config: EvaluationConfig, *, seed: int,
    earlier: Iterable[Sample] = (), save: Callable[[list[Sample]], None] | None = None,
) -> Evaluation:
    """Greedy and sampled (at the sampler's temperature) completions of the test prompts.

    Args:
        earlier: completions of an interrupted evaluation with the same settings; they are not sampled again.
        save: called with the completions of each batch as soon as they are graded.

    Raises:
        UserError: the grader failed on more than `config.max_infra_errors` of the completions.
    """
    prompts, policy = list(task.prompts("test"))[: config.num_prompts], sampler.prepared(policy)
    wanted = [(mode, prompt, index, number) for mode, count in (("greedy", int(config.greedy)), ("sampled", config.samples))
              for index in range(count) for number, prompt in enumerate(prompts)]
    found = {sample.key: sample for sample in earlier}
    for mode in ("greedy", "sampled"):
        settings = replace(sampler, temperature=0.0) if mode == "greedy" else sampler
        waiting = [(prompt, index, number) for m, prompt, index, number in wanted
                   if m == mode and (m, prompt.id, index) not in found]
        for start in range(0, len(waiting), sampler.batch_size):
            new = _sampled(policy, task, settings, mode, waiting[start : start + sampler.batch_size], seed)
            found |= {sample.key: sample for sample in new}
            if save:
                save(new)
    samples = [found[mode, prompt.id, index] for mode, prompt, index, _ in wanted]
    failed = [sample for sample in samples if sample.verdict == "infra_error"]
    if len(failed) > config.max_infra_errors * len(samples):
        raise UserError(f"evaluation.max_infra_errors={config.max_infra_errors:g}: the grader failed on {len(failed)} of "
                        f"{len(samples)} completions" + (f" (such as: {failed[0].note})" if failed[0].note else ""))
    return summarised(samples, config)


def regraded(samples: Sequence[Sample], task: Task) -> list[Sample]:
    """The samples, those that the grader could not grade graded again."""
    prompts = {prompt.id: prompt for prompt in task.prompts("test")}
    failed = [sample for sample in samples if sample.verdict == "infra_error" and sample.id in prompts]
    rewards = task.score_batch([prompts[sample.id] for sample in failed], [sample.completion for sample in failed])
    again = {sample.key: replace(sample, **_graded(reward)) for sample, reward in zip(failed, rewards, strict=True)}
    return [again.get(sample.key, sample) for sample in samples]


def _sampled(
    policy: Policy, task: Task, sampler: Sampler, mode: str, chunk: Sequence[tuple[Prompt, int, int]], seed: int
) -> list[Sample]:
    """Samples and grades a batch of (prompt, index of the completion, number of the prompt)."""
    prompts, started = [prompt for prompt, _, _ in chunk], time.perf_counter()
    # The noise of a completion depends on its prompt and index alone, not on what else is in the batch.
    sample_ids = torch.tensor([number + (index << 32) for _, index, number in chunk])
    completions, texts = rollout(policy, task, sampler, prompts, seed=seed, step=EVALUATION_STEP, sample_ids=sample_ids)
    seconds = (time.perf_counter() - started) / len(chunk)
    lengths, nfe = _lengths(completions.ids, policy.stop_ids), completions.nfe.tolist()
    rewards = task.score_batch(prompts, texts)
    return [
        Sample(mode, prompt.id, index, policy.render(prompt), text, lengths[row], nfe[row], seconds, **_graded(reward))
        for row, ((prompt, index, _), text, reward) in enumerate(zip(chunk, texts, rewards, strict=True))
    ]


def _lengths(ids: Tensor, ends: list[int]) -> list[int]:
    """Tokens of [B, L] before the first that ends the text."""
    before: list[int] = (torch.isin(ids, torch.tensor(ends, device=ids.device)).cumsum(1) == 0).sum(1).tolist()
    return before


def _graded(reward: Reward) -> dict[str, Any]:
    return {"value": reward.value, "verdict": reward.verdict, "parts": dict(reward.parts), "note": reward.note}


def summarised(samples: Sequence[Sample], config: EvaluationConfig) -> Evaluation:
    """The estimates. Completions that could not be graded are in none of them."""
    graded = [sample for sample in samples if sample.verdict != "infra_error"]
    if not graded:
        raise UserError("the grader failed on every completion")
    estimates = [estimate for mode in dict.fromkeys(sample.mode for sample in graded)
                 for estimate in _estimates(mode, [sample for sample in graded if sample.mode == mode])]
    estimates.sort(key=lambda estimate: not estimate.metric.endswith("/reward"))
    chances = {k: pass_by_prompt(graded, k) for k in config.ks}
    pass_at = {k: Estimate(f"pass@{k}", len(found), *_interval(found)) for k, found in chances.items() if found}
    return Evaluation(estimates, pass_at, list(samples))


def metrics_by_prompt(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Metric → prompt id → mean over the completions of the prompt: the reward, the share of right answers, the parts."""
    columns: dict[str, dict[str, list[float]]] = {"reward": {}, "correct": {}}
    for sample in samples:
        named = {"reward": sample.value, "correct": float(sample.verdict == "correct"), **sample.parts}
        for name, value in named.items():
            columns.setdefault(name, {}).setdefault(sample.id, []).append(value)
    means = {name: {prompt: sum(values) / len(values) for prompt, values in column.items()}
             for name, column in columns.items()}
    return means


def _estimates(mode: str, samples: Sequence[Sample]) -> list[Estimate]:
    columns = metrics_by_prompt(samples)
    if columns["correct"] == columns["reward"]:  # it would say the same twice
        del columns["correct"]
    return [Estimate(f"{mode}/{name}", len(means), *_interval(means)) for name, means in columns.items()]


def _interval(means: dict[str, float]) -> Interval:
    return mean_interval(list(means.values()))


def pass_by_prompt(samples: Sequence[Sample], k: int) -> dict[str, float]:
    """Prompt id → the chance that one of k completions is right; prompts with fewer gradable completions are left out."""
    groups: dict[str, list[bool]] = {}
    for sample in samples:
        if sample.mode == "sampled":
            groups.setdefault(sample.id, []).append(sample.verdict == "correct")
    return {prompt: pass_at_k(len(found), sum(found), k) for prompt, found in groups.items() if len(found) >= k}


def compared(model: Evaluation, baseline: Evaluation) -> dict[str, dict[str, object]]:
    """model − baseline for every metric, over the prompts that both have: a paired test each."""
    ours, theirs = (_columns(one) for one in (model, baseline))
    found: dict[str, dict[str, object]] = {}
    for metric in (metric for metric in ours if metric in theirs):
        common = [prompt for prompt in ours[metric] if prompt in theirs[metric]]
        if common:
            result = paired([ours[metric][prompt] for prompt in common], [theirs[metric][prompt] for prompt in common])
            found[metric] = {"n": len(common), **result._asdict()}
    return found


def _columns(result: Evaluation) -> dict[str, dict[str, float]]:
    """Metric → prompt id → value."""
    graded = [sample for sample in result.samples if sample.verdict != "infra_error"]
    columns = {f"{mode}/{name}": column for mode in ("greedy", "sampled")
               for name, column in metrics_by_prompt([s for s in graded if s.mode == mode]).items()}
    return columns | {f"pass@{k}": pass_by_prompt(graded, k) for k in result.pass_at}
