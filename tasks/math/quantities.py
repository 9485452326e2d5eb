r"""Reading an answer as one number with its unit.

Example: `137 \frac{1}{2}`, `\$32,\!348`, `864 \mbox{ inches}^2` and `.0000672` are answers of rows of MATH500
(hendrycks/math, MIT). Texts come from `latex.cleaned`. Only ASCII digits are digits, and values are exact.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_EXPONENT = 100
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# The spellings of a unit. A unit that is missing here is as good as none: only two that are here can contradict.
_UNITS = {name: row.split()[0] for row in (
    "% percent percentage pct", "degree degrees deg", "radian radians rad", "cent cents", "dollar dollars usd",
    "euro euros eur", "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres",
    "m meter meters metre metres", "km kilometer kilometers kilometre kilometres", "inch inches in", "foot feet ft",
    "yard yards yd", "mile miles mi", "g gram grams", "kg kilogram kilograms", "lb pound pounds lbs", "oz ounce ounces",
    "ml milliliter milliliters", "l liter liters litre litres", "gallon gallons gal", "s second seconds sec secs",
    "min minute minutes mins", "h hour hours hr hrs", "day days", "week weeks", "month months", "year years", "am", "pm",
) for name in row.split()}
# Words after a number that change it, or say that it is not the answer.
NO_UNITS = frozenset((
    "hundred", "thousand", "million", "billion", "trillion", "dozen", "hundreds", "thousands", "millions", "billions",
    "trillions", "dozens", "k", "mil", "or", "than", "twice", "double", "triple", "sqrt", "root", "log", "ln", "half",
    "halves", "third", "thirds", "quarter", "quarters", "squared", "cubed", "factorial", "times", "plus", "minus", "over",
    "under", "to", "not", "no", "is", "isn't", "wrong", "false", "incorrect", "if", "unless", "except",
))
_CURRENCY = {"\\$": "dollar", "€": "euro", "£": "", "¥": ""}
_MONEY = re.compile(r"([-+]? ?)(\\\$|€|£|¥) ?")
_TAIL = re.compile(
    r"( ?%| ?\^\\circ(?: ?[CF]| ?\\text ?\{ ?[CF] ?\})?| ?\\text ?\{([^{}]*)\}(?: ?\^ ?\{? ?[0-9] ?\}?)?)$"
)
_WORDS = re.compile(r"(?<![\\A-Za-z])([A-Za-z][A-Za-z.'/ -]*)[²³]?(?: ?\^ ?\{? ?[23] ?\}?)?$")
_VALUE_END = re.compile(r"(?:[0-9})]|\\pi) *$")

_SIGN = r"[-+]? ?"
_PLAIN = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:(?:{_PLAIN}|[1-9][0-9]{{0,2}}(?: [0-9]{{3}})+)(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r" ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?P<brace>\{)? ?(?P<e>[-+]?[0-9]{1,4}) ?(?(brace)\})"
_OPERAND = rf"{_PLAIN}(?:\.[0-9]+)?"
_FORMS = [re.compile(rf"(?P<sign>{_SIGN}){form}") for form in (
    rf"(?P<a>{_DECIMAL})(?:{_POWER})?",
    r"(?P<a>[0-9]*\.[0-9]*)\\overline ?\{(?P<repeated>[0-9]{1,50})\}",
    rf"(?P<a>{_DECIMAL})[eE](?P<e>[-+]?[0-9]{{1,4}})",
    rf"(?P<whole>[0-9]+ ?)?\\frac ?\{{ ?(?P<a>{_SIGN}{_DECIMAL}) ?\}} ?\{{ ?(?P<b>{_SIGN}{_DECIMAL}) ?\}}",
    rf"(?P<whole>[0-9]+ )?(?P<a>{_OPERAND}) ?/ ?(?P<b>{_OPERAND})",
)]


class Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    unit: str
    """One name for all spellings of a unit; empty for none and for a unit that is not in the table."""


@lru_cache(maxsize=16384)
def quantity(text: str) -> Quantity | None:
    r"""A cleaned text as one number, or None where it is anything else, such as a sum or a list.

    Example: `quantity("-1\\frac{1}{2} \\text{ cm}")` is `Quantity(Fraction(-3, 2), "cm")`.
    """
    wrapped = re.fullmatch(r"\\text ?\{([^{}]*)\}", text)
    text, money = _without_money((wrapped[1] if wrapped else text).removeprefix("\\approx").strip())
    text, unit = split_unit(text)
    if money and unit and money != unit:
        return None
    if text.startswith("(") and text.endswith(")") and "," not in text:  # (1,000) is a pair
        text = text[1:-1].strip()
    value = _value(text)
    return None if value is None else Quantity(value, money or unit)


def contradict(one: str, other: str) -> bool:
    """Whether two units cannot both be right; a missing one goes with every other."""
    return one != other and one != "" and other != ""


def split_unit(text: str) -> tuple[str, str]:
    r"""A text without the unit at its end, and that unit's one name.

    Example: `split_unit("12\\pi \\text{ square inches}")` is `("12\\pi", "inch")`.
    """
    tail = _TAIL.search(text)
    if tail is None:
        return _split_words(text)
    head = text[:tail.start()].strip()
    if not head:
        return text, ""
    if tail[2] is None:
        return head, "%" if "%" in tail[0] else "degree"
    unit = _unit(tail[2])
    return (text, "") if unit is None else (head, unit)


def _split_words(text: str) -> tuple[str, str]:
    """Units that are written as plain words: `5 apples`, `5cm`. One letter or an unknown word needs a space before it."""
    match = _WORDS.search(text)
    if match is None:
        return text, ""
    head, words = text[:match.start()], match[1]
    known = words in _UNITS or (len(words) > 1 and words.lower() in _UNITS)  # 5 M is no length
    fits = known or len(words) > 2 if head.endswith(" ") else known and len(words) > 1
    unit = _unit(words) if fits else None
    return (text, "") if unit is None or not _VALUE_END.search(head) else (head.rstrip(), unit)


def _unit(text: str) -> str | None:
    """The one name of a unit, empty if it has none; None for words that are no unit."""
    words = text.lower().replace(".", "").split()
    if len(words) > 5 or "," in text or any(word in NO_UNITS or any(map(str.isdigit, word)) for word in words):
        return None
    if "per" in words or "/" in text:
        return ""
    return next((_UNITS[word] for word in words if word in _UNITS), "")


def _without_money(text: str) -> tuple[str, str]:
    match = _MONEY.match(text)
    return (text, "") if match is None else (match[1] + text[match.end():], _CURRENCY[match[2]])


def _value(text: str) -> Fraction | None:
    if text.lower() in _NUMBER_WORDS:
        return Fraction(_NUMBER_WORDS.index(text.lower()))
    for form in _FORMS:
        match = form.fullmatch(text)
        if match:
            return _matched(match.groupdict())
    return None


def _matched(parts: dict[str, str | None]) -> Fraction | None:
    exponent, divisor = int(parts.get("e") or 0), _fraction(parts.get("b") or "1")
    if abs(exponent) > MAX_EXPONENT or divisor == 0:
        return None
    value = _fraction(parts["a"] or "") * Fraction(10) ** exponent / divisor
    repeated = parts.get("repeated")
    if repeated:  # 0.1666... is 0.1 and 6/90
        places = len((parts["a"] or "").partition(".")[2])
        value += Fraction(int(repeated), 10 ** places * (10 ** len(repeated) - 1))
    whole = parts.get("whole")
    if whole and not 0 <= value < 1:  # 2 7/3 is no mixed number
        return None
    value += _fraction(whole or "0")
    return -value if "-" in (parts["sign"] or "") else value


def _fraction(numeral: str) -> Fraction:
    return Fraction(numeral.replace(",", "").replace(" ", "").rstrip(".") or "0")
