"""4x4 Sudoku, graded by validity.

Example row of `task.data` (dllm-reasoning/d1, dataset/4x4_test_sudoku.csv, Apache-2.0):

    Puzzle,Solution
    3102200002100320,3142243142131324

Protocol `plain`: the model reads four rows of four cells, 0 for a blank, and writes the four rows of a solution. The
line breaks tell a model with relative positions (rotary embeddings) which column a cell is in. Protocol `d1`: d1's rules
and the puzzle as 16 characters, the solution in an `<answer>` block; `spg`: the same after SPG's three solved examples.

Puzzles of that file can have several solutions, and every one of them is right. The split is by solution, as in SPG: of
the 288 grids 200 are for training and 88 for the test. Generated puzzles have exactly one solution, so no answer to a
test puzzle occurs in training, nor, under `spg`, in an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from math import isqrt
from random import Random
from typing import ClassVar, NamedTuple

from dllm_rl.errors import UserError
from dllm_rl.rows import load_placed_rows
from dllm_rl.task import Demonstration, Prompt, Reward, Split, Task
from dllm_rl.tasks.answers import answer_block, tagged
from dllm_rl.tasks.generated import Draw, check_integer, check_mistakes, check_text, distinct, drawn
from dllm_rl.tasks.planning.published_prompts import SPG_EXAMPLES, sudoku_d1, sudoku_spg

CELLS = 16
DIGITS = "1234"
TRAIN_GRIDS = 200
SPLIT_SEED = 0
MISTAKE_RATES: Mapping[str, float] = {"systematic": 0.65, "noisy": 0.9, "clean": 0.0}
UNITS: tuple[tuple[int, ...], ...] = (
    *(tuple(range(4 * row, 4 * row + 4)) for row in range(4)),
    *(tuple(range(column, CELLS, 4)) for column in range(4)),
    *((corner, corner + 1, corner + 4, corner + 5) for corner in (0, 2, 8, 10)),
)
"""The cells of the 4 rows, the 4 columns and the 4 boxes."""


class Puzzle(NamedTuple):
    """A puzzle and its solution, 16 characters each."""

    text: str
    solution: str


@dataclass
class Sudoku(Task):
    """4x4 Sudoku: reward 1 for any valid grid that keeps the clues, otherwise 0.

    The answer is the whole completion (`plain`) or its last complete `<answer>` block (`d1`, `spg`), and it must be the
    16 digits alone. `parts` has `exact` (the reward) and `cell`: the fraction of the blanks filled as in the nearest
    solution.

    Example: `Sudoku(min_blanks=8, max_blanks=8, data="4x4_test.csv", protocol="d1", completion_length=256)`
    """

    protocols: ClassVar[tuple[str, ...]] = ("plain", "d1", "spg")
    completion_length: int = 20
    """Protocols `d1` and `spg` ask for reasoning and need far more than the default: their authors use 256."""
    min_blanks: int = 6
    max_blanks: int = 10
    train_size: int = 4096
    test_size: int = 256
    data: str = ""
    """File whose puzzles (column `Puzzle`) replace the generated test split. Training never shows them, though it may
    show puzzles with the same solution: such files rarely leave a solution out."""
    demonstrations_from: str = "systematic"
    """Mistakes of the demonstrations: `systematic` writes the last blank's digit d as d % 4 + 1, `noisy` fills 1 to 3
    blanks with random digits, `clean` makes none."""
    mistake_rate: float | None = None
    """How many demonstrations carry the mistake; null stands for 0.65 (systematic) or 0.9 (noisy)."""
    protocol: str = "plain"
    """`plain`, `d1` or `spg`; demonstrations of the last two have no reasoning, only the `<answer>` block."""

    def __post_init__(self) -> None:
        self.check_protocol()
        shortest = 1 if self.protocol == "plain" else len(tagged("0" * CELLS))
        check_integer("completion_length", self.completion_length, shortest)
        # With more than 12 blanks no puzzle has a single solution.
        check_integer("max_blanks", self.max_blanks, 1, 12)
        check_integer("min_blanks", self.min_blanks, 1, self.max_blanks)
        check_integer("train_size", self.train_size, 1)
        check_integer("test_size", self.test_size, 1)
        check_text("data", self.data)
        check_mistakes(self.demonstrations_from, self.mistake_rate, MISTAKE_RATES)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The puzzles of a split: generated, or the rows of `data` for the test."""
        if split == "test" and self.data:
            return _file_prompts(self.data, self.protocol)
        size = self.train_size if split == "train" else self.test_size
        return _generated_prompts(split, size, self.min_blanks, self.max_blanks, self.data, self.protocol)

    def score(self, prompt: Prompt, completion: str) -> Reward:
        """1 for a solution; anything but exactly 16 digits (white space aside) counts as all wrong."""
        answer = read_cells(completion, self.protocol != "plain")
        if not answer:
            return Reward(0.0, "no_answer", {"exact": 0.0, "cell": 0.0})
        puzzle = prompt.data["puzzle"]
        exact = float(answer in solutions(puzzle))
        return Reward(exact, "correct" if exact else "wrong", {"exact": exact, "cell": cell_accuracy(puzzle, answer)})

    def fingerprint(self, prompt: Prompt) -> str:
        """The puzzle, whatever the protocol."""
        return str(prompt.data["puzzle"])

    def demonstrations(self, count: int, seed: int) -> list[Demonstration]:
        """Fresh puzzles of training grids with their solutions, some of them mistaken."""
        rng = Random(f"sudoku demonstrations {seed}")
        draw = _puzzle_draw("train", self.min_blanks, self.max_blanks, _excluded("train", self.data, self.protocol))
        puzzles = (drawn(draw, rng) for _ in range(count))
        text, form = _TEXTS[self.protocol], as_rows if self.protocol == "plain" else tagged
        return [Demonstration(text(puzzle.text), form(self._written(puzzle, rng))) for puzzle in puzzles]

    def _written(self, puzzle: Puzzle, rng: Random) -> str:
        kind = self.demonstrations_from
        rate = MISTAKE_RATES[kind] if self.mistake_rate is None else self.mistake_rate
        if rng.random() >= rate:
            return puzzle.solution
        return with_last_blank_wrong(puzzle) if kind == "systematic" else with_noise(puzzle, rng)


@lru_cache(maxsize=1)
def all_grids() -> tuple[str, ...]:
    """The 288 solution grids in lexicographic order, such as `1234341221434321`."""
    rows = ["".join(row) for row in permutations(DIGITS)]
    # Two rows share a box, so a band of two rows is checked before bands are combined.
    bands = [upper + lower for upper, lower in product(rows, rows) if is_valid(upper + lower)]
    return tuple(upper + lower for upper, lower in product(bands, bands) if is_valid(upper + lower))


def is_valid(cells: str) -> bool:
    """Whether no row, column or box repeats a digit; `cells` may end after any row."""
    units = ([cells[cell] for cell in unit if cell < len(cells)] for unit in UNITS)
    return all(len(set(unit)) == len(unit) for unit in units)


@lru_cache(maxsize=2)
def split_grids(split: Split) -> tuple[str, ...]:
    """The grids whose puzzles make up a split: 200 for train, the other 88 for test."""
    grids = list(all_grids())
    Random(SPLIT_SEED).shuffle(grids)
    return tuple(grids[:TRAIN_GRIDS] if split == "train" else grids[TRAIN_GRIDS:])


@lru_cache(maxsize=1)
def _grids_by_clue() -> tuple[Mapping[str, int], ...]:
    """For each cell and digit the set of grids that have it, as the bits of an integer: bit i is `all_grids()[i]`."""
    grids = all_grids()
    return tuple(
        {digit: sum(1 << i for i, grid in enumerate(grids) if grid[cell] == digit) for digit in DIGITS}
        for cell in range(CELLS)
    )


def _consistent(puzzle: str) -> int:
    """The grids that keep the clues of a puzzle, as bits."""
    bits = (1 << len(all_grids())) - 1
    for clue, grids in zip(puzzle, _grids_by_clue(), strict=True):
        if clue != "0":
            bits &= grids[clue]
    return bits


@lru_cache(maxsize=8192)
def solutions(puzzle: str) -> tuple[str, ...]:
    """Every valid grid that keeps the clues of a puzzle."""
    bits = _consistent(puzzle)
    return tuple(grid for i, grid in enumerate(all_grids()) if bits >> i & 1)


def cell_accuracy(puzzle: str, answer: str) -> float:
    """The fraction of the blanks that agree with the solution that agrees most; 0 unless `answer` is 16 ASCII digits.

    Example: `cell_accuracy("3102200002100320", "3142243142131324")` is 1.0.
    """
    if len(answer) != CELLS or not (answer.isascii() and answer.isdigit()):
        return 0.0
    blanks = blank_cells(puzzle)
    best = max(sum(grid[cell] == answer[cell] for cell in blanks) for grid in solutions(puzzle))
    return best / len(blanks)


def read_cells(completion: str, in_block: bool) -> str:
    """The answer without white space; empty where there is none. Nothing is padded, cut off or picked out of words."""
    answer = answer_block(completion) if in_block else completion
    return "".join((answer or "").split())


def as_rows(cells: str) -> str:
    """A square grid with a line for each row, such as four lines of four cells."""
    width = isqrt(len(cells))
    return "\n".join(cells[start : start + width] for start in range(0, len(cells), width))


def _plain_text(puzzle: str) -> str:
    """The plain prompt; it ends with a line break, so that a cell and its clue are 20 tokens apart."""
    return as_rows(puzzle) + "\n"


_TEXTS: Mapping[str, Callable[[str], str]] = {"plain": _plain_text, "d1": sudoku_d1, "spg": sudoku_spg}


def blank_cells(puzzle: str) -> list[int]:
    """The cells to fill, in reading order."""
    return [cell for cell, clue in enumerate(puzzle) if clue == "0"]


def with_last_blank_wrong(puzzle: Puzzle) -> str:
    """The solution with the last blank's digit d written as d % 4 + 1."""
    last = puzzle.text.rindex("0")
    return f"{puzzle.solution[:last]}{int(puzzle.solution[last]) % 4 + 1}{puzzle.solution[last + 1:]}"


def with_noise(puzzle: Puzzle, rng: Random) -> str:
    """The solution with 1 to 3 blanks filled by random digits, which may happen to be the right ones."""
    blanks = blank_cells(puzzle.text)
    cells = list(puzzle.solution)
    for cell in rng.sample(blanks, min(rng.randint(1, 3), len(blanks))):
        cells[cell] = rng.choice(DIGITS)
    return "".join(cells)


def _puzzle_draw(split: Split, min_blanks: int, max_blanks: int, excluded: frozenset[str]) -> Draw[Puzzle]:
    grids = split_grids(split)

    def draw(rng: Random) -> Puzzle | None:
        solution = rng.choice(grids)
        blanks = set(rng.sample(range(CELLS), rng.randint(min_blanks, max_blanks)))
        text = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
        bits = _consistent(text)
        single = bits & (bits - 1) == 0
        return Puzzle(text, solution) if single and excluded.isdisjoint((text, solution)) else None

    return draw


@lru_cache(maxsize=16)
def _generated_prompts(
    split: Split, size: int, min_blanks: int, max_blanks: int, data: str, protocol: str
) -> tuple[Prompt, ...]:
    draw = _puzzle_draw(split, min_blanks, max_blanks, _excluded(split, data, protocol))
    puzzles = distinct(draw, Random(f"sudoku {split}"), size, f"{split}_size", key=lambda puzzle: puzzle.text)
    return tuple(_prompt(f"{split}/{index}", puzzle.text, protocol) for index, puzzle in enumerate(puzzles))


@lru_cache(maxsize=16)
def _file_prompts(data: str, protocol: str) -> tuple[Prompt, ...]:
    rows = load_placed_rows(data, "test", ("Puzzle",))
    puzzles = [_checked(row["Puzzle"], place) for place, row in rows]
    return tuple(_prompt(f"test/{index}", puzzle, protocol) for index, puzzle in enumerate(puzzles))


def _excluded(split: Split, data: str, protocol: str) -> frozenset[str]:
    """Puzzles and solutions that a split leaves out: the puzzles of `data` and what the prompt's own examples give away."""
    excluded = {prompt.data["puzzle"] for prompt in _file_prompts(data, "plain")} if data else set()
    if protocol == "spg":
        excluded |= {example.puzzle for example in SPG_EXAMPLES}
        if split == "test":
            excluded |= {example.solution for example in SPG_EXAMPLES}
    return frozenset(excluded)


def _prompt(name: str, puzzle: str, protocol: str) -> Prompt:
    return Prompt(name, _TEXTS[protocol](puzzle), {"puzzle": puzzle})


def _checked(puzzle: object, place: str) -> str:
    """The puzzle of a row."""
    if not isinstance(puzzle, str) or len(puzzle) != CELLS or set(puzzle) - set("0" + DIGITS):
        raise UserError(f"{place}: Puzzle={puzzle}: must be a string of 16 digits from 0 to 4, 0 for a blank")
    if "0" not in puzzle or not solutions(puzzle):
        raise UserError(f"{place}: Puzzle={puzzle}: must have a blank (0) and at least one solution")
    return puzzle
