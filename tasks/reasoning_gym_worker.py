"""The process that runs reasoning_gym: started by `dllm_rl.tasks.reasoning_gym` as a script, never imported by the package.

It reads one JSON request per line and answers each with one JSON line. It generates the questions as well as grading the
answers, because some generators depend on the order of sets: this process has a fixed hash seed.

Some graders evaluate the answer as Python. While grading, `eval` therefore refuses everything but literals, arithmetic
and a few functions of sympy. An alarm ends the process when a grader takes too long, also inside C code and also when
nobody waits for it any more.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 4 << 30
_FUNCTIONS = frozenset((
    "Integer", "Float", "Rational", "Symbol", "Abs", "exp", "log", "ln", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc",
    "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
))
_NODES = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
    ast.Name, ast.Load, ast.Call,
)
_NOT_A_NUMBER = re.compile(r"(?<![a-z])(nan|inf|infinity)(?![a-ik-z])", re.IGNORECASE)
_eval = builtins.eval


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return isinstance(node, _NODES)


def guarded_eval(source: Any, names: dict[str, Any] | None = None, local: Mapping[str, Any] | None = None) -> Any:
    """`eval` for literals, arithmetic and calls of `_FUNCTIONS`.

    Raises:
        ValueError: the source holds anything else, such as an attribute or `__import__`.
    """
    text = source.strip() if isinstance(source, str) else ""
    if not text or not all(map(_is_harmless, ast.walk(ast.parse(text, mode="eval")))):
        raise ValueError("not arithmetic")
    return _eval(text, {"__builtins__": {}} if names is None else names, local)


@contextlib.contextmanager
def _guarded(seconds: float) -> Iterator[None]:
    builtins.eval = guarded_eval
    signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles the alarm, so it ends this process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        builtins.eval = _eval


@lru_cache(maxsize=8)
def _dataset(name: str, params: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(params))


@lru_cache(maxsize=65536)
def _entry(name: str, params: str, seed: int, size: int, index: int) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = _dataset(name, params, seed, size)[index]
    return entry


def names(request: Mapping[str, Any]) -> Any:
    """The names of all generators; `composite` only mixes others."""
    del request
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def entries(request: Mapping[str, Any]) -> Any:
    """Questions and answers from `start` up to `stop`, None for those that the generator fails to make."""
    _dataset(*request["dataset"])
    return [_question(request["dataset"], index) for index in range(request["start"], request["stop"])]


def _question(dataset: list[Any], index: int) -> tuple[str, str | None] | None:
    try:
        entry = _entry(*dataset, index)
    except Exception:  # such as maze, which gives up after 1,000 attempts
        return None
    return entry["question"], entry["answer"]


def score(request: Mapping[str, Any]) -> Any:
    """The score of an answer, from 0 to 1, by the generator's own grader."""
    entry, answer = _entry(*request["dataset"], request["index"]), request["answer"]
    if entry["question"] != request["question"]:
        raise ValueError("the generator no longer makes this question")
    gold = entry["answer"] or ""
    if is_unearned(request["dataset"][0], answer, gold, entry["metadata"]):
        return 0.0
    with _guarded(request["seconds"]):
        value = float(_dataset(*request["dataset"]).score_answer(answer, entry))
    return max(0.0, min(1.0, value)) if value == value else 0.0


def is_unearned(name: str, answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a wrong answer would exploit a known hole of a grader of version 0.1.25.

    `complex_arithmetic` and `number_sorting` are content with "nan", `game_of_life_halting` with any text, and `puzzle24`
    with any four numbers. (The integrations are content with the question's own integral; `guarded_eval` refuses it.)
    """
    if _NOT_A_NUMBER.search(answer) and not _NOT_A_NUMBER.search(gold):
        return True
    if name == "game_of_life_halting":
        return answer.strip().casefold() != gold.strip().casefold()
    if name == "puzzle24":
        return sorted(map(int, re.findall(r"[0-9]+", answer)[:5])) != sorted(metadata["numbers"])
    return False


REQUESTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {"names": names, "entries": entries, "score": score}


def main() -> None:
    """Answers requests until the standard input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # generators and graders print
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # its reasoning_gym.py would hide the package
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # where the system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"value": REQUESTS[request["request"]](request)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
