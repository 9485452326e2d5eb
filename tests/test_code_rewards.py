"""What the code tasks pay for: shares of tests, batches, and nothing at all for the tricks that fooled other graders."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.sandbox import Call, Limits, Outcome, Program
from dllm_rl.task import Prompt, Reward
from dllm_rl.tasks.code import grading
from dllm_rl.tasks.code.grading import extract_code, fenced, grade, reward_of
from dllm_rl.tasks.code.humaneval import HumanEval
from dllm_rl.tasks.code.mbpp import MBPP
from dllm_rl.tasks.code.program_synthesis import ProgramSynthesis
from tests.test_task_humaneval import ADD, ADD_PROMPT, SHIFT, graded, real_file, write_rows


@pytest.fixture
def task(tmp_path: Path) -> HumanEval:
    return HumanEval(data=write_rows(tmp_path / "rows.jsonl.gz", [ADD, SHIFT]), timeout_seconds=2)


# Rewards


OUTCOMES = {
    Outcome("ok", (True, True)): (1.0, 1.0), Outcome("failed", (True, False)): (0.0, 0.5),
    Outcome("failed", (False, False)): (0.0, 0.0), Outcome("timeout", (True, False)): (0.0, 0.0),
    Outcome("infra_error", (False, False)): (0.0, 0.0),
}


def test_rewards_of_outcomes() -> None:
    for outcome, (strict, share) in OUTCOMES.items():
        by_all, by_fraction = reward_of(outcome, "all"), reward_of(outcome, "fraction")
        assert (by_all.value, by_fraction.value) == (strict, share)
        assert by_all.verdict == by_fraction.verdict
        assert (by_all.verdict == "correct") == (outcome.status == "ok")
        assert by_all.parts == {"pass_rate": sum(outcome.passed) / 2}
        assert by_fraction.parts == {**by_all.parts, "exact": strict}


def test_fraction_pays_for_the_share_of_tests(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl.gz", [ADD])
    task = HumanEval(data=data, reward="fraction", timeout_seconds=2)
    answers = ["    return x + y", "    return 5", "    return 1 if x == 0 else 5", "    return x", "",
               "    while x: pass\n    return 1"]
    rewards = task.score_batch([task.prompts("test")[0]] * len(answers), answers)
    assert [reward.value for reward in rewards] == pytest.approx([1, 1 / 3, 2 / 3, 0, 0, 0])
    assert [reward.verdict for reward in rewards] == ["correct", "wrong", "wrong", "wrong", "no_answer", "timeout"]
    assert [reward.parts["exact"] for reward in rewards] == [1, 0, 0, 0, 0, 0]
    assert {frozenset(reward.parts) for reward in rewards} == {frozenset({"pass_rate", "exact"})}


def test_other_code_tasks_pay_for_shares_as_well(tmp_path: Path) -> None:
    synthesis = ProgramSynthesis(reward="fraction")
    prompt = Prompt("test/0", "2->7 5->13 1->5", {"pairs": ((2, 7), (5, 13), (1, 5), (3, 9), (4, 11))})
    values = [reward.value for reward in synthesis.score_batch([prompt] * 4, ["x*2+3", "7", "x/0", "x\n=" * 90])]
    assert values == [1.0, 0.2, 0.0, 0.0]
    row = {"task_id": 11, "text": "Add.", "code": "def add(a, b): return a + b",
           "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}
    mbpp = MBPP(data=write_rows(tmp_path / "rows.jsonl.gz", [row]), reward="fraction")
    (question,) = mbpp.prompts("test")
    answers = ["def add(a, b): return a + b", "def add(a, b): return 3", "def add(a, b): return 0"]
    assert [reward.value for reward in mbpp.score_batch([question] * 3, answers)] == [1.0, 0.5, 0.0]


def test_equal_answers_run_once_and_keep_their_order(task: HumanEval, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    run = grading.run_programs
    monkeypatch.setattr(grading, "run_programs", lambda programs, limits: (
        sizes.append(len(programs)), run(programs, limits))[1])
    first, second = task.prompts("test")
    prompts = [first, second, first, first, second, first]
    answers = ["return x + y", "return x / 2", "", "```python\nreturn x + y\n```", "return x", "return x - y"]
    rewards = task.score_batch(prompts, answers)
    assert [reward.verdict for reward in rewards] == ["correct", "correct", "no_answer", "correct", "wrong", "wrong"]
    assert sizes == [4]
    assert [task.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)] == rewards
    assert task.score_batch(prompts, answers) == rewards
    assert task.score_batch([], []) == []


# Defects of other graders, by their numbers in the survey of 2026


NO_FUNCTION = ["pass", "I do not know.", "x = 1", "def plus(x, y):\n    return x + y", "def check(candidate):\n    pass",
               "def check(candidate):\n    assert True\ndef plus(x, y):\n    return x + y", "print('passed')", "...", "#"]


def test_R9_an_answer_without_the_function_passes_nothing(task: HumanEval) -> None:
    for row in (0, 1):
        assert graded(task, NO_FUNCTION, row) == [("wrong", 0.0)] * len(NO_FUNCTION)


def test_R9_nothing_of_the_real_rows_is_passed_without_the_function() -> None:
    task = HumanEval(data=real_file("humaneval/HumanEval.jsonl.gz"))
    prompts = task.prompts("test")[::4]
    for answer in ("pass", "def check(candidate):\n    return None", "def first_function(x):\n    return x"):
        rewards = task.score_batch(prompts, [answer] * len(prompts))
        assert {reward.verdict for reward in rewards} == {"wrong"}
        assert sum(reward.value for reward in rewards) == 0


def test_R9_the_function_under_test_is_the_row_s_not_the_first_of_the_answer(task: HumanEval) -> None:
    helper = "def helper(x, y):\n    return {} \n\n\ndef add(x, y):\n    return {}\n"
    assert graded(task, [helper.format("0", "x + y"), helper.format("x + y", "0")]) == [("correct", 1.0), ("wrong", 0.0)]


def test_R9_at_least_one_assertion_is_executed(tmp_path: Path) -> None:
    test = "def check(candidate):\n    for case in candidate(3):\n        assert case == 1\n"
    row = {**ADD, "prompt": 'def ones(n):\n    """n ones."""\n', "entry_point": "ones", "test": test}
    task = HumanEval(data=write_rows(tmp_path / "rows.jsonl.gz", [row]))
    assert graded(task, ["    return [1] * n", "    return []", "    return [2]"]) == [
        ("correct", 1.0), ("wrong", 0.0), ("wrong", 0.0)]


LIAR = "class Liar:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
TRICKS = {
    "sys.exit": "import sys\ndef add(x, y): return x + y\nsys.exit(0)",
    "os._exit": "import os\ndef add(x, y): return x + y\nos._exit(0)",
    "exit in the function": "import os\ndef add(x, y): os._exit(0)",
    "SystemExit in the function": "def add(x, y): raise SystemExit(0)",
    "__eq__": f"{LIAR}def add(x, y): return Liar()",
    "__eq__ of an int": LIAR.replace("Liar:", "Liar(int):") + "def add(x, y): return Liar(7)",
    "prints": "print('passed')\nprint('ok')\ndef add(x, y): print(x + y)",
    "renamed": "def add_(x, y): return x + y", "upper case": "def Add(x, y): return x + y",
    "redefined check": "def check(candidate): return True\ndef add(x, y): return 0",
    "redefined candidate": "candidate = lambda x, y: x + y\ndef add(x, y): return 0",
    "redefined AssertionError": "class AssertionError(Exception): pass\ndef add(x, y): return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(x, y): return 0",
}


def test_R10_tricks_earn_nothing(tmp_path: Path) -> None:
    row = {**ADD, "test": ADD["test"].partition("    for i in range")[0]}
    task = HumanEval(data=write_rows(tmp_path / "rows.jsonl.gz", [row]), timeout_seconds=2)
    verdicts = dict(zip(TRICKS, graded(task, [fenced(code) for code in TRICKS.values()]), strict=True))
    assert verdicts == dict.fromkeys(TRICKS, ("wrong", 0.0))


def test_R10_tricks_earn_nothing_of_mbpp(tmp_path: Path) -> None:
    row = {"task_id": 11, "text": "Add.", "code": "def add(x, y): return x + y",
           "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}
    task = MBPP(data=write_rows(tmp_path / "rows.jsonl.gz", [row]), reward="fraction")
    rewards = task.score_batch(list(task.prompts("test")) * len(TRICKS), [fenced(code) for code in TRICKS.values()])
    assert {name: reward.value for name, reward in zip(TRICKS, rewards, strict=True)} == dict.fromkeys(TRICKS, 0.0)


def test_R10_lying_objects_earn_nothing_of_assertions(task: HumanEval) -> None:
    assert graded(task, [TRICKS["__eq__"], TRICKS["__eq__ of an int"]]) == [("wrong", 0.0)] * 2


@pytest.mark.parametrize("trick", [
    "abs = lambda x: 0", "doubled = lambda x: 2", "def abs(x): return -1", "class abs:\n    def __new__(cls, x): return 0",
])
def test_R10_a_program_cannot_redefine_what_its_tests_use(task: HumanEval, trick: str) -> None:
    answers = [f"{trick}\ndef halved(x):\n    return {value}" for value in ("x / 2", "2.0")]
    assert graded(task, answers, row=1) == [("correct", 1.0), ("wrong", 0.0)]


def test_R11_grading_prints_nothing_and_leaves_random_numbers_alone(
    task: HumanEval, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    odd = ["assert (1, 'always')\nreturn '\\d' is 1", "print('passed')",
           "import random; random.seed(1)\ndef add(x, y): return x"]
    before = random.getstate()
    verdicts = [verdict for verdict, _ in graded(task, [*odd, "    return x + y", ""])]
    assert verdicts == ["wrong", "wrong", "wrong", "correct", "no_answer"]
    assert random.getstate() == before
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_R13_programs_that_all_crash_are_worth_the_same() -> None:
    """Otherwise the differences in a group that solved nothing would be learnt."""
    task = HumanEval(data=real_file("humaneval/HumanEval.jsonl.gz"), reward="fraction")
    crashes = ["    raise ValueError", "    return 1 / 0", "    return undefined", "import nowhere", "    return x +",
               "def f(:", "    import os\n    os._exit(0)", "    raise SystemExit(0)", "Sorry.", ""]
    prompts = [prompt for prompt in task.prompts("test")[::8] for _ in crashes]
    rewards = task.score_batch(prompts, crashes * (len(prompts) // len(crashes)))
    assert {reward.value for reward in rewards} == {0.0}
    assert all(reward.verdict in ("wrong", "no_answer") for reward in rewards)


# Any text


def stub_outcomes(programs: Sequence[Program], limits: Limits) -> list[Outcome]:
    assert limits.seconds > 0
    return [Outcome("failed", (False,) * len(program.tests)) for program in programs]


PIECES = ("```python\n", "```", "[BEGIN]", "[DONE]", "def add(x, y):\n", "    return x", "\r\n", "\t", "'", '"""', "(" * 300,
          "-" * 9000, "async ", "from __future__ import x\n", "\ud800", "\0", "\f", "\\", "add = ", "@", "lambda: " * 200,
          "0" * 5000)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=20))).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_no_text_stops_the_graders(text: str) -> None:
    question = Prompt("test/0", "", {"prompt": ADD_PROMPT, "entry_point": "add", "test": ADD["test"], "solution": ""})
    data = {"asserts": ("assert add(1, 2) == 3",), "setup": "", "code": "def add(x, y): return x + y"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "run_programs", stub_outcomes)
        rewards: list[Reward] = [HumanEval().score(question, text), MBPP().score(Prompt("test/1", "", data), text)]
    assert {reward.verdict for reward in rewards} <= {"wrong", "no_answer"}
    assert all((reward.verdict == "no_answer") == (not extract_code(text, ("add",))) for reward in rewards)


@settings(max_examples=4, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_no_text_stops_the_sandbox(texts: list[str]) -> None:
    question = Prompt("test/0", "", {"prompt": ADD_PROMPT, "entry_point": "add", "test": ADD["test"], "solution": ""})
    rewards = HumanEval(timeout_seconds=2).score_batch([question] * len(texts), texts)
    assert {reward.verdict for reward in rewards} <= {"wrong", "no_answer", "timeout"}
    assert {reward.value for reward in rewards} == {0.0}


@given(st.lists(st.sampled_from(["", "a", "b", "c"])), st.randoms(use_true_random=False))
def test_a_batch_is_graded_as_its_answers_are(answers: list[str], rng: random.Random) -> None:
    outcomes = {name: rng.choice(list(OUTCOMES)) for name in "abc"}

    def run(programs: Sequence[Program], limits: Limits) -> list[Outcome]:
        assert len({program.source for program in programs}) == len(programs), (programs, limits)
        return [outcomes[program.source] for program in programs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "run_programs", run)
        given_or_none = [answer or None for answer in answers]
        rewards = grade(given_or_none, lambda answer: Program(answer, (Call("x", 1),)), 1.0, "fraction")
    expected = [reward_of(outcomes[answer], "fraction") if answer else grading.no_answer("fraction") for answer in answers]
    assert rewards == expected


# All of MBPP


def mbpp_verdicts(step: int) -> tuple[Counter[str], Counter[str]]:
    task = MBPP(data=real_file("mbpp/mbpp.jsonl"), timeout_seconds=30)
    prompts, right, wrong = zip(*list(task.solved_rows())[::step], strict=True)
    assert len(prompts) == len(range(0, 974, step))
    verdicts = [Counter(reward.verdict for reward in task.score_batch(prompts, answers)) for answers in (right, wrong)]
    return verdicts[0], verdicts[1]


def test_a_tenth_of_mbpp_is_right_and_wrong_where_it_should_be() -> None:
    assert mbpp_verdicts(10) == (Counter(correct=98), Counter(wrong=98))


@pytest.mark.heavy
def test_all_of_mbpp_is_right_and_wrong_where_it_should_be() -> None:
    assert mbpp_verdicts(1) == (Counter(correct=974), Counter(wrong=974))
