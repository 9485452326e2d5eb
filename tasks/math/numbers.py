"""Reading the number that answers a question out of free text.

Example (the gold answer of the first test row of GSM8K, openai/grade-school-math, MIT):

    She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer's market.
    #### 18

`1,000`, `18.0`, `$18`, `18.` and `50%` are read as numbers, and values are compared exactly.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dllm_rl.tasks.math.extraction import MAX_CHARACTERS, final_text
from dllm_rl.tasks.math.latex import MAX_ANSWER, cleaned, without_text
from dllm_rl.tasks.math.quantities import NO_UNITS, quantity

MAX_DIGITS = 40
"""A longer numeral answers no question; converting huge ones is slow, and beyond 4,300 digits Python refuses."""

# The minus is a sign unless something that could be an operand stands before it: 16-3 holds 16 and 3, not -3.
_MINUS = r"(?:(?<![\w)\]}%.])-)?"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(rf"({_MINUS})\$?({_MINUS})({_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:/([0-9]+))?")
_PROSE = re.compile(r"(?:[A-Za-z\s.,:;'$%]|(?<=[A-Za-z])-(?=[A-Za-z]))*")
_CHANGED = re.compile(r"[0-9.,] ?[KkM]\b|\bor\b")  # thousands, millions, alternatives


def final_answer(text: str) -> Fraction | None:
    r"""The number a text ends on, or None.

    It is the one number of its final answer (see `final_text`), else the last of all.

    Example: `final_answer("so she has \\boxed{1,000} left, not 7")` is 1000.
    """
    final = final_text(text)
    return last_number(text) if final is None else number_of(final)


def number_of(answer: str) -> Fraction | None:
    r"""The one number that an answer is, or holds among nothing but words; what stands before an `=` does not count.

    Example: `number_of("9 \\times 2 = 18 \\text{ eggs}")` is 18, and of `3 or 4` there is none.
    """
    answer = answer.replace("**", "").replace("`", "").replace("≈", "")
    *before, side = answer.split("=")
    if _CHANGED.search(answer):
        return None
    whole = quantity(cleaned(side)) if len(side) <= MAX_ANSWER else None
    if whole is not None:
        others = [quantity(cleaned(other)) for other in before if len(other) <= MAX_ANSWER]
        return whole.value if all(other is None or other.value == whole.value for other in others) else None
    found = _numbers(without_text(side))
    if len(found) != 1:
        return None
    start, end = found[0].string[:found[0].start()], found[0].string[found[0].end():]
    if start[-1:].isalpha() or end[:1].isalpha():
        return None
    words = f"{start} {end}"
    is_prose = _PROSE.fullmatch(words) and (NO_UNITS | {"negative"}).isdisjoint(words.lower().split())
    return _value(found[0]) if is_prose else None


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

