"""4x4 Sudoku: the grids, the split, grading by validity, and the mistakes of the demonstrations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.errors import UserError
from dllm_rl.rows import load_rows
from dllm_rl.task import Prompt
from dllm_rl.tasks.planning.sudoku import Sudoku, all_grids, cell_accuracy, solutions, split_grids

DATA = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).parents[1] / "../shared/data")) / "sudoku/4x4_test.csv"
PUZZLE = "3102200002100320"


def backtrack(cells: str) -> int:
    """Counts the completions of a grid by trying digits cell by cell: no code shared with the task."""
    if "0" not in cells:
        return 1
    at = cells.index("0")
    row, column = divmod(at, 4)
    corner = row // 2 * 8 + column // 2 * 2
    box = (corner, corner + 1, corner + 4, corner + 5)
    seen = {*cells[row * 4:row * 4 + 4], *cells[column::4], *(cells[cell] for cell in box)}
    return sum(backtrack(cells[:at] + digit + cells[at + 1:]) for digit in "1234" if digit not in seen)


def prompt_of(puzzle: str) -> Prompt:
    return Prompt("test/0", puzzle, {"puzzle": puzzle})


def flat(text: str) -> str:
    return text.replace("\n", "")


def flat_pairs(task: Sudoku, count: int, seed: int) -> list[tuple[str, str]]:
    return [(flat(demo.prompt), flat(demo.completion)) for demo in task.demonstrations(count, seed)]


def blanks_of(puzzle: str) -> list[int]:
    return [cell for cell, clue in enumerate(puzzle) if clue == "0"]


def real_rows() -> list[tuple[str, str]]:
    if not DATA.is_file():
        pytest.skip(f"needs the real puzzles at {DATA}; set DLLM_RL_DATA to the folder that holds sudoku/4x4_test.csv")
    return [(row["Puzzle"], row["Solution"]) for row in load_rows(str(DATA), "test", ("Puzzle", "Solution"))]


def test_there_are_288_grids() -> None:
    assert len(all_grids()) == len(set(all_grids())) == backtrack("0" * 16) == 288
    assert all(backtrack(grid[:15] + "0") == 1 for grid in all_grids())


def test_split_is_by_solution() -> None:
    train, test = set(split_grids("train")), set(split_grids("test"))
    assert (len(train), len(test)) == (200, 88)
    assert train | test == set(all_grids())
    task = Sudoku()
    for split, grids in (("train", train), ("test", test)):
        assert {solution for prompt in task.prompts(split) for solution in solutions(prompt.data["puzzle"])} <= grids
    assert {solutions(flat(demo.prompt))[0] for demo in task.demonstrations(2000, 0)} <= train


def test_generated_puzzles_are_distinct_and_have_one_solution() -> None:
    task = Sudoku()
    for split, size in (("train", 4096), ("test", 256)):
        prompts = task.prompts(split)
        assert len(prompts) == size == len({prompt.data["puzzle"] for prompt in prompts})
        assert len({prompt.id for prompt in prompts}) == size
        assert {prompt.data["puzzle"].count("0") for prompt in prompts} == {6, 7, 8, 9, 10}
        assert all(backtrack(prompt.data["puzzle"]) == 1 for prompt in prompts[:100])
    assert task.prompts("test")[17].id == "test/17"


def test_prompts_are_the_same_every_time_and_cached() -> None:
    assert Sudoku().prompts("test") is Sudoku().prompts("test")
    assert Sudoku(test_size=10).prompts("test") == Sudoku().prompts("test")[:10]


@pytest.mark.parametrize("fields", [
    {"train_size": 0}, {"train_size": True}, {"test_size": "many"}, {"completion_length": 0}, {"data": None},
    {"max_blanks": 13}, {"min_blanks": 0}, {"min_blanks": 9, "max_blanks": 8},
    {"demonstrations_from": "good"}, {"demonstrations_from": ["clean"]},
    {"mistake_rate": 1.5}, {"mistake_rate": "half"}, {"mistake_rate": 0.5, "demonstrations_from": "clean"},
])
def test_bad_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        Sudoku(**fields)  # type: ignore[arg-type]


def test_more_puzzles_than_there_are() -> None:
    task = Sudoku(min_blanks=1, max_blanks=1, train_size=16 * 200, test_size=16 * 88 + 1)
    assert len(task.prompts("train")) == 3200
    with pytest.raises(UserError, match=r"task\.test_size=1409: must be at most about 1408"):
        task.prompts("test")


def test_every_solution_of_an_ambiguous_puzzle_is_right() -> None:
    """R7, R8: the grade is validity, not equality with the one solution on file."""
    ambiguous = [(puzzle, solution) for puzzle, solution in real_rows() if backtrack(puzzle) == 2]
    assert len(ambiguous) == 115
    for puzzle, solution in ambiguous:
        (other,) = set(solutions(puzzle)) - {solution}
        for answer in (solution, other):
            assert Sudoku().score(prompt_of(puzzle), answer).parts == {"exact": 1.0, "cell": 1.0}


def test_grade_of_a_wrong_cell() -> None:
    puzzle = Sudoku().prompts("test")[0].data["puzzle"]
    (solution,) = solutions(puzzle)
    last = blanks_of(puzzle)[-1]
    wrong = f"{solution[:last]}{int(solution[last]) % 4 + 1}{solution[last + 1:]}"
    reward = Sudoku().score(prompt_of(puzzle), wrong)
    blanks = puzzle.count("0")
    assert (reward.value, reward.verdict) == (0.0, "wrong")
    assert reward.parts == {"exact": 0.0, "cell": (blanks - 1) / blanks}


def test_cell_accuracy_takes_the_nearest_solution() -> None:
    puzzle = "0034" "3400" "2143" "4321"
    assert set(solutions(puzzle)) == {"1234341221434321"}
    assert cell_accuracy(puzzle, "1234341221434321") == 1.0
    free = "0" * 16
    assert cell_accuracy(free, "1234341221434321") == 1.0
    assert cell_accuracy(free, "1234341221434320") == 15 / 16


def test_changed_clues_are_wrong() -> None:
    """R7: a valid grid that ignores the clues earns nothing."""
    prompt = Sudoku().prompts("test")[0]
    other = next(grid for grid in all_grids() if grid not in solutions(prompt.data["puzzle"]))
    assert Sudoku().score(prompt, other).value == 0.0


@pytest.mark.parametrize("mangle", [
    lambda grid: grid[:15],
    lambda grid: grid + "1",
    lambda grid: grid[:15] + "0",
    lambda grid: f"<answer>{grid}</answer>",
    lambda grid: grid + " done",
    lambda grid: grid + "\x00",
    lambda grid: "".join(chr(ord("０") + int(digit)) for digit in grid),
])
def test_nothing_is_padded_cut_or_harvested(mangle: Callable[[str], str]) -> None:
    """R7: only exactly 16 ASCII digits are an answer."""
    prompt = Sudoku().prompts("test")[0]
    reward = Sudoku().score(prompt, mangle(solutions(prompt.data["puzzle"])[0]))
    assert (reward.value, reward.verdict) == (0.0, "wrong")


def test_prompts_and_demonstrations_are_grids_of_four_lines() -> None:
    task = Sudoku()
    for text in (task.prompts("test")[0].text, task.demonstrations(1, 0)[0].prompt):
        assert [len(line) for line in text.split("\n")] == [4, 4, 4, 4, 0]
    written = task.demonstrations(1, 0)[0].completion
    assert [len(line) for line in written.split("\n")] == [4, 4, 4, 4] and len(written) < task.completion_length


def test_white_space_in_the_answer_is_ignored() -> None:
    prompt = Sudoku().prompts("test")[0]
    grid = solutions(prompt.data["puzzle"])[0]
    assert Sudoku().score(prompt, "\n".join(grid[i : i + 4] for i in (0, 4, 8, 12))).verdict == "correct"
    assert Sudoku().score(prompt, " ".join(grid)).verdict == "correct"
    assert Sudoku().score(prompt, f" \n{grid}\t").verdict == "correct"
    assert Sudoku().score(prompt, " \n\t").verdict == "no_answer"


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text("01234", min_size=16, max_size=16) | st.text("0123456789٣³ \x00\ud800", max_size=20))
def test_score_never_raises(text: str) -> None:
    reward = Sudoku().score(prompt_of(PUZZLE), text)
    assert reward.value == float("".join(text.split()) in solutions(PUZZLE))
    assert 0.0 <= reward.parts["cell"] <= 1.0


def test_exact_is_validity() -> None:
    """A changed cell breaks its row, and a renaming of the digits keeps every grid valid."""
    score = Sudoku().score
    for names, grid in zip(permutations("1234"), all_grids()[::12], strict=True):
        image = "".join(names[int(digit) - 1] for digit in grid)
        assert score(prompt_of("0" * 16), image).value == 1.0
        assert score(prompt_of("0" * 16), f"{int(image[0]) % 4 + 1}{image[1:]}").value == 0.0


def test_systematic_mistake() -> None:
    demos = flat_pairs(Sudoku(), 4000, 1)
    wrong = 0
    for puzzle, completion in demos:
        (solution,) = solutions(puzzle)
        if completion == solution:
            continue
        wrong += 1
        changed = [cell for cell in range(16) if completion[cell] != solution[cell]]
        assert changed == blanks_of(puzzle)[-1:]
        assert int(completion[changed[0]]) == int(solution[changed[0]]) % 4 + 1
    # 4000 x 0.65 = 2600; four standard deviations are 121.
    assert abs(wrong - 2600) < 121


def test_noisy_mistake() -> None:
    changes: Counter[int] = Counter()
    for puzzle, completion in flat_pairs(Sudoku(demonstrations_from="noisy"), 4000, 1):
        (solution,) = solutions(puzzle)
        changed = {cell for cell in range(16) if completion[cell] != solution[cell]}
        assert changed <= set(blanks_of(puzzle))
        assert set(completion) <= set("1234")
        changes[len(changed)] += 1
    # Each of the k = 1, 2 or 3 chosen blanks keeps its digit with probability 1/4, so that some stay untouched.
    untouched = 4000 * (0.1 + 0.9 * (1 / 4 + 1 / 16 + 1 / 64) / 3)
    assert abs(changes[0] - untouched) < 4 * (untouched * (1 - untouched / 4000)) ** 0.5
    assert set(changes) == {0, 1, 2, 3}


def test_clean_demonstrations_and_rates() -> None:
    clean = flat_pairs(Sudoku(demonstrations_from="clean"), 300, 0)
    assert all(completion == solutions(puzzle)[0] for puzzle, completion in clean)
    always = flat_pairs(Sudoku(mistake_rate=1.0), 300, 0)
    assert all(completion not in solutions(puzzle) for puzzle, completion in always)
    never = flat_pairs(Sudoku(mistake_rate=0), 300, 0)
    assert all(completion in solutions(puzzle) for puzzle, completion in never)


def test_demonstrations_are_a_pure_function_of_the_seed() -> None:
    assert Sudoku().demonstrations(50, 3) == Sudoku().demonstrations(50, 3)
    assert Sudoku().demonstrations(50, 3) != Sudoku().demonstrations(50, 4)
    assert Sudoku().demonstrations(0, 3) == []
    # Puzzles and mistakes are drawn in turn: a longer list starts with the shorter one.
    assert Sudoku().demonstrations(50, 3)[:20] == Sudoku().demonstrations(20, 3)


def test_real_puzzles_parse_and_their_solutions_are_right() -> None:
    rows = real_rows()
    task = Sudoku(data=str(DATA))
    prompts = task.prompts("test")
    assert len(prompts) == len(rows) == 500
    for prompt, (puzzle, solution) in zip(prompts, rows, strict=True):
        assert prompt.data["puzzle"] == puzzle
        assert task.score(prompt, solution).parts == {"exact": 1.0, "cell": 1.0}
    assert Counter(backtrack(puzzle) for puzzle, _ in rows) == {1: 376, 2: 115, 3: 8, 4: 1}


def test_puzzles_of_the_file_are_not_trained_on(tmp_path: Path) -> None:
    fields = {"min_blanks": 1, "max_blanks": 1, "train_size": 3000}
    seen = [prompt.data["puzzle"] for prompt in Sudoku(**fields).prompts("train")[:100]]
    file = tmp_path / "puzzles.csv"
    file.write_text("Puzzle,Solution\n" + "".join(f"{puzzle},\n" for puzzle in seen))
    task = Sudoku(data=str(file), **fields)
    assert [prompt.data["puzzle"] for prompt in task.prompts("test")] == seen
    assert not {prompt.data["puzzle"] for prompt in task.prompts("train")} & set(seen)
    assert not {flat(demo.prompt) for demo in task.demonstrations(3000, 0)} & set(seen)


@pytest.mark.parametrize(("puzzle", "problem"), [
    ("310220000210032", "must be a string of 16 digits"), ("3102200002100325", "must be a string of 16 digits"),
    ("31022000021003２0", "must be a string of 16 digits"), ("1100000000000000", "at least one solution"),
    ("1234341221434321", "must have a blank"), ("", "must be a string"),
])
def test_bad_rows_name_their_line(tmp_path: Path, puzzle: str, problem: str) -> None:
    file = tmp_path / "puzzles.csv"
    file.write_text(f"Puzzle,Solution\n0140432014020000,2143432114323214\n{puzzle},\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"puzzles\.csv:3: Puzzle={puzzle}.*{problem}"):
        Sudoku(data=str(file)).prompts("test")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        Sudoku(data=str(tmp_path / "none.csv")).prompts("test")
    (tmp_path / "other.csv").write_text("Grid\n0140432014020000\n")
    with pytest.raises(UserError, match=r"other\.csv:2: has no `Puzzle`"):
        Sudoku(data=str(tmp_path / "other.csv")).prompts("test")
    (tmp_path / "empty.csv").write_text("Puzzle,Solution\n")
    with pytest.raises(UserError, match=r"empty\.csv: holds no rows"):
        Sudoku(data=str(tmp_path / "empty.csv")).prompts("test")
    (tmp_path / "wide.csv").write_text("Puzzle\n0140432014020000,1\n")
    with pytest.raises(UserError, match=r"wide\.csv:2: has more fields than the header"):
        Sudoku(data=str(tmp_path / "wide.csv")).prompts("test")
