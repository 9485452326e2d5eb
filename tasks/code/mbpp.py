"""MBPP: short Python functions from a sentence and three assertions.

Example row (google-research MBPP, CC-BY-4.0; `google-research-datasets/mbpp` on the hub):

    {"task_id": 3, "text": "Write a python function to identify non-prime numbers.",
     "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n    ...", "test_setup_code": "",
     "test_list": ["assert is_not_prime(2) == False", "assert is_not_prime(10) == True", ...]}

The prompt has the words of OpenCompass and BGPO without their three solved examples: the sentence and the assertions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

from dllm_rl.errors import UserError, check
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.sandbox import Assertion, Call, Limits, Outcome, Program, assert_to_test, run_programs
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, Verdict
from dllm_rl.tasks.generated import check_integer

TASK_IDS: Mapping[Split, range] = {"train": range(601, 975), "test": range(11, 511)}
VERDICTS: Mapping[str, Verdict] = {
    "ok": "correct", "failed": "wrong", "timeout": "timeout", "infra_error": "infra_error",
}
_PYTHON_BLOCK = re.compile(r"```[ \t]*(?:python|py)[0-9]?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_ANY_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BEGIN_DONE = re.compile(r"\[BEGIN\](.*?)(?:\[DONE\]|\Z)", re.DOTALL)


@dataclass
class MBPP(Task):
    """MBPP: reward 1 when every assertion of the row holds, otherwise 0.

    The program is the last fenced Python block of a completion, else its last fenced block, else what stands between
    `[BEGIN]` and `[DONE]`, else all of it. It runs in `dllm_rl.sandbox` with the standard library only. `pass_rate` is
    the share of the assertions that hold.

    Example: `MBPP(data="mbpp.jsonl")`
    """

    data: str = "google-research-datasets/mbpp"
    """Name on the hub, or a local file or folder with rows of `task_id`, `text`, `code`, `test_list` and, if need be,
    `test_setup_code`. Of a single file, `task_id` 601 to 974 are the train split and 11 to 510 the test split."""
    completion_length: int = 256
    timeout_seconds: float = 5.0
    """Wall clock per completion, its assertions included."""

    def __post_init__(self) -> None:
        check(isinstance(self.data, str) and self.data != "", "task.data", self.data,
              "a data set name on the hub, a file or a folder")
        check_integer("completion_length", self.completion_length, 1)
        check(isinstance(self.timeout_seconds, int | float) and 0 < self.timeout_seconds <= 600,
              "task.timeout_seconds", self.timeout_seconds, "a number above 0, at most 600")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The questions of a split."""
        return _prompts(self.data, split)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The grade of one completion; batches are far cheaper for each."""
        return self.score_batch([prompt], [completion])[0]

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades all completions in one batch of sandboxed programs; the same answer to a prompt runs once."""
        answers = [(prompt.data["setup"], tuple(prompt.data["asserts"]), extract_code(completion))
                   for prompt, completion in zip(prompts, completions, strict=True)]
        unique = dict.fromkeys(answer for answer in answers if answer[2])
        programs = [_program(*answer) for answer in unique]
        outcomes = run_programs(programs, Limits(seconds=self.timeout_seconds))
        rewards = {answer: _reward(outcome) for answer, outcome in zip(unique, outcomes, strict=True)}
        return [rewards.get(answer, Reward(0.0, "no_answer", {"pass_rate": 0.0})) for answer in answers]

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The training questions with their reference programs, shuffled anew for every pass over them."""
        prompts = self.prompts("train")
        rng = Random(f"mbpp demonstrations {seed}")
        chosen: list[Prompt] = []
        while len(chosen) < count:
            chosen.extend(rng.sample(prompts, len(prompts)))
        return [Demonstration(prompt.text, fenced(prompt.data["code"])) for prompt in chosen[:count]]


def extract_code(completion: str) -> str:
    """The program in a completion; empty if there is none. A block that is cut off counts.

    Example: the code of "Here it is: [BEGIN] 'def f(): pass' [DONE]" is "def f(): pass".
    """
    text = completion.replace("\r\n", "\n")
    for pattern in (_PYTHON_BLOCK, _ANY_BLOCK):
        blocks = pattern.findall(text)
        if blocks:
            return str(blocks[-1]).strip("\n").rstrip()
    bracketed = _BEGIN_DONE.findall(text)
    if bracketed:
        text = bracketed[-1].strip()
        if len(text) > 1 and text[0] == text[-1] == "'":
            text = text[1:-1]
    return text.strip("\n").rstrip()


def fenced(code: str) -> str:
    """A reference program as a completion."""
    lines = "\n".join(line.rstrip() for line in code.replace("\r\n", "\n").strip().split("\n"))
    return f"```python\n{lines}\n```"


def prompt_text(text: str, asserts: Sequence[str]) -> str:
    """What the model reads."""
    tests = "\n".join(asserts)
    return (f"You are an expert Python programmer, and here is your task: {text.strip()} "
            f"Your code should pass these tests:\n\n{tests}\n")


def _program(setup: str, asserts: tuple[str, ...], code: str) -> Program:
    return Program(f"{code}\n{setup}", _tests(asserts))


@lru_cache(maxsize=1024)
def _tests(asserts: tuple[str, ...]) -> tuple[Call | Assertion, ...]:
    return tuple(assert_to_test(statement) for statement in asserts)


def _reward(outcome: Outcome) -> Reward:
    rate = sum(outcome.passed) / len(outcome.passed)
    return Reward(float(outcome.status == "ok"), VERDICTS[outcome.status], {"pass_rate": rate})


@lru_cache(maxsize=8)
def _prompts(data: str, split: Split) -> tuple[Prompt, ...]:
    placed = load_placed_rows(data, split, ("task_id", "text", "code", "test_list"), config_name="full")
    for place, row in placed:
        _check_row(row, place)
    ids = TASK_IDS[split]
    one_file = Path(data).expanduser().is_file()  # the hub and folders keep the splits apart
    rows = [row for _, row in placed if not one_file or row["task_id"] in ids]
    if not rows:
        raise UserError(f"task.data={data}: holds no row of the {split} split (task_id {ids[0]} to {ids[-1]})")
    return tuple(_prompt(row, split) for row in rows)


def _prompt(row: Row, split: Split) -> Prompt:
    asserts = tuple(statement.strip() for statement in row["test_list"])
    setup = (row.get("test_setup_code") or "").replace("\r\n", "\n")
    data = {"asserts": asserts, "setup": setup, "code": row["code"]}
    return Prompt(f"{split}/{row['task_id']}", prompt_text(row["text"], asserts), data)


def _check_row(row: Row, place: str) -> None:
    if not isinstance(row["task_id"], int):
        raise UserError(f"{place}: task_id={row['task_id']}: must be an integer")
    for column in ("text", "code"):
        if not isinstance(row[column], str):
            raise UserError(f"{place}: {column}={row[column]}: must be a string")
    asserts = row["test_list"]
    if not (isinstance(asserts, list) and asserts and all(isinstance(text, str) for text in asserts)):
        raise UserError(f"{place}: test_list={asserts}: must be a list of at least one assertion")
