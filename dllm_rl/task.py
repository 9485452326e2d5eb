"""What a task is: prompts, and a reward for each completion.

Training and evaluation call the same `score`, so the reward that is optimised and the number that is reported cannot
drift apart. A task is a plain dataclass: its fields are its configuration (`task.FIELD=` on the command line).
"""

from __future__ import annotations

import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from dllm_rl.errors import UserError, check

Split = Literal["train", "test"]
Verdict = Literal["correct", "wrong", "no_answer", "timeout", "infra_error"]


@dataclass(frozen=True)
class Prompt:
    """One question.

    Example: `Prompt(id="test/3", text="Ann has 5 apples and loses 2", data={"answer": 3})`
    """

    id: str
    """Unique within the task; written to rollouts.jsonl."""
    text: str
    """What the model reads: the user's turn where the tokenizer has a chat template, else the whole prompt."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the grader needs; the model never sees it."""
    shots: tuple[tuple[str, str], ...] = ()
    """Solved examples that come first, each (question, answer): turns of their own in a chat."""
    prefill: str = ""
    """How the answer begins, given to the model; a completion is what follows it."""


@dataclass(frozen=True)
class Reward:
    """The grade of one completion.

    Example: `Reward(1.0, "correct", {"exact": 1.0, "cell": 1.0})`
    """

    value: float
    """What training maximises. Meaningless when the verdict is `infra_error`: such a completion leaves its group."""
    verdict: Verdict
    """`infra_error` means that the grader failed, not the completion."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Further figures by name, averaged by `dllm-rl evaluate`."""
    note: str = ""
    """For people to read: why, where the verdict alone does not say."""


@dataclass
class TaskReward:
    """The task's own reward (`reward=task`)."""

    def grader(self, task: Task, device: object, tokenizer: object = None) -> Grader:
        """The task itself."""
        del device, tokenizer
        return task


def normalised(text: str) -> str:
    """The text in lower case, without punctuation at its ends, runs of white space or compatibility forms.

    Example: `normalised(" How  many?\\n")` is `how many`.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(string.punctuation + " ")


class Demonstration(NamedTuple):
    """A prompt and a completion to imitate, for supervised fine-tuning."""

    prompt: str
    completion: str


class Grader(Protocol):
    """Whatever grades completions: a task, or a learned reward."""

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """One reward per completion."""


class Task(ABC):
    """Prompts and their reward. Subclasses are plain dataclasses registered in the Hydra group `task`."""

    completion_length: int
    """L: tokens on the canvas that the sampler fills."""
    words: ClassVar[tuple[str, ...]] = ()
    """Strings that deserve one token each in the tokenizer of the tiny model (everything else is spelled out)."""
    protocols: ClassVar[tuple[str, ...]] = ("plain",)
    """The ways in which this task can word its prompts, named after their sources."""
    protocol: str = "plain"
    """One of `protocols`; training and evaluation use the same one, and both say which."""

    def check_protocol(self) -> None:
        """Raises `UserError` unless `protocol` is one of `protocols`; for `__post_init__`."""
        check(self.protocol in self.protocols, "task.protocol", self.protocol, " or ".join(self.protocols))

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The questions of a split, always the same ones in the same order."""

    @abstractmethod
    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The grade of one completion. Never raises for any completion text."""

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades many completions; tasks whose grader starts processes override this one."""
        return [self.score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def fingerprint(self, prompt: Prompt) -> str:
        """What makes two prompts the same question, whatever their split; the guard against leaks compares it."""
        return normalised(prompt.text)

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """`count` demonstrations for supervised fine-tuning, a pure function of (count, seed) and the configuration.

        Raises `UserError` for a task that has none.
        """
        raise UserError(f"task {type(self).__name__} has no demonstrations to fine-tune on ({count=}, {seed=})")
