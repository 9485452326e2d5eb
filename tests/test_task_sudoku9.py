"""9x9 Sudoku: the search for solutions, the generator, grading by validity, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from dllm_rl.errors import UserError
from dllm_rl.task import Prompt
from dllm_rl.tasks.planning import sudoku9
from dllm_rl.tasks.planning.sudoku9 import Sudoku9x9, cell_accuracy, search, solutions, solves

# The puzzle and the solution that the article "Sudoku" of Wikipedia shows, checked by `is_grid` below.
PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARDEST = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"  # Inkala, 2012
SMALL = {"train_size": 300, "test_size": 50}


def prompt_of(puzzle: str) -> Prompt:
    return Prompt("test/0", "", {"puzzle": puzzle})


def is_grid(cells: str) -> bool:
    """Whether all rows, columns and boxes hold 1 to 9: no code shared with the task."""
    rows = [cells[start:start + 9] for start in range(0, 81, 9)]
    columns = ["".join(row[column] for row in rows) for column in range(9)]
    boxes = ["".join(row[left:left + 3] for row in rows[top:top + 3]) for top in (0, 3, 6) for left in (0, 3, 6)]
    return all(sorted(unit) == list("123456789") for unit in (*rows, *columns, *boxes))


def backtrack(cells: str) -> list[str]:
    """All completions by trying digits cell by cell, in reading order: no code shared with the task."""
    at = cells.find("0")
    if at < 0:
        return [cells]
    row, column = divmod(at, 9)
    top, left = row // 3 * 3, column // 3 * 3
    seen = {*cells[row * 9:row * 9 + 9], *cells[column::9],
            *(cells[y * 9 + x] for y in range(top, top + 3) for x in range(left, left + 3))}
    return [grid for digit in "123456789" if digit not in seen for grid in backtrack(cells[:at] + digit + cells[at + 1:])]


def ambiguous() -> tuple[str, list[str]]:
    """A puzzle with several solutions, found by blanking a random grid until the oracle finds some."""
    rng = Random(0)
    while True:
        blanks = rng.sample(range(81), 44)
        puzzle = "".join("0" if cell in blanks else digit for cell, digit in enumerate(SOLUTION))
        found = backtrack(puzzle)
        if 2 <= len(found) <= 10:
            return puzzle, found


def test_the_search_finds_exactly_the_solutions() -> None:
    assert is_grid(SOLUTION) and not is_grid(SOLUTION[:-1] + "1")
    assert solutions(PUZZLE) == (SOLUTION,) == tuple(backtrack(PUZZLE))
    assert len(solutions(HARDEST)) == 1 and solves(HARDEST, solutions(HARDEST)[0]) and is_grid(solutions(HARDEST)[0])
    puzzle, found = ambiguous()
    assert sorted(solutions(puzzle)) == sorted(found)
    assert solutions("55" + PUZZLE[2:]) == ()
    assert len(solutions("0" * 81)) == sudoku9.SOLUTIONS_KEPT == len(set(solutions("0" * 81)))


def test_random_grids_are_valid_and_differ() -> None:
    grids = {next(search("0" * 81, Random(seed))) for seed in range(50)}
    assert len(grids) == 50 and all(map(is_grid, grids))
    assert next(search("0" * 81, Random(7))) == next(search("0" * 81, Random(7)))


def test_generated_puzzles_are_distinct_and_have_one_solution() -> None:
    task = Sudoku9x9(**SMALL)
    puzzles = {split: [prompt.data["puzzle"] for prompt in task.prompts(split)] for split in ("train", "test")}
    assert [len(set(puzzles[split])) for split in ("train", "test")] == [300, 50]
    assert {puzzle.count("0") for puzzle in puzzles["train"]} == set(range(20, 41))
    for puzzle in puzzles["train"][:60] + puzzles["test"][:20]:
        (only,) = backtrack(puzzle)
        assert is_grid(only) and task.score(prompt_of(puzzle), only).parts == {"exact": 1.0, "cell": 1.0}


def test_the_split_is_by_solution() -> None:
    task = Sudoku9x9(**SMALL)
    train = {solutions(prompt.data["puzzle"])[0] for prompt in task.prompts("train")}
    train |= {demo.completion.replace("\n", "") for demo in task.demonstrations(300, 0)}
    test = {solutions(prompt.data["puzzle"])[0] for prompt in Sudoku9x9(train_size=1, test_size=300).prompts("test")}
    assert len(train) > 500 and len(test) == 300 and not train & test


def test_prompts_are_the_same_every_time_and_cached() -> None:
    assert Sudoku9x9(**SMALL).prompts("test") is Sudoku9x9(**SMALL).prompts("test")
    assert Sudoku9x9(train_size=300, test_size=10).prompts("test") == Sudoku9x9(**SMALL).prompts("test")[:10]
    prompt = Sudoku9x9(**SMALL).prompts("test")[7]
    assert prompt.id == "test/7" and [len(line) for line in prompt.text.split("\n")] == [9] * 9 + [0]


def test_protocols_word_the_same_puzzles() -> None:
    plain, rules = Sudoku9x9(**SMALL), Sudoku9x9(protocol="rules", completion_length=256, **SMALL)
    for a, b in zip(plain.prompts("test"), rules.prompts("test"), strict=True):
        assert a.data == b.data and b.text.endswith("Puzzle:\n" + a.text) and plain.fingerprint(a) == rules.fingerprint(b)
    prompt = rules.prompts("test")[0]
    (grid,) = backtrack(prompt.data["puzzle"])
    assert rules.score(prompt, f"<answer>{grid}</answer>").verdict == "correct"
    assert rules.score(prompt, grid).verdict == "no_answer"
    for task in (plain, rules):
        for text, completion in task.demonstrations(20, 0):
            puzzle = text.replace("\n", "")[-81:]
            assert task.score(prompt_of(puzzle), completion).verdict == "correct"
            assert len(completion) <= task.completion_length


def test_every_other_digit_in_every_blank_is_wrong() -> None:
    """30 blanks with 8 wrong digits each, and 51 clues with 8 changes each."""
    puzzle = Sudoku9x9(**SMALL).prompts("test")[0].data["puzzle"]
    (grid,) = backtrack(puzzle)
    blanks = puzzle.count("0")
    for cell in range(81):
        for digit in set("123456789") - {grid[cell]}:
            reward = Sudoku9x9().score(prompt_of(puzzle), grid[:cell] + digit + grid[cell + 1:])
            assert (reward.value, reward.verdict) == (0.0, "wrong")
            assert reward.parts == {"exact": 0.0, "cell": (blanks - (puzzle[cell] == "0")) / blanks}


def test_another_grid_is_valid_but_does_not_keep_the_clues() -> None:
    other = SOLUTION.translate(str.maketrans("123456789", "234567891"))
    assert is_grid(other)
    assert Sudoku9x9().score(prompt_of("0" * 81), other).parts == {"exact": 1.0, "cell": 1.0}
    assert Sudoku9x9().score(prompt_of(PUZZLE), other).value == 0.0


def test_every_solution_of_an_ambiguous_puzzle_is_right() -> None:
    puzzle, found = ambiguous()
    for grid in found:
        assert Sudoku9x9().score(prompt_of(puzzle), grid).value == 1.0
    last = puzzle.rindex("0")
    blanks = [cell for cell, clue in enumerate(puzzle) if clue == "0"]
    wrong = found[-1][:last] + found[-1][last].translate(str.maketrans("123456789", "234567891")) + found[-1][last + 1:]
    nearest = max(sum(grid[cell] == wrong[cell] for cell in blanks) for grid in found)
    assert cell_accuracy(puzzle, wrong) == nearest / len(blanks)


@pytest.mark.parametrize("mangle", [
    lambda grid: grid[:80], lambda grid: grid + "1", lambda grid: grid[:80] + "0", lambda grid: f"<answer>{grid}</answer>",
    lambda grid: grid + " done", lambda grid: grid + "\x00", lambda grid: "|".join(grid),
    lambda grid: "".join(chr(0x660 + int(digit)) for digit in grid),
])
def test_nothing_is_padded_cut_or_harvested(mangle: Callable[[str], str]) -> None:
    reward = Sudoku9x9().score(prompt_of(PUZZLE), mangle(SOLUTION))
    assert (reward.value, reward.verdict) == (0.0, "wrong")
    assert Sudoku9x9().score(prompt_of(PUZZLE), " ".join(SOLUTION)).verdict == "correct"
    assert Sudoku9x9().score(prompt_of(PUZZLE), " \n").verdict == "no_answer"


@pytest.mark.parametrize("fields", [
    {"train_size": 0}, {"test_size": "many"}, {"completion_length": 88}, {"completion_length": 100, "protocol": "rules"},
    {"data": None}, {"max_blanks": 51}, {"min_blanks": 0}, {"min_blanks": 41}, {"protocol": "d1"},
])
def test_bad_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        Sudoku9x9(**fields)  # type: ignore[arg-type]


def test_files_and_their_solutions_are_left_out_of_training(tmp_path: Path) -> None:
    seen = [prompt.data["puzzle"] for prompt in Sudoku9x9(**SMALL).prompts("train")[:20]]
    file = tmp_path / "puzzles.csv"
    file.write_text("Puzzle,Solution\n" + "".join(f"{puzzle.replace('0', '.')},\n" for puzzle in seen))
    task = Sudoku9x9(data=str(file), **SMALL)
    assert [prompt.data["puzzle"] for prompt in task.prompts("test")] == seen
    theirs = {solutions(puzzle)[0] for puzzle in seen}
    assert not {solutions(prompt.data["puzzle"])[0] for prompt in task.prompts("train")} & theirs
    assert theirs & {solutions(prompt.data["puzzle"])[0] for prompt in Sudoku9x9(**SMALL).prompts("train")}


@pytest.mark.parametrize(("puzzle", "problem"), [
    (PUZZLE[:80], "must be a string of 81 digits"), (PUZZLE[:80] + "x", "must be a string of 81 digits"),
    (PUZZLE[:80] + "３", "must be a string of 81 digits"), ("55" + PUZZLE[2:], "at least one solution"),
    (SOLUTION, "must have a blank"), ("", "must be a string"),
    # 1 to 8 in the first row and a 9 below the gap: no solution, which a search finds at once.
    ("123456780" + "0" * 8 + "9" + "0" * 63, "at least one solution"),
])
def test_bad_rows_name_their_line(tmp_path: Path, puzzle: str, problem: str) -> None:
    file = tmp_path / "puzzles.csv"
    file.write_text(f"Puzzle,Solution\n{PUZZLE},{SOLUTION}\n{puzzle},\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"puzzles\.csv:3: Puzzle={puzzle}: .*{problem}"):
        Sudoku9x9(data=str(file)).prompts("test")


def test_a_row_that_takes_too_long_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A puzzle made against searches like this one; the cap is lowered so that the test is quick."""
    monkeypatch.setattr(sudoku9, "MAX_STEPS", 10_000)
    slow = "000005080000601043000000000010500000000106000300000005530000061000000004000000000"
    file = tmp_path / "puzzles.csv"
    file.write_text(f"Puzzle\n{slow}\n")
    with pytest.raises(UserError, match=rf"puzzles\.csv:2: Puzzle={slow}: must be solvable within 10,000 steps"):
        Sudoku9x9(data=str(file)).prompts("test")
