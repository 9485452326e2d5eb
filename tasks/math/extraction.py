r"""Where the final answer of a completion stands.

Example (a completion in the format that d1's prompt asks for):

    <reasoning>
    She sells 9 eggs at $2 each, and 9 * 2 = 18.
    </reasoning>
    <answer>
    18
    </answer>
"""

from __future__ import annotations

import re

MAX_CHARACTERS = 20_000
"""Only the end of a completion is read: answers come last, and a longer text must not slow grading down."""

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def final_text(completion: str) -> str | None:
    r"""What a completion gives as its answer, without white space around it, or None where it gives none.

    It is what stands in the last `\boxed{...}` or, if that comes later, in the last `<answer>...</answer>`, which may
    lack its end; without either, the line after the last `####`.

    Example: `final_text("<answer>\n18\n</answer>")` is `18`.
    """
    text = completion[-MAX_CHARACTERS:]
    box = _last_box(text)
    _, tag, tail = text.rpartition("<answer>")
    if box is not None and box[0] > len(text) - len(tail):
        tag = ""
    if tag:
        return tail.partition("</answer>")[0].strip()
    if box is not None:
        return text[box[0]:box[1]].strip()
    _, mark, tail = text.rpartition("####")
    return tail.strip().partition("\n")[0].strip() if mark else None


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last `\boxed{...}` whose braces balance, or None.

    Example: `last_boxed("\\boxed{\\frac{1}{2}}")` is `\frac{1}{2}`.
    """
    box = _last_box(text)
    return None if box is None else text[box[0]:box[1]]


def _last_box(text: str) -> tuple[int, int] | None:
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0] == "{" or match[0].startswith("\\boxed"):
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            start, boxed = opened.pop()
            if boxed and (last is None or start > last[0]):
                last = (start, match.start())
    return last
