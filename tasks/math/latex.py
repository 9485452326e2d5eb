r"""One way of writing for answers in LaTeX, without a change to what they mean.

Example: `11,\! 111,\! 111,\! 100`, the answer of a row of MATH (hendrycks/math, MIT), becomes `11111111100`, and
`\left( \dfrac12, \, 3 \right]` becomes `( \frac{1}{2}, 3 ]`. Texts have at most
`MAX_ANSWER` characters, so that no function takes long.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

MAX_ANSWER = 500
"""A longer answer is wrong: the longest one of MATH has 159 characters."""

_UNICODE = str.maketrans({
    "−": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "°": "^\\circ ", "º": "^\\circ ", "π": "\\pi ", "∞": "\\infty ",
    "∪": "\\cup ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "\u2044": "/", "\u00a0": " ", "\u202f": " ",
})
_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|\$|~", re.DOTALL)
_REWRITTEN = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys((r"\mbox", r"\hbox", r"\textbf", r"\textit", r"\textrm", r"\textnormal", r"\textsf", r"\texttt",
                     r"\mathrm"), r"\text"),
    **dict.fromkeys((r"\,", r"\;", r"\:", "\\ ", "\\\n", r"\quad", r"\qquad", "~"), " "),
    **dict.fromkeys(("$", r"\!", r"\(", r"\)", r"\[", r"\]", r"\left", r"\right", r"\big", r"\Big", r"\bigl", r"\bigr",
                     r"\Bigl", r"\Bigr", r"\displaystyle", r"\textstyle", r"\mathbf", r"\boldsymbol", r"\bf"), ""),
    r"\%": "%", r"\degree": r"^\circ", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\leq": r"\le", r"\geq": r"\ge",
    r"\neq": r"\ne", r"\leqslant": r"\le", r"\geqslant": r"\ge",
}
_DRESSED_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!\s?)(?=[0-9]{3}(?![0-9]))")
_CONJUNCTION = re.compile(r",? ?(?:\\text ?\{ ?,? ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?")
_CIRCLE = re.compile(r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z])) ?")
_FRACTIONS = (
    (re.compile(r"\\frac ?([0-9]) ?([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac ?([0-9]) ?\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac ?\{([^{}]*)\} ?([0-9])"), r"\\frac{\1}{\2}"),
)
_ROOT = re.compile(r"\\sqrt ?([0-9])")
_IDLE_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")
_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}"}
_OPENING, _CLOSING = "([{", ")]}"


class Items(NamedTuple):
    """What stands between the commas of a list, and the brackets around it."""

    opening: str
    items: tuple[str, ...]
    closing: str


@lru_cache(maxsize=16384)
def cleaned(text: str) -> str:
    r"""An answer without what LaTeX, Markdown and Unicode add for looks alone.

    Example: `cleaned("$\\dfrac12$.")` is `\frac{1}{2}`.
    """
    text = _DRESSED_SEPARATOR.sub("", text.translate(_UNICODE))
    text = _TOKEN.sub(lambda match: _REWRITTEN.get(match[0], match[0]), text)
    text = " ".join(text.split()).strip("* ").rstrip(" .,;:")
    text = _CIRCLE.sub(r"^\\circ ", _CONJUNCTION.sub(", ", text))
    for pattern, canonical in _FRACTIONS:
        text = pattern.sub(canonical, text)
    return _without_braces(_ROOT.sub(r"\\sqrt{\1}", text).strip())


def squeezed(text: str) -> str:
    """A cleaned text without the spaces that mean nothing; the one in `1 2/3` stays.

    Example: `squeezed("( 3, 4 ]")` is `(3,4]`.
    """
    return _IDLE_SPACE.sub("", text)


def without_text(text: str) -> str:
    r"""The text with what stands inside `\text{...}` outside of it."""
    return _TEXT.sub(r"\1", text)


def depth(text: str) -> int:
    """How deep brackets and braces nest, whether they match or not."""
    level = deepest = 0
    for character in text:
        level += (character in _OPENING) - (character in _CLOSING)
        deepest = max(deepest, level)
    return deepest


def items(text: str) -> Items:
    r"""A cleaned text as a list; one item where it is none.

    Example: `items("(3, \\infty)")` is `Items("(", ("3", "\\infty"), ")")`.
    """
    opening = text[:2] if text.startswith("\\{") else text[:1]
    length = len(opening)
    closing = text[-length:] if length else ""
    if opening in _BRACKETS and closing in _BRACKETS.values() and _is_one_bracket(text, length):
        return Items(opening, _between_commas(text[length:-length]), closing)
    return Items("", _between_commas(text), "")


def _is_one_bracket(text: str, length: int) -> bool:
    """Whether the bracket that opens a text closes at its end."""
    level = 0
    for index, character in enumerate(text):
        level += (character in _OPENING) - (character in _CLOSING)
        if level == 0 and index >= length - 1:
            return index == len(text) - 1
    return False


def _between_commas(text: str) -> tuple[str, ...]:
    found, start, level = [], 0, 0
    for index, character in enumerate(text):
        level += (character in _OPENING) - (character in _CLOSING)
        if character in ",;" and level == 0:
            found.append(text[start:index])
            start = index + 1
    return tuple(filter(None, (_without_braces(item.strip()) for item in (*found, text[start:]))))


def _without_braces(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and not text.endswith("\\}") and _is_one_bracket(text, 1):
        text = text[1:-1].strip()
    return text
