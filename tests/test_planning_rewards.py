"""The rewards of the planning tasks against the defects found in published ones, and against enumeration.

R4 to R8 and R12 are numbered as in a survey of reward code of other projects; each test says what was wrong and where.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.errors import UserError
from dllm_rl.task import Prompt, Task
from dllm_rl.tasks.answers import answer_block, tagged
from dllm_rl.tasks.planning.countdown import Countdown
from dllm_rl.tasks.planning.known_grades import countdown_grades, solve, sudoku_grades
from dllm_rl.tasks.planning.published_prompts import SPG_EXAMPLES
from dllm_rl.tasks.planning.sudoku import Sudoku, split_grids
from dllm_rl.tasks.planning.sudoku9 import Sudoku9x9

DATA = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).parents[1] / "../shared/data"))
COUNTDOWN = Countdown(protocol="d1", completion_length=256)
SUDOKU = Sudoku(protocol="d1", completion_length=256)
PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
NINE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
TASKS: tuple[tuple[Task, Prompt], ...] = (
    *((task, Prompt("test/0", "", {"numbers": [30, 100, 93], "target": 23})) for task in (Countdown(), COUNTDOWN)),
    *((task, Prompt("test/0", "", {"puzzle": PUZZLE}))
      for task in (Sudoku(), SUDOKU, Sudoku(protocol="spg", completion_length=256))),
    *((task, Prompt("test/0", "", {"puzzle": NINE}))
      for task in (Sudoku9x9(), Sudoku9x9(protocol="rules", completion_length=256))),
)


def real_file(name: str) -> str:
    if not (DATA / name).is_file():
        pytest.skip(f"needs the real rows at {DATA / name}; set DLLM_RL_DATA to the folder that holds {name}")
    return str(DATA / name)


def countdown(expression: str, numbers: list[int], target: int) -> float:
    """The reward under d1's protocol, which is where the defects were."""
    return COUNTDOWN.score(Prompt("test/0", "", {"numbers": numbers, "target": target}), tagged(expression)).value


def sudoku(answer: str, puzzle: str = PUZZLE) -> tuple[float, float]:
    parts = SUDOKU.score(Prompt("test/0", "", {"puzzle": puzzle}), tagged(answer)).parts
    return parts["exact"], parts["cell"]


@pytest.mark.parametrize(("expression", "numbers", "target"), [
    ("2**3", [2, 3], 8), ("7//2", [2, 7], 3), ("2.5*2", [2, 2, 5], 5), ("-2+5", [2, 5], 3), ("5--2", [2, 5], 7),
    ("9**9**9", [9, 9, 9], 1), ("1 2", [1, 2], 12), ("0x10+1", [0, 1, 10], 17), ("1_0+2", [1, 2, 10], 12),
    ("abs(2-5)", [2, 5], 3), ("x*2", [2], 2), ("1e1+2", [1, 1, 2], 12), ("٢+٣", [2, 3], 5), ("2+3\x00", [2, 3], 5),
    ("(" * 10_000 + "2+3" + ")" * 10_000, [2, 3], 5), ("1*" * 500_000 + "1", [1], 1), ("9" * 5000, [9], 9),
])
def test_R4_only_plain_integers_and_four_operations(expression: str, numbers: list[int], target: int) -> None:
    """R4: the Countdown reward of d1 (diffu-grpo/reward_func.py) lets `eval` have powers, floor division, decimals (2.5
    counts as a 2 and a 5) and signs, and hangs on 9**9**9."""
    assert countdown(expression, numbers, target) == 0.0


def test_R4_arithmetic_is_exact() -> None:
    """R4: floats call 1/3*3 right by luck and miss 8/(3-8/3) = 24, which is 23.999999999999989."""
    assert eval("8/(3-8/3)") != 24
    assert countdown("8/(3-8/3)", [3, 3, 8, 8], 24) == 1.0
    assert countdown("9007199254740993-1-1", [9007199254740993, 1, 1], 9007199254740992) == 0.0


@pytest.mark.parametrize("text", ["", "no idea", "<answer></answer>", "<answer>\n</answer>", "<answer>x</answer>",
                                  "<reasoning>\n2+3\n</reasoning>\n<answer>\n2*3\n</answer>"])
def test_R5_no_reward_for_a_format(text: str) -> None:
    """R5: d1 and BGPO's code give 0.1 for any text in an <answer> block, a point at which training can collapse."""
    assert COUNTDOWN.score(Prompt("test/0", "", {"numbers": [2, 3], "target": 5}), text).value == 0.0


@pytest.mark.parametrize("expression", ["98", "100-2", "2+96", "100-2+0", "100-2-2+2", "\\boxed{98}", "98*100/100"])
def test_R6_every_number_exactly_once(expression: str) -> None:
    """R6: ant-research/Drift only checks that the numbers used are among those given, and with a target given as text
    not even that: the bare target scores 1."""
    assert countdown(expression, [100, 2, 5], 98) == 0.0
    assert countdown("(100-2)*5", [100, 2, 5], 490) == 1.0


@pytest.mark.parametrize("answer", [
    SOLUTION[:15], SOLUTION + "1", SOLUTION + SOLUTION, f"The grid is {SOLUTION}", f"{SOLUTION}.", " | ".join(SOLUTION),
    f"R1: {SOLUTION}", "".join(chr(0x660 + int(digit)) for digit in SOLUTION), SOLUTION.replace("1", "¹"),
])
def test_R7_nothing_is_padded_cut_or_harvested(answer: str) -> None:
    """R7: the Sudoku reward of d1 picks the digits out of any text in the block, pads them with zeros or cuts at 16."""
    assert sudoku(answer) == (0.0, 0.0)
    assert sudoku(f" {SOLUTION[:8]}\n{SOLUTION[8:]} ") == (1.0, 1.0)


def test_R7_changed_clues_are_wrong() -> None:
    """R7: d1's reward compares the blanks only, so a grid that overwrites clues can score 1."""
    changed = "2" + SOLUTION[1:]
    assert PUZZLE[0] == "3" and sudoku(changed)[0] == 0.0
    renamed = SOLUTION.translate(str.maketrans("1234", "2143"))
    assert sudoku(renamed, "0" * 16) == (1.0, 1.0) and sudoku(renamed)[0] == 0.0


def test_R8_every_solution_is_right_and_both_rates_are_reported() -> None:
    """R8: 124 of d1's 500 test puzzles have several solutions, and its reward accepts one of them; the fraction of right
    blanks is reported as accuracy."""
    puzzle = "0034" "3412" "0043" "4321"
    for answer in ("1234341221434321", "2134341212434321"):
        assert is_grid(answer) and sudoku(answer, puzzle) == (1.0, 1.0)
    assert sudoku("1234341212434321", puzzle) == (0.0, 2 / 4)
    assert sudoku("1434341221434321", puzzle) == (0.0, 3 / 4)


@pytest.mark.parametrize("expression", ["3*4=12", "12=3*4", "3*4==12", "3*4 = 12", "x=3*4", "3*4=", "=3*4"])
def test_R12_an_equals_sign_is_wrong(expression: str) -> None:
    """R12: d1's evaluation reads what stands left of the first equals sign; the prompt forbids one, so it is wrong."""
    assert countdown(expression, [3, 4], 12) == 0.0
    assert countdown("3*4", [3, 4], 12) == 1.0


def is_grid(cells: str) -> bool:
    """Whether all rows, columns and boxes of a 4x4 grid hold 1 to 4: no code shared with the task."""
    rows = [cells[start:start + 4] for start in (0, 4, 8, 12)]
    columns = ["".join(row[column] for row in rows) for column in range(4)]
    boxes = [rows[top][left:left + 2] + rows[top + 1][left:left + 2] for top in (0, 2) for left in (0, 2)]
    return all(sorted(unit) == list("1234") for unit in (*rows, *columns, *boxes))


def keeps(puzzle: str, grid: str) -> bool:
    return all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))


def all_grids() -> list[str]:
    rows = ["".join(row) for row in permutations("1234")]
    return [grid for grid in map("".join, product(rows, repeat=4)) if is_grid(grid)]


@pytest.mark.parametrize("protocol", ["plain", "d1"])
def test_all_288_grids_on_all_500_real_puzzles(protocol: str) -> None:
    task = Sudoku(protocol=protocol, completion_length=256, data=real_file("sudoku/4x4_test.csv"))
    grids, accepted, answers = all_grids(), [], 0
    assert len(grids) == 288 and len(task.prompts("test")) == 500
    for prompt in task.prompts("test"):
        values = [task.score(prompt, grid if protocol == "plain" else tagged(grid)).value for grid in grids]
        assert values == [float(keeps(prompt.data["puzzle"], grid)) for grid in grids]
        accepted.append(sum(values))
        answers += len(values)
    assert answers == 144_000
    assert [accepted.count(count) for count in (1, 2, 3, 4)] == [376, 115, 8, 1]


def test_all_65536_fillings_of_an_ambiguous_puzzle() -> None:
    blanks = [0, 1, 2, 3, 8, 9, 10, 11]
    puzzle = "0000" "3412" "0000" "4321"
    prompt = Prompt("test/0", "", {"puzzle": puzzle})
    accepted = 0
    for digits in product("1234", repeat=8):
        cells = list(puzzle)
        for cell, digit in zip(blanks, digits, strict=True):
            cells[cell] = digit
        grid = "".join(cells)
        value = Sudoku().score(prompt, grid).value
        assert value == float(is_grid(grid))
        accepted += int(value)
    assert accepted == sum(keeps(puzzle, grid) for grid in all_grids()) > 1


def expressions(terms: list[tuple[Fraction | None, str]]) -> Iterator[tuple[Fraction | None, str]]:
    """Every bracketed expression of all terms with its value, None for a division by zero."""
    if len(terms) == 1:
        yield terms[0]
    for i, j in permutations(range(len(terms)), 2):
        (a, left), (b, right) = terms[i], terms[j]
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for sign in "+-*/":
            value = None
            if a is not None and b is not None and not (sign == "/" and b == 0):
                value = {"+": a + b, "-": a - b, "*": a * b}.get(sign) if sign != "/" else a / b
            yield from expressions([*rest, (value, f"({left}{sign}{right})")])


def test_every_expression_of_every_real_problem() -> None:
    """256 problems: each expression scores 1 exactly if enumeration with fractions says that it hits the target."""
    task = Countdown(data=real_file("countdown/cd3_test.jsonl"))
    assert len(task.prompts("test")) == 256
    graded = 0
    for prompt in task.prompts("test"):
        numbers, target = prompt.data["numbers"], prompt.data["target"]
        values = [(value, task.score(prompt, text).value)
                  for value, text in expressions([(Fraction(number), str(number)) for number in numbers])]
        assert all(reward == float(value == target) for value, reward in values)
        assert any(reward == 1 for _, reward in values), f"{numbers} cannot make {target}"
        graded += len(values)
    assert graded == 256 * 6 * 4 * 2 * 4


def test_perturbed_solutions_of_every_real_problem() -> None:
    """A number changed, dropped, repeated or joined to its neighbour: never right, whatever the value."""
    task = Countdown(data=real_file("countdown/cd3_test.jsonl"), protocol="d1", completion_length=256)
    for prompt in task.prompts("test"):
        numbers, target = prompt.data["numbers"], prompt.data["target"]
        terms: list[tuple[Fraction | None, str]] = [(Fraction(number), str(number)) for number in numbers]
        right = next(text for value, text in expressions(terms) if value == target)
        assert task.score(prompt, tagged(right)).verdict == "correct"
        changed = re.sub("[0-9]+", lambda match: str(int(match[0]) + 1), right, count=1)
        for wrong in (changed, f"{right}+0", f"{right}={target}", f"{right}*1", f"-{right}", right[:-1], str(target),
                      right.replace("+", "").replace("-", "").replace("*", "").replace("/", "")):
            assert task.score(prompt, tagged(wrong)).value == 0.0, wrong


def test_known_grades_hold() -> None:
    """Every right completion scores 1 and every wrong one 0, for each row of the real files and each protocol."""
    for protocol in ("plain", "d1"):
        rows = list(countdown_grades(real_file("countdown/cd3_test.jsonl"), protocol))
        task: Task = Countdown(protocol=protocol, completion_length=256)
        assert len(rows) == 256
        assert all((task.score(p, right).value, task.score(p, wrong).value) == (1, 0) for p, right, wrong in rows)
    for protocol in ("plain", "d1", "spg"):
        rows = list(sudoku_grades(real_file("sudoku/4x4_test.csv"), protocol))
        task = Sudoku(protocol=protocol, completion_length=256)
        assert len(rows) == 500
        assert all((task.score(p, right).value, task.score(p, wrong).value) == (1, 0) for p, right, wrong in rows)
    assert solve([1, 1], 7) is None and solve([2, 0], 0) is not None


@pytest.mark.parametrize("count", [4, 5])
def test_generated_problems_with_more_numbers(count: int) -> None:
    """Distinct, disjoint between the splits, and solvable: the demonstration's expression is found by enumeration too."""
    task = Countdown(numbers=count, completion_length=256, protocol="d1", train_size=1000)
    splits = [{task.fingerprint(prompt) for prompt in task.prompts(split)} for split in ("train", "test")]
    assert [len(keys) for keys in splits] == [1000, 256] and not splits[0] & splits[1]
    for prompt in task.prompts("test")[:5 if count == 4 else 2]:
        terms: list[tuple[Fraction | None, str]] = [(Fraction(n), str(n)) for n in prompt.data["numbers"]]
        right = next(text for value, text in expressions(terms) if value == prompt.data["target"])
        assert task.score(prompt, tagged(right)).value == 1.0
    for text, completion in task.demonstrations(100, 0):
        numbers = [int(number) for number in text.split("numbers [")[1].split("]")[0].split(",")]
        target = int(text.split("exactly ")[1].split(".")[0])
        assert task.score(Prompt("", "", {"numbers": numbers, "target": target}), completion).verdict == "correct"


def test_d1_prompts() -> None:
    """Only the words differ between protocols: the same problems in the same order, with the same fingerprints."""
    for plain, worded in ((Countdown(), COUNTDOWN), (Sudoku(), SUDOKU)):
        for split in ("train", "test"):
            pairs = list(zip(plain.prompts(split), worded.prompts(split), strict=True))
            assert all(a.data == b.data and a.id == b.id for a, b in pairs)
            assert [plain.fingerprint(a) for a, _ in pairs] == [worded.fingerprint(b) for _, b in pairs]
    text = COUNTDOWN.prompts("test")[0].text
    numbers, target = (COUNTDOWN.prompts("test")[0].data[key] for key in ("numbers", "target"))
    head = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\nUsing only the"
    assert text.startswith(head)
    assert f"Using only the numbers {numbers}, create an arithmetic expression that evaluates to exactly {target}." in text
    prompt = SUDOKU.prompts("test")[0]
    assert prompt.text.endswith(f"</answer>\n\n\nSolve the following Sudoku puzzle: {prompt.data['puzzle']}\n")
    assert all(rule in prompt.text for rule in ("digits 1-4", "16-character", "Each 2x2 box"))


def test_fingerprints_do_not_depend_on_the_order_of_the_numbers() -> None:
    prompts = [Prompt("a", "", {"numbers": numbers, "target": 6}) for numbers in ([1, 2, 3], [3, 1, 2], [1, 2, 2])]
    first, second, other = map(COUNTDOWN.fingerprint, prompts)
    assert first == second != other


def test_the_examples_of_spg_give_nothing_away() -> None:
    """The three examples are right, and no test puzzle has one of their solutions (one is among the 88 test grids)."""
    task = Sudoku(protocol="spg", completion_length=256)
    given_away = {example.solution for example in SPG_EXAMPLES}
    assert all(Sudoku().score(Prompt("", "", {"puzzle": e.puzzle}), e.solution).value == 1.0 for e in SPG_EXAMPLES)
    assert len(given_away & set(split_grids("test"))) == 1
    for prompt in task.prompts("test"):
        assert all(task.score(prompt, tagged(solution)).value == 0.0 for solution in given_away)
        assert all(example.puzzle in prompt.text for example in SPG_EXAMPLES)
    assert not {example.puzzle for example in SPG_EXAMPLES} & {prompt.data["puzzle"] for prompt in task.prompts("train")}
    assert prompt.text.endswith(f"\n\nQuestion: Solve the following Sudoku puzzle: {prompt.data['puzzle']}\nAnswer:\n")


@pytest.mark.parametrize(("text", "block"), [
    ("<answer>1</answer>", "1"), ("<answer>\n 1 2\n</answer> so", "1 2"), ("<answer>1</answer><answer>2</answer>", "2"),
    ("<answer>1<answer>2</answer>", "2"), ("<answer>1</answer> or <answer>2", "1"), ("<answer>1", None),
    ("1</answer>", None), ("</answer>1<answer>", None), ("1", None), ("", None),
    ("<Answer>1</Answer>", None), ("<answer></answer>", ""),
])
def test_the_last_complete_block_counts(text: str, block: str | None) -> None:
    assert answer_block(text) == block


def test_without_a_block_there_is_no_answer() -> None:
    for task, prompt in TASKS:
        if task.protocol != "plain":
            assert task.score(prompt, "30+93-100").verdict == "no_answer"
            assert task.score(prompt, SOLUTION).verdict == "no_answer"


@pytest.mark.parametrize("fields", [{"protocol": "d2"}, {"protocol": "d1"}, {"protocol": "d1", "completion_length": 31}])
def test_protocols_and_their_lengths_are_checked(fields: dict[str, object]) -> None:
    """The default length leaves no room for the block of `d1`."""
    for task in (Countdown, Sudoku):
        with pytest.raises(UserError, match=r"task\.(protocol|completion_length)=.*: must be (plain or d1|an integer >= 3)"):
            task(**fields)  # type: ignore[arg-type]


HOSTILE = ("9**9**9", "(" * 10_000 + ")" * 10_000, "1" * 10**6, "<answer>" * 10**5, "</answer>" * 10**5, "\x00", "\ud800",
           "١٢٣", "<answer>١٢٣</answer>", "<answer>" + "9**" * 10_000 + "9</answer>", "[" * 10**5, "1+" * 10**5 + "1",
           "<answer>" + "(" * 10_000 + "</answer>", "<answer>" + "1" * 10**6 + "</answer>", "NaN", "inf", "1e999")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_earn_nothing(text: str) -> None:
    for task, prompt in TASKS:
        reward = task.score(prompt, text)
        assert reward.value == 0.0 and reward.verdict in ("wrong", "no_answer")


ANSWERS = st.text() | st.text("0123456789+-*/() \n", max_size=90) | st.text("12٣³=._eE'\x00\ud800３", max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TASKS), ANSWERS, st.booleans())
def test_no_text_makes_a_grader_fail(graded: tuple[Task, Prompt], text: str, in_block: bool) -> None:
    task, prompt = graded
    reward = task.score(prompt, tagged(text) if in_block else text)
    assert reward.value in (0.0, 1.0) and (reward.value == 1.0) == (reward.verdict == "correct")
    assert all(0.0 <= part <= 1.0 for part in reward.parts.values())
