"""The program's own process: executes it, then does what the tester asks, one request at a time.

Whatever the program does to this process, all it can change is the plain data that goes back and its own exit status;
neither the tests nor the nonce ever come here.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, ModuleType
from typing import Any

from dllm_rl.sandboxing.codec import decode, encode


class Session:
    """A program under test. Requests name a method and carry its operands in their JSON form."""

    def __init__(self) -> None:
        self.module = ModuleType("program")
        sys.modules["program"] = self.module  # dataclasses and enum look their module up
        self.objects: list[Any] = []
        self.operations: dict[str, Callable[..., Any]] = {
            "execute": self.execute, "global": self.name, "call": _call, "attribute": getattr, "iterate": iter,
            "next": next, "length": len, "item": lambda target, key: target[key], "truth": bool,
            "contains": lambda target, item: item in target,
        }

    def answer(self, request: Any) -> dict[str, Any]:
        """The reply: a value, or the name and the message of an exception."""
        try:
            operation, *operands = request
            if operation == "evaluate":  # the value is for the caller's process, where an object would be of no use
                return {"value": encode(self.evaluate(*operands))}
            operands = [decode(operand, self.objects.__getitem__) for operand in operands]
            return {"value": encode(self.operations[operation](*operands), self.keep)}
        except BaseException as error:
            return failure(error)

    def keep(self, value: Any) -> int:
        """A number for an object, by which the tester can refer to it."""
        self.objects.append(value)
        return len(self.objects) - 1

    def execute(self, source: str) -> None:
        """Runs the program itself."""
        exec(compile(source, "<program>", "exec", dont_inherit=True), self.module.__dict__)

    def evaluate(self, expression: str, arguments: dict[str, Any]) -> Any:
        """The value of an expression over the names of the program and the arguments (JSON values)."""
        return eval(_compiled(expression), {**self.module.__dict__, **arguments})

    def name(self, name: str) -> Any:
        """The value of one of the program's names."""
        try:
            return self.module.__dict__[name]
        except KeyError:
            raise NameError(f"name '{name}' is not defined") from None


def end_normally() -> None:
    """What an interpreter does at its end: waits for threads that are no daemons, then calls the exit functions."""
    threading = sys.modules.get("threading")
    if threading:
        threading._shutdown()
    atexit._run_exitfuncs()


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as a reply."""
    name = type(error).__name__
    try:
        return {"error": [name, str.__str__(str(error))[:200]]}
    except BaseException:  # the message of an exception is the program's code as well
        return {"error": [name, "an exception without a message"]}


def _call(target: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    return target(*arguments, **options)


@cache
def _compiled(expression: str) -> CodeType:
    """Compiling is most of the cost of a tiny program, and its tests often share one expression."""
    return compile(expression, "<test>", "eval", dont_inherit=True)
