"""Algebra in worker processes: deadlines hold, failures are told apart, and no process is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dllm_rl.task import Prompt
from dllm_rl.tasks.math import symbolic
from dllm_rl.tasks.math.competition import Math
from dllm_rl.tasks.math.symbolic import Pool

ROOT = ("3\\sqrt{13}", "\\sqrt{9 \\cdot 13}")
HANGS = ["9^{9^{9}}", "10^{10^{10}}", "(10^9)!", "\\sum_{k=1}^{10^9} \\frac{1}{k^k}", "\\int_0^{10^9} \\sin(x^x) \\, dx",
         "\\prod_{k=1}^{10^8} (x+k)", "(1+x)^{10^{9}}", "2^{2^{2^{2^{2^{2}}}}}", "\\binom{10^9}{10^8}"]
HOSTILE = [
    "9**9**9", "__import__(\"os\").system(\"true\")", "\\input{/etc/passwd}", "\\write18{true}", "x" * 5000,
    "\\sqrt" * 10_000, "\\sqrt{" * 10_000 + "2" + "}" * 10_000, "{" * 500, "}" * 500, "\x00", "\ud800", "\\" * 499, "٣" * 50,
    "(" * 12 + ")" * 12, "\\begin{pmatrix}" + " & ".join(["x"] * 110) + "\\end{pmatrix}", "\\frac{1}{" * 12 + "2" + "}" * 12,
    "a" * 490, "+" * 490, "1" * 490 + "x", "x^" * 240 + "x", "\\boxed" * 80, "\\left" * 80, ",".join("abcdefghij" * 24),
    "\\text{" * 12 + "}" * 12, "lambda: exec('1')", "\\begin{array}" * 35, "%" * 490, "\\pm" * 160, "\\%",
    "x_{" * 12 + "1" + "}" * 12, "=" * 490,
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(workers=2, seconds=10.0)
    yield made
    made.close()


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker that writes every pair to `seen` and does what the given answer says; `once` dies in its first life."""
    script = tmp_path / "stub.py"
    script.write_text(textwrap.dedent("""
        import json, os, pathlib, sys, time
        folder = pathlib.Path(__file__).parent
        sys.stdin.readline()
        print('"ready"', flush=True)
        for line in sys.stdin:
            gold, answer = json.loads(line)
            with open(folder / "seen", "a") as seen:
                seen.write(answer + "\\n")
            if answer == "die" or (answer == "once" and not (folder / "died").exists()):
                (folder / "died").touch()
                os._exit(1)
            if answer == "hang":
                time.sleep(600)
            if answer == "slow":
                time.sleep(0.5)
            print(json.dumps(gold == answer), flush=True)
    """))
    monkeypatch.setattr(symbolic, "_SCRIPT", script)
    return tmp_path


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended but nobody has waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(parent: int | None = None) -> set[int]:
    """The living children of this process or another one."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[1]) == (parent or os.getpid()):
                    found.add(int(folder.name))
    return found


def run_script(source: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter whose main script has no guard; it can import this module as `tests`."""
    command = [sys.executable, "-c", f"from tests.test_math_symbolic import children\n{textwrap.dedent(source)}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])


def test_equal_and_different(pool: Pool) -> None:
    assert pool.outcomes([ROOT, ("x+1", "1+x"), ("x+1", "x-1"), ("y=2x", "2x"), ("(3,4]", "3 < x \\le 4")]) == \
        ["right", "right", "wrong", "right", "right"]


def test_the_right_answer_comes_first(pool: Pool) -> None:
    """math-verify takes a value for an assignment of the right answer, not an equation for a value."""
    assert pool.outcomes([("x=y+1", "y+1"), ("y+1", "x+y=1")]) == ["right", "wrong"]


@pytest.mark.parametrize(("gold", "answer"), [
    ("\\frac{1}{2^{98}}", "\\frac{2}{2^{98}}"), ("\\pi", "3.1415927"), ("\\sqrt{2}", "1.41421356"), ("2h", "2"), ("5t", "5"),
    ("x", "0=0"), ("x", "\\frac{0}{0}"), ("(2,4)", "4,2"), ("2^{4950}", "2^{4950}+1"),
])
def test_wrong_answers_that_a_looser_grader_accepts(pool: Pool, gold: str, answer: str) -> None:
    """Tiny numbers that differ, rounded numbers, letters that look like units."""
    assert pool.outcomes([(gold, answer)]) == ["wrong"]


def test_hanging_pairs_time_out_and_the_pool_goes_on() -> None:
    pool = Pool(workers=2, seconds=1.0)
    before = children()
    outcomes = pool.outcomes([("3\\sqrt{13}", HANGS[0]), ("3\\sqrt{13}", HANGS[2])])
    assert outcomes == ["timeout", "timeout"]
    assert children() == before
    assert pool.outcomes([("x", "x+1")]) == ["wrong"]
    assert len(children() - before) == 1
    pool.close()
    assert children() == before


@pytest.mark.heavy
def test_every_hanging_pair_is_given_up() -> None:
    pool = Pool(workers=2, seconds=2.0)
    outcomes = pool.outcomes([("3\\sqrt{13}", answer) for answer in HANGS])
    assert set(outcomes) <= {"timeout", "wrong"}
    assert outcomes.count("timeout") >= 4
    pool.close()


@pytest.mark.heavy
def test_hostile_texts_neither_pass_nor_crash(pool: Pool) -> None:
    outcomes = pool.outcomes([("3\\sqrt{13}", answer[:500]) for answer in HOSTILE])
    assert set(outcomes) <= {"timeout", "wrong"}
    assert pool.outcomes([ROOT]) == ["right"]


@pytest.mark.parametrize("gold", ["42", "3\\sqrt{13}", "\\text{(C)}", "(3,4]", "1,-2", "52_8"])
def test_hostile_completions_score_nothing(gold: str) -> None:
    task = Math(timeout_seconds=2.0)
    slow = ("x^", "x_", "a" * 9, "+", "=", "\\boxed", "\\frac", "a,b")  # these are for the heavy test
    quick = [answer for answer in HOSTILE if not answer.startswith(slow) or gold in ("42", "\\text{(C)}")]
    texts = [f"\\boxed{{{answer}}}" for answer in quick] + [f"<answer>{answer}</answer>" for answer in quick]
    if gold == "42":
        texts += [f"\\boxed{{{answer}}}" for answer in HANGS]
    megabytes = ["\\boxed{" + "9" * 10**6 + "}", "\\boxed{" * 10**5, "9" * 10**6, "<answer>" + "x" * 10**6, "####" * 10**5]
    rewards = task.score_batch([Prompt("test/0", "", {"answer": gold})] * (len(texts) + 5), texts + megabytes)
    assert all(reward.value == 0.0 and reward.verdict in ("wrong", "no_answer", "timeout") for reward in rewards)


def test_a_worker_that_dies_is_replaced_once(stub: Path) -> None:
    pool = Pool(workers=1, seconds=20.0)
    assert pool.outcomes([("a", "a"), ("once", "once"), ("a", "die"), ("b", "a")]) == ["right", "right", "timeout", "wrong"]
    assert (stub / "seen").read_text().split() == ["a", "once", "once", "die", "die", "a"]
    pool.close()


def test_a_late_worker_is_killed(stub: Path) -> None:
    pool = Pool(workers=1, seconds=0.5)
    before = children()
    assert pool.outcomes([("a", "hang"), ("a", "b")]) == ["timeout", "wrong"]
    assert (stub / "seen").read_text().split() == ["hang", "hang", "b"]
    assert len(children() - before) == 1
    pool.close()
    assert children() == before


def test_the_same_answer_costs_one(stub: Path) -> None:
    pool = Pool(workers=1, seconds=20.0)
    assert pool.outcomes([("a", "a")] * 3 + [("a", "b")]) == ["right"] * 3 + ["wrong"]
    assert pool.outcomes([("a", "b"), ("a", "a")]) == ["wrong", "right"]
    assert (stub / "seen").read_text().split() == ["a", "b"]
    pool.close()


def test_many_threads_grade_at_once(stub: Path) -> None:
    pool = Pool(workers=2, seconds=20.0)
    with ThreadPoolExecutor(4) as threads:
        pairs = [[(str(thread), str(index % 7)) for index in range(40)] for thread in range(4)]
        outcomes = list(threads.map(pool.outcomes, pairs))
    for mine, found in zip(pairs, outcomes, strict=True):
        assert found == ["right" if gold == answer else "wrong" for gold, answer in mine]
    assert len((stub / "seen").read_text().split()) == 4 * 7
    pool.close()


@pytest.mark.usefixtures("stub")
def test_closing_ends_every_worker() -> None:
    before = children()
    pool = Pool(workers=3, seconds=20.0)
    assert pool.outcomes([(str(index), "slow") for index in range(6)]) == ["wrong"] * 6
    assert len(children() - before) == 3
    pool.close()
    assert children() == before
    assert pool.outcomes([("a", "a")]) == ["right"], "a closed pool can be used again"
    pool.close()


def test_a_worker_that_cannot_start_is_an_infrastructure_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "nothing"))
        assert pool.outcomes([("a", "b"), ("a", "c")]) == ["infra_error"] * 2
        assert "nothing" in pool.trouble
    with monkeypatch.context() as patch:
        (tmp_path / "math_verify.py").write_text("raise ImportError('math_verify is broken')")
        patch.setattr(sys, "path", [str(tmp_path), *sys.path])
        assert pool.outcomes([("a", "b")]) == ["infra_error"]
        assert "math_verify is broken" in pool.trouble
    with monkeypatch.context() as patch:
        patch.setattr(symbolic, "MEMORY_MB", 1)
        assert pool.outcomes([("a", "b")]) == ["infra_error"]
    assert pool.outcomes([("a", "b")]) == ["wrong"], "a failure to start is not kept"
    pool.close()


def test_an_infrastructure_error_is_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    prompts = [Prompt("test/0", "", {"answer": "\\sqrt{7} + 1"})] * 3
    rewards = Math(workers=3).score_batch(prompts, ["\\boxed{1 + \\sqrt7}", "\\boxed{\\sqrt{7} + 1}", "none"])
    assert [reward.verdict for reward in rewards] == ["infra_error", "correct", "no_answer"]


def test_workers_end_with_a_script_without_a_guard() -> None:
    done = run_script("""
        from dllm_rl.tasks.math import symbolic
        print(symbolic.equal("x+1", "1+x"), *children())
    """)
    outcome, *pids = done.stdout.split()
    assert (outcome, done.returncode, done.stderr) == ("right", 0, "")
    assert len(pids) == 1
    assert not any(lives(int(pid)) for pid in pids)


@pytest.mark.parametrize("answer", ["1+x", "9^{9^{9}}"], ids=["idle", "busy"])
def test_workers_end_when_their_parent_is_killed(answer: str) -> None:
    done = run_script(f"""
        import os, signal, threading, time
        from dllm_rl.tasks.math import symbolic
        pool = symbolic.Pool(workers=1, seconds=1.0)
        pool.outcomes([("x+1", "x+2")])
        threading.Thread(target=pool.outcomes, args=([("x+1", "{answer}")],), daemon=True).start()
        time.sleep(0.5)
        print(*children(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 1
    deadline = time.monotonic() + 60
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, pids))


def test_a_forked_process_has_workers_of_its_own() -> None:
    done = run_script("""
        import os
        from dllm_rl.tasks.math import symbolic
        assert symbolic.equal("x+1", "1+x") == "right"
        child = os.fork()
        if child == 0:
            assert not symbolic._pools
            os._exit(0 if symbolic.equal("x+2", "2+x") == "right" else 1)
        assert os.waitpid(child, 0)[1] == 0
        print(symbolic.equal("x+3", "3+x"))
    """)
    assert (done.stdout.strip(), done.returncode) == ("right", 0), done.stderr
