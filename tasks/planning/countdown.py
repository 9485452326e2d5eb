"""Countdown: reach a target with the given numbers, each used exactly once.

Example row of `task.data` (dllm-reasoning/d1, dataset/countdown_cd3_test.jsonl, Apache-2.0):

    {"input": "30,100,93", "output": "23"}

Protocol `plain`: the model reads `30,100,93=23` and writes an expression such as `30+93-100`, without `=` or target.
Protocol `d1`: the training prompt of d1 and BGPO, and the expression in an `<answer>` block. Generated problems follow
that file: three numbers from 1 to 100, a target from 1 to 100.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import ClassVar, NamedTuple

from dllm_rl.errors import UserError
from dllm_rl.rows import Row, load_placed_rows
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task
from dllm_rl.tasks.answers import answer_block, tagged
from dllm_rl.tasks.generated import Draw, check_integer, check_text, distinct, drawn, is_held_out
from dllm_rl.tasks.planning.published_prompts import countdown_d1

MAX_NUMBER = 100
MAX_TARGET = 100
MAX_CHARACTERS = 200
MAX_OPERANDS = 32
# Only these characters reach the parser: no names, calls, decimals, exponents, NUL bytes or digits of other scripts.
_ADMISSIBLE = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}
_SIGNS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_NO_OPERATOR = 3


class Term(NamedTuple):
    """A subexpression of a generated solution."""

    value: int
    text: str
    precedence: int


class Problem(NamedTuple):
    """A generated problem with one solution, such as `Problem((30, 100, 93), 23, "30+93-100")`."""

    numbers: tuple[int, ...]
    target: int
    expression: str

    @property
    def key(self) -> str:
        """The same for every order of the numbers."""
        return problem_text(sorted(self.numbers), self.target)


@dataclass
class Countdown(Task):
    """Countdown: reward 1 for an expression that uses every number once and equals the target, otherwise 0.

    The answer is the whole completion (`plain`) or its last complete `<answer>` block (`d1`), and it must be the
    expression alone: an equals sign makes it wrong. There is no reward for the format. `parts` has `valid`: the
    expression uses every number once, whatever its value.

    Example: `Countdown(numbers=4, completion_length=256, protocol="d1")`
    """

    protocols: ClassVar[tuple[str, ...]] = ("plain", "d1")
    completion_length: int = 16
    """Protocol `d1` asks for reasoning and needs far more than the default: its authors use 256."""
    numbers: int = 3
    train_size: int = 4096
    test_size: int = 256
    data: str = ""
    """File whose rows (`input`, `output`) replace the generated test split; training never draws them, in any order of
    the numbers."""
    protocol: str = "plain"
    """`plain`, or `d1`: its demonstrations have no reasoning, only the `<answer>` block."""

    def __post_init__(self) -> None:
        self.check_protocol()
        check_integer("numbers", self.numbers, 2, 6)
        # A shorter canvas would cut demonstrations off where the tokenizer spells characters.
        longest = len(self._completion("1" * longest_expression(self.numbers)))
        check_integer("completion_length", self.completion_length, longest)
        check_integer("train_size", self.train_size, 1)
        check_integer("test_size", self.test_size, 1)
        check_text("data", self.data)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The problems of a split: generated, or the rows of `data` for the test."""
        if split == "test" and self.data:
            return _file_prompts(self.data, self.protocol)
        size = self.train_size if split == "train" else self.test_size
        return _generated_prompts(split, size, self.numbers, self.data, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """1 for a correct expression; the whole answer must be the expression (white space around it aside)."""
        text = completion.strip() if self.protocol == "plain" else answer_block(completion)
        if not text:
            return Reward(0.0, "no_answer", {"valid": 0.0})
        tree = parse(text)
        if tree is None or sorted(_operands(tree)) != sorted(prompt.data["numbers"]):
            return Reward(0.0, "wrong", {"valid": 0.0})
        correct = value_of(tree) == prompt.data["target"]
        return Reward(float(correct), "correct" if correct else "wrong", {"valid": 1.0})

    def fingerprint(self, prompt: Prompt) -> str:
        """The same for every order of the numbers and every protocol."""
        return problem_text(sorted(prompt.data["numbers"]), prompt.data["target"])

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Fresh training problems, each with one correct expression."""
        rng = Random(f"countdown demonstrations {seed}")
        draw = _problem_draw("train", self.numbers, _file_keys(self.data))
        problems = (drawn(draw, rng) for _ in range(count))
        text = _TEXTS[self.protocol]
        return [Demonstration(text(problem.numbers, problem.target), self._completion(problem.expression))
                for problem in problems]

    def _completion(self, expression: str) -> str:
        return expression if self.protocol == "plain" else tagged(expression)


def problem_text(numbers: Sequence[int], target: int) -> str:
    """The plain prompt.

    Example: `problem_text([30, 100, 93], 23)` is `30,100,93=23`.
    """
    return f"{','.join(map(str, numbers))}={target}"


_TEXTS: Mapping[str, Callable[[Sequence[int], int], str]] = {"plain": problem_text, "d1": countdown_d1}


def longest_expression(numbers: int) -> int:
    """The characters of the longest solution that is generated: digits, operators, and brackets but for the root."""
    return numbers * len(str(MAX_NUMBER)) + (numbers - 1) + 2 * (numbers - 2)


def parse(text: str) -> ast.expr | None:
    """The tree of an expression of plain integers, + - * / and brackets, or None for anything else.

    A sign (`-3`, `+3`), `**`, `//`, decimals and everything that is longer than 200 characters are refused.
    """
    if len(text) > MAX_CHARACTERS or not _ADMISSIBLE.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return tree if len(nodes) < 2 * MAX_OPERANDS and all(map(_is_admissible, nodes)) else None


def _is_admissible(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS
    return isinstance(node, ast.Constant) and type(node.value) is int


def _operands(tree: ast.expr) -> Iterator[int]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, int))


def value_of(tree: ast.expr) -> Fraction | None:
    """The exact value of a tree from `parse`; None where it divides by zero."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return Fraction(tree.value)
    assert isinstance(tree, ast.BinOp)
    left, right = value_of(tree.left), value_of(tree.right)
    if left is None or right is None or (isinstance(tree.op, ast.Div) and right == 0):
        return None
    return _OPERATORS[type(tree.op)](left, right)


def combined(sign: str, left: Term, right: Term) -> Term:
    """`left sign right` with only the brackets that it needs."""
    precedence = _PRECEDENCE[sign]
    first = f"({left.text})" if left.precedence < precedence else left.text
    # a-(b+c) and a/(b*c) need brackets, a+(b-c) and a*(b/c) do not.
    bracket = right.precedence < precedence or (sign in "-/" and right.precedence == precedence)
    second = f"({right.text})" if bracket else right.text
    return Term(_SIGNS[sign](left.value, right.value), f"{first}{sign}{second}", precedence)


def _random_step(left: Term, right: Term, rng: Random) -> Term:
    """A random operation on two terms whose result is a positive integer."""
    sign = rng.choice(_signs(left.value, right.value))
    swap = sign in "-/" and left.value < right.value
    return combined(sign, right, left) if swap else combined(sign, left, right)


def _signs(one: int, other: int) -> str:
    """The operations on two positive integers, in the order that suits, that give a positive integer."""
    if one == other:
        return "+*/"
    return "+-*/" if max(one, other) % min(one, other) == 0 else "+-*"


def _solution(numbers: Sequence[int], rng: Random) -> Term:
    """Random operations on the numbers until one term is left."""
    terms = [Term(number, str(number), _NO_OPERATOR) for number in numbers]
    while len(terms) > 1:
        left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        terms.append(_random_step(left, right, rng))
    return terms[0]


def _problem_draw(split: Split, count: int, excluded: frozenset[str]) -> Draw[Problem]:
    def draw(rng: Random) -> Problem | None:
        numbers = tuple(rng.choices(range(1, MAX_NUMBER + 1), k=count))
        term = _solution(numbers, rng)
        if term.value > MAX_TARGET:
            return None
        problem = Problem(numbers, term.value, term.text)
        fits = is_held_out(problem.key) == (split == "test") and problem.key not in excluded
        return problem if fits else None

    return draw


@lru_cache(maxsize=16)
def _generated_prompts(split: Split, size: int, count: int, data: str, protocol: str) -> tuple[Prompt, ...]:
    draw = _problem_draw(split, count, _file_keys(data))
    problems = distinct(draw, Random(f"countdown {split}"), size, f"{split}_size", key=lambda problem: problem.key)
    return tuple(_prompt(f"{split}/{index}", row.numbers, row.target, protocol) for index, row in enumerate(problems))


@lru_cache(maxsize=16)
def _file_prompts(data: str, protocol: str) -> tuple[Prompt, ...]:
    rows = load_placed_rows(data, "test", ("input", "output"))
    return tuple(
        _prompt(f"test/{index}", _integers(row, "input", place), _integers(row, "output", place)[0], protocol)
        for index, (place, row) in enumerate(rows)
    )


def _file_keys(data: str) -> frozenset[str]:
    prompts = _file_prompts(data, "plain") if data else ()
    return frozenset(problem_text(sorted(prompt.data["numbers"]), prompt.data["target"]) for prompt in prompts)


def _prompt(name: str, numbers: Sequence[int], target: int, protocol: str) -> Prompt:
    return Prompt(name, _TEXTS[protocol](numbers, target), {"numbers": list(numbers), "target": target})


def _integers(row: Row, column: str, place: str) -> list[int]:
    value, many = str(row[column]), column == "input"
    if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*" if many else "[0-9]{1,9}", value):
        valid = "integers with commas between them, such as 30,100,93" if many else "an integer, such as 23"
        raise UserError(f"{place}: {column}={value}: must be {valid}")
    return [int(part) for part in value.split(",")]
