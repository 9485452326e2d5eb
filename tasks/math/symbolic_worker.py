r"""The process in which math-verify compares two answers; `symbolic.py` starts it and holds the deadline.

One line of JSON comes in and one goes out. The first line in has the search path for imports and the limits, and the
answer to it is "ready" or the reason why not. Every further one is a pair such as `["3\\sqrt{13}", "\\sqrt{117}"]`, the
right answer first, and the answer to it is true or false.

No process is left behind: a worker ends when its input does, when its parent is gone, and, by an alarm of the kernel that
stops even C code, a little after the deadline of a pair.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

PARENT_CHECK_SECONDS = 5.0
GRACE_SECONDS = 2.0


def main() -> None:
    """Answers one line after the other."""
    output = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    lines = _lines(os.getppid())
    setup = json.loads(next(lines))
    try:
        _limit(setup["memory_mb"])
        sys.path[:] = setup["path"]
        equal = _comparison()
    except Exception as error:  # the parent tells the user
        _send(output, f"{type(error).__name__}: {error}")
        return
    _send(output, "ready")
    for line in lines:
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"] + GRACE_SECONDS)
        try:
            result = equal(*json.loads(line))
        except MemoryError:
            return
        except Exception:  # neither is what math-verify can read
            result = False
        _send(output, result)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _lines(parent: int) -> Iterator[bytes]:
    """The lines of the input, until it ends or the parent is gone."""
    kept = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], PARENT_CHECK_SECONDS)[0]:
            continue
        read = os.read(0, 65536)
        if not read:
            return
        *complete, kept = (kept + read).split(b"\n")
        yield from complete


def _send(output: int, value: Any) -> None:
    os.write(output, json.dumps(value).encode() + b"\n")


def _limit(memory_mb: int) -> None:
    import resource

    for kind, size in ((resource.RLIMIT_AS, memory_mb << 20), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (size, size))


def _comparison() -> Callable[[str, str], bool]:
    """math-verify without its own deadlines, which need the main thread of the caller."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    logging.disable(logging.CRITICAL)
    # Units are off: math-verify would take the h of 2h for hours.
    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
    reading = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=normal)]

    def parsed(text: str) -> list[Any]:
        return parse(f"\\boxed{{{text}}}", reading, fallback_mode="no_fallback", parsing_timeout=None)

    def equal(gold: str, answer: str) -> bool:
        # Ten decimals: with the six of math-verify 0.000067 would be .0000672.
        expected, given = parsed(gold), parsed(answer)
        same = verify(expected, given, float_rounding=10, allow_set_relation_comp=True, timeout_seconds=None)
        return bool(same) and _are_close(expected[0], given[0])

    equal("\\sqrt{x+1}", "y^2")  # the first pair would otherwise pay for what is loaded on use
    return equal


def _are_close(one: Any, other: Any) -> bool:
    """False for two numbers that differ, however small they are; math-verify takes 1/2^98 and 2/2^98 for equal."""
    try:
        left, right = complex(one.evalf(30)), complex(other.evalf(30))
        difference, size = abs(left - right), max(abs(left), abs(right))
    except (AttributeError, TypeError, ValueError, OverflowError):
        return True  # not two numbers that a float can hold
    return not math.isfinite(size) or difference <= 1e-9 * size


if __name__ == "__main__":
    main()
