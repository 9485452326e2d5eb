"""Runs untrusted programs, such as a model's completions, and tells which of their tests pass.

    program = Program("def double(x):\n    return 2 * x", (Call("double(4)", 8), Call("double(x)", 6, {"x": 3})))
    run_programs([program])[0].status  # "ok"

One fresh interpreter per batch (`sandbox_runner.py`) forks a child per program. The child evaluates and sends values
over a pipe of its own; expected values stay in this process, and so does the comparison.

Covered:
* A program cannot pass by ending early (`sys.exit(0)`, `os._exit(0)`), printing, or returning objects whose `__eq__`
  lies: what counts are plain values that arrive on the pipe, and a normal end after the last test.
* Endless loops, hangs inside C code and ignored signals: SIGKILL to the process group at a wall deadline.
* Memory, CPU time, file size, descriptors, core files and (unless run by root) further processes and threads are
  limited; printed text is thrown away and the result pipe is capped.
* Processes that a program leaves behind are killed, on Linux even those that opened a session of their own.
* Programs see an empty environment, no descriptor of the caller and an empty temporary folder of their own.
* A failure of the sandbox itself is `infra_error`, never a failed program.

Not covered yet; the processes have the rights of the user who starts the training:
* The file system and the network are open: a program can read and write what the user can, including the environment
  and memory of other processes of that user where the kernel allows it.
* The number and total size of files is not limited.
* A program can kill the runner. The programs not yet finished then become `infra_error`.
* An `Assertion` runs in the process of the program. A program that walks the frames or the objects of its interpreter
  can find the nonce that proves success, and an `__eq__` that lies is believed. Prefer a `Call`.
* Root is exempt from some limits. macOS limits neither memory nor processes that open a session of their own.
"""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "failed", "timeout", "infra_error"]

_RUNNER = Path(__file__).with_name("sandbox_runner.py")
_CONFINEMENT_FAILED, _SOURCE_FAILED = -2, -1  # as in sandbox_runner.py


@dataclass(frozen=True)
class Limits:
    """What a program, or a batch of them, may use."""

    seconds: float = 5.0
    """Wall clock per program; the limit on CPU time is the next whole second but one."""
    memory_mb: int = 512
    """Address space per program; the interpreter itself takes about 30 MB of it."""
    output_bytes: int = 65536
    """What a program may send back; more of it and the program has failed."""
    file_mb: int = 1
    """Size of one file."""
    workers: int | None = None
    """Programs that run at a time; None: one per processor."""
    batch_seconds: float | None = None
    """Wall clock for the batch; what has not finished by then is `infra_error`. None: enough for all to time out."""

    @property
    def parallel(self) -> int:
        """How many programs run at a time."""
        return self.workers or os.cpu_count() or 1

    def batch_deadline(self, count: int) -> float:
        """Seconds after which a batch of `count` programs is given up."""
        if self.batch_seconds is not None:
            return self.batch_seconds
        return 20 + math.ceil(count / self.parallel) * (self.seconds + 0.5)


@dataclass(frozen=True)
class Call:
    """A test that passes when an expression over the program's names has the expected value.

    Example: `Call("add(a, b)", 5, {"a": 2, "b": 3})`
    """

    expression: str
    expected: Any
    """Plain data: None, bool, int, float, str, bytes, complex, list, tuple, dict, set. Never leaves this process."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further names for the expression; JSON values."""
    same_type: bool = True
    """Whether 1, 1.0 and True differ, at any depth of lists, tuples and dictionary values. False: Python's `==`."""


@dataclass(frozen=True)
class Assertion:
    """A test that passes when the code runs to its end and reaches at least one `assert`. Weaker than a `Call`.

    Example: `Assertion("for n in range(9): assert is_even(2 * n)")`
    """

    code: str
    setup: str = ""
    """Trusted code that comes first; its names hide those of the program."""


@dataclass(frozen=True)
class Program:
    """Source code, and what to check once it has been executed.

    Example: `Program("def f(x): return x + 1", (Call("f(1)", 2),))`
    """

    source: str
    tests: Sequence[Call | Assertion]

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("a program without tests would always pass")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Example: `Outcome("failed", (True, False), "ZeroDivisionError: division by zero")`
    """

    status: Status
    """`ok`: every test passed and the program ended normally. `infra_error`: the sandbox failed, not the program."""
    passed: tuple[bool, ...]
    """One entry for each test."""
    error: str = ""
    """For people to read: the first thing that went wrong."""


def run_programs(programs: Sequence[Program], limits: Limits | None = None) -> list[Outcome]:
    """The outcome of each program, in their order. Never raises for anything that a program does."""
    if not programs:
        return []
    limits = limits or Limits()
    reports, trouble = _run_batch(_batch(programs, limits), limits.batch_deadline(len(programs)))
    return [
        _judged(program, reports[index]) if index in reports else
        Outcome("infra_error", (False,) * len(program.tests), trouble)
        for index, program in enumerate(programs)
    ]


def assert_to_test(statement: str) -> Call | Assertion:
    """The strongest test for one `assert` statement.

    `assert EXPRESSION == LITERAL` becomes a call whose value is compared in this process with Python's `==`; anything
    else stays an assertion.

    Example: `assert_to_test("assert f(2) == (1, 2)")` is `Call("f(2)", (1, 2), same_type=False)`.
    """
    try:
        (node,) = ast.parse(statement).body
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
            comparison = node.test
            if len(comparison.ops) == 1 and isinstance(comparison.ops[0], ast.Eq):
                expected = ast.literal_eval(comparison.comparators[0])
                return Call(ast.unparse(comparison.left), expected, same_type=False)
    except (SyntaxError, ValueError):
        pass
    return Assertion(statement)


def _batch(programs: Sequence[Program], limits: Limits) -> bytes:
    """The job of the runner; it leaves the expected values out."""
    jobs = [{"source": program.source, "tests": [_job(test) for test in program.tests]} for program in programs]
    bounds = {"seconds": limits.seconds, "memory_mb": limits.memory_mb, "output_bytes": limits.output_bytes,
              "file_mb": limits.file_mb, "workers": limits.parallel}
    return json.dumps({"limits": bounds, "programs": jobs}).encode()


def _job(test: Call | Assertion) -> dict[str, Any]:
    if isinstance(test, Assertion):
        return {"assertion": test.code, "setup": test.setup}
    return {"expression": test.expression, "arguments": dict(test.arguments)}


def _run_batch(batch: bytes, seconds: float) -> tuple[dict[int, dict[str, Any]], str]:
    """The reports by index of the program, and why some are missing."""
    try:
        with tempfile.TemporaryDirectory(prefix="dllm-rl-", ignore_cleanup_errors=True) as folder:
            output, trouble = _run_runner(batch, folder, seconds)
    except OSError as error:
        return {}, f"the sandbox could not start: {error}"
    reports = {}
    for line in output.split(b"\n")[:-1]:
        report = json.loads(line)
        reports[report["index"]] = report
    return reports, trouble


def _run_runner(batch: bytes, folder: str, seconds: float) -> tuple[bytes, str]:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(_RUNNER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=folder, env={}, start_new_session=True,
    ) as runner:
        try:
            output, errors = runner.communicate(batch, timeout=seconds)
        except subprocess.TimeoutExpired:
            runner.kill()
            return runner.communicate()[0], f"the batch did not finish within {seconds:g} s"
        except BaseException:  # an interrupt must not leave it behind
            runner.kill()
            raise
    reason = errors.decode(errors="replace").strip().split("\n")[-1]
    return output, f"the sandbox ended with code {runner.returncode} {reason}".strip()


def _judged(program: Program, report: Mapping[str, Any]) -> Outcome:
    """The outcome by the records of a child: for each test one record, in order, all of them genuine."""
    nothing = (False,) * len(program.tests)
    try:
        records = [(int(index), json.loads(text)) for index, _, text in (r.partition(" ") for r in report["records"])]
    except (ValueError, RecursionError):
        return Outcome("failed", nothing, "sent records that cannot be read")
    if records and records[0][0] == _CONFINEMENT_FAILED:
        return Outcome("infra_error", nothing, f"the program could not be confined: {records[0][1].get('error')}")
    source_failed = bool(records) and records[0][0] == _SOURCE_FAILED
    in_order = [index for index, _ in records] == list(range(len(records))) and len(records) <= len(program.tests)
    if report["forged"] or not (in_order or source_failed):
        return Outcome("failed", nothing, "sent records that are not the sandbox's")
    graded = [_grade(test, record) for test, (_, record) in zip(program.tests, records, strict=False)]
    passed = tuple(not error for error in graded) + nothing[len(graded):]
    first_error = next((error for error in graded if error), "")
    return _summed_up(passed, first_error, report)


def _summed_up(passed: tuple[bool, ...], error: str, report: Mapping[str, Any]) -> Outcome:
    if report["ending"] == "timeout" or report["code"] == -signal.SIGXCPU:  # by threads
        return Outcome("timeout", passed, error or "did not finish in time")
    if report["ending"] == "output":
        return Outcome("failed", (False,) * len(passed), "sent more than the sandbox accepts")
    if report["code"] != 0:
        return Outcome("failed", (False,) * len(passed), error or f"ended with code {report['code']}")
    if all(passed):
        return Outcome("ok", passed)
    return Outcome("failed", passed, error or "ended before its last test")


def _grade(test: Call | Assertion, record: Any) -> str:
    """What is wrong with the record of a test; empty for a pass."""
    if not isinstance(record, dict) or "value" not in record:
        return str(record.get("error") if isinstance(record, dict) else "")[:200] or "no value"
    if isinstance(test, Assertion):
        return "" if record["value"] is True else "the assertion did not hold"
    try:
        value = _decoded(record["value"])
        equal = _same(value, test.expected) if test.same_type else bool(value == test.expected)
        return "" if equal else f"{test.expression} is {str(value)[:100]}"
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        return f"the value cannot be read: {error}"


_CONTAINERS: Mapping[str, Callable[[Any], Any]] = {
    "tuple": lambda items: tuple(_decoded(item) for item in items),
    "set": lambda items: {_decoded(item) for item in items},
    "frozenset": lambda items: frozenset(_decoded(item) for item in items),
    "dict": lambda pairs: {_decoded(key): _decoded(item) for key, item in pairs},
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
}


def _decoded(value: Any) -> Any:
    """Plain data from its JSON form; the way there is `_encode` in sandbox_runner.py."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    return _CONTAINERS[kind](items)


def _same(value: Any, expected: Any) -> bool:
    """Equality that tells 1, 1.0 and True apart."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, (list, tuple)):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    return bool(value == expected)
