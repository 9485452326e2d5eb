"""Where a completion states its answer: between the tags that many prompts ask for.

Example: the answer in "<reasoning>\\n7 and 3\\n</reasoning>\\n<answer>\\n7+3\\n</answer>" is "7+3".
"""

from __future__ import annotations

OPEN, CLOSE = "<answer>", "</answer>"


def answer_block(text: str) -> str | None:
    """What stands in the last complete block `<answer>...</answer>`, white space at its ends aside; None without one.

    A block that is never closed, such as one that the canvas cut off, is no answer.

    Example: `answer_block("<answer>1</answer> no, <answer> 2 </answer> it is")` is "2".
    """
    before, closed, _ = text.rpartition(CLOSE)
    _, opened, content = before.rpartition(OPEN)
    return content.strip() if closed and opened else None


def tagged(answer: str) -> str:
    """The answer as a block of its own, on lines of its own."""
    return f"{OPEN}\n{answer}\n{CLOSE}"
