"""A program that runs in another process, as its tests see it.

`Call` expressions are passed on to the program's process. Assertions run here, in a process that never executes a line
of the program, with the program's names as stand-ins: calling one sends plain data over and gets plain data back. An
object that is no plain data stays over there, and what comes back is a `Handle`, which equals nothing but itself.
"""

from __future__ import annotations

import ast
import builtins
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from dllm_rl.sandboxing.codec import decode, encode, frame, read_frame

SOURCE_FAILED = -1  # index of the record that says that the program itself raised an exception


class Ended(BaseException):
    """The program's process will answer no more. No test can catch it for good: every further request raises it."""


class Remote:
    """The program's process, as seen from here."""

    def __init__(self, channel: socket.socket, seconds: float, output_bytes: int) -> None:
        self.channel = channel
        self.deadline = time.monotonic() + seconds
        self.budget = output_bytes
        self.ending: str | None = None
        """Why it answers no more: `exit`, `timeout` or `output`."""

    def ask(self, *request: Any) -> Any:
        """The JSON form of the reply to a request."""
        if self.ending is None:
            try:
                self.tell(*request)
                return read_frame(self._read, self.budget)
            except TimeoutError:
                self.ending = "timeout"
            except OverflowError:
                self.ending = "output"
            except (EOFError, OSError):
                self.ending = "exit"
        raise Ended(self.ending)

    def tell(self, *request: Any) -> None:
        """Sends a request without waiting for its reply."""
        self._wait_no_longer_than_allowed()
        self.channel.sendall(frame(request))

    def value(self, *request: Any) -> Any:
        """The value that a request yields here; what it raises over there, it raises here."""
        reply = self.ask(*request)
        if "error" in reply:
            raise _exception(*reply["error"])
        return decode(reply["value"], lambda number: Handle(self, int(number)))

    def operate(self, operation: str, *operands: Any) -> Any:
        """The result of an operation on operands of this side, handles among them."""
        return self.value(operation, *(encode(operand, self._number) for operand in operands))

    def _number(self, operand: Any) -> int:
        if type(operand) is Handle and operand._remote is self:
            return operand._number
        raise TypeError(f"the program cannot be handed an object of type {type(operand).__name__}")

    def _read(self, most: int) -> bytes:
        self._wait_no_longer_than_allowed()
        data = self.channel.recv(most)
        self.budget -= len(data)
        return data

    def _wait_no_longer_than_allowed(self) -> None:
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self.channel.settimeout(seconds)


class Handle:
    """An object of the program's process. Using it is done over there; it is never equal to anything of this side."""

    __slots__ = ("_number", "_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        self._remote, self._number = remote, number

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._remote.operate("call", self, list(arguments), options)

    def __getattr__(self, name: str) -> Any:
        return self._remote.operate("attribute", self, name)

    def __iter__(self) -> Iterator[Any]:
        return self._remote.operate("iterate", self)

    def __next__(self) -> Any:
        return self._remote.operate("next", self)

    def __getitem__(self, key: Any) -> Any:
        return self._remote.operate("item", self, key)

    def __contains__(self, item: Any) -> bool:
        return bool(self._remote.operate("contains", self, item))

    def __len__(self) -> int:
        return int(self._remote.operate("length", self))

    def __bool__(self) -> bool:
        return bool(self._remote.operate("truth", self))


class Names(dict[str, Any]):
    """The names of a test: its own, those of Python, then those of the program, so that no program redefines `abs`."""

    def __init__(self, remote: Remote) -> None:
        super().__init__(__name__="test")
        self._remote = remote

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        try:
            return self._remote.value("global", name)
        except NameError:
            raise KeyError(name) from None


def run_tests(remote: Remote, source: str, tests: list[dict[str, Any]], report: Callable[[dict[str, Any]], None]) -> bool:
    """Executes the program, then its tests, and reports each. True if all had a value, and assertions held.

    Values are reported as JSON in JSON: who reads reports need not be able to read what a program has made up.
    """
    try:
        executed = remote.ask("execute", source)
        if "error" in executed:
            report({"test": SOURCE_FAILED, "error": _message(executed)})
            return False
        good = True
        for index, test in enumerate(tests):
            record = _record(remote, test)
            report({"test": index, **record})
            good = good and "value" in record
        return good and remote.ending is None
    except Ended:
        return False
    except Exception:  # it wrote something of its own to the channel
        remote.ending = "garbage"
        return False


def _record(remote: Remote, test: dict[str, Any]) -> dict[str, Any]:
    if "expression" in test:
        reply = remote.ask("evaluate", test["expression"], test["arguments"])
        return {"error": _message(reply)} if "error" in reply else {"value": json.dumps(reply["value"])}
    try:
        run_assertion(test["assertion"], test["setup"], Names(remote))
    except Ended:
        raise
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    if remote.ending:  # the test has caught it
        raise Ended(remote.ending)
    return {"value": "true"}


def run_assertion(code: str, setup: str, names: dict[str, Any]) -> None:
    """Runs a test and raises ValueError if it reached no `assert`; the counter has a name that occurs nowhere."""
    tree = ast.parse(code)
    counter = "_reached"
    while counter in code or counter in setup:
        counter += "_"
    reached: list[None] = []
    tree = ast.fix_missing_locations(_CountAssertions(counter).visit(tree))
    names[counter] = lambda: reached.append(None)
    exec(compile(setup, "<setup>", "exec", dont_inherit=True), names)
    exec(compile(tree, "<test>", "exec", dont_inherit=True), names)
    if not reached:
        raise ValueError("no assertion was executed")


class _CountAssertions(ast.NodeTransformer):
    def __init__(self, counter: str) -> None:
        self.counter = counter

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [node, ast.Expr(ast.Call(ast.Name(self.counter, ast.Load()), [], []))]


def _exception(name: str, message: str) -> Exception:
    """The builtin exception of that name, so that a test can expect it; anything else is a plain `Exception`."""
    kind = getattr(builtins, str(name), None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # such as UnicodeDecodeError, which wants five arguments
            pass
    return Exception(f"{name}: {message}")


def _message(reply: dict[str, Any]) -> str:
    name, message = reply["error"]
    return f"{name}: {message}"[:200]
