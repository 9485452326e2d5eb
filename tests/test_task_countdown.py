"""Countdown: the grader against tricks, the generator, and the real problems."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.errors import UserError
from dllm_rl.rows import load_rows
from dllm_rl.task import Prompt
from dllm_rl.tasks.planning.countdown import Countdown, longest_expression, parse, value_of

DATA = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).parents[1] / "../shared/data")) / "countdown/cd3_test.jsonl"


def problem(numbers: list[int], target: int) -> Prompt:
    return Prompt("test/0", "", {"numbers": numbers, "target": target})


def value(text: str) -> Fraction | None:
    tree = parse(text)
    return None if tree is None else value_of(tree)


def solved(terms: list[tuple[Fraction, str]], target: int) -> Iterator[str]:
    """Every fully bracketed expression of all terms that hits the target: no code shared with the task."""
    if len(terms) == 1 and terms[0][0] == target:
        yield terms[0][1]
    for i, (a, left) in enumerate(terms):
        for j, (b, right) in enumerate(terms):
            if i == j:
                continue
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for sign, result in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a / b if b else None)):
                if result is not None:
                    yield from solved([*rest, (result, f"({left}{sign}{right})")], target)


@pytest.mark.parametrize("text", ["30+93-100", "(30+93)-100", "30-(100-93)", " 30 + 93 - 100\n", "((30))+93-100"])
def test_right_expressions(text: str) -> None:
    reward = Countdown().score(problem([30, 100, 93], 23), text)
    assert (reward.value, reward.verdict, reward.parts) == (1.0, "correct", {"valid": 1.0})


def test_arithmetic_is_exact() -> None:
    assert Countdown().score(problem([1, 3, 3], 1), "1/3*3").value == 1.0
    assert Countdown().score(problem([8, 3, 3, 8], 24), "8/(3-8/3)").value == 1.0
    assert value("1/3+1/3+1/3") == 1
    assert value("7/2") == Fraction(7, 2)
    assert value("100-2*3-4/2") == 92


@pytest.mark.parametrize("text", [
    "23", "30+93", "100-93+30-14", "30+93-100+0", "30+93-100=23", "123-100", "3093-100", "30 93", "30+100+93",
    "30+30+93-100-30", "x", "no idea", "<answer>30+93-100</answer>", "\\boxed{30+93-100}", "30+93-100 30+93-100",
])
def test_wrong_expressions(text: str) -> None:
    """R5, R6: neither a format, nor a subset of the numbers, nor the bare target earns anything."""
    reward = Countdown().score(problem([30, 100, 93], 23), text)
    assert (reward.value, reward.verdict) == (0.0, "wrong")


def test_a_right_form_with_a_wrong_value_is_only_valid() -> None:
    reward = Countdown().score(problem([30, 100, 93], 23), "30+93+100")
    assert (reward.value, reward.verdict, reward.parts) == (0.0, "wrong", {"valid": 1.0})
    assert Countdown().score(problem([1, 2, 2], 1), "1/(2-2)").value == 0.0
    assert Countdown().score(problem([1, 2, 2], 1), " \n").verdict == "no_answer"


@pytest.mark.parametrize("text", [
    "9**9**9", "2**2", "7//2", "2.5+1", "1e3", "0x10", "1_0", "1j", "-3+5", "+3+5", "3+-5", "3--5", "(-3)", "~3",
    "not 3", "3 if 3 else 3", "3<5", "3,5", "(3,5)", "()", "[3]", "{3}", "'3'", "f'{3}'", "True", "...", "a:=3",
    "lambda:3", "abs(3)", "3(5)", "(3)(5)", "__import__('os')", "3;5", "3#5", "3+5\\", "3+5\n+1", "3+\t5", "03+5",
    "３+５", "٣+٥", "³+5", "3×5", "3−5", "3+5\x00", "\x00", "\ud800", "", "3+", "*3", ")3(", "(3", "3)",
])
def test_everything_else_is_refused(text: str) -> None:
    """R4: powers, floor division, decimals, signs, names, calls and other scripts never count."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(text) is None


@pytest.mark.parametrize("text", [
    "9**9**9", "(" * 5000 + "1" + ")" * 5000, "(" * 99 + "1" + ")" * 99, "(" * 200, "1+" * 99 + "1", "9" * 200,
    "9*" * 99 + "9", "1" * 10**6, "-" * 10**6, "1/" * 10**6,
])
def test_hostile_texts_are_graded_at_once(text: str) -> None:
    """R4: nothing hangs the grader or exhausts the parser."""
    start = time.process_time()
    reward = Countdown().score(problem([9, 9, 9], 1), text)
    assert (reward.value, reward.verdict) == (0.0, "wrong")
    assert time.process_time() - start < 0.5


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("0123456789+-*/() ", max_size=40) | st.text("12+-*/().,_eE=x'\x00\ud800３\n", max_size=30))
def test_score_never_raises(text: str) -> None:
    assert Countdown().score(problem([1, 2, 12], 3), text).value in (0.0, 1.0)


def bracketed(operand: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(operand, st.sampled_from("+-*/"), operand).map(lambda parts: f"({''.join(parts)})")


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.integers(0, 99).map(str), bracketed, max_leaves=8))
def test_values_agree_with_python(text: str) -> None:
    """Python on fractions is the reference: every literal is wrapped before `eval`."""
    try:
        expected = eval(re.sub(r"([0-9]+)", r"Fraction(\1)", text))
    except ZeroDivisionError:
        expected = None
    assert value(text) == expected


@pytest.mark.parametrize(("numbers", "length"), [(2, 7), (3, 16), (4, 19), (6, 31)])
def test_demonstrations_are_right_and_fit(numbers: int, length: int) -> None:
    task = Countdown(numbers=numbers, completion_length=length)
    for text, expression in task.demonstrations(300, 0):
        given_numbers, target = text.split("=")
        prompt = problem([int(part) for part in given_numbers.split(",")], int(target))
        assert len(prompt.data["numbers"]) == numbers
        assert task.score(prompt, expression).value == 1.0
        assert len(expression) <= longest_expression(numbers) <= length


def test_demonstrations_use_every_operation() -> None:
    demos = Countdown().demonstrations(2000, 0)
    assert {sign for demo in demos for sign in "+-*/()" if sign in demo.completion} == set("+-*/()")


def test_demonstrations_are_a_pure_function_of_the_seed() -> None:
    assert Countdown().demonstrations(50, 3) == Countdown().demonstrations(50, 3)
    assert Countdown().demonstrations(50, 3) != Countdown().demonstrations(50, 4)
    assert Countdown().demonstrations(50, 3)[:20] == Countdown().demonstrations(20, 3)


def key(prompt: Prompt) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(prompt.data["numbers"])), prompt.data["target"]


def test_splits_are_disjoint_whatever_their_sizes() -> None:
    train = {key(prompt) for prompt in Countdown().prompts("train")}
    test = {key(prompt) for prompt in Countdown(test_size=3000).prompts("test")}
    assert (len(train), len(test)) == (4096, 3000)
    assert not train & test
    for text, _ in Countdown().demonstrations(3000, 0):
        numbers, target = text.split("=")
        assert (tuple(sorted(map(int, numbers.split(",")))), int(target)) not in test
    assert Countdown().prompts("test") == Countdown(test_size=3000).prompts("test")[:256]


def test_prompts() -> None:
    prompt = Countdown().prompts("test")[17]
    assert prompt.id == "test/17"
    assert prompt.text == f"{','.join(map(str, prompt.data['numbers']))}={prompt.data['target']}"
    assert Countdown().prompts("test") is Countdown().prompts("test")
    for prompt in Countdown().prompts("test")[:20]:
        terms = [(Fraction(number), str(number)) for number in prompt.data["numbers"]]
        assert any(solved(terms, prompt.data["target"]))


@pytest.mark.parametrize("fields", [
    {"numbers": 1}, {"numbers": 7}, {"completion_length": 12}, {"completion_length": 18, "numbers": 4},
    {"train_size": 0}, {"test_size": 2.5}, {"data": 3},
])
def test_bad_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        Countdown(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("row", "problem"), [
    ('{"input": "30,100"}', "has no `output`"), ('{"input": "30,x", "output": "23"}', "input=30,x: must be integers"),
    ('{"input": "", "output": "23"}', "input=: must be integers"), ("[1]", "must be a JSON object"),
    ('{"input": "1,2", "output": "2.5"}', "output=2.5: must be an integer"), ("{", "is not JSON"),
    ('{"input": "1,２", "output": "2"}', "must be integers"), ('{"input": "1,,2", "output": "2"}', "must be integers"),
])
def test_bad_rows_name_their_line(tmp_path: Path, row: str, problem: str) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(f'{{"input": "1,2,3", "output": 6}}\n\n{row}\n', encoding="utf-8")
    with pytest.raises(UserError, match=rf"test\.jsonl:3: .*{problem}"):
        Countdown(data=str(file)).prompts("test")


def test_problems_of_the_file_are_not_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    with file.open("w") as lines:
        for prompt in Countdown().prompts("train")[:100]:
            numbers = ",".join(map(str, reversed(prompt.data["numbers"])))
            lines.write(json.dumps({"input": numbers, "output": prompt.data["target"]}) + "\n")
    task = Countdown(data=str(file))
    test = {key(prompt) for prompt in task.prompts("test")}
    assert len(test) == 100
    assert not test & {key(prompt) for prompt in task.prompts("train")}


def test_real_problems_are_solvable() -> None:
    if not DATA.is_file():
        pytest.skip(f"needs the real problems at {DATA}; set DLLM_RL_DATA to the folder that holds countdown/")
    rows = load_rows(str(DATA), "test", ("input", "output"))
    task = Countdown(data=str(DATA))
    prompts = task.prompts("test")
    assert len(prompts) == 256
    assert (prompts[0].text, prompts[0].data) == ("30,100,93=23", {"numbers": [30, 100, 93], "target": 23})
    for prompt, row in zip(prompts, rows, strict=True):
        terms = [(Fraction(part), part) for part in row["input"].split(",")]
        expression = next(solved(terms, int(row["output"])))
        assert task.score(prompt, expression).value == 1.0
        assert task.score(prompt, row["output"]).value == 0.0
