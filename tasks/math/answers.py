r"""Comparing a final answer with the right one, exactly and at once, where that can be done for certain.

Example (a row of MATH500; hendrycks/math, MIT): the right answer is `\left( \frac{3}{2}, -13 \right)`; `(1.5,-13)` is
right, `(-13, 3/2)` and `(\frac32, -13, 0)` are wrong, and `(\sqrt{9/4}, -13)` is undecided: `symbolic` has to work it out.

What counts, where opinions differ (these follow the conventions of MATH and its own grader):

* A unit, a currency or a degree sign may be missing or added; two that contradict, such as cm and inches, are wrong.
* A percent sign may be missing or added: for 50, `50\%` is right. For 0.5, `50\%` is right as well, but for `50\%`,
  0.5 is not, since a question about percent reads it as half a percent.
* Where the right answer is a number, the answer must be one as well: an integer, a decimal, a fraction, a mixed number
  or a numeral times a power of ten. `3^5 \cdot 7` may be the question itself, copied into the box, and is wrong.
* Fractions need not be in lowest terms, decimals must be exact, and `x = 5` is 5. Of
  several sides of an equation the last must be the number, and no other one a different number.
* A list without brackets or in braces has no order; a tuple or an interval has, and its brackets count. Exactly as many
  elements as there should be: a subset is wrong, and so is "3 or 4".
* The digits of a number in another base may come without the base.
* Words are compared without case, punctuation and article.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from dllm_rl.tasks.math.latex import MAX_ANSWER, Items, cleaned, depth, items, squeezed, without_text
from dllm_rl.tasks.math.quantities import Quantity, contradict, quantity, split_unit

Decision = Literal["right", "wrong", "undecided"]

MAX_DEPTH = 12
"""An answer whose brackets nest deeper is wrong; those of MATH nest 3 deep at most."""

_TEXT_ONLY = re.compile(r"\\text ?\{([^{}]*)\}")
_NAME = re.compile(r"(?:[A-Za-z]|\\[a-zA-Z]+)(?:_[A-Za-z0-9]|_\{[^{}]*\})?(?: ?\( ?[A-Za-z0-9]+ ?\))?")
_BASED = re.compile(r"(-?)([A-Z]*[0-9][0-9A-Z]*)_\{?([0-9]+)\}?")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|not|approx|equiv)(?![a-zA-Z])|!=|,|;|\\text")
_SIMPLE_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_BASE_NAMES = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def compare(gold: str, answer: str, question: str = "") -> Decision:
    r"""Whether an answer agrees with the right one. Never raises, and takes no longer than a fraction of a millisecond.

    Example: `compare("\\frac{3}{2}", "1.50")` is `right`.

    Args:
        gold: the right answer.
        answer: what a completion gives.
        question: the text of the problem, which says whether a number is meant in another base.
    """
    if len(answer) > MAX_ANSWER or depth(answer) > MAX_DEPTH:
        return "wrong"
    return _compare(cleaned(gold), cleaned(answer), question)


def symbolic_form(text: str) -> str:
    """An answer as `symbolic` should see it: cleaned, and without its unit."""
    return split_unit(cleaned(text))[0]


def is_echo(gold: str, answer: str, question: str) -> bool:
    r"""Whether an answer is an expression of the question, copied though it is not written like the right answer.

    It has the right value wherever a question says "simplify", "factor" or "compute", so algebra alone would reward it.

    Example: `is_echo("3\\sqrt{13}", "\\sqrt{117}", "Simplify $\\sqrt{117}$.")` is True.
    """
    copied = _loose(answer)
    has_operation = re.search(r".[-+*/^]|\\(?!pi|circ|infty)[a-z]", copied) is not None
    return has_operation and copied != _loose(gold) and copied in _loose(question)


def _loose(text: str) -> str:
    return _SIMPLE_FRACTION.sub(r"\1/\2", squeezed(cleaned(text))).replace(" ", "")


def _compare(gold: str, answer: str, question: str) -> Decision:
    if not answer:
        return "wrong"
    same_kind = (quantity(gold) is None) == (quantity(answer) is None)  # 58, 500 is not 58,500
    if same_kind and squeezed(gold) == squeezed(answer):
        return "right"
    for rule in _RULES:
        decision = rule(gold, answer, question)
        if decision != "undecided":
            return decision
    return "undecided"


def _judged(right: bool) -> Decision:
    return "right" if right else "wrong"


def _by_words(gold: str, answer: str, question: str) -> Decision:
    r"""Answers such as `\text{Evelyn}`, `\text{(C)}`, `\text{A, B}`, or a plain `C`."""
    del question
    text = _TEXT_ONLY.fullmatch(gold)
    if quantity(gold) or not (text or re.fullmatch(r"\(?[A-Z]\)?(?:, ?[A-Z])*", gold)):
        return "undecided"
    expected, given = _words(text[1] if text else gold), _words(without_text(answer))
    letters = all(len(word) == 1 for word in expected)
    # Letters in alphabetical order are a choice of several; otherwise their order may be the answer.
    if expected == given or (letters and expected == sorted(expected) == sorted(given)):
        return "right"
    return "wrong" if text else "undecided"


def _words(text: str) -> list[str]:
    kept = "".join(character if character.isalnum() else " " if character in ",- " else "" for character in text.casefold())
    words = kept.split()
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") and len(words[1]) > 1 else words


def _by_base(gold: str, answer: str, question: str) -> Decision:
    """Numbers in another base, such as `52_8`."""
    expected = _BASED.fullmatch(squeezed(without_text(gold)))
    given = _BASED.fullmatch(squeezed(without_text(answer)))
    if expected is None and given is None:
        return "undecided"
    if expected is None:
        plain = given is not None and squeezed(gold) == given[1] + given[2]
        return _judged(plain) if given and _is_in_base(question, given[3]) else "undecided"
    if given is None:
        return _judged(squeezed(without_text(answer)) == expected[1] + expected[2])
    return _judged(expected.groups() == given.groups())


def _is_in_base(question: str, base: str) -> bool:
    name = _BASE_NAMES[int(base)] if len(base) < 3 and int(base) < len(_BASE_NAMES) else base
    return base == "10" or re.search(rf"(?i)base[\s$-]*(?:{base}|{name or base})\b", question) is not None


def _by_number(gold: str, answer: str, question: str) -> Decision:
    """Right answers that are one number, such as `x=5`, `\\$18.90` or `0.56 = 56\\%`."""
    del question
    name, sides = _sides(gold)
    expected = [quantity(side) for side in sides]
    if not expected or None in expected:
        return "undecided"
    given_name, given_sides = _sides(answer)
    given = [quantity(side) for side in given_sides]
    if not given or given[-1] is None or (name and given_name and squeezed(name) != squeezed(given_name)):
        return "wrong"
    return _judged(all(any(_agree(side, one) for side in expected if side) for one in given if one))


def _sides(text: str) -> tuple[str, list[str]]:
    """What stands between the `=` of a text, after the name at its start; nothing where `=` does not make it a value."""
    *rest, last = (side.strip() for side in text.split("="))
    if any(_RELATION.search(side) or side.endswith("!") for side in rest):
        return "", []
    name = rest[0] if rest and _NAME.fullmatch(rest[0]) else ""
    return name, [*rest[bool(name):], last]


def _agree(expected: Quantity, given: Quantity) -> bool:
    if given.unit == "%" and expected.unit == "":
        return expected.value in (given.value, given.value / 100)
    return expected.value == given.value and not contradict(expected.unit, given.unit)


def _by_unit(gold: str, answer: str, question: str) -> Decision:
    r"""Units behind an expression, such as `12\pi \text{ cm}`."""
    del question
    (expected, unit), (given, given_unit) = split_unit(gold), split_unit(answer)
    if contradict(unit, given_unit):
        return "wrong"
    return "right" if squeezed(expected) == squeezed(given) else "undecided"


def _by_items(gold: str, answer: str, question: str) -> Decision:
    """Lists, tuples and intervals, element by element."""
    expected, given = items(gold), items(answer)
    if len(expected.items) < 2:
        return "undecided"
    if _is_set(expected) and _is_set(given):
        return _same_elements(expected.items, given.items, question)
    if len(expected.items) != len(given.items) or _is_set(expected):
        return "undecided"
    if not _is_set(given) and (expected.opening, expected.closing) != (given.opening, given.closing):
        return "wrong"
    pairs = [_compare(one, other, question) for one, other in zip(expected.items, given.items, strict=True)]
    return "wrong" if "wrong" in pairs else "undecided" if "undecided" in pairs else "right"


def _is_set(listed: Items) -> bool:
    return listed.opening in ("", "\\{") and listed.closing in ("", "\\}")


def _same_elements(expected: Sequence[str], given: Sequence[str], question: str) -> Decision:
    """The elements of two sets, in any order."""
    if len(expected) != len(given):
        numbers = all(map(quantity, expected)) and all(quantity(_sides(item)[1][-1]) for item in given if _sides(item)[1])
        return "wrong" if numbers else "undecided"
    left, certain = list(given), True
    for one in expected:
        decisions = [_compare(one, other, question) for other in left]
        certain = certain and "undecided" not in decisions
        if "right" in decisions:
            left.pop(decisions.index("right"))
    return "right" if not left else "wrong" if certain else "undecided"


_RULES: tuple[Callable[[str, str, str], Decision], ...] = (_by_words, _by_base, _by_number, _by_unit, _by_items)
