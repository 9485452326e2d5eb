"""Programs from examples: input/output pairs to a Python expression in `x`, learnt by a tiny model in a minute.

Example row (generated here; there is no file):

    prompt      "2->7 5->13 1->5"
    completion  "x*2+3"

Numbers are one token each for the tiny tokenizer, so a prompt has 9 tokens and a completion 3 or 5. The inputs of a
prompt differ, and three of them fit no other program of the family; two more pairs that the model never sees keep a
completion that only reproduces the three from being right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar, NamedTuple

from dllm_rl.sandbox import Call, Limits, Program, run_programs
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task
from dllm_rl.tasks.code.grading import check_reward, check_timeout, no_answer, reward_of
from dllm_rl.tasks.generated import Draw, check_integer, check_mistakes, distinct, drawn, is_held_out

FORMS = ("x+{0}", "x*{0}", "x*x+{0}", "x*{0}+{1}", "x*{0}-{1}")
INPUTS = range(1, 11)
SHOWN, HIDDEN = 3, 2
MAX_NUMBER = 255
MAX_CONSTANT = 20  # 10*20+20, and one more for the mistake, stay below MAX_NUMBER
MAX_CHARACTERS = 200
MISTAKE_RATES: Mapping[str, float] = {"systematic": 0.65, "noisy": 0.65, "clean": 0.0}


class Expression(NamedTuple):
    """A program, such as `Expression("x*{0}+{1}", (2, 3))`."""

    form: str
    constants: tuple[int, ...]

    @property
    def text(self) -> str:
        """The source code."""
        return self.form.format(*self.constants)

    def value(self, x: int) -> int:
        """The result for one input."""
        first, last = self.constants[0], self.constants[-1]
        if self.form == "x+{0}":
            return x + first
        if self.form == "x*{0}":
            return x * first
        if self.form == "x*x+{0}":
            return x * x + first
        return x * first + (last if "+" in self.form else -last)


class Problem(NamedTuple):
    """A program and the inputs at which it is shown, then tested."""

    expression: Expression
    inputs: tuple[int, ...]

    @property
    def text(self) -> str:
        """What the model reads."""
        return " ".join(f"{x}->{self.expression.value(x)}" for x in self.inputs[:SHOWN])

    @property
    def key(self) -> str:
        """The same for every order of the shown inputs; it decides the split."""
        return f"{self.expression.text} {sorted(self.inputs[:SHOWN])}"


@dataclass
class ProgramSynthesis(Task):
    """Expressions from input/output pairs: reward 1 when all 3 shown and 2 hidden pairs come out right, otherwise 0.

    Completions are evaluated by `dllm_rl.sandbox`; a value counts only if it is an integer. `pass_rate` is the share of
    the five pairs.

    Example: `ProgramSynthesis(demonstrations_from="clean")`
    """

    words: ClassVar[tuple[str, ...]] = (
        "->", *(str(number) for number in range(MAX_NUMBER + 1)), *(f" {x}" for x in INPUTS),
    )

    completion_length: int = 9
    train_size: int = 4096
    test_size: int = 256
    largest_constant: int = 5
    """Constants are drawn from 1 to this one."""
    reward: str = "all"
    """What is paid: `all`, 1 if all five pairs come out right; `fraction`, the share of them that do."""
    timeout_seconds: float = 2.0
    """Wall clock per completion."""
    demonstrations_from: str = "systematic"
    """Mistakes of the demonstrations: `systematic` writes the last constant one too large, `noisy` writes other,
    random constants, `clean` makes none."""
    mistake_rate: float | None = None
    """How many of the demonstrations carry the mistake; null stands for 0.65."""

    def __post_init__(self) -> None:
        check_integer("completion_length", self.completion_length, 1)
        check_integer("train_size", self.train_size, 1)
        check_integer("test_size", self.test_size, 1)
        check_integer("largest_constant", self.largest_constant, 2, MAX_CONSTANT)
        check_reward(self.reward)
        check_timeout(self.timeout_seconds)
        check_mistakes(self.demonstrations_from, self.mistake_rate, MISTAKE_RATES)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The generated questions of a split. No program is shown in both at the same inputs, whatever their order."""
        return _prompts(split, self.train_size if split == "train" else self.test_size, self.largest_constant)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """The grade of one completion; batches are far cheaper for each."""
        return self.score_batch([prompt], [completion])[0]

    def score_batch(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        """Grades all completions in one batch of sandboxed programs; the same answer to a prompt runs once."""
        answers = [(prompt.text, tuple(map(tuple, prompt.data["pairs"])), completion.strip())
                   for prompt, completion in zip(prompts, completions, strict=True)]
        unique = dict.fromkeys(answer for answer in answers if _is_runnable(answer[2]))
        programs = [_program(pairs, text) for _, pairs, text in unique]
        outcomes = run_programs(programs, Limits(seconds=self.timeout_seconds))
        rewards = {answer: reward_of(outcome, self.reward) for answer, outcome in zip(unique, outcomes, strict=True)}
        return [rewards[answer] if answer in rewards else self._unrun(answer[2]) for answer in answers]

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Fresh training questions with their programs, some of them mistaken."""
        rng = Random(f"program synthesis demonstrations {seed}")
        draw = _problem_draw("train", self.largest_constant)
        problems = (drawn(draw, rng) for _ in range(count))
        return [Demonstration(problem.text, self._written(problem.expression, rng)) for problem in problems]

    def _unrun(self, answer: str) -> Reward:
        empty = no_answer(self.reward)
        return Reward(empty.value, "wrong", empty.parts) if answer else empty

    def _written(self, expression: Expression, rng: Random) -> str:
        rate = MISTAKE_RATES[self.demonstrations_from] if self.mistake_rate is None else self.mistake_rate
        form, constants = expression
        if rng.random() >= rate:
            return expression.text
        if self.demonstrations_from == "systematic":
            return Expression(form, (*constants[:-1], constants[-1] + 1)).text
        noisy = constants
        while noisy == constants:
            noisy = tuple(rng.randint(1, self.largest_constant) for _ in constants)
        return Expression(form, noisy).text


def _is_runnable(answer: str) -> bool:
    return 0 < len(answer) <= MAX_CHARACTERS and answer.isprintable()


def _program(pairs: tuple[tuple[int, ...], ...], answer: str) -> Program:
    return Program("", tuple(Call(answer, y, {"x": x}) for x, y in pairs))


def _problem_draw(split: Split, largest_constant: int) -> Draw[Problem]:
    def draw(rng: Random) -> Problem | None:
        form = rng.choice(FORMS)
        first = rng.randint(2 if form.startswith("x*{0}") else 1, largest_constant)
        if "{1}" not in form:
            constants: tuple[int, ...] = (first,)
        else:  # a difference is never negative, not even at the input 1
            constants = (first, rng.randint(1, first if "-" in form else largest_constant))
        problem = Problem(Expression(form, constants), tuple(rng.sample(INPUTS, SHOWN + HIDDEN)))
        return problem if is_held_out(problem.key) == (split == "test") else None

    return draw


@lru_cache(maxsize=16)
def _prompts(split: Split, size: int, largest_constant: int) -> tuple[Prompt, ...]:
    draw, rng = _problem_draw(split, largest_constant), Random(f"program synthesis {split}")
    problems = distinct(draw, rng, size, f"{split}_size", key=lambda problem: problem.text)
    return tuple(
        Prompt(f"{split}/{index}", problem.text, {
            "pairs": tuple((x, problem.expression.value(x)) for x in problem.inputs),
            "program": problem.expression.text,
        })
        for index, problem in enumerate(problems)
    )
