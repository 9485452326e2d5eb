"""The sandbox: what passes, what cannot be made to pass, and what it does when programs or workers misbehave.

Everything holds with bubblewrap and without; attacks are in test_sandbox_attacks.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dllm_rl import sandbox
from dllm_rl.errors import UserError
from dllm_rl.sandbox import (
    Assertion,
    Call,
    Limits,
    Outcome,
    Program,
    SandboxConfig,
    assert_to_test,
    configure,
    run_programs,
)
from dllm_rl.sandboxing import isolation, pool
from tests.sandbox_ways import WAYS, World, choose_way

QUICK = Limits(seconds=2.0)
ADD = (Call("add(2, 3)", 5), Call("add(a, b)", 9, {"a": 4, "b": 5}))
ADD_ASSERTED = (Assertion("assert add(2, 3) == 5"), Assertion("assert add(4, 5) == 9"))
RIGHT = "def add(a, b):\n    return a + b\n"
LIAR = "class Liar:\n    def __eq__(self, other): return True\n    def __hash__(self): return 5\n"


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Isolated or not."""
    with choose_way(request.param):
        yield request.param


def run(source: str, *tests: Call | Assertion, limits: Limits = QUICK) -> Outcome:
    return run_programs([Program(source, tests or ADD)], limits)[0]


def value_of(expression: str, expected: Any, **options: Any) -> str:
    return run("", Call(expression, expected, **options)).status


def test_correct_programs_pass() -> None:
    recursive = "def add(a, b):\n    return a if b == 0 else 1 + add(a, b - 1)"
    outcomes = run_programs([Program(RIGHT, ADD), Program(recursive, ADD), Program(RIGHT, ADD_ASSERTED)], QUICK)
    assert outcomes == [Outcome("ok", (True, True))] * 3


def test_wrong_program_fails_test_by_test() -> None:
    outcome = run("def add(a, b):\n    return 5")
    assert outcome == Outcome("failed", (True, False), "add(a, b) is 5")


def test_program_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="without tests"):
        Program(RIGHT, ())


@pytest.mark.parametrize("tests", [ADD, ADD_ASSERTED], ids=["calls", "assertions"])
@pytest.mark.parametrize("source", [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "raise SystemExit",
    "import sys\ndef add(a, b): sys.exit(0)",
    "import os\ndef add(a, b): os._exit(0)",
    "def add(a, b): raise SystemExit(0)",
    "def add(a, b): raise BaseException",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import os\nos._exit = lambda code: None\ndef add(a, b): return 0",
    "import os\ndef add(a, b): os.close(3)",
    "",
    "def add(a, b:",
    "\0",
    "def subtract(a, b): return a - b",
])
def test_ending_early_earns_nothing(source: str, tests: tuple[Call | Assertion, ...]) -> None:
    outcome = run(source, *tests)
    assert outcome.status == "failed"
    assert outcome.passed == (False, False)
    assert outcome.error


def test_objects_that_claim_equality_fail() -> None:
    tests = tuple(assert_to_test(text) for text in ("assert add(2, 3) == 5", "assert add(4, 5) == 9"))
    for checks in (ADD, tests):
        assert run(LIAR + "def add(a, b): return Liar()", *checks).status == "failed"
    integer = "class Liar(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Liar(0)"
    assert run(integer).status == "failed"


def test_fake_verdicts_and_nonces_fail() -> None:
    fakes = [r'"ok\n"', r'"0 {\"value\": 5}\n1 {\"value\": 9}\n"', r'"0" * 32 + "0 {\"value\": true}\n"']
    sources = [f"import os\nfor n in range(64):\n    try: os.write(n, ({fake}).encode())\n    except OSError: pass\n"
               for fake in fakes]
    programs = [Program(source + ending, tests) for source in sources for ending in ("os._exit(0)", RIGHT)
                for tests in (ADD, ADD_ASSERTED)]
    outcomes = run_programs(programs, QUICK)
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert not any(any(outcome.passed) for outcome in outcomes)


def test_forged_depths_fail() -> None:
    """Somewhere between what every process can read and what none can, there must be no gap."""
    forge = "import os\ndef send(text): os.write(3, len(text).to_bytes(4, 'big') + text)\nsend(b'{\"value\": null}')\n" \
            "for _ in range(2): send(b'{\"value\": ' + b'[' * DEPTH + b']' * DEPTH + b'}')\n"
    programs = [Program(f"DEPTH = {depth}\n{forge}", tests) for depth in (*range(100, 900, 100), *range(900, 1000, 10))
                for tests in (ADD, ADD_ASSERTED)]
    assert {(outcome.status, any(outcome.passed)) for outcome in run_programs(programs, QUICK)} == {("failed", False)}


def test_printing_is_harmless() -> None:
    assert run(RIGHT + "import sys\nprint('passed', flush=True)\nprint('x', file=sys.stderr)").status == "ok"


@pytest.mark.parametrize("code", ["pass", "", "if False: assert add(2, 3) == 5", "def check(): assert True"])
def test_assertion_must_be_reached(code: str) -> None:
    outcome = run(RIGHT, Assertion(code))
    assert outcome == Outcome("failed", (False,), "ValueError: no assertion was executed")


def test_assertions_in_functions_and_loops_count() -> None:
    check = "def check(f):\n    for n in range(3):\n        assert f(n, 1) == n + 1, 'message'\ncheck(add)"
    assert run(RIGHT, Assertion(check)).status == "ok"
    assert run("def add(a, b): return 1", Assertion(check)).status == "failed"


def test_hanging_programs_time_out_and_spoil_no_others() -> None:
    hangs = [
        "while True: pass",
        "(10 ** 7) ** (10 ** 7)",
        "import signal\nfor n in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT): signal.signal(n, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\nwhile True: pass",
        "import time\ntime.sleep(60)",
    ]
    programs = [Program(source, ADD) for hang in hangs for source in (hang, RIGHT, "def add(a, b): return 0")]
    started = time.monotonic()
    outcomes = run_programs(programs, Limits(seconds=0.8))
    assert [outcome.status for outcome in outcomes] == ["timeout", "ok", "failed"] * len(hangs)
    assert time.monotonic() - started < 0.8 * len(hangs) + 5


def test_time_out_keeps_the_tests_passed_before() -> None:
    outcome = run("def add(a, b):\n    while a == 4: pass\n    return a + b")
    assert (outcome.status, outcome.passed) == ("timeout", (True, False))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
def test_memory_is_limited() -> None:
    assert "MemoryError" in run("data = bytearray(3 << 30)").error
    assert run("data = [0] * (80 << 20)").status == "failed"
    assert run("data = bytearray(64 << 20)\n" + RIGHT).status == "ok"


def test_output_and_files_are_limited() -> None:
    flood = "import sys\nfor n in range(10 ** 9): sys.stdout.write('x' * 65536)"
    outcomes = run_programs([
        Program(flood, ADD),
        Program("", (Call("'x' * 10 ** 6", ""),)),
        Program("import os\nwhile True: os.write(3, b'x' * 65536)", ADD),
        Program("open('f', 'wb').write(bytes(2 << 20))", ADD),
    ], QUICK)
    assert [outcome.status for outcome in outcomes] == ["timeout", "failed", "failed", "failed"]
    assert outcomes[1].error == outcomes[2].error == "sent more than the sandbox accepts"
    assert "File too large" in outcomes[3].error


def test_recursion_without_end_fails() -> None:
    assert "RecursionError" in run("def add(a, b): return add(a, b)").error
    deep = "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\n"
    assert run(deep + "def add(a, b): return repr(A())").status == "failed"
    assert run("(" * 100_000).status == "failed"
    assert run("def add(a, b):\n    x = []\n    x.append(x)\n    return x").status == "failed"


FORK = """
import os, time
if os.fork() == 0:
    if LEAVE_SESSION:
        os.setsid()
        if os.fork(): os._exit(0)
    time.sleep(30)
    os._exit(0)
"""


@pytest.mark.parametrize("leave_session", [False, True])
@pytest.mark.parametrize("ending", ["", "\nwhile True: pass"])
def test_forked_processes_do_not_outlive_their_program(tmp_path: Path, leave_session: bool, ending: str) -> None:
    with World(tmp_path) as world:
        outcome = run(f"LEAVE_SESSION = {leave_session}\n{FORK}{ending}\n{RIGHT}")
        refused = "BlockingIOError" in outcome.error  # without isolation an ordinary user may have no processes
        assert refused or outcome.status == ("timeout" if ending else "ok")
        assert world.harm() == []


def test_programs_see_no_environment_and_no_descriptors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SANDBOX_TEST_SECRET", "s3cret")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        see = "import os\ndef is_open(n):\n    try: return bool(os.fstat(n))\n    except OSError: return False\n"
        outcome = run(see, Call("dict(os.environ)", {}), Call("[n for n in range(1000) if is_open(n)]", [0, 1, 2, 3]))
    assert outcome.status == "ok", outcome.error


def test_each_program_has_an_empty_folder_that_is_removed(way: str) -> None:
    source = "import os\nopen('f', 'w').close()\nos.mkdir('d')\nos.chmod('d', 0)"
    programs = [Program(source, (Call("sorted(os.listdir())", ["d", "f"]), Call("os.getcwd()", ""))) for _ in range(3)]
    outcomes = run_programs(programs, Limits(workers=1))
    assert [outcome.passed for outcome in outcomes] == [(True, False)] * 3
    folders = [outcome.error.removeprefix("os.getcwd() is ") for outcome in outcomes]
    if way == "isolated":
        assert set(folders) <= {"/tmp", "/scratch"}
    else:
        assert len(set(folders)) == 3 and not any(Path(folder).exists() for folder in folders)
        sandbox.close()
        assert not any(Path(folder).parent.exists() for folder in folders)


def test_values_that_are_no_plain_data_fail() -> None:
    for expression in ("object()", "float('nan')", "{1, 2}", "(1, 2)", "print", "iter([1, 2])", "10 ** 10 ** 4"):
        assert value_of(expression, [1, 2]) == "failed", expression
    assert value_of("float('nan')", float("nan")) == "failed"


@pytest.mark.parametrize("value", [
    None, True, 0, -7, 2.5, 1e300, "text\n\ud800'\"", [1, [2, "3"]], {"a": [1]}, {1: 2, (3, 4): None}, (1, (2,)), {1, 2},
    frozenset({3}), b"\x00\xff", 1 + 2j, [], {}, (), {"tuple": [1]},
])
def test_plain_data_arrives_unchanged(value: Any) -> None:
    assert value_of(repr(value), value) == "ok"


@pytest.mark.parametrize(("expression", "expected"), [
    ("True", 1), ("1", True), ("1", 1.0), ("1.0", 1), ("[True]", [1]), ("(1,)", [1]), ("{'a': 1.0}", {"a": 1}),
    ("0", None), ("''", None), ("'1'", 1),
])
def test_types_are_told_apart(expression: str, expected: Any) -> None:
    assert value_of(expression, expected) == "failed"
    if expression != "(1,)" and expected is not None and expression != "'1'":
        assert value_of(expression, expected, same_type=False) == "ok"


def test_asserts_become_calls_where_the_expected_value_is_a_literal() -> None:
    assert assert_to_test("assert f(2) == (1, -2)") == Call("f(2)", (1, -2), same_type=False)
    assert assert_to_test("assert f(2) == {'a': 1}, 'message'") == Call("f(2)", {"a": 1}, same_type=False)
    for text in ("assert f(2)", "assert f(2) == g(3)", "assert 1 == f(2) == 1", "assert f(1) != 2", "assert f(1) ==",
                 "assert f(1) == 1; assert f(2) == 2"):
        assert assert_to_test(text) == Assertion(text)


@pytest.mark.parametrize(("killed", "status"), [(1, "ok"), (2, "infra_error")])
def test_program_is_tried_twice_when_its_worker_dies(monkeypatch: pytest.MonkeyPatch, killed: int, status: str) -> None:
    start, starts = pool.Worker.start, []

    def start_and_die(worker: pool.Worker, number: int, job: dict[str, Any]) -> None:
        start(worker, number, job)
        starts.append(number)
        if starts.count(1) <= killed and number == 1:
            worker.process.kill()

    monkeypatch.setattr(pool.Worker, "start", start_and_die)
    sleeper = Program("import time\ntime.sleep(0.3)\n" + RIGHT, ADD)
    outcomes = run_programs([Program(RIGHT, ADD), sleeper, Program("def add(a, b): return 0", ADD)], Limits(workers=1))
    assert [outcome.status for outcome in outcomes] == ["ok", status, "failed"]
    assert starts == [0, 1, 1, 2]
    assert status == "ok" or "code -9" in outcomes[1].error


def test_tester_that_is_killed_fails_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    start = pool.Worker.start

    def start_and_kill_tester(worker: pool.Worker, number: int, job: dict[str, Any]) -> None:
        start(worker, number, job)
        root = worker.process.pid
        for _ in range(1 if sandbox._launch(True).isolated else 0):  # bubblewrap, then the worker
            (root,) = children(root)
        os.kill(min(children(root)), signal.SIGKILL)  # the tester is the first child of the worker

    monkeypatch.setattr(pool.Worker, "start", start_and_kill_tester)
    outcome = run("import time\ntime.sleep(0.5)\n" + RIGHT)
    assert (outcome.status, outcome.error) == ("failed", "the process of its tests was killed")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_that_cannot_start_are_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(RIGHT).status == "ok"
    sandbox.close()
    for interpreter in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(isolation, "interpreter", lambda path=interpreter: path)
        assert run(RIGHT).status == "infra_error"


def test_batch_deadline_is_an_infrastructure_error() -> None:
    programs = [Program(RIGHT, ADD), *[Program("while True: pass", ADD)] * 3]
    started = time.monotonic()
    outcomes = run_programs(programs, Limits(seconds=30, batch_seconds=1.5, workers=2))
    assert time.monotonic() - started < 4
    assert [outcome.status for outcome in outcomes] == ["ok", *["infra_error"] * 3]
    assert "within 1.5 s" in outcomes[-1].error


def test_order_is_kept() -> None:
    sources = [f"import time\ntime.sleep({0.05 * (n % 3)})\ndef f(): return {n}" for n in range(24)]
    programs = [Program(source, (Call("f()", n if n % 2 else -1),)) for n, source in enumerate(sources)]
    statuses = [outcome.status for outcome in run_programs(programs, Limits(workers=4))]
    assert statuses == ["failed", "ok"] * 12
    assert run_programs([]) == []


def test_batches_of_tiny_programs_reuse_their_workers() -> None:
    programs = [Program("", tuple(Call(f"x*{n}+1", x * n + 1, {"x": x}) for x in range(5))) for n in range(64)]
    sandbox.close()
    used = []
    for _ in range(2):
        assert {outcome.status for outcome in run_programs(programs, Limits(seconds=20, workers=2))} == {"ok"}
        used.append({worker.process.pid for worker in pool.pool_of(sandbox._launch(True))._idle})
    assert used[0] == used[1] and 1 <= len(used[0]) <= 2


# Assertions


PAIR = """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def __len__(self): return 2
    def __getitem__(self, n): return (self.a, self.b)[n]
    def sum(self, *, more=0): return self.a + self.b + more
def total(pairs): return sum(p.sum() for p in pairs)
def count(n): yield from range(n)
"""


@pytest.mark.parametrize("code", [
    "assert total([Pair(1, 2), Pair(3, 4)]) == 10",
    "p = Pair(1, 2)\nassert (p.a, p.b, p[1], len(p), p.sum(more=4), bool(p)) == (1, 2, 2, 2, 7, True)",
    "assert list(count(4)) == [0, 1, 2, 3]",
    "assert 2 in count(4) and 5 not in count(4)",
    "assert Pair(1, 2) != Pair(1, 2) and Pair(1, 2) != 3 and not Pair(1, 2) == (1, 2)",
    "assert [x for x in Pair(1, 2).sum.__name__] == list('sum')",
    "assert sorted([3, 1], key=abs) == [1, 3]",
])
def test_assertions_use_objects_of_the_program(code: str) -> None:
    assert run(PAIR, Assertion(code)) == Outcome("ok", (True,))


@pytest.mark.parametrize("text", [
    "None", "True", "-7", "2 ** 70", "-(10 ** 5000)", "2.5", "float('inf')", "'text\\n\\ud800\\x00'", "[1, [2, '3']]",
    "{'a': [1]}", "{(3, 4): None}", "(1, (2,))", "{1, 2}", "frozenset({3})", "b'\\x00\\xff'", "bytearray(b'x')", "1 + 2j",
    "range(1, 9, 2)", "{'tuple': [1]}", "{'handle': 0}",
])
def test_plain_data_goes_there_and_back(text: str) -> None:
    outcome = run("def f(x): return x", Assertion(f"x = {text}\ny = f(x)\nassert y == x and type(y) is type(x)"))
    assert outcome.status == "ok", outcome.error
    assert run("def f(x): return x", Call(f"f({text})", eval(text))).status == "ok"


def test_subclasses_are_their_base_classes() -> None:
    source = "from collections import *\nfrom enum import IntEnum\nP = namedtuple('P', 'x y')\nE = IntEnum('E', 'A B')\n" \
             "class L(list):\n    def __iter__(self): return iter([9])\n    def __len__(self): return 7\n"
    for expression, expected in (("P(1, 2)", (1, 2)), ("E.B", 2), ("Counter('aab')", {"a": 2, "b": 1}), ("L([1])", [1]),
                                 ("OrderedDict(a=1)", {"a": 1}), ("defaultdict(list, {1: [2]})", {1: [2]})):
        assert run(source, Call(expression, expected), Assertion(f"v = {expression}\nassert v == {expected!r}") if
                   expression.startswith("L") else Call(expression, expected)).passed[0], expression
    assert run(source, Assertion("assert P(1, 2) == (1, 2) and L([1]) == [1] and len(L([1])) == 1")).status == "ok"


def test_exceptions_of_the_program_are_raised_in_its_tests() -> None:
    source = "class Own(ValueError): pass\ndef f(n): raise (ValueError, Own, SystemExit, KeyError)[n]('why')\n"
    caught = "try:\n    f({})\nexcept {} as e:\n    assert 'why' in str(e)\nelse:\n    assert False"
    assert run(source, Assertion(caught.format(0, "ValueError"))).status == "ok"
    assert run(source, Assertion(caught.format(3, "KeyError"))).status == "ok"
    assert run(source, *(Assertion(caught.format(n, "Exception")) for n in (1, 2))).status == "ok"
    assert run(source, Assertion(caught.format(0, "KeyError"))).error == "ValueError: why"
    assert run(source, Assertion("f(1)\nassert True")).error == "Exception: Own: why"


def test_whose_names_a_test_sees() -> None:
    source = "def abs(x): return 0\ndef helper(x): return 0\nnumber = 1\ndef f():\n    global number\n    number += 1\n"
    setup = "def helper(x): return x + 1"
    assert run(source, Assertion("assert abs(-3) == 3 and helper(1) == 2 and number == 1", setup)).status == "ok"
    assert run(source, Assertion("assert helper(1) == 0")).status == "ok"
    assert run(source, Assertion("f()\nassert number == 2"), Assertion("assert number == 2")).status == "ok"
    assert "NameError" in run(source, Assertion("assert unknown")).error


def test_what_a_program_does_to_its_arguments_stays_there() -> None:
    assert run("def f(x): x.clear()", Assertion("x = [1]\nf(x)\nassert x == [1]")).status == "ok"
    assert run("def f(x):\n    x.clear()\n    return x", Call("f(x)", [], {"x": [1]})).status == "ok"


def test_a_test_cannot_swallow_the_end_of_the_program() -> None:
    swallow = "try: f()\nexcept: pass\nassert True"
    for source, status in (("import os\ndef f(): os._exit(0)", "failed"), ("def f():\n    while True: pass", "timeout")):
        outcome = run(source, Assertion(swallow), Assertion("assert True"), limits=Limits(seconds=0.7))
        assert (outcome.status, outcome.passed) == (status, (False, False))


@pytest.mark.parametrize("code", ["while True: pass", "while f(): pass", "(10 ** 7) ** (10 ** 7)"])
def test_test_that_hangs_is_a_time_out(code: str) -> None:
    slow = "import time\ndef f(): return not time.sleep(0.01)"
    programs = [Program(slow, (Assertion("assert True"), Assertion(code))), Program(RIGHT, ADD)]
    outcomes = run_programs(programs, Limits(seconds=0.7, workers=1))
    assert [(outcome.status, outcome.passed) for outcome in outcomes] == [("timeout", (True, False)), ("ok", (True, True))]


# Honest programs


HONEST = [RIGHT + code for code in (
    "import re, math, itertools, collections, heapq, functools, datetime, typing, dataclasses, decimal, fractions, random",
    "import string, bisect, copy, json, statistics, operator, enum, abc, time, hashlib, textwrap, queue, unittest, asyncio",
    "from typing import *\nfrom dataclasses import *\n@dataclass\nclass P:\n    x: List[int] = field(default_factory=list)",
    "import sys\nprint('hello', flush=True)\nprint('x' * 10 ** 6, file=sys.stderr)",
    "if __name__ == '__main__':\n    raise SystemExit",
    "import sys\nsys.setrecursionlimit(20000)\ndef add(a, b, n=9000): return a + b if n == 0 else add(a, b, n - 1)",
    "def add(a, b): return (3 ** 20000 * (a + b)) // 3 ** 20000",
    "def add(a, b): return len(sorted(range(200_000))[:a + b])",
    "import asyncio\nasync def slow(x): return await asyncio.sleep(0, x)\ndef add(a, b): return asyncio.run(slow(a + b))",
    "import tempfile, os\ndef add(a, b):\n    with tempfile.NamedTemporaryFile('w+') as f:\n        f.write('x' * (a + b))\n"
    "        f.flush()\n        return os.path.getsize(f.name)",
    "import pickle\ndef add(a, b): return pickle.loads(pickle.dumps(a + b))",
)]


def test_honest_programs_pass() -> None:
    programs = [Program(source, tests) for source in HONEST for tests in (ADD, ADD_ASSERTED)]
    assert run_programs(programs, Limits(seconds=20)) == [Outcome("ok", (True, True))] * len(programs)


def test_threads_are_for_honest_programs_too(way: str) -> None:
    source = "from concurrent.futures import ThreadPoolExecutor\nimport threading\ndone = []\n" \
             "def add(a, b):\n    with ThreadPoolExecutor(6) as pool: numbers = list(pool.map(lambda n: n, [a, b] * 6))\n" \
             "    thread = threading.Thread(target=lambda: done.append(sum(numbers) // 6))\n    thread.start()\n" \
             "    thread.join()\n    return done.pop()"
    outcome = run(source, limits=Limits(seconds=20))
    if way == "unisolated" and outcome.status != "ok":
        assert "can't start new thread" in outcome.error and os.geteuid() != 0
        pytest.skip("without isolation, the limit on processes leaves an ordinary user no threads")
    assert outcome == Outcome("ok", (True, True))


# What remains


def test_nothing_passes_from_one_program_to_the_next() -> None:
    leave = "import os, builtins, sys, math\nopen('f', 'w').close()\nos.environ['X'] = '1'\nos.umask(0o777)\n" \
            "math.pi = builtins.x = sys.x = 3\n" + RIGHT
    look = (Call("os.listdir()", []), Call("dict(os.environ)", {}), Call("math.pi == 3 or hasattr(sys, 'x')", False),
            Call("os.umask(0o22)", 0o22))
    programs = [Program(leave, ADD), Program("import os, sys, math", look)] * 3
    assert [outcome.status for outcome in run_programs(programs, Limits(seconds=20, workers=1))] == ["ok"] * 6


def test_limits_come_from_the_configuration() -> None:
    big = Program("x = bytearray(300 << 20)\n" + RIGHT, ADD)
    assert run_programs([big])[0].status == "ok"
    configure(SandboxConfig(allow_unisolated=True, memory_mb=128, workers=3))
    assert "MemoryError" in run_programs([big])[0].error
    assert run_programs([big], Limits(memory_mb=1024))[0].status == "ok"
    assert (Limits().parallel, Limits(workers=5).parallel) == (3, 5)
    configure(SandboxConfig(allow_unisolated=True))
    assert Limits().parallel == os.cpu_count()


@pytest.mark.parametrize(("change", "message"), [
    ({"allow_unisolated": "yes"}, "sandbox.allow_unisolated=yes: must be true or false"),
    ({"workers": 0}, "sandbox.workers=0: must be null or an integer from 1 to 1024"),
    ({"memory_mb": 8}, "sandbox.memory_mb=8: must be an integer from 64"),
    ({"processes": 1.5}, "sandbox.processes=1.5: must be an integer from 1 to 1024"),
])
def test_bad_configuration_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SandboxConfig(**change)


def test_several_threads_may_run_programs(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        outcomes: list[Outcome] = []
        batch = [Program(RIGHT, ADD), Program("def add(a, b): return 0", ADD)] * 4
        threads = [threading.Thread(target=lambda: outcomes.extend(run_programs(batch, Limits(seconds=20, workers=2))))
                   for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [outcome.status for outcome in outcomes] == ["ok", "failed"] * 16
        assert world.harm() == []


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listen = pool.Batch._listen

    def interrupted(batch: pool.Batch, worker: pool.Worker) -> None:
        listen(batch, worker)
        if worker.busy is not None or any(other.busy is not None for other in batch.workers):
            raise KeyboardInterrupt

    with World(tmp_path) as world:
        monkeypatch.setattr(pool.Batch, "_listen", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_programs([Program("while True: pass", ADD)] * 4, Limits(seconds=60, workers=2))
        assert world.harm() == []


CALLER = r"""
import sys
from dllm_rl.sandbox import *
from dllm_rl.sandboxing import isolation

if sys.argv[1] == "unisolated":
    isolation.executable = lambda: None
configure(SandboxConfig(allow_unisolated=True))
run_programs([Program("", (Call("1", 1),))])
print("ready", flush=True)
run_programs([Program("open('f', 'w').close()\nwhile True: pass", (Call("1", 1),))] * 2, Limits(seconds=60))
"""


def test_nothing_outlives_a_caller_that_is_killed(tmp_path: Path, way: str) -> None:
    with World(tmp_path) as world:
        environment = {**os.environ, "TMPDIR": str(world.temporary), "PYTHONWARNINGS": "ignore"}
        caller = subprocess.Popen([sys.executable, "-c", CALLER, way], stdout=subprocess.PIPE, env=environment)
        assert caller.stdout and caller.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        caller.kill()
        caller.wait()
        caller.stdout.close()
        world.await_children()
        assert world.harm() == []


def test_forked_copy_of_the_caller_has_workers_of_its_own() -> None:
    assert run(RIGHT).status == "ok"
    child = os.fork()
    if child == 0:
        os._exit(0 if run(RIGHT, limits=Limits(seconds=20)).status == "ok" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run(RIGHT, limits=Limits(seconds=20)).status == "ok"


def test_idle_workers_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.close()
    monkeypatch.setattr(isolation, "IDLE_SECONDS", 0.1)
    assert run(RIGHT, limits=Limits(seconds=20)).status == "ok"
    (worker,) = pool.pool_of(sandbox._launch(True))._idle
    assert worker.process.wait(timeout=20) == 0
    assert run(RIGHT, limits=Limits(seconds=20)).status == "ok"
