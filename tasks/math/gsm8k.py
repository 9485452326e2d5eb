"""GSM8K: grade-school word problems with a number for an answer.

Example row (openai/grade-school-math, MIT; `openai/gsm8k` on the hub):

    {"question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it
     take?", "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is 2+1=<<2+1=3>>3
     bolts of fabric\n#### 3"}

The model reads the bare question, as in the protocol of BGPO, or the question with the words of d1 or Drift around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import ClassVar

from dllm_rl.errors import UserError, check
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task, Verdict
from dllm_rl.tasks.generated import check_integer
from dllm_rl.tasks.math.answers import compare
from dllm_rl.tasks.math.extraction import final_text
from dllm_rl.tasks.math.numbers import final_answer, number_of
from dllm_rl.tasks.math.protocols import PROTOCOLS, format_parts, worded, written

_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclass
class GSM8K(Task):
    r"""GSM8K: reward 1 when the final number is right, otherwise 0.

    The final number is the one in the last `\boxed{...}` or, if that comes later, in the last `<answer>...</answer>`, else
    the one in the line after the last `####`, else the last of the text. `1,000`, `18.0` and `$18` are read as what they
    mean; two numbers are no answer. `parts` has `format` under a protocol that asks for one; it earns nothing.

    Example: `GSM8K(data="gsm8k/", protocol="d1")`
    """

    protocols: ClassVar[tuple[str, ...]] = PROTOCOLS

    data: str = "openai/gsm8k"
    """Name on the hub, or a local file or folder with rows of `question` and `answer` (`... #### 18`)."""
    protocol: str = "bgpo"
    completion_length: int = 256

    def __post_init__(self) -> None:
        self.check_protocol()
        check(isinstance(self.data, str) and self.data != "", "task.data", self.data,
              "a data set name on the hub, a file or a folder")
        check_integer("completion_length", self.completion_length, 1)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The questions of a split."""
        return _prompts(self.data, split, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """1 for the right final number; `no_answer` where none can be read."""
        verdict = _verdict(prompt.data["answer"], completion)
        return Reward(float(verdict == "correct"), verdict, format_parts(completion, self.protocol, boxed=False))

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """The training questions with their worked answers, shuffled anew for every pass over them.

        Under `bgpo` an answer is that of the data set; the other protocols have their own form and no `<<2/2=1>>`.
        """
        rows = _rows(self.data, "train")
        rng = Random(f"gsm8k demonstrations {seed}")
        chosen: list[Row] = []
        while len(chosen) < count:
            chosen.extend(rng.sample(rows, len(rows)))
        return [Demonstration(worded(row["question"], self.protocol, boxed=False), self._written(row["answer"]))
                for row in chosen[:count]]

    def _written(self, answer: str) -> str:
        if self.protocol == "bgpo":
            return answer
        solution, _, number = _CALCULATION.sub("", answer).rpartition("####")
        return written(solution.strip(), number.strip(), self.protocol, boxed=False)


def _verdict(gold: str, completion: str) -> Verdict:
    final = final_text(completion)
    if final is not None and compare(gold, final) == "right":
        return "correct"
    number = final_answer(completion)
    if number is None:
        return "wrong" if final else "no_answer"
    return "correct" if number == Fraction(gold) else "wrong"


@lru_cache(maxsize=8)
def _rows(data: str, split: Split) -> tuple[Row, ...]:
    placed = load_placed_rows(data, split, ("question", "answer"), config_name="main")
    for place, row in placed:
        _check_row(row, place)
    return tuple(row for _, row in placed)


@lru_cache(maxsize=8)
def _prompts(data: str, split: Split, protocol: str) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(f"{split}/{index}", worded(row["question"], protocol, boxed=False), {"answer": str(_gold(row["answer"]))})
        for index, row in enumerate(_rows(data, split))
    )


def _check_row(row: Row, place: str) -> None:
    for column in ("question", "answer"):
        if not isinstance(row[column], str):
            raise UserError(f"{place}: {column}={row[column]}: must be a string")
    if _gold(row["answer"]) is None:
        raise UserError(f"{place}: `answer` must end on #### and a number, such as `... #### 18`")


def _gold(answer: str) -> Fraction | None:
    _, mark, tail = answer.rpartition("####")
    return number_of(tail) if mark else None
