"""Wrong programs made of right ones, to check a grader with: every result of the function under test is altered.

Example: with `def add(a, b): return a + b` spoilt, `add(1, 2)` is 4. What an altered result looks like: `False` for
`True`, 4 for 3, "ab?" for "ab", one item more for a list. Calls that the program makes of itself are left alone, so that
a spoilt recursive function still ends.
"""

from __future__ import annotations

from collections.abc import Sequence

_SPOILER = '''

def _altered(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1 if value + 1 != value else 0
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, (list, tuple)):
        return type(value)([*value, 0])
    return 0 if value is None else [value]


def _spoilt(function):
    depth = 0

    def spoilt(*arguments, **named):
        nonlocal depth
        depth += 1
        try:
            value = function(*arguments, **named)
        finally:
            depth -= 1
        return value if depth else _altered(value)

    return spoilt


'''


def spoilt(code: str, names: Sequence[str]) -> str:
    """The program with the results of the functions `names` altered."""
    return code.replace("\r\n", "\n").rstrip() + _SPOILER + "\n".join(f"{name} = _spoilt({name})" for name in names)
