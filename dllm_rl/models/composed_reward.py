"""A reward made of named parts (`reward=composed`): value = Σ weight × part − length penalty.

    reward=composed +reward.weights.pass_rate=0.5
    reward=composed reward.weights.task=0.7 +reward.weights.learned=0.3 reward.learned.path=REWARD_MODEL
    reward=composed reward.length.kind=overlong reward.length.coef=0.5 reward.length.free_tokens=192

A completion without an answer, or whose answer runs out of time, never profits: its positive parts do not count and its
length penalty is the full one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_rl.errors import UserError, check
from dllm_rl.models.reward_model import LearnedReward
from dllm_rl.task import Grader, Prompt, Reward, Task

PENALTIES = ("none", "linear", "overlong")


@dataclass
class LengthPenalty:
    """What long completions cost."""

    kind: str = "none"
    """none. linear: coef × tokens / completion_length. overlong: 0 up to `free_tokens`, then rising linearly to `coef` at
    the end of the canvas (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13)."""
    coef: float = 0.5
    free_tokens: int = 0
    """Tokens that cost nothing (overlong)."""

    def __post_init__(self) -> None:
        check(self.kind in PENALTIES, "reward.length.kind", self.kind, ", ".join(PENALTIES))
        check(self.coef >= 0, "reward.length.coef", self.coef, "a number >= 0")
        check(self.free_tokens >= 0, "reward.length.free_tokens", self.free_tokens, "an integer >= 0")

    @property
    def largest(self) -> float:
        """What the longest completion costs."""
        return 0.0 if self.kind == "none" else self.coef

    def penalty(self, tokens: int, canvas: int) -> float:
        """What a completion of `tokens` tokens on a canvas of `canvas` costs, from 0 to `largest`."""
        free = self.free_tokens if self.kind == "overlong" else 0
        return self.largest * min(1.0, max(0, tokens - free) / (canvas - free))


@dataclass
class ComposedReward:
    """Weighted named parts, a length penalty, and a learned reward if it has a weight (`reward=composed`)."""

    weights: dict[str, float] = field(default_factory=lambda: {"task": 1.0})
    """By name: `task` is the task's own value, `learned` the learned reward; any other name is one of the task's parts."""
    length: LengthPenalty = field(default_factory=LengthPenalty)
    learned: LearnedReward = field(default_factory=LearnedReward)
    """As in reward=learned; read only when `weights.learned` is given."""

    def __post_init__(self) -> None:
        check(bool(self.weights), "reward.weights", self.weights, "at least one weight, such as {task: 1}")

    def grader(self, task: Task, device: torch.device, tokenizer: Any = None) -> Grader:
        """Checks the names against the parts of the task and loads the learned reward if it has a weight.

        Raises:
            UserError: the task has no part of that name, or the learned reward cannot be loaded.
        """
        example = task.score(task.prompts("test")[0], "")
        known = ["task", "learned", *example.parts]
        for name in self.weights:
            check(name in known, "reward.weights", name, "names among " + ", ".join(known))
        canvas = task.completion_length
        fits = self.length.kind != "overlong" or self.length.free_tokens < canvas
        valid = f"less than task.completion_length={canvas}"
        check(fits, "reward.length.free_tokens", self.length.free_tokens, valid)
        if self.length.kind != "none" and tokenizer is None:
            raise UserError(f"reward.length.kind={self.length.kind}: must be none without a policy to count tokens with")
        inner = self.learned.grader(task, device) if "learned" in self.weights else task
        return ComposedGrader(self, inner, canvas, tokenizer)


class ComposedGrader:
    """Grades by the weighted sum; every part is kept by its name."""

    def __init__(self, config: ComposedReward, inner: Grader, canvas: int, tokenizer: Any) -> None:
        self._config, self._inner, self._canvas, self._tokenizer = config, inner, canvas, tokenizer

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """The composed reward of each completion, with the task's verdict."""
        graded = self._inner.score_batch(prompts, completions)
        return [self._composed(reward, text) for reward, text in zip(graded, completions, strict=True)]

    def _composed(self, reward: Reward, text: str) -> Reward:
        if reward.verdict == "infra_error":
            return reward
        length, parts = self._config.length, self._parts(reward)
        if any(name not in parts for name in self._config.weights):
            return Reward(0.0, "infra_error", note="a part of the reward is missing")  # the task's own grader failed
        if length.kind != "none":
            parts["length"] = -length.penalty(self._tokens(text), self._canvas)
        return Reward(self._value(reward, parts), reward.verdict, parts, reward.note)

    def _parts(self, reward: Reward) -> dict[str, float]:
        if "learned" not in self._config.weights:
            return {**reward.parts, "task": reward.value}
        return {**reward.parts, "learned": reward.value}  # the learned reward keeps the task's value as `task`

    def _value(self, reward: Reward, parts: Mapping[str, float]) -> float:
        value = sum(weight * parts[name] for name, weight in self._config.weights.items())
        if reward.verdict in ("no_answer", "timeout"):
            return min(0.0, value) - self._config.length.largest
        return value + parts.get("length", 0.0)

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))
