r"""MATH: competition problems with an answer in LaTeX; its test split is MATH500.

Example row (hendrycks/math, MIT; `HuggingFaceH4/MATH-500` on the hub has it without what is left out here):

    {"problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.  Enter your answer in the form
     $(r,\\theta),$ where $r > 0$ and $0 \\le \\theta < 2 \\pi.$", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
     "level": 2, "solution": "We have that $r = \\sqrt{0^2 + 3^2} = 3.$ ..."}

Answers are graded exactly where that can be done for certain (`answers.py`), else by math-verify (`symbolic.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar

from dllm_rl.errors import UserError, check
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, Verdict
from dllm_rl.tasks.generated import check_integer
from dllm_rl.tasks.math import symbolic
from dllm_rl.tasks.math.answers import compare, is_echo, symbolic_form
from dllm_rl.tasks.math.extraction import final_text, last_boxed
from dllm_rl.tasks.math.protocols import PROTOCOLS, format_parts, worded, written

_VERDICTS: Mapping[symbolic.Outcome, Verdict] = {
    "right": "correct", "wrong": "wrong", "timeout": "timeout", "infra_error": "infra_error",
}


@dataclass
class Math(Task):
    r"""MATH: reward 1 when the final answer equals the right one, otherwise 0.

    The final answer is the one in the last `\boxed{...}` or, if that comes later, in the last `<answer>...</answer>`, else
    the line after the last `####`; a completion without any gives none. An expression copied out of the question is wrong,
    even if its value is right. `parts` has `format` under a protocol that asks for one; it earns nothing.

    Example: `Math(data="math/train.json", test_data="math/math500.json", protocol="drift")`
    """

    protocols: ClassVar[tuple[str, ...]] = PROTOCOLS

    data: str = "DigitalLearningGmbH/MATH-lighteval"
    """The train split: a name on the hub, or a local file or folder with rows of `problem` and `answer`, or of `problem` and
    a `solution` that ends on `\\boxed{answer}`. Rows without an answer are left out, with a warning."""
    test_data: str = "HuggingFaceH4/MATH-500"
    """The test split, as `data`; every row must have an answer."""
    protocol: str = "bgpo"
    completion_length: int = 512
    timeout_seconds: float = symbolic.SECONDS
    """Wall clock for one answer that has to be worked out; a late one is tried once more."""
    workers: int = symbolic.WORKERS
    """Processes that work answers out."""

    def __post_init__(self) -> None:
        self.check_protocol()
        for name in ("data", "test_data"):
            value = getattr(self, name)
            check(isinstance(value, str) and value != "", f"task.{name}", value,
                  "a data set name on the hub, a file or a folder")
        check_integer("completion_length", self.completion_length, 1)
        check_integer("workers", self.workers, 1, 64)
        check(isinstance(self.timeout_seconds, int | float) and 0 < self.timeout_seconds <= 600,
              "task.timeout_seconds", self.timeout_seconds, "a number above 0, at most 600")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The problems of a split."""
        return _prompts(self.data if split == "train" else self.test_data, split, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The grade of one completion; batches are far cheaper for each."""
        return self.score_batch([prompt], [completion])[0]

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades all completions; what has to be worked out is worked out together, and the same answer once."""
        answers = [(prompt.data["answer"], final_text(completion), prompt.text)
                   for prompt, completion in zip(prompts, completions, strict=True)]
        verdicts = {answer: _verdict(*answer) for answer in dict.fromkeys(answers)}
        pairs = {(gold, answer, question): (symbolic_form(gold), symbolic_form(answer or ""))
                 for (gold, answer, question), verdict in verdicts.items() if verdict is None}
        outcomes = symbolic.pool(self.workers, float(self.timeout_seconds)).outcomes(list(pairs.values()))
        worked_out = {answer: _VERDICTS[outcome] for answer, outcome in zip(pairs, outcomes, strict=True)}
        return [self._reward(verdicts[answer] or worked_out[answer], completion)
                for answer, completion in zip(answers, completions, strict=True)]

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The training problems with their solutions, shuffled anew for every pass; without any, the answers alone."""
        prompts = self.prompts("train")
        rng = Random(f"math demonstrations {seed}")
        chosen: list[Prompt] = []
        while len(chosen) < count:
            chosen.extend(rng.sample(prompts, len(prompts)))
        return [Demonstration(prompt.text, self._written(prompt)) for prompt in chosen[:count]]

    def _written(self, prompt: Prompt) -> str:
        solution, answer = prompt.data["solution"], prompt.data["answer"]
        if self.protocol != "d1" and last_boxed(solution) is not None:
            return str(solution)
        return written(solution, answer, self.protocol, boxed=True)

    def _reward(self, verdict: Verdict, completion: str) -> Reward:
        return Reward(float(verdict == "correct"), verdict, format_parts(completion, self.protocol, boxed=True))


def _verdict(gold: str, answer: str | None, question: str) -> Verdict | None:
    """The verdict that needs no algebra; None where it does."""
    if not answer:
        return "no_answer"
    decision = compare(gold, answer, question)
    if decision != "undecided":
        return "correct" if decision == "right" else "wrong"
    return "wrong" if is_echo(gold, answer, question) else None


@lru_cache(maxsize=16)
def _prompts(source: str, split: Split, protocol: str) -> tuple[Prompt, ...]:
    key = "task.data" if split == "train" else "task.test_data"
    placed = load_placed_rows(source, split, ("problem",), key=key)
    prompts = [_prompt(row, place, f"{split}/{index}", protocol) for index, (place, row) in enumerate(placed)]
    bare = [place for prompt, (place, _) in zip(prompts, placed, strict=True) if not prompt.data["answer"]]
    if bare and (split == "test" or len(bare) == len(placed)):
        raise UserError(f"{bare[0]}: has no answer: `answer` must not be empty, or `solution` must have a \\boxed{{...}}")
    if bare:
        warnings.warn(f"{key}={source}: left out {len(bare)} of {len(placed)} rows, which have no answer (the first is "
                      f"{bare[0]})", stacklevel=2)
    return tuple(prompt for prompt in prompts if prompt.data["answer"])


def _prompt(row: Row, place: str, identifier: str, protocol: str) -> Prompt:
    for column in ("problem", "answer", "solution"):
        if not isinstance(row.get(column, ""), str | None):
            raise UserError(f"{place}: {column}={row[column]}: must be a string")
    solution = row.get("solution") or ""
    answer = row.get("answer") or last_boxed(solution) or ""
    data = {"answer": answer.strip(), "solution": solution}
    level = row.get("level", row.get("difficulty"))
    if level is not None:
        data["level"] = level
    return Prompt(identifier, worded(row["problem"], protocol, boxed=True), data)
