"""Completions whose grade is known: for every row of a file one that is right and one that is wrong.

    for prompt, right, wrong in countdown_grades("countdown/cd3_test.jsonl"):
        assert Countdown().score(prompt, right).value == 1 and Countdown().score(prompt, wrong).value == 0
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from dllm_rl.task import Prompt
from dllm_rl.tasks.answers import tagged
from dllm_rl.tasks.planning.countdown import Countdown
from dllm_rl.tasks.planning.sudoku import Puzzle, Sudoku, all_grids, solutions, with_last_blank_wrong

Grades = Iterator[tuple[Prompt, str, str]]
"""A prompt, a right completion and a wrong one."""


def countdown_grades(data: str, protocol: str = "plain") -> Grades:
    """The rows of a Countdown file that have a solution. By turns the wrong one has the right value with numbers that are
    not given, states the target after an equals sign, or uses a given number three times."""
    task = Countdown(data=data, protocol=protocol, completion_length=256)
    for index, prompt in enumerate(task.prompts("test")):
        numbers, target = prompt.data["numbers"], prompt.data["target"]
        right = solve(numbers, target)
        if right is not None:
            wrong = (f"{right}+1-1", f"{right}={target}", f"{right}+{numbers[0]}-{numbers[0]}")[index % 3]
            yield (prompt, right, wrong) if protocol == "plain" else (prompt, tagged(right), tagged(wrong))


def sudoku_grades(data: str, protocol: str = "plain") -> Grades:
    """The rows of a 4x4 Sudoku file. By turns the wrong one changes the last blank, ignores the clues or ends early."""
    task = Sudoku(data=data, protocol=protocol, completion_length=256)
    for index, prompt in enumerate(task.prompts("test")):
        puzzle = prompt.data["puzzle"]
        right = solutions(puzzle)[0]
        other = next(grid for grid in all_grids() if grid not in solutions(puzzle))
        wrong = (with_last_blank_wrong(Puzzle(puzzle, right)), other, right[:-1])[index % 3]
        yield (prompt, right, wrong) if protocol == "plain" else (prompt, tagged(right), tagged(wrong))


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that uses every number once and equals the target; None where there is none.

    Example: `solve([30, 100, 93], 23)` is "(93+(30-100))".
    """
    return _solve([(Fraction(number), str(number)) for number in numbers], target)


def _solve(terms: Sequence[tuple[Fraction, str]], target: int) -> str | None:
    if len(terms) == 1:
        return terms[0][1] if terms[0][0] == target else None
    for i, (a, left) in enumerate(terms):
        for j, (b, right) in enumerate(terms):
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for sign, value in _results(a, b) if i != j else ():
                found = _solve([*rest, (value, f"({left}{sign}{right})")], target)
                if found is not None:
                    return found
    return None


def _results(a: Fraction, b: Fraction) -> Iterator[tuple[str, Fraction]]:
    yield from (("+", a + b), ("-", a - b), ("*", a * b))
    if b:
        yield "/", a / b
