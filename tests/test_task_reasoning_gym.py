"""Every generator of reasoning_gym as a task, and the process that runs them: guarded, timed, restarted, not left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.config import reasoning_gym_names, register
from dllm_rl.errors import UserError
from dllm_rl.task import Prompt
from dllm_rl.tasks import reasoning_gym
from dllm_rl.tasks.answers import tagged
from dllm_rl.tasks.reasoning_gym import ReasoningGym, generator_names
from dllm_rl.tasks.reasoning_gym_worker import guarded_eval, is_unearned
from tests.test_cli import SMALL, dllm, module

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs reasoning-gym: pip install dllm-rl[reasoning-gym]")
SIZES = {"train_size": 4, "test_size": 4}
# What is special about the 105 generators of reasoning_gym 0.1.25; all others give their own answers a score of 1.
WITHOUT_ANSWERS = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
UNSOLVED = {"intermediate_integration"}  # some of its own answers are the question: "-3*Integral(x*cos(x), x) + C"
HASH_DEPENDENT = ("isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note")
QUICK = ("basic_arithmetic", "boxnet", "chain_sum", "gcd", "number_sorting", "prime_factorization", "spell_backward")
GARBAGE = ("no idea", "garbage", "x", "None", "[]", "{}", "[null]", "nan", "NaN, NaN", "[NaN, NaN, NaN, NaN, NaN]",
           "nan+nanj", "1e999", "inf", "????")
HOSTILE = ("9**9**9**9", "(" * 10_000, "[" * 10_000, "1" * 10**6, "1" * 19_999, "\x00", "\ud800", "١٢٣", "1\n" * 9_000,
           "__import__('os').abort()", "{" + '"a":' * 3_000)


def first(name: str, **fields: object) -> tuple[ReasoningGym, Prompt]:
    task = ReasoningGym(name, **SIZES, **fields)  # type: ignore[arg-type]
    return task, task.prompts("test")[0]


def check_generator(name: str) -> None:
    """Questions are made, their own answers score 1, garbage does not, and hostile texts come back as 0."""
    task = ReasoningGym(name, **SIZES)
    prompts = [*task.prompts("train"), *task.prompts("test")]
    assert len({task.fingerprint(prompt) for prompt in prompts}) == 8
    assert (name in WITHOUT_ANSWERS) == any(prompt.data["answer"] is None for prompt in prompts)
    for prompt in prompts:
        gold = prompt.data["answer"]
        if gold is not None:
            value = 0.0 if name in UNSOLVED and "Integral(" in gold else 1.0
            for completion in (gold, f"<answer>wrong</answer> no: {tagged(gold)}"):
                reward = task.score(prompt, completion)
                assert (reward.value, reward.parts) == (value, {"score": value}), completion
                assert reward.verdict == ("correct" if value else "wrong")
        for text in GARBAGE:
            reward = task.score(prompt, text)
            assert reward.verdict == "wrong" and reward.value < 1, f"{name} gives {reward.value} for {text}"
    impatient = replace(task, timeout_seconds=1)
    for text in HOSTILE:
        reward = impatient.score(prompts[0], text)
        assert reward.verdict in ("wrong", "timeout") and reward.value < 1, f"{name}: {text[:20]}"


@pytest.mark.parametrize("name", QUICK)
def test_some_generators(name: str) -> None:
    check_generator(name)


@pytest.mark.heavy
def test_every_generator() -> None:
    assert len(generator_names()) >= 105
    for name in generator_names():
        check_generator(name)


def exploit(name: str, prompt: Prompt) -> str:
    """An answer that the grader of version 0.1.25 itself gives a score of 1, whatever the question."""
    if name == "number_sorting":
        return json.dumps([float("nan")] * len(prompt.data["answer"].split(",")))
    if name == "intermediate_integration":
        integral = re.search(r"∫ (.+) d(\w)\n", prompt.text)
        assert integral
        return f"Integral({integral[1]}, {integral[2]})"
    return {"complex_arithmetic": "nan+nanj", "game_of_life_halting": "no idea", "puzzle24": "6*4*1*1"}[name]


HOLES = ("number_sorting", "intermediate_integration", "complex_arithmetic", "game_of_life_halting", "puzzle24")


@pytest.mark.parametrize("name", HOLES)
def test_known_holes_are_closed(name: str) -> None:
    task = ReasoningGym(name, train_size=1, test_size=8)
    for prompt in task.prompts("test"):
        answer = exploit(name, prompt)
        if answer.casefold() != prompt.data["answer"].casefold():
            assert task.score(prompt, answer).value == 0.0


def test_what_counts_as_unearned() -> None:
    assert is_unearned("any", "NaN", "7", {}) and is_unearned("any", "-inf", "7", {})
    assert not is_unearned("spell_backward", "nan", "nan", {}) and not is_unearned("word_ladder", "FINAL,NANNY", "KNIFE", {})
    assert is_unearned("puzzle24", "6*4*1*1", "", {"numbers": [6, 4, 1, 2]})
    assert not is_unearned("puzzle24", "(1+1)*6*2", "", {"numbers": [6, 1, 1, 2]})


def test_the_empty_answer_can_be_right() -> None:
    """Where it is not, it is `no_answer`."""
    task = ReasoningGym("ab", train_size=1, test_size=300)
    prompts = task.prompts("test")
    verdicts = {prompt.data["answer"] == "": task.score(prompt, "<answer></answer>").verdict for prompt in prompts}
    assert verdicts == {True: "correct", False: "no_answer"}


@pytest.mark.parametrize("text", [
    "__import__('os')", "open('/etc/passwd')", "(1).__class__", "().__class__.__bases__", "exec('1')", "[x for x in (1,)]",
    "lambda: 1", "f'{1}'", "1 if 1 else 2", "exp.__globals__", "Symbol('x')(1)", "exp(*[1])", "preview(1)", "S('1')", "",
    "lambdify(1, 2)", "(a := 1)", "exp(x=1)", "Integral(1, x)", 7, None,
])
def test_eval_refuses_everything_that_could_act(text: object) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        guarded_eval(text, {"__builtins__": {}})


def test_eval_of_arithmetic_and_literals() -> None:
    assert guarded_eval("[1, -2, 'a', (3.5, {4: 5})]") == [1, -2, "a", (3.5, {4: 5})]
    assert guarded_eval("2 + 3*x - (7 & 3) // 2", {}, {"x": 5}) == 16
    assert guarded_eval("Integer(2)", {"Integer": float}) == 2.0


def test_answers_are_not_run(tmp_path: Path) -> None:
    """Graders of reasoning_gym hand the answer to `eval`, directly or through sympy."""
    for name in ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "simple_integration", "countdown"):
        task, prompt = first(name)
        for code in (f"open({str(tmp_path / 'a')!r}, 'w')", f"__import__('os').mkdir({str(tmp_path / 'b')!r})"):
            assert task.score(prompt, code).value < 0.1
    assert not list(tmp_path.iterdir())


def test_a_hanging_grader_is_a_timeout_and_the_next_answer_is_graded() -> None:
    task, prompt = first("simple_integration", timeout_seconds=1)
    reward = task.score(prompt, "9**9**9**9")
    assert (reward.value, reward.verdict) == (0.0, "timeout")
    assert task.score(prompt, prompt.data["answer"]).verdict == "correct"


def test_a_failing_grader() -> None:
    """Wrong if it copes with its own answer; else a failure of ours, never a silent 0."""
    task, prompt = first("prime_factorization")
    assert task.score(prompt, "garbage").verdict == "wrong"
    changed = replace(prompt, data={**prompt.data, "question": "another question"})
    assert task.score(changed, prompt.data["answer"]).verdict == "infra_error"


def test_a_killed_process_is_started_again() -> None:
    task, prompt = first("chain_sum")
    process = reasoning_gym._worker._process
    assert process is not None
    process.kill()
    process.wait()
    assert task.score(prompt, "garbage").verdict == "wrong"
    assert task.score(prompt, prompt.data["answer"]).verdict == "correct"
    assert reasoning_gym._worker._process is not process


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing remembered from earlier tests, nor for later ones."""
    caches = (reasoning_gym._prompts, reasoning_gym._test_questions, generator_names)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_questions_do_not_depend_on_the_process() -> None:
    """These generators go through sets of strings, whose order depends on the hash seed."""
    def questions() -> list[str]:
        reasoning_gym._prompts.cache_clear()
        reasoning_gym._test_questions.cache_clear()
        return [prompt.text for name in HASH_DEPENDENT for prompt in ReasoningGym(name, **SIZES).prompts("test")]

    before = questions()
    reasoning_gym._worker.stop()
    assert questions() == before


def test_no_question_is_in_both_splits() -> None:
    for name, size in (("coin_flip", 100), ("tower_of_hanoi", 40), ("chain_sum", 300)):
        task = ReasoningGym(name, train_size=size, test_size=size)
        splits = [{task.fingerprint(prompt) for prompt in task.prompts(split)} for split in ("train", "test")]
        assert [len(keys) for keys in splits] == [size, size] and not splits[0] & splits[1]
    with pytest.raises(UserError, match=r"^task\.train_size=200: must be at most [0-9]+, the distinct questions of"):
        ReasoningGym("tower_of_hanoi", train_size=200, test_size=10).prompts("train")


def test_protocols_answers_and_demonstrations() -> None:
    plain, prompt = first("chain_sum")
    worded, other = first("chain_sum", protocol="reasoning_gym")
    assert prompt.text == prompt.data["question"] and other.text.endswith(f"in that example.\n\n{prompt.text}")
    assert plain.fingerprint(prompt) == worded.fingerprint(other)
    assert plain.score(prompt, " \n").verdict == "no_answer" == plain.score(prompt, "<answer></answer>").verdict
    for task in (plain, worded):
        demos = task.demonstrations(10, 0)
        by_text = {prompt.text: prompt for prompt in task.prompts("train")}
        assert len(demos) == 10 and all(task.score(by_text[d.prompt], d.completion).value == 1.0 for d in demos)
        assert demos == task.demonstrations(10, 0) != task.demonstrations(10, 1)
    with pytest.raises(UserError, match=r"task\.name=boxnet: has no demonstrations"):
        ReasoningGym("boxnet", **SIZES).demonstrations(1, 0)


def test_params_and_partial_credit() -> None:
    _, prompt = first("chain_sum", params={"min_terms": 7, "max_terms": 7})
    assert prompt.data["question"].count("+") + prompt.data["question"].count("-") >= 6
    task, prompt = first("spell_backward")
    gold = prompt.data["answer"]
    nearly = gold[:-1] + ("a" if gold[-1] != "a" else "b")
    assert 0 < task.score(prompt, nearly).value < 1 and task.score(prompt, nearly).verdict == "wrong"
    strict = replace(task, partial_credit=False)
    assert strict.score(prompt, nearly).value == 0.0 < strict.score(prompt, nearly).parts["score"]
    assert strict.score(prompt, gold).value == 1.0
    with pytest.raises(UserError, match=r'^task\.params=\{"no_such": 1\}: chain_sum makes no questions'):
        first("chain_sum", params={"no_such": 1})


@pytest.mark.parametrize("fields", [
    {"train_size": 0}, {"test_size": 10_001}, {"completion_length": 0}, {"timeout_seconds": 0}, {"params": {"seed": 1}},
    {"params": [1]}, {"protocol": "d1"},
])
def test_bad_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        ReasoningGym("gcd", **fields)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(QUICK), st.text() | st.text("0123456789 [],.'-+*/()", max_size=40))
def test_no_text_makes_a_grader_fail(name: str, text: str) -> None:
    task, prompt = first(name)
    (reward,) = task.score_batch([prompt], [text])
    assert 0.0 <= reward.value <= 1.0 and (reward.verdict == "correct") == (reward.value == 1.0)
    assert reward.verdict in ("correct", "wrong", "no_answer")


def test_a_batch_has_one_reward_per_completion_in_order() -> None:
    task, prompt = first("gcd")
    other = task.prompts("test")[1]
    answers = [prompt.data["answer"], "x", other.data["answer"], "", prompt.data["answer"]]
    rewards = task.score_batch([prompt, prompt, other, other, prompt], answers)
    assert [reward.verdict for reward in rewards] == ["correct", "wrong", "correct", "no_answer", "correct"]
    assert task.score_batch([], []) == []


def test_names() -> None:
    assert reasoning_gym_names(["-m", "task=reasoning_gym/gcd,reasoning_gym/lcm"]) == {"gcd", "lcm"}
    assert reasoning_gym_names(["task=sudoku", "run_dir=reasoning_gym/x"]) == set()
    with pytest.raises(UserError, match=r"^task=reasoning_gym/chainsum: .*did you mean chain_sum"):
        register(["task=reasoning_gym/chainsum"])
    with pytest.raises(UserError, match=r"^task=reasoning_gym/: .*one of ab, acre"):
        register(["task=reasoning_gym/"])


@pytest.mark.usefixtures("fresh")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install dllm-rl\[reasoning-gym\]"):
        register(["task=reasoning_gym/gcd"])


def test_the_command_line(tmp_path: Path) -> None:
    """In a process of its own, because Hydra's store remembers what was registered."""
    sizes = ("task.train_size=16", "task.test_size=4", "task.completion_length=16", "+task.params.min_terms=3")
    done = module(tmp_path, "cli", "sft", "task=reasoning_gym/chain_sum", *sizes, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "task=reasoning_gym/chain_sum" in done.stdout
    (run,) = (tmp_path / "outputs").iterdir()
    assert run.name.startswith("sft-reasoning_gym_chain_sum-tiny") and (run / "config.yaml").is_file()
    bad = dllm(tmp_path, "train", "task=reasoning_gym/chainsum")
    assert bad.returncode == 2
    assert bad.stderr == ("error: task=reasoning_gym/chainsum: is no generator of reasoning_gym; "
                          "did you mean chain_sum, decimal_chain_sum?\n")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the process in /proc")
def test_the_process_does_not_outlive_its_parent() -> None:
    """Not even when the parent is killed while a grader hangs."""
    code = """
import threading, time
from dllm_rl.tasks import reasoning_gym
task = reasoning_gym.ReasoningGym("simple_integration", train_size=1, test_size=1, timeout_seconds=3)
prompt = task.prompts("test")[0]
threading.Thread(target=task.score, args=(prompt, "9**9**9**9"), daemon=True).start()
time.sleep(0.5)
print(reasoning_gym._worker._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
