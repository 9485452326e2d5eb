"""9x9 Sudoku, graded by validity.

Example row of `task.data` (the first generated test puzzle, in two lines here; 0 or . for a blank, `Solution` is not
needed and not read):

    Puzzle,Solution
    109200030006419270720600941010090427974821000562740198690354000050062300000987564,
    149275836386419275725638941813596427974821653562743198698354712457162389231987564

Protocol `plain`: the model reads nine rows of nine cells and writes the nine rows of a solution. Protocol `rules`: a
prompt of our own in the manner of d1's for 4x4 (which has none for 9x9): the rules, the nine rows, and the solution in an
`<answer>` block.

Generated puzzles have exactly one solution. The split is by solution, so no answer to a test puzzle occurs in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from random import Random
from typing import ClassVar

from dllm_rl.errors import UserError
from dllm_rl.rows import load_placed_rows
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task
from dllm_rl.tasks.answers import tagged
from dllm_rl.tasks.generated import Draw, check_integer, check_text, distinct, drawn, is_held_out
from dllm_rl.tasks.planning.sudoku import Puzzle, as_rows, blank_cells, read_cells

CELLS = 81
DIGITS = "123456789"
MAX_STEPS = 1_000_000
"""The search for solutions gives up after so many steps; puzzles with one solution rarely take a tenth of them."""
SOLUTIONS_KEPT = 16
UNITS_OF: tuple[tuple[int, int, int], ...] = tuple(
    (cell // 9, 9 + cell % 9, 18 + cell // 27 * 3 + cell % 9 // 3) for cell in range(CELLS)
)
"""The row, the column and the box of each cell, as numbers from 0 to 26."""
_COUNT = tuple(bin(digits).count("1") for digits in range(512))
_RULES = """\
Solve this 9x9 Sudoku puzzle. It is given as nine lines of nine digits, where 0 stands for an empty cell.

- Replace every 0 with a digit from 1 to 9 and keep all other digits.
- Each row, each column and each of the nine 3x3 boxes must contain the digits 1 to 9 exactly once.

Think step by step if you like. Then write the nine lines of the complete grid, and nothing else, between <answer> and
</answer>.

Puzzle:
"""


class SearchTooLongError(Exception):
    """A puzzle takes more than `MAX_STEPS` steps to solve."""


@dataclass
class Sudoku9x9(Task):
    """9x9 Sudoku: reward 1 for any valid grid that keeps the clues, otherwise 0.

    `parts` has `exact` (the reward) and `cell`: the fraction of the blanks filled as in the nearest solution. Of a puzzle
    with more than 16 solutions, which only a file can hold, `cell` looks at the first 16 found.

    Example: `Sudoku9x9(min_blanks=30, max_blanks=30, protocol="rules", completion_length=256)`
    """

    protocols: ClassVar[tuple[str, ...]] = ("plain", "rules")
    completion_length: int = 96
    min_blanks: int = 20
    max_blanks: int = 40
    train_size: int = 4096
    test_size: int = 256
    data: str = ""
    """File whose puzzles (column `Puzzle`) replace the generated test split; training shows none with a solution of
    theirs."""
    protocol: str = "plain"
    """`plain`, or `rules`: its demonstrations have no reasoning, only the `<answer>` block."""

    def __post_init__(self) -> None:
        self.check_protocol()
        shortest = len(self._completion("0" * CELLS))
        check_integer("completion_length", self.completion_length, shortest)
        # With more blanks too few random puzzles have a single solution.
        check_integer("max_blanks", self.max_blanks, 1, 50)
        check_integer("min_blanks", self.min_blanks, 1, self.max_blanks)
        check_integer("train_size", self.train_size, 1)
        check_integer("test_size", self.test_size, 1)
        check_text("data", self.data)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The puzzles of a split: generated, or the rows of `data` for the test."""
        if split == "test" and self.data:
            return _prompts("test", _file_puzzles(self.data), self.protocol)
        size = self.train_size if split == "train" else self.test_size
        return _prompts(split, _generated(split, size, self.min_blanks, self.max_blanks, self.data), self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """1 for a solution; anything but exactly 81 digits (white space aside) counts as all wrong."""
        answer = read_cells(completion, self.protocol != "plain")
        if not answer:
            return Reward(0.0, "no_answer", {"exact": 0.0, "cell": 0.0})
        puzzle = prompt.data["puzzle"]
        if solves(puzzle, answer):
            return Reward(1.0, "correct", {"exact": 1.0, "cell": 1.0})
        return Reward(0.0, "wrong", {"exact": 0.0, "cell": cell_accuracy(puzzle, answer)})

    def fingerprint(self, prompt: Prompt) -> str:
        """The puzzle, whatever the protocol."""
        return str(prompt.data["puzzle"])

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Fresh puzzles of training grids with their solutions."""
        rng = Random(f"sudoku_9x9 demonstrations {seed}")
        draw = _puzzle_draw("train", self.min_blanks, self.max_blanks, _file_solutions(self.data))
        puzzles = (drawn(draw, rng) for _ in range(count))
        return [Demonstration(_text(puzzle.text, self.protocol), self._completion(puzzle.solution)) for puzzle in puzzles]

    def _completion(self, solution: str) -> str:
        return as_rows(solution) if self.protocol == "plain" else tagged(as_rows(solution))


def solves(puzzle: str, answer: str) -> bool:
    """Whether `answer` is a valid grid of 81 ASCII digits that keeps the clues of `puzzle`."""
    if len(answer) != CELLS or any(clue not in ("0", digit) for clue, digit in zip(puzzle, answer, strict=True)):
        return False
    units: list[set[str]] = [set() for _ in range(27)]
    for cell, digit in enumerate(answer):
        for unit in UNITS_OF[cell]:
            units[unit].add(digit)
    return all(unit == set(DIGITS) for unit in units)


def search(puzzle: str, rng: Random | None = None) -> Iterator[str]:
    """The solutions of a puzzle one after the other; in random order if `rng` is given.

    Example: `next(search("0" * 81, Random(0)))` is a random grid.

    Raises:
        SearchTooLongError: after `MAX_STEPS` steps.
    """
    free = [511] * 27  # for each unit the digits it still lacks, as bits
    for cell, clue in enumerate(puzzle):
        bit = 0 if clue == "0" else 1 << (int(clue) - 1)
        for unit in UNITS_OF[cell]:
            if free[unit] & bit != bit:
                return
            free[unit] ^= bit
    yield from _fill(list(puzzle), blank_cells(puzzle), free, iter(range(MAX_STEPS)), rng)


def _fill(cells: list[str], blanks: list[int], free: list[int], steps: Iterator[int], rng: Random | None) -> Iterator[str]:
    """Fills the blank with the fewest possible digits in every possible way, then the rest; leaves all as it was."""
    if next(steps, None) is None:
        raise SearchTooLongError
    if not blanks:
        yield "".join(cells)
        return
    place, possible = _most_constrained(blanks, free)
    cell = blanks[place]
    blanks[place] = blanks[-1]
    blanks.pop()
    digits = [digit for digit in range(9) if possible >> digit & 1]
    if rng:
        rng.shuffle(digits)
    for digit in digits:
        cells[cell] = DIGITS[digit]
        _toggle(free, cell, digit)
        yield from _fill(cells, blanks, free, steps, rng)
        _toggle(free, cell, digit)
    blanks.append(cell)
    blanks[place], blanks[-1] = blanks[-1], blanks[place]


def _most_constrained(blanks: list[int], free: list[int]) -> tuple[int, int]:
    """The place in `blanks` of the cell with the fewest possible digits, and these digits as bits."""
    fewest, best, digits = 10, 0, 0
    for place, cell in enumerate(blanks):
        row, column, box = UNITS_OF[cell]
        possible = free[row] & free[column] & free[box]
        if _COUNT[possible] < fewest:
            fewest, best, digits = _COUNT[possible], place, possible
            if fewest < 2:
                break
    return best, digits


def _toggle(free: list[int], cell: int, digit: int) -> None:
    for unit in UNITS_OF[cell]:
        free[unit] ^= 1 << digit


@lru_cache(maxsize=8192)
def solutions(puzzle: str) -> tuple[str, ...]:
    """The first 16 solutions of a puzzle, all of them where it has no more.

    Raises:
        SearchTooLongError: they are not found within `MAX_STEPS` steps.
    """
    return tuple(islice(search(puzzle), SOLUTIONS_KEPT))


def cell_accuracy(puzzle: str, answer: str) -> float:
    """The fraction of the blanks that agree with the solution that agrees most; 0 unless `answer` is 81 ASCII digits."""
    if len(answer) != CELLS or not (answer.isascii() and answer.isdigit()):
        return 0.0
    blanks = blank_cells(puzzle)
    best = max(sum(grid[cell] == answer[cell] for cell in blanks) for grid in solutions(puzzle))
    return best / len(blanks)


def _random_grid(split: Split, rng: Random) -> str:
    """A random grid of a split. Renaming digits leads from any grid to one of the split without another search."""
    grid = next(search("0" * CELLS, rng))
    while is_held_out(grid) != (split == "test"):
        grid = grid.translate(str.maketrans(DIGITS, "".join(rng.sample(DIGITS, 9))))
    return grid


def _puzzle_draw(split: Split, min_blanks: int, max_blanks: int, excluded: frozenset[str]) -> Draw[Puzzle]:
    def draw(rng: Random) -> Puzzle | None:
        solution = _random_grid(split, rng)
        blanks = set(rng.sample(range(CELLS), rng.randint(min_blanks, max_blanks)))
        text = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
        single = len(list(islice(search(text), 2))) == 1
        return Puzzle(text, solution) if single and solution not in excluded else None

    return draw


@lru_cache(maxsize=16)
def _generated(split: Split, size: int, min_blanks: int, max_blanks: int, data: str) -> tuple[str, ...]:
    draw = _puzzle_draw(split, min_blanks, max_blanks, _file_solutions(data))
    puzzles = distinct(draw, Random(f"sudoku_9x9 {split}"), size, f"{split}_size", key=lambda puzzle: puzzle.text)
    return tuple(puzzle.text for puzzle in puzzles)


@lru_cache(maxsize=16)
def _file_puzzles(data: str) -> tuple[str, ...]:
    return tuple(_checked(row["Puzzle"], place) for place, row in load_placed_rows(data, "test", ("Puzzle",)))


def _file_solutions(data: str) -> frozenset[str]:
    return frozenset(grid for puzzle in _file_puzzles(data) for grid in solutions(puzzle)) if data else frozenset()


def _text(puzzle: str, protocol: str) -> str:
    return ("" if protocol == "plain" else _RULES) + as_rows(puzzle) + "\n"


@lru_cache(maxsize=16)
def _prompts(split: Split, puzzles: tuple[str, ...], protocol: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{split}/{index}", _text(puzzle, protocol), {"puzzle": puzzle})
                 for index, puzzle in enumerate(puzzles))


def _checked(puzzle: object, place: str) -> str:
    """The puzzle of a row, with 0 for its blanks."""
    text = puzzle.replace(".", "0") if isinstance(puzzle, str) else ""
    if len(text) != CELLS or set(text) - set("0" + DIGITS):
        raise UserError(f"{place}: Puzzle={puzzle}: must be a string of 81 digits, 0 or . for a blank")
    try:
        solvable = "0" in text and bool(solutions(text))
    except SearchTooLongError:
        raise UserError(f"{place}: Puzzle={puzzle}: must be solvable within {MAX_STEPS:,} steps of search") from None
    if not solvable:
        raise UserError(f"{place}: Puzzle={puzzle}: must have a blank (0) and at least one solution")
    return text
