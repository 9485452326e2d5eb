"""Runs untrusted programs, such as a model's completions, and tells which of their tests pass.

    program = Program("def double(x):\n    return 2 * x", (Call("double(4)", 8), Call("double(x)", 6, {"x": 3})))
    run_programs([program])[0].status  # "ok"

Two processes per program, forked by a worker before it is known what the program is: one runs the program, the other
its tests (`sandboxing/`). They exchange plain data only. Expected values of a `Call` stay in this process; assertions
and the nonce that confirms a success stay in the tests' process, which never executes a line of the program.

Covered on every path:
* A program cannot pass by ending early (`sys.exit(0)`, `os._exit(0)`), printing, forging messages, returning objects
  whose `__eq__` lies, redefining builtins, or searching the frames and objects of its interpreter: nothing there knows
  what is expected. A success is a nonce of this process that comes back after the last test, and exit status 0.
* Endless loops, hangs inside C code and ignored signals: SIGKILL at a wall deadline.
* Memory, processor time, descriptors, core files and the size of a file are limited; printed text is thrown away and
  what a program may send back is capped.
* A failure of the sandbox itself is `infra_error`, never a failed program; a worker that dies is replaced and the program
  tried once more. Nothing is left behind, even when this process is killed.
* Linux on x86-64 and ARM: sockets, signals to other processes and the calls listed in `sandboxing/filter.py` are refused.

Covered with bubblewrap (Linux): programs see none of this machine's files but the system's libraries and Python's
standard library, read-only; no environment, network or other process. They write to a /tmp of 16 MB in memory that goes
with them. The number of processes and threads is limited (not where root may not change users or Python's library is
unreadable for others; before Linux 5.14 the limit counts all processes of an ordinary user, so that there may be none).

Not covered:
* Without bubblewrap, only if `sandbox.allow_unisolated` accepts it: a program can read and write the files that the user
  can; started by root, those of everybody, unless Python's library is readable for others, which lets programs run as
  a user without any rights. Total disk space is not limited. An ordinary user's programs cannot have threads; those of
  root that cannot change users have any number of processes. macOS limits neither memory nor processes that open a
  session of their own.
* The limit on memory is per process, so that a program may use it as often as it may have processes.
* Faults of the kernel.
"""

from __future__ import annotations

import ast
import json
import math
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from dllm_rl.errors import UserError, check
from dllm_rl.sandboxing import isolation, pool
from dllm_rl.sandboxing.codec import decode

Status = Literal["ok", "failed", "timeout", "infra_error"]

_SOURCE_FAILED = -1  # as in sandboxing/tester.py
_START_SECONDS = 30.0


def _is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


@dataclass
class SandboxConfig:
    """How programs are run in this process; `configure` puts it into effect.

    Example: `configure(SandboxConfig(workers=8, memory_mb=1024))`
    """

    allow_unisolated: bool = False
    """Whether programs may run where bubblewrap does not work, limited but not isolated."""
    workers: int | None = None
    """Programs that run at a time; null stands for one per processor."""
    memory_mb: int = 512
    """Address space of each process of a program; the interpreter itself takes about 30 MB of it."""
    processes: int = 16
    """Processes and threads of a program, itself included."""

    def __post_init__(self) -> None:
        check(isinstance(self.allow_unisolated, bool), "sandbox.allow_unisolated", self.allow_unisolated, "true or false")
        check(self.workers is None or _is_integer(self.workers, 1, 1024), "sandbox.workers", self.workers,
              "null or an integer from 1 to 1024")
        check(_is_integer(self.memory_mb, 64, 1 << 20), "sandbox.memory_mb", self.memory_mb, "an integer from 64 to 1048576")
        check(_is_integer(self.processes, 1, 1024), "sandbox.processes", self.processes, "an integer from 1 to 1024")


_config = SandboxConfig()


def configure(config: SandboxConfig) -> None:
    """Sets how all programs of this process are run from now on."""
    global _config
    _config = config


def close() -> None:
    """Ends the idle workers of this process, which otherwise end by themselves: soon, and at the latest with it."""
    pool.close_all()


@dataclass(frozen=True)
class Limits:
    """What a program, or a batch of them, may use."""

    seconds: float = 5.0
    """Wall clock per program; the limit on CPU time is the next whole second but one."""
    memory_mb: int | None = None
    """Address space of each process; None: as configured."""
    output_bytes: int = 65536
    """What a program may send back; more of it and the program has failed."""
    file_mb: int = 1
    """Size of one file."""
    workers: int | None = None
    """Programs that run at a time; None: as configured."""
    batch_seconds: float | None = None
    """Wall clock for the batch; what has not finished by then is `infra_error`. None: enough for all to time out."""

    @property
    def parallel(self) -> int:
        """How many programs run at a time."""
        return self.workers or _config.workers or os.cpu_count() or 1

    def batch_deadline(self, count: int) -> float:
        """Seconds after which a batch of `count` programs is given up."""
        if self.batch_seconds is not None:
            return self.batch_seconds
        return 20 + math.ceil(count / self.parallel) * (self.seconds + 1.5)


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
    """A test that passes when the code runs to its end and reaches at least one `assert`.

    The code runs in a process of its own, where the program's names are stand-ins. Calls take and return copies of plain
    data, so that the code does not see what a program does to its arguments. Other objects stay with the program: they
    can be called, passed back, indexed and iterated, have attributes, and are equal to nothing.

    Example: `Assertion("for n in range(9): assert is_even(2 * n)")`
    """

    code: str
    setup: str = ""
    """Trusted code that comes first; its names, like those of Python's builtins, hide those of the program."""


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
    """The outcome of each program, in their order. Never raises for anything that a program does.

    Raises UserError if programs cannot be isolated here and `sandbox.allow_unisolated` is not set.
    """
    if not programs:
        return []
    limits = limits or Limits()
    jobs = [{"source": program.source, "tests": [_job(test) for test in program.tests], "limits": _bounds(limits)}
            for program in programs]
    workers = pool.pool_of(_launch(_config.allow_unisolated))
    reports = pool.Batch(workers, jobs, limits.parallel, limits.batch_deadline(len(jobs))).run()
    return [_judged(program, report) for program, report in zip(programs, reports, strict=True)]


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


@lru_cache(maxsize=2)
def _launch(allow_unisolated: bool) -> isolation.Launch:
    """How workers are started in this process, found out once."""
    reason = "bubblewrap (bwrap) is not installed; install it (apt install bubblewrap)"
    if isolation.executable():
        for launch in isolation.launches():
            trouble = pool.pool_of(launch).try_out(_START_SECONDS)
            if not trouble:
                return launch
            reason = f"bubblewrap (bwrap) does not work here ({trouble}); mend that"
    if not allow_unisolated:
        raise UserError(f"sandbox: {reason} or accept programs that run without isolation with "
                        "sandbox.allow_unisolated=true")
    warnings.warn(f"programs run without isolation, because {reason.split(';')[0]}", stacklevel=3)
    return isolation.plain_launch()


def _job(test: Call | Assertion) -> dict[str, Any]:
    """What a worker is told of a test: never the expected value."""
    if isinstance(test, Assertion):
        return {"assertion": test.code, "setup": test.setup}
    return {"expression": test.expression, "arguments": dict(test.arguments)}


def _bounds(limits: Limits) -> dict[str, Any]:
    return {"seconds": limits.seconds, "memory_mb": limits.memory_mb or _config.memory_mb,
            "output_bytes": limits.output_bytes, "file_mb": limits.file_mb, "processes": _config.processes}


def _judged(program: Program, report: pool.Report) -> Outcome:
    """The outcome by the records of a tester: for each test one record, in order."""
    nothing = (False,) * len(program.tests)
    if report.ending == "infra":
        return Outcome("infra_error", nothing, report.trouble)
    if report.records and report.records[0]["test"] == _SOURCE_FAILED:
        return Outcome("failed", nothing, report.records[0]["error"])
    graded = [_grade(test, record) for test, record in zip(program.tests, report.records, strict=False)]
    passed = tuple(not error for error in graded) + nothing[len(graded):]
    return _summed_up(passed, next((error for error in graded if error), ""), report)


_ENDINGS = {"output": "sent more than the sandbox accepts", "garbage": "sent messages that are not the sandbox's",
            "killed": "the process of its tests was killed"}


def _summed_up(passed: tuple[bool, ...], error: str, report: pool.Report) -> Outcome:
    if report.ending == "timeout" or report.code == -signal.SIGXCPU:  # by threads
        return Outcome("timeout", passed, error or "did not finish in time")
    if report.ending in _ENDINGS:
        return Outcome("failed", (False,) * len(passed), _ENDINGS[report.ending])
    if report.code:
        return Outcome("failed", (False,) * len(passed), error or f"ended with code {report.code}")
    if all(passed) and report.confirmed:
        return Outcome("ok", passed)
    return Outcome("failed", passed, error or "ended before its last test")


def _grade(test: Call | Assertion, record: Mapping[str, Any]) -> str:
    """What is wrong with the record of a test; empty for a pass."""
    if "value" not in record:
        return str(record["error"]) or "no value"
    if isinstance(test, Assertion):
        return ""
    try:
        value = decode(json.loads(record["value"]))
        equal = _same(value, test.expected) if test.same_type else bool(value == test.expected)
        return "" if equal else f"{test.expression} is {str(value)[:100]}"
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        return f"the value cannot be read: {error}"


def _same(value: Any, expected: Any) -> bool:
    """Equality that tells 1, 1.0 and True apart."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, (list, tuple)):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    return bool(value == expected)
