"""One-step word problems that a tiny model learns in seconds.

Example row (generated here; there is no file):

    prompt      "Ann has 5 apples and loses 3"
    completion  " 5 - 3 = 2"

Names, verbs, things and numbers are one token each for the tiny tokenizer, so a prompt has 7 tokens and a completion 5.
Every number is written with the space before it: the same token stands in the prompt and in the completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar, NamedTuple

from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task
from dllm_rl.tasks.generated import Draw, check_integer, check_mistakes, distinct, drawn, is_held_out
from dllm_rl.tasks.math.numbers import last_number

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "cookies", "eggs", "figs", "nuts", "pears", "plums", "rolls")
PLUS_VERBS = ("finds", "buys", "gets", "wins", "picks")
MINUS_VERBS = ("loses", "eats", "gives", "sells", "drops")
MAX_NUMBER = 10
MISTAKE_RATES: Mapping[str, float] = {"systematic": 0.65, "noisy": 0.65, "clean": 0.0}


class Problem(NamedTuple):
    """A question, such as `Problem("Ann", 5, "apples", "loses", 3)`."""

    name: str
    first: int
    thing: str
    verb: str
    second: int

    @property
    def text(self) -> str:
        """What the model reads."""
        return f"{self.name} has {self.first} {self.thing} and {self.verb} {self.second}"

    @property
    def sign(self) -> str:
        """The operation that the verb stands for."""
        return "+" if self.verb in PLUS_VERBS else "-"

    @property
    def answer(self) -> int:
        """The right result."""
        return result(self.first, self.sign, self.second)


@dataclass
class WordProblems(Task):
    """One-step word problems: reward 1 when the number after the last `=` is right, otherwise 0.

    A completion without `=` is graded on its last number.

    Example: `WordProblems(demonstrations_from="clean")`
    """

    words: ClassVar[tuple[str, ...]] = (
        *NAMES, " has", *(f" {number}" for number in range(2 * MAX_NUMBER + 1)), *(f" {thing}" for thing in THINGS),
        " and", *(f" {verb}" for verb in PLUS_VERBS + MINUS_VERBS), " +", " -", " =",
    )

    completion_length: int = 6
    train_size: int = 4096
    test_size: int = 256
    demonstrations_from: str = "systematic"
    """Mistakes of the demonstrations: `systematic` reads verbs of loss as gain (5 + 3 = 8), `noisy` writes a random
    result, `clean` makes none."""
    mistake_rate: float | None = None
    """How many of the demonstrations that can carry the mistake do (`systematic`: those with a verb of loss); null
    stands for 0.65."""

    def __post_init__(self) -> None:
        check_integer("completion_length", self.completion_length, 1)
        check_integer("train_size", self.train_size, 1)
        check_integer("test_size", self.test_size, 1)
        check_mistakes(self.demonstrations_from, self.mistake_rate, MISTAKE_RATES)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The generated questions of a split; no question is in both."""
        return _prompts(split, self.train_size if split == "train" else self.test_size)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """1 for the right result, however it was reached."""
        number = last_number(completion.rpartition("=")[2])
        if number is None:
            return Reward(0.0, "no_answer")
        return Reward(1.0, "correct") if number == prompt.data["answer"] else Reward(0.0, "wrong")

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Fresh training questions with their equations, some of them mistaken."""
        rng = Random(f"word problems demonstrations {seed}")
        draw = _problem_draw("train")
        problems = (drawn(draw, rng) for _ in range(count))
        return [Demonstration(problem.text, self._written(problem, rng)) for problem in problems]

    def _written(self, problem: Problem, rng: Random) -> str:
        rate = MISTAKE_RATES[self.demonstrations_from] if self.mistake_rate is None else self.mistake_rate
        first, second = problem.first, problem.second
        if rng.random() >= rate:
            return equation(first, problem.sign, second, problem.answer)
        if self.demonstrations_from == "systematic":
            return equation(first, "+", second, result(first, "+", second))
        return equation(first, problem.sign, second, rng.randint(0, 2 * MAX_NUMBER))


def result(first: int, sign: str, second: int) -> int:
    """The value of `first sign second`."""
    return first + second if sign == "+" else first - second


def equation(first: int, sign: str, second: int, value: int) -> str:
    """A completion; it opens with a space like every other token of it.

    Example: `equation(5, "-", 3, 2)` is ` 5 - 3 = 2`.
    """
    return f" {first} {sign} {second} = {value}"


def _problem_draw(split: Split) -> Draw[Problem]:
    def draw(rng: Random) -> Problem | None:
        # Two in three, because subtraction is what the demonstrations get wrong.
        loses = rng.random() < 2 / 3
        first = rng.randint(1, MAX_NUMBER)
        second = rng.randint(1, first if loses else MAX_NUMBER)
        verb = rng.choice(MINUS_VERBS if loses else PLUS_VERBS)
        problem = Problem(rng.choice(NAMES), first, rng.choice(THINGS), verb, second)
        return problem if is_held_out(problem.text) == (split == "test") else None

    return draw


@lru_cache(maxsize=16)
def _prompts(split: Split, size: int) -> tuple[Prompt, ...]:
    draw = _problem_draw(split)
    problems = distinct(draw, Random(f"word problems {split}"), size, f"{split}_size", key=lambda problem: problem.text)
    return tuple(
        Prompt(f"{split}/{index}", problem.text, {"answer": problem.answer}) for index, problem in enumerate(problems)
    )
