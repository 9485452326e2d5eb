"""The process that runs untrusted programs: started by `dllm_rl.sandbox` as a script, never imported by the package.

It reads a batch as JSON from standard input, forks one confined child per program and writes one JSON line per finished
program to standard output. It reports how each child ended and which records carried the child's nonce; it judges
nothing and never learns an expected value, because every child is a copy of this process and can read its memory.
Forking is safe here, and cheap, because this interpreter has one thread and has imported next to nothing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import CodeType
from typing import Any, NoReturn

Send = Callable[[int, dict[str, Any]], None]

TICK_SECONDS = 0.02  # how late an end is noticed when it does not close the pipe: deadlines, and pipes held open
RESULT_FD = 3  # the only descriptor of a child besides 0 to 2, which are /dev/null
CONFINEMENT_FAILED = -2  # index of the record that says so; the grader's fault, not the program's
SOURCE_FAILED = -1  # index of the record that says so


class Child:
    """One running program."""

    def __init__(self, index: int, pid: int, pipe: int, nonce: str, deadline: float) -> None:
        self.index = index
        self.pid = pid
        self.pipe = pipe
        self.nonce = nonce.encode()
        self.deadline = deadline
        self.output = bytearray()
        self.code: int | None = None

    def read(self) -> bool:
        """Takes what the pipe holds, up to one buffer; False at its end."""
        try:
            chunk = os.read(self.pipe, 65536)
        except BlockingIOError:
            return True
        self.output += chunk
        return bool(chunk)

    def reap(self, flags: int) -> bool:
        """Whether the process has ended; waits for it unless `flags` say otherwise."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def ending(self, ready: bool, output_bytes: int) -> str | None:
        """Why this program is over (`exit`, `output`, `timeout`), or None while it may go on."""
        if ready and not self.read():
            return "exit"  # the kernel closes the pipe as the process ends; closing it by hand is an end as well
        if len(self.output) > output_bytes:
            return "output"
        if self.reap(os.WNOHANG):
            return "exit"
        return "timeout" if time.monotonic() > self.deadline else None

    def kill(self) -> None:
        """Kills the program and its process group; one that has already exited keeps its exit code."""
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.code is None:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)  # it may not have opened its session yet
        self.reap(0)

    def report(self, ending: str, output_bytes: int) -> dict[str, Any]:
        """What the parent process needs to grade this program. Lines without the nonce count as forged."""
        size = -1
        while size < len(self.output) <= output_bytes:
            size = len(self.output)
            self.read()
        os.close(self.pipe)
        lines = bytes(self.output).split(b"\n")[:-1]
        genuine = [line[len(self.nonce):].decode("ascii", "replace") for line in lines if line.startswith(self.nonce)]
        return {"index": self.index, "ending": ending, "code": self.code, "records": genuine,
                "forged": len(lines) - len(genuine)}


def main() -> None:
    """Runs the batch on standard input."""
    os.environ.clear()  # the interpreter itself sets LC_CTYPE
    batch = json.load(sys.stdin.buffer)
    limits = batch["limits"]
    waiting = list(enumerate(batch["programs"]))[::-1]
    adopts = _adopt_orphans()
    _warm_up()
    gc.freeze()  # children then share these pages instead of copying them
    selector = selectors.DefaultSelector()
    running: list[Child] = []
    while waiting or running:
        while waiting and len(running) < limits["workers"]:
            child = _start(*waiting.pop(), limits)
            running.append(child)
            selector.register(child.pipe, selectors.EVENT_READ, child)
        ready = {key.data for key, _ in selector.select(TICK_SECONDS)}
        for child in list(running):
            ending = child.ending(child in ready, limits["output_bytes"])
            if ending:
                running.remove(child)
                selector.unregister(child.pipe)
                child.kill()
                if adopts:
                    _kill_orphans({other.pid for other in running})
                _write(child.report(ending, limits["output_bytes"]))


def _warm_up() -> None:
    """Runs a program of our own: what the interpreter prepares at first use, children inherit; it saves a third."""
    send = _sender(nonce="", write=lambda _, line: len(line))
    _perform("def f(x):\n    return x", [{"expression": "f(x)", "arguments": {"x": [1]}}], send)


def _write(report: dict[str, Any]) -> None:
    line = memoryview(json.dumps(report).encode() + b"\n")
    while line:
        line = line[os.write(1, line):]


def _prctl(option: int, value: int) -> bool:
    """Whether the Linux call prctl(option, value) succeeded."""
    return sys.platform == "linux" and _c_library().prctl(option, value, 0, 0, 0) == 0


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _adopt_orphans() -> bool:
    """Makes processes that leave their session children of this one, so that they can be found; False if impossible."""
    _prctl(4, 0)  # PR_SET_DUMPABLE: without privileges, children cannot open /proc/<runner>/fd or its memory
    return _prctl(36, 1) and os.path.exists(_children_file())  # PR_SET_CHILD_SUBREAPER


def _children_file() -> str:
    return f"/proc/self/task/{os.getpid()}/children"


def _kill_orphans(known: set[int]) -> None:
    """Kills what a finished program left behind; killing an orphan may orphan its own children, hence the rounds."""
    for _ in range(1000):
        with open(_children_file()) as file:
            orphans = {int(pid) for pid in file.read().split()} - known
        if not orphans:
            return
        for pid in orphans:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _start(index: int, program: dict[str, Any], limits: dict[str, Any]) -> Child:
    folder, nonce = str(index), os.urandom(16).hex()
    os.mkdir(folder)
    read_end, write_end = os.pipe()
    runner = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run_child(program, _sender(nonce), lambda: _confine(folder, write_end, runner, limits), os._exit)
    os.close(write_end)
    os.set_blocking(read_end, False)
    return Child(index, pid, read_end, nonce, time.monotonic() + limits["seconds"])


# What follows runs in the child.


def _sender(nonce: str, write: Callable[[int, bytes], int] = os.write) -> Send:
    """Writes one record; the closure is the only place of the child that holds the nonce on purpose."""
    dumps = json.dumps

    def send(index: int, record: dict[str, Any]) -> None:
        line = f"{nonce}{index} {dumps(record)}\n".encode()
        while line:
            line = line[write(RESULT_FD, line):]

    return send


def _run_child(program: dict[str, Any], send: Send, confine: Callable[[], None],
               leave: Callable[[int], NoReturn]) -> NoReturn:
    """Never returns, whatever the program does; `leave` is os._exit as it was before the program could replace it."""
    code = 1
    try:
        try:
            confine()
        except BaseException as error:
            send(CONFINEMENT_FAILED, _failure(error))
        else:
            _perform(program["source"], program["tests"], send)
        code = 0
    finally:
        leave(code)


def _confine(folder: str, pipe: int, runner: int, limits: dict[str, Any]) -> None:
    """Own session, own folder, no descriptor but the result pipe, limited resources."""
    os.dup2(pipe, RESULT_FD)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    # Descriptors are given out lowest first: the runner cannot have any beyond this bound.
    os.closerange(RESULT_FD + 1, 16 + 2 * limits["workers"])
    os.setsid()
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the runner
    if os.getppid() != runner:
        raise OSError("the runner has ended")
    os.chdir(folder)
    cpu_seconds = math.ceil(limits["seconds"]) + 1
    memory = limits["memory_mb"] << 20
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)  # SIGXCPU, then SIGKILL
    bounds = {"AS": memory, "DATA": memory, "FSIZE": limits["file_mb"] << 20, "NOFILE": 32, "CORE": 0, "NPROC": 0}
    for name, bound in bounds.items():
        _limit(getattr(resource, f"RLIMIT_{name}"), bound, bound)


def _limit(kind: int, soft: int, hard: int) -> None:
    most = resource.getrlimit(kind)[1]
    if most != resource.RLIM_INFINITY:
        soft, hard = min(soft, most), min(hard, most)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (ValueError, OSError):
        if sys.platform != "darwin":  # macOS refuses limits on address space
            raise


def _perform(source: str, tests: list[dict[str, Any]], send: Send) -> None:
    """Executes the program, then each test; one record for each test, or one that says why there are none."""
    module = type(sys)("program")
    sys.modules["program"] = module  # dataclasses and enum look their module up
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        send(SOURCE_FAILED, _failure(error))
        return
    for index, test in enumerate(tests):
        try:
            check = _evaluate if "expression" in test else _assert
            record = {"value": check(test, dict(module.__dict__))}
        except BaseException as error:
            record = _failure(error)
        send(index, record)


def _failure(error: BaseException) -> dict[str, Any]:
    try:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    except BaseException:  # the message of an exception is the program's code as well
        return {"error": "an exception without a message"}


def _evaluate(test: dict[str, Any], namespace: dict[str, Any]) -> Any:
    return _encode(eval(_compiled(test["expression"]), {**namespace, **test["arguments"]}))


@cache
def _compiled(expression: str) -> CodeType:
    """Compiling is most of the cost of a tiny program, and its tests often share one expression."""
    return compile(expression, "<test>", "eval", dont_inherit=True)


def _assert(test: dict[str, Any], namespace: dict[str, Any]) -> bool:
    """Runs assertions, counting those that are reached; the counter has a name that the program cannot guess."""
    import ast

    name = f"_{os.urandom(8).hex()}"
    reached: list[None] = []

    class CountAssertions(ast.NodeTransformer):
        def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
            return [node, ast.Expr(ast.Call(ast.Name(name, ast.Load()), [ast.Constant(None)], []))]

    tree = ast.fix_missing_locations(CountAssertions().visit(ast.parse(test["assertion"])))
    names = {**namespace, name: reached.append}
    exec(compile(test["setup"], "<setup>", "exec", dont_inherit=True), names)
    exec(compile(tree, "<test>", "exec", dont_inherit=True), names)
    if not reached:
        raise ValueError("no assertion was executed")
    return True


def _encode(value: Any) -> Any:
    """Plain data as JSON, keeping what JSON would lose; `dllm_rl.sandbox` holds the way back."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [_encode(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"the value is no plain data but of type {type(value).__name__}")


if __name__ == "__main__":
    main()
