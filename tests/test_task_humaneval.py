"""HumanEval: its rows and prompts, how answers are read, and how the function that checks them is cut into tests."""

from __future__ import annotations

import gzip
import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dllm_rl.errors import UserError
from dllm_rl.rows import load_placed_rows
from dllm_rl.sandbox import Assertion, Call
from dllm_rl.tasks.code.check_function import assertions_of
from dllm_rl.tasks.code.grading import extract_code, fenced
from dllm_rl.tasks.code.humaneval import HumanEval, preamble, program_source

DATA = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
ADD_PROMPT = 'from typing import List\n\n\ndef add(x: int, y: int):\n    """The sum.\n    >>> add(2, 3)\n    5\n    """\n'
ADD = {
    "task_id": "HumanEval/53", "prompt": ADD_PROMPT, "entry_point": "add", "canonical_solution": "    return x + y\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    import random\n\n    assert candidate(0, 1) == 1\n"
            "    assert candidate(2, 3) == 5, 'message'\n    assert True, 'prints'\n"
            "    for i in range(9):\n        x, y = random.randint(0, 99), random.randint(0, 99)\n"
            "        assert candidate(x, y) == x + y\n",
}
SHIFT = {  # its tests call a helper of the prompt, and abs()
    "task_id": "HumanEval/50", "entry_point": "halved", "canonical_solution": "    return doubled(x) / 4\n",
    "prompt": 'def doubled(x: float):\n    return 2 * x\n\n\ndef halved(x: float):\n    """Half of x."""\n',
    "test": "def check(candidate):\n    for x in (3, 5):\n        assert abs(candidate(doubled(x)) - x) < 1e-6\n",
}


def real_file(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs the real rows at {path}; set DLLM_RL_DATA to the folder that holds {name}")
    return str(path)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


@pytest.fixture
def task(tmp_path: Path) -> HumanEval:
    return HumanEval(data=write_rows(tmp_path / "rows.jsonl.gz", [ADD, SHIFT]), timeout_seconds=2)


def graded(task: HumanEval, completions: Sequence[str], row: int = 0) -> list[tuple[str, float]]:
    rewards = task.score_batch([task.prompts("test")[row]] * len(completions), completions)
    return [(reward.verdict, reward.parts["pass_rate"]) for reward in rewards]


# Data


def test_rows_of_a_gzip_file(tmp_path: Path) -> None:
    placed = load_placed_rows(write_rows(tmp_path / "test.jsonl.gz", [ADD, SHIFT]), "test", ("task_id",))
    assert [(Path(place).name, row["task_id"]) for place, row in placed] == [
        ("test.jsonl.gz:1", "HumanEval/53"), ("test.jsonl.gz:2", "HumanEval/50")]
    assert len(load_placed_rows(str(tmp_path), "test", ("task_id",))) == 2


@pytest.mark.parametrize(("content", "message"), [
    (b"plain text", r"rows\.jsonl\.gz: cannot be read \(Not a gzipped file"),
    (gzip.compress(b"[1]\n" * 99, mtime=0)[:-9], r"rows\.jsonl\.gz: is no whole gzip file"),
    (gzip.compress(b"{}\nnot JSON", mtime=0), r"rows\.jsonl\.gz:2: is not JSON"),
])
def test_bad_gzip_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_placed_rows(str(tmp_path / "rows.jsonl.gz"), "test", ())


def test_there_is_no_train_split_but_in_a_folder(task: HumanEval, tmp_path: Path) -> None:
    for source in (task.data, "openai/openai_humaneval"):
        with pytest.raises(UserError, match=r"HumanEval has a test split only"):
            HumanEval(data=source).prompts("train")
    with pytest.raises(UserError, match=r"HumanEval has a test split only"):
        task.demonstrations(1, 0)
    write_rows(tmp_path / "train.jsonl.gz", [SHIFT])
    folder = HumanEval(data=str(tmp_path))
    assert [prompt.id for prompt in folder.prompts("train")] == ["train/HumanEval/50"]
    (row,) = folder.demonstrations(1, 3)
    assert row.completion == fenced(SHIFT["prompt"] + SHIFT["canonical_solution"])
    assert folder.score(folder.prompts("train")[0], row.completion).verdict == "correct"


def test_protocols_word_the_prompt_and_leave_the_question_alone(task: HumanEval) -> None:
    prompts = {name: HumanEval(data=task.data, protocol=name).prompts("test")[0] for name in HumanEval.protocols}
    assert task.prompts("test")[0] == prompts["bgpo"]
    assert prompts["bgpo"].text == "Complete the following python code:\n" + ADD_PROMPT
    assert prompts["bare"].text == ADD_PROMPT
    assert prompts["drift"].text.startswith(ADD_PROMPT)
    assert len({task.fingerprint(prompt) for prompt in prompts.values()}) == 1
    assert task.fingerprint(prompts["bare"]) != task.fingerprint(task.prompts("test")[1])


@pytest.mark.parametrize(("field", "bad"), [
    ("protocol", "plain"), ("reward", "some"), ("completion_length", 0), ("timeout_seconds", 0), ("data", ""),
])
def test_bad_fields_are_named(field: str, bad: object) -> None:
    with pytest.raises(UserError, match=f"^task.{field}={bad}: must be "):
        HumanEval(**{field: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt": 3}, "prompt=3: must be a string"),
    ({"entry_point": "plus"}, "entry_point=plus: must be the function that `prompt` ends on"),
    ({"prompt": "x = ("}, "entry_point=add: must be the function"),
    ({"test": "assert add(1, 2) == 3"}, r"test: must define check\(candidate\)"),
    ({"test": "def check(candidate):\n    assert True"}, "test: .* must hold an assertion that can fail"),
    ({"test": "def check("}, "test: "),
])
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl.gz", [SHIFT, {**ADD, **change}])
    with pytest.raises(UserError, match=rf"rows\.jsonl\.gz:2: {message}"):
        HumanEval(data=data).prompts("test")


# Answers


RIGHT = {
    "body": "    return x + y", "body without indentation": "return x + y", "one space": " return x + y",
    "fenced body": "```python\n    return x + y\n```", "two lines, the first stripped": "total = x + y\n    return total",
    "two lines, both stripped": "total = x + y\nreturn total", "tab": "\treturn x + y",
    "body and prose": "    return x + y\nThis adds the numbers.\n",
    "body and a function": "    return f(x, y)\n\ndef f(x, y):\n    return x + y",
    "prompt and body": ADD_PROMPT + "    return x + y\n", "fenced whole": fenced(ADD_PROMPT + "    return x + y"),
    "without the imports": "```python\ndef add(x: List, y):\n    return x + y\n```",
    "windows": "    a = x\r\n    return a + y\r\n", "a variable": "add = lambda x, y: x + y",
    "another signature": "```python\ndef add(*numbers):\n    return sum(numbers)\n```",
    "two blocks": "```python\ndef add(x, y):\n    return x + y\n```\nUse it:\n```python\nprint(add(1, 2))\n```",
    "future": "```python\nfrom __future__ import annotations\ndef add(x: Any, y):\n    return x + y\n```",
    "cut off": "```python\ndef add(x, y):\n    return x + y\n",
    "brackets": "[BEGIN]\n 'def add(x, y): return x + y' \n[DONE]",
}
WRONG = {
    "the stub": ADD_PROMPT, "another body": "    return x - y", "another function": "def plus(x, y):\n    return x + y",
    "a method": "class A:\n    def add(x, y):\n        return x + y", "syntax": "    return x +", "nul": "return x\0",
    "prints": "    print(x + y)", "type": "    return str(x + y)", "asserts": "def add(x, y): return x\nassert True",
}


def test_right_answers_in_every_form(task: HumanEval) -> None:
    assert dict(zip(RIGHT, graded(task, list(RIGHT.values())), strict=True)) == dict.fromkeys(RIGHT, ("correct", 1.0))


def test_wrong_answers(task: HumanEval) -> None:
    verdicts = {name: verdict for name, (verdict, _) in zip(WRONG, graded(task, list(WRONG.values())), strict=True)}
    assert verdicts == dict.fromkeys(WRONG, "wrong")
    assert graded(task, ["", " \n", "```python\n```"]) == [("no_answer", 0.0)] * 3
    assert graded(task, ["    while True: pass"]) == [("timeout", 0.0)]


def test_program_keeps_the_helpers_of_the_prompt_but_not_its_stub() -> None:
    source = program_source(SHIFT["prompt"], "halved", "def halved(x):\n    return doubled(x) / 4")
    assert source.count("def halved") == source.count("def doubled") == 1
    assert preamble(SHIFT["prompt"], "halved") == "def doubled(x: float):\n    return 2 * x"
    assert preamble("import math\ndef area(r):\n", "area") == "import math"
    assert program_source(ADD_PROMPT, "add", "return x + y") == f"{ADD_PROMPT}    return x + y\n"


def test_last_block_that_defines_the_function_is_the_program() -> None:
    text = "```python\ndef f(): return 1\n```\n```python\ndef f(): return 2\n```\n```python\nprint(f())\n```"
    assert extract_code(text, ("f",)) == "def f(): return 2"
    assert extract_code(text) == extract_code(text, ("g",)) == "print(f())"
    assert extract_code("'x = 1' \n[DONE]\n[DONE]") == "x = 1"


# Tests


def test_a_check_function_is_cut_into_its_assertions() -> None:
    first, second, loop = assertions_of(ADD["test"], "add", "import math")
    assert first == Call("add(0, 1)", 1, same_type=False)
    assert second == Call("add(2, 3)", 5, same_type=False)
    assert isinstance(loop, Assertion)
    assert "import random" in loop.code and "for i in range(9):" in loop.code and "candidate(0, 1)" not in loop.code
    assert loop.code.startswith("candidate = add\n")
    assert "METADATA" in loop.setup and "import math" in loop.setup and "def add" not in loop.setup


def test_set_up_neither_calls_the_check_nor_hides_the_function_under_test() -> None:
    test = '"""Tests."""\nLIMIT = 3\ndef check(candidate):\n    assert candidate(1) in range(LIMIT)\ncheck(sum)\n'
    (only,) = assertions_of(test, "sum", "def sum_of(x):\n    return sum(x)")
    assert isinstance(only, Assertion)
    assert only.setup.split("\n") == ["from builtins import range", "def sum_of(x):", "    return sum(x)", "LIMIT = 3"]


def test_an_assertion_that_compares_the_program_with_itself_joins_the_next() -> None:
    own, other = "assert candidate(1) == f(1)", "assert candidate(2) == 2"
    for lines, count in (([own, own, other, other], 2), ([other, own], 1), ([own], 1)):
        tests = assertions_of("def check(candidate):\n    " + "\n    ".join(lines), "f", "")
        assert len(tests) == count
        assert sum(test.code.count("f(1)") for test in tests if isinstance(test, Assertion)) == lines.count(own)


def test_a_function_that_cannot_be_cut_up_is_one_test() -> None:
    lines = ("def check(candidate):", "    assert candidate(1) == 1", "    if candidate(2) == 0:", "        return",
             "    assert candidate(2) == 2")
    (whole,) = assertions_of("\n".join(lines), "f", "")
    assert isinstance(whole, Assertion)
    assert whole.code.endswith("\ncheck(f)")


def test_random_tests_are_the_same_at_every_grading(tmp_path: Path) -> None:
    test = "from random import random\ndef check(candidate):\n    x = random()\n    assert candidate(x, 0) == (x > 0.5)\n"
    task = HumanEval(data=write_rows(tmp_path / "rows.jsonl.gz", [{**ADD, "test": test}]))
    assert len(set(graded(task, [f"    return True  # {number}" for number in range(16)]))) == 1


@pytest.mark.parametrize(("number", "count"), [(0, 7), (32, 1), (33, 4), (38, 1), (53, 6), (115, 5), (128, 8), (151, 7)])
def test_tests_of_real_rows(number: int, count: int) -> None:
    """Counted by hand; `assert True` is none, and three of HumanEval/33 compare the program with itself."""
    prompt = HumanEval(data=real_file("humaneval/HumanEval.jsonl.gz")).prompts("test")[number]
    data = prompt.data
    assert len(assertions_of(data["test"], data["entry_point"], preamble(data["prompt"], data["entry_point"]))) == count


# The real rows


def official(program: str, test: str, entry_point: str) -> bool:
    """What the data set itself says of a program, which must be one of ours: the whole check function, run here."""
    names: dict[str, Any] = {}
    try:
        exec(f"{program}\n{test}\ncheck({entry_point})", names)
    except Exception:
        return False
    return True


def test_reference_solutions_are_right_and_spoilt_ones_wrong() -> None:
    task = HumanEval(data=real_file("humaneval/HumanEval.jsonl.gz"), timeout_seconds=30)
    prompts, right, wrong = zip(*task.solved_rows(), strict=True)
    assert len(prompts) == 164
    assert Counter(reward.verdict for reward in task.score_batch(prompts, right)) == {"correct": 164}
    spoilt = task.score_batch(prompts, wrong)
    assert Counter(reward.verdict for reward in spoilt) == {"wrong": 164}
    assert {reward.parts["pass_rate"] for reward in spoilt} == {0.0}
    for prompt, body, program in zip(prompts[::4], right[::4], wrong[::4], strict=True):
        data = prompt.data
        assert official(data["prompt"] + body, data["test"], data["entry_point"])
        assert not official(extract_code(program), data["test"], data["entry_point"])


FORMS: Mapping[str, Callable[[str, str], str]] = {
    "whole": lambda prompt, body: prompt + body, "fenced": lambda prompt, body: fenced(prompt + body),
    "fenced body": lambda _, body: f"```python\n{body}```", "stripped body": lambda _, body: body.strip(),
    "dedented body": lambda _, body: textwrap.dedent(body), "prose after it": lambda _, body: f"{body}\nThat is all.",
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_the_reference_solutions_is_right(form: str) -> None:
    task = HumanEval(data=real_file("humaneval/HumanEval.jsonl.gz"), timeout_seconds=30)
    prompts = task.prompts("test")[::3]
    answers = [FORMS[form](prompt.data["prompt"], prompt.data["solution"]) for prompt in prompts]
    assert Counter(reward.verdict for reward in task.score_batch(prompts, answers)) == {"correct": len(prompts)}


def test_humaneval_uses_the_whole_file() -> None:
    prompts = HumanEval(data=real_file("humaneval/HumanEval.jsonl.gz")).prompts("test")
    assert len({HumanEval().fingerprint(prompt) for prompt in prompts}) == 164
