"""The code tasks: what their prompts and demonstrations are, and which programs they pay for."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dllm_rl import sandbox
from dllm_rl.errors import UserError
from dllm_rl.task import Prompt
from dllm_rl.tasks.code import mbpp, program_synthesis
from dllm_rl.tasks.code.mbpp import MBPP, extract_code, fenced, prompt_text
from dllm_rl.tasks.code.program_synthesis import ProgramSynthesis

ROWS = [
    {"task_id": number, "text": "Write a function to add.", "code": "def add(a, b):\r\n\treturn a + b \r\n",
     "test_setup_code": "", "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}
    for number in (1, 11, 510, 601, 974)
]


def data_file() -> str:
    root = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
    path = root / "mbpp" / "mbpp.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is missing; set DLLM_RL_DATA to the folder that holds mbpp/mbpp.jsonl")
    return str(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown_pairs(text: str) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in re.findall(r"(\d+)->(\d+)", text)]


def value(expression: str, x: int) -> Any:
    return eval(expression, {"x": x})  # expressions of the task's own making


# Program synthesis


def test_prompt_has_nine_tokens_and_a_program_of_the_family() -> None:
    task = ProgramSynthesis(largest_constant=20)
    words = sorted(task.words, key=len, reverse=True)
    tokens = re.compile("|".join(map(re.escape, words)) + "|.", re.DOTALL)
    for prompt in task.prompts("train"):
        assert len(tokens.findall(prompt.text)) == 9
        assert len(tokens.findall(prompt.data["program"])) in (3, 5)
        pairs = prompt.data["pairs"]
        assert list(pairs[:3]) == shown_pairs(prompt.text)
        assert len({x for x, _ in pairs}) == 5
        assert all(value(prompt.data["program"], x) == y and 0 <= y <= 255 for x, y in pairs)


def test_three_pairs_determine_the_program() -> None:
    programs: dict[frozenset[tuple[int, int]], str] = {}
    for prompt in ProgramSynthesis(train_size=8192).prompts("train"):
        pairs = frozenset(shown_pairs(prompt.text))
        assert programs.setdefault(pairs, prompt.data["program"]) == prompt.data["program"]


def test_splits_are_stable_distinct_and_disjoint() -> None:
    task = ProgramSynthesis(train_size=2000, test_size=200)
    train, test = task.prompts("train"), task.prompts("test")
    assert task.prompts("train") is train
    assert (len(train), len(test)) == (2000, 200)
    assert test[17].id == "test/17"
    assert ProgramSynthesis(train_size=100).prompts("train") == train[:100]
    assert len({prompt.text for prompt in train}) == 2000
    held_out = {frozenset(shown_pairs(prompt.text)) for prompt in test}
    trained = [prompt.text for prompt in train] + [row.prompt for row in task.demonstrations(5000, 1)]
    assert held_out.isdisjoint(frozenset(shown_pairs(text)) for text in trained)


def right_program(prompt: str) -> str:
    """The only program of the family that fits, found by search."""
    constants = range(1, 10)
    candidates = [f"x+{a}" for a in constants] + [f"x*{a}" for a in constants[1:]] + [f"x*x+{a}" for a in constants]
    candidates += [f"x*{a}{sign}{b}" for a in constants[1:] for b in constants for sign in "+-"]
    (found,) = (text for text in candidates if all(value(text, x) == y for x, y in shown_pairs(prompt)))
    return found


def test_systematic_mistake_is_the_last_constant_plus_one_at_its_rate() -> None:
    count, rate = 600, 0.65
    wrong = 0
    for prompt, completion in ProgramSynthesis().demonstrations(count, 3):
        right = right_program(prompt)
        mistaken = re.sub(r"\d+$", lambda digits: str(int(digits[0]) + 1), right)
        assert completion in (right, mistaken)
        wrong += completion == mistaken
    assert abs(wrong - count * rate) < 4 * math.sqrt(count * rate * (1 - rate))


def test_noisy_demonstrations_keep_the_form_and_clean_ones_are_right() -> None:
    for prompt, completion in ProgramSynthesis(demonstrations_from="clean").demonstrations(300, 0):
        assert completion == right_program(prompt)
    for prompt, completion in ProgramSynthesis(demonstrations_from="noisy", mistake_rate=1).demonstrations(300, 0):
        right = right_program(prompt)
        assert completion != right
        assert re.sub(r"\d+", "n", completion) == re.sub(r"\d+", "n", right)


def test_demonstrations_are_a_pure_function_and_fast() -> None:
    task = ProgramSynthesis()
    first = task.demonstrations(500, 7)
    assert ProgramSynthesis().demonstrations(500, 7) == first
    assert task.demonstrations(200, 7) == first[:200]
    assert task.demonstrations(500, 8) != first
    started = time.process_time()
    task.demonstrations(10_000, 0)
    assert time.process_time() - started < 1.0


def test_right_programs_score_one_and_mistaken_ones_zero() -> None:
    task = ProgramSynthesis()
    prompts = task.prompts("test")[:40]
    right = [prompt.data["program"] for prompt in prompts]
    mistaken = [re.sub(r"\d+$", lambda digits: str(int(digits[0]) + 1), text) for text in right]
    rewards = task.score_batch([*prompts, *prompts], [*right, *mistaken])
    assert {(r.value, r.verdict, r.parts["pass_rate"]) for r in rewards[:40]} == {(1.0, "correct", 1.0)}
    assert {(r.value, r.verdict) for r in rewards[40:]} == {(0.0, "wrong")}


QUESTION = Prompt("test/0", "2->7 5->13 1->5", {"pairs": ((2, 7), (5, 13), (1, 5), (3, 9), (4, 11)), "program": "x*2+3"})
ANSWERS = {
    "x*2+3": ("correct", 1.0), " 3 + 2 * x\n": ("correct", 1.0), "x+x+3": ("correct", 1.0),
    "{2:7,5:13,1:5}.get(x,0)": ("wrong", 0.6), "x*2.0+3": ("wrong", 0.0), "7": ("wrong", 0.2), "True": ("wrong", 0.0),
    "x*2+": ("wrong", 0.0), "x=2": ("wrong", 0.0), "y": ("wrong", 0.0), "x/0": ("wrong", 0.0),
    "exit()": ("wrong", 0.0), "__import__('os')._exit(0)": ("wrong", 0.0), "x*2+3\nx": ("wrong", 0.0),
    "x*2+3" + "+0" * 200: ("wrong", 0.0), "\ud800": ("wrong", 0.0), "x\0": ("wrong", 0.0),
    "": ("no_answer", 0.0), " \n": ("no_answer", 0.0), "9**9**9**9": ("timeout", 0.0),
}


def test_verdicts_of_program_synthesis() -> None:
    rewards = ProgramSynthesis(timeout_seconds=1).score_batch([QUESTION] * len(ANSWERS), list(ANSWERS))
    graded = {text: (r.verdict, r.parts["pass_rate"]) for text, r in zip(ANSWERS, rewards, strict=True)}
    assert graded == ANSWERS
    assert all(reward.value == (reward.verdict == "correct") for reward in rewards)


def test_equal_answers_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    run = program_synthesis.run_programs
    monkeypatch.setattr(program_synthesis, "run_programs", lambda programs, limits: (
        sizes.append(len(programs)), run(programs, limits))[1])
    other = ProgramSynthesis().prompts("test")[0]
    prompts, answers = [QUESTION, QUESTION, other, QUESTION], ["x*2+3", " x*2+3 ", "x*2+3", ""]
    verdicts = [reward.verdict for reward in ProgramSynthesis().score_batch(prompts, answers)]
    assert verdicts[:2] + verdicts[3:] == ["correct", "correct", "no_answer"]
    assert sizes == [2]


def test_failing_sandbox_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.close()
    monkeypatch.setattr("dllm_rl.sandboxing.isolation.interpreter", lambda: "/nowhere/python")
    assert ProgramSynthesis().score(QUESTION, "x*2+3").verdict == "infra_error"
    prompt = Prompt("test/11", "", {"asserts": ("assert f() == 1",), "setup": "", "code": ""})
    assert MBPP().score(prompt, "def f(): return 1").verdict == "infra_error"


@pytest.mark.parametrize(("field", "bad"), [
    ("completion_length", 0), ("train_size", 0), ("test_size", "many"), ("largest_constant", 21),
    ("timeout_seconds", 0), ("demonstrations_from", "elsewhere"), ("mistake_rate", 1.5),
])
def test_bad_fields_are_named(field: str, bad: object) -> None:
    with pytest.raises(UserError, match=f"^task.{field}={bad}: must be "):
        ProgramSynthesis(**{field: bad})  # type: ignore[arg-type]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^task.test_size=1500: must be at most about"):
        ProgramSynthesis(test_size=1500, largest_constant=2).prompts("test")


# MBPP


def test_splits_of_a_single_file_go_by_task_id(tmp_path: Path) -> None:
    task = MBPP(data=write_rows(tmp_path / "all.jsonl", ROWS))
    assert [prompt.id for prompt in task.prompts("train")] == ["train/601", "train/974"]
    assert [prompt.id for prompt in task.prompts("test")] == ["test/11", "test/510"]
    write_rows(tmp_path / "test.jsonl", ROWS)
    assert len(MBPP(data=str(tmp_path)).prompts("test")) == len(ROWS)


def test_prompt_and_demonstration_of_mbpp(tmp_path: Path) -> None:
    task = MBPP(data=write_rows(tmp_path / "all.jsonl", ROWS))
    text = task.prompts("test")[0].text
    assert text == prompt_text("Write a function to add.", ["assert add(1, 2) == 3", "assert add(2, 2) == 4"])
    assert text.endswith("Your code should pass these tests:\n\nassert add(1, 2) == 3\nassert add(2, 2) == 4\n")
    rows = task.demonstrations(5, 0)
    assert {row.completion for row in rows} == {"```python\ndef add(a, b):\n\treturn a + b\n```"}
    assert len(rows) == 5
    assert rows == task.demonstrations(5, 0)


@pytest.mark.parametrize("completion", [
    "x = 1", "   x = 1\n".strip(), "```python\nx = 1\n```", "Sure:\n```py\nx = 1\n```\nIt works.", "```\nx = 1\n```",
    "```python\nx = 0\n```\nor rather\n```python\nx = 1\n```", "```python\nx = 1\n```\noutput:\n```\n1\n```",
    "```python\r\nx = 1\r\n```", "```python\nx = 1", "[BEGIN]\nx = 1\n[DONE]", "[BEGIN]\n 'x = 1' \n[DONE] more",
    "[BEGIN] x = 1", "``` python3 \nx = 1\n```",
])
def test_code_is_found(completion: str) -> None:
    assert extract_code(completion) == "x = 1"


def test_indentation_of_code_is_kept() -> None:
    assert extract_code("```python\n    x = 1\n    y = 2\n```") == "    x = 1\n    y = 2"
    assert extract_code(fenced("def f():\r\n\treturn 1\r\n")) == "def f():\n\treturn 1"


LIAR = "class Liar:\n    def __eq__(self, other): return True\ndef add(a, b): return Liar()"
MBPP_ANSWERS = {
    "def add(a, b): return a + b": ("correct", 1.0), "add = lambda a, b: float(a + b)": ("correct", 1.0),
    "def add(a, b): return 3": ("wrong", 0.5), "def sum(a, b): return a + b": ("wrong", 0.0),
    "I do not know.": ("wrong", 0.0), "x = 1": ("wrong", 0.0), "import sys; sys.exit(0)": ("wrong", 0.0),
    "import os; os._exit(0)": ("wrong", 0.0), LIAR: ("wrong", 0.0), "def add(a, b): return str(a + b)": ("wrong", 0.0),
    "": ("no_answer", 0.0), "```python\n```": ("no_answer", 0.0),
    "def add(a, b):\n    while b == 2 and a == 2: pass\n    return 3": ("timeout", 0.5),
}


def test_verdicts_of_mbpp(tmp_path: Path) -> None:
    task = MBPP(data=write_rows(tmp_path / "all.jsonl", ROWS), timeout_seconds=1)
    rewards = task.score_batch([task.prompts("test")[0]] * len(MBPP_ANSWERS), list(MBPP_ANSWERS))
    graded = {text: (r.verdict, r.parts["pass_rate"]) for text, r in zip(MBPP_ANSWERS, rewards, strict=True)}
    assert graded == MBPP_ANSWERS
    assert task.score(task.prompts("test")[0], "def add(a, b): return b + a").value == 1.0


def test_setup_code_and_other_assertions_run(tmp_path: Path) -> None:
    row = {**ROWS[1], "test_setup_code": "numbers = [1,\r\n 2]", "test_list": ["assert add(*numbers) == 3",
                                                                        "assert add(*numbers) in {3}"]}
    task = MBPP(data=write_rows(tmp_path / "all.jsonl", [row]))
    (prompt,) = task.prompts("test")
    answers = ["def add(a, b): return a + b", "def add(a, b): return 1"]
    assert [reward.value for reward in task.score_batch([prompt] * 2, answers)] == [1.0, 0.0]


@pytest.mark.parametrize(("change", "message"), [
    ({"code": None}, "has no `code`"), ({"test_list": []}, r"test_list=\[\]: must be a list of at least one"),
    ({"test_list": "assert True"}, "test_list=assert True: must be a list"), ({"text": 3}, "text=3: must be a string"),
    ({"task_id": "x"}, "task_id=x: must be an integer"),
])
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [ROWS[0], {key: item for key, item in {**ROWS[1], **change}.items() if item is not None}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {message}"):
        MBPP(data=data).prompts("test")


def test_file_without_the_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no row of the train split \(task_id 601 to 974\)"):
        MBPP(data=write_rows(tmp_path / "rows.jsonl", ROWS[:2])).prompts("train")


def test_reference_programs_of_the_real_file_score_one() -> None:
    task = MBPP(data=data_file())
    train, test = task.prompts("train"), task.prompts("test")
    assert (len(train), len(test)) == (374, 500)
    prompts = [*train[::4], *test[::4]]
    rewards = task.score_batch(prompts, [fenced(prompt.data["code"]) for prompt in prompts])
    assert Counter(reward.verdict for reward in rewards) == {"correct": len(prompts)}
    swapped = task.score_batch(test[:40], [fenced(prompt.data["code"]) for prompt in test[1:41]])
    assert sum(reward.value for reward in swapped) == 0


def test_few_assertions_of_the_real_file_run_beside_the_program() -> None:
    asserts = [text for split in ("train", "test") for prompt in MBPP(data=data_file()).prompts(split)
               for text in prompt.data["asserts"]]
    beside = [text for text in asserts if isinstance(mbpp.assert_to_test(text), mbpp.Assertion)]
    assert len(beside) <= 3
