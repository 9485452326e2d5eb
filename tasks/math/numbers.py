"""Reading the number that answers a question out of free text.

Example (the gold answer of the first test row of GSM8K, openai/grade-school-math, MIT):

    She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer's market.
    #### 18

`1,000`, `18.0`, `$18`, `18.` and `50%` are read as numbers, and values are compared exactly.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 20_000
"""Only the end of a text is read: answers come last, and a longer text must not slow grading down."""
MAX_DIGITS = 40
"""A longer numeral answers no question; converting huge ones is slow, and beyond 4,300 digits Python refuses."""

# The minus is a sign unless something that could be an operand stands before it: 16-3 holds 16 and 3, not -3.
_MINUS = r"(?:(?<![\w)\]}%.])-)?"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(rf"({_MINUS})\$?({_MINUS})({_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:/([0-9]+))?")
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def final_answer(text: str) -> Fraction | None:
    r"""The number a text ends on, or None.

    It is the one number inside the last `\boxed{...}`, else the first number after the last `####`, else the last
    number of all.

    Example: `final_answer("so she has \\boxed{1,000} left, not 7")` is 1000.
    """
    text = text[-MAX_CHARACTERS:]
    box = last_boxed(text)
    if box is not None:
        found = _numbers(box)
        return _value(found[0]) if len(found) == 1 else None
    _, mark, tail = text.rpartition("####")
    found = _numbers(tail)
    return _value(found[0 if mark else -1]) if found else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text, or None.

    Example: `last_number("5 - 3 = 2")` is 2.
    """
    found = _numbers(text[-MAX_CHARACTERS:])
    return _value(found[-1]) if found else None


def _numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(_plain(text)))


def _plain(text: str) -> str:
    """The text without the ways in which LaTeX and Unicode dress numbers up."""
    for dressed, plain in (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\$", "$"), ("−", "-")):
        text = text.replace(dressed, plain)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a number; None where it has too many digits or divides by zero."""
    sign, inner_sign, numeral, divisor = match.groups()
    if len(numeral) > MAX_DIGITS or len(divisor or "") > MAX_DIGITS or (divisor and int(divisor) == 0):
        return None
    value = Fraction(numeral.replace(",", "")) / int(divisor or 1)
    return -value if (sign or inner_sign) else value


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last `\boxed{...}` whose braces balance, or None.

    Example: `last_boxed("\\boxed{\\frac{1}{2}}")` is `\frac{1}{2}`.
    """
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0] == "{" or match[0].startswith("\\boxed"):
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            start, boxed = opened.pop()
            if boxed and (last is None or start > last[0]):
                last = (start, match.start())
    return None if last is None else text[last[0]:last[1]]
