"""What the code tasks share: the program in a completion, its grade, and batches in which equal answers run once.

Example: "Sure:\\n```python\\ndef f(x): return x + 1\\n```" holds the program `def f(x): return x + 1`. If it passes three of
four tests, it is `wrong`, its `pass_rate` is 0.75, and its reward is 0 (`reward=all`) or 0.75 (`reward=fraction`).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from random import Random
from typing import TypeVar

from dllm_rl.errors import check
from dllm_rl.sandbox import Limits, Outcome, Program, run_programs
from dllm_rl.task import Prompt, Reward, Verdict

Answer = TypeVar("Answer", bound=Hashable)

REWARDS = ("all", "fraction")
VERDICTS: Mapping[str, Verdict] = {
    "ok": "correct", "failed": "wrong", "timeout": "timeout", "infra_error": "infra_error",
}
_PYTHON_BLOCK = re.compile(r"```[ \t]*(?:python|py)[0-9]?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_ANY_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_BEGIN, _DONE = "[BEGIN]", "[DONE]"


def check_reward(reward: object) -> None:
    """Raises `UserError` unless the field `reward` of a task names a way to pay for tests."""
    check(reward in REWARDS, "task.reward", reward, " or ".join(REWARDS))


def check_timeout(seconds: object) -> None:
    """Raises `UserError` unless the field `timeout_seconds` of a task is a sensible number of seconds."""
    fits = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds <= 600
    check(fits, "task.timeout_seconds", seconds, "a number above 0, at most 600")


def extract_code(completion: str, names: Collection[str] = ()) -> str:
    """The program in a completion; empty if there is none. A block that is cut off counts.

    It is the last fenced Python block, else the last fenced block, else what stands between `[BEGIN]` and `[DONE]`, else
    all of it. Blocks that define one of `names` go before those that do not, such as an example of use at the end.

    Example: the code of "Here it is: [BEGIN] 'def f(): pass' [DONE]" is "def f(): pass".
    """
    text = completion.replace("\r\n", "\n")
    for pattern in (_PYTHON_BLOCK, _ANY_BLOCK):
        blocks = pattern.findall(text)
        if blocks:
            defining = [block for block in blocks if any(_mentions_definition(block, name) for name in names)]
            return _trimmed((defining or blocks)[-1])
    if _BEGIN in text or _DONE in text:
        # An answer whose opening mark was given to the model begins after it.
        text = text.rpartition(_BEGIN)[2].partition(_DONE)[0].strip()
        if len(text) > 1 and text[0] == text[-1] == "'":
            text = text[1:-1]
    return _trimmed(text)


def _mentions_definition(block: str, name: str) -> bool:
    return re.search(rf"^(?:async )?(?:def|class) +{re.escape(name)}\b", block, re.MULTILINE) is not None


def _trimmed(code: str) -> str:
    """Without empty lines around it; the indentation of its first line may matter."""
    return re.sub(r"\A(?:[ \t]*\n)+", "", code).rstrip()


def fenced(code: str) -> str:
    """A program as a completion."""
    lines = "\n".join(line.rstrip() for line in code.replace("\r\n", "\n").strip().split("\n"))
    return f"```python\n{lines}\n```"


def is_program(source: str) -> bool:
    """Whether Python would compile the text."""
    try:
        with warnings.catch_warnings():  # what the compiler finds odd in an answer is no news for the terminal
            warnings.simplefilter("ignore")
            compile(source, "<answer>", "exec", dont_inherit=True)
    except Exception:  # SyntaxError, but also ValueError, MemoryError and RecursionError, by what the text is
        return False
    return True


def parsed(source: str) -> ast.Module | None:
    """The tree of the text, or None if it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except Exception:  # as above
        return None


def defined_names(source: str) -> set[str]:
    """The functions, classes and variables that the text binds at its top level; none if it is no Python."""
    tree = parsed(source)
    statements = tree.body if tree else []
    found = {node.name for node in statements if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in statements:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def shuffled(prompts: Sequence[Prompt], count: int, rng: Random) -> list[Prompt]:
    """`count` prompts, shuffled anew for every pass over them."""
    chosen: list[Prompt] = []
    while len(chosen) < count:
        chosen.extend(rng.sample(prompts, len(prompts)))
    return chosen[:count]


def grade(
    answers: Sequence[Answer | None], program: Callable[[Answer], Program], seconds: float, reward: str
) -> list[Reward]:
    """The grade of each answer, in order; None is a completion without code.

    Args:
        answers: everything that makes one program differ from another; equal answers run once.
        program: the program of an answer, with its tests.
        seconds: wall clock per program, its tests included.
        reward: one of `REWARDS`.
    """
    unique = list(dict.fromkeys(answer for answer in answers if answer is not None))
    outcomes = run_programs([program(answer) for answer in unique], Limits(seconds=seconds))
    graded = {answer: reward_of(outcome, reward) for answer, outcome in zip(unique, outcomes, strict=True)}
    return [no_answer(reward) if answer is None else graded[answer] for answer in answers]


def reward_of(outcome: Outcome, reward: str) -> Reward:
    """The grade of a program: `all` pays 1 if every test passes, `fraction` the share of the tests that do.

    Whatever it pays, the verdict is `correct` only if every test passes, and a program that ran out of time earns
    nothing. Where the value does not say whether all tests passed, the part `exact` does.
    """
    verdict = VERDICTS[outcome.status]
    exact, rate = float(verdict == "correct"), sum(outcome.passed) / len(outcome.passed)
    # Values of programs can hold halves of characters, which no file can.
    note = outcome.error.encode(errors="replace").decode() if verdict == "infra_error" else ""
    if reward == "all":
        return Reward(exact, verdict, {"pass_rate": rate}, note)
    return Reward(rate if verdict in ("correct", "wrong") else 0.0, verdict, {"pass_rate": rate, "exact": exact}, note)


def no_answer(reward: str) -> Reward:
    """The grade of a completion without code."""
    return Reward(0.0, "no_answer", {"pass_rate": 0.0} if reward == "all" else {"pass_rate": 0.0, "exact": 0.0})
