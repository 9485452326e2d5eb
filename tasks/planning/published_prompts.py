"""Prompts of published work, word for word: a protocol is its prompt.

Sources: `diffu-grpo/data_utils.py` of dllm-reasoning/d1 (Apache-2.0), whose training prompts BGPO uses as well, and
`spg/data_utils.py` of facebookresearch/SPG (MIT, Copyright (c) Meta Platforms, Inc. and affiliates). Both put the
whole text in the user's turn. For their evaluations d1 and SPG word some prompts differently and begin the answer with
`<reasoning>`; here training and evaluation use the training prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# From d1.
_REASONING_AND_ANSWER = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""

# From d1.
_SUDOKU_RULES = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading left-to-right, \
top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""


class Example(NamedTuple):
    """A solved example of SPG's prompt."""

    puzzle: str
    reasoning: str
    solution: str

    @property
    def text(self) -> str:
        """The example as the prompt words it."""
        return (f"Question:\nSolve the following Sudoku puzzle: {self.puzzle}\nAnswer:\n"
                f"<reasoning>\n{self.reasoning}\n</reasoning>\n<answer>\n{self.solution}\n</answer>")


# From SPG.
SPG_EXAMPLES = (
    Example("3014002020004130", """\
Interpret puzzle as 4 rows of 4:
R1: 3 0 1 4
R2: 0 0 2 0
R3: 2 0 0 0
R4: 4 1 3 0

Fill easy singles:
R1 missing 2 → R1C2=2.
R4 missing 2 → R4C4=2.
Box D (R3-4,C3-4) then needs {1,4}; column4 can only accept 1 → R3C4=1, R3C3=4.
R3 now missing 3 → R3C2=3.
Column1 missing 1 → R2C1=1.
Column2 missing 4 → R2C2=4.
Last cell R2C4=3.

Final grid:
R1: 3 2 1 4
R2: 1 4 2 3
R3: 2 3 4 1
R4: 4 1 3 2""", "3214142323414132"),
    Example("0000100420013142", """\
Interpret puzzle as 4 rows of 4:
R1: 0 0 0 0
R2: 1 0 0 4
R3: 2 0 0 1
R4: 3 1 4 2

Fill easy singles:
Col1 missing 4 → R1C1=4.
Col4 missing 3 → R1C4=3.
Box A (R1-2,C1-2) missing {2,3} and R1 now needs {1,2} → R1C2=2, R2C2=3.
R1C3=1.
R2 now missing 2 → R2C3=2.
Col2 missing 4 → R3C2=4, then R3C3=3.

Final grid:
R1: 4 2 1 3
R2: 1 3 2 4
R3: 2 4 3 1
R4: 3 1 4 2""", "4213132424313142"),
    Example("2001403002001420", """\
Interpret puzzle as 4 rows of 4:
R1: 2 0 0 1
R2: 4 0 3 0
R3: 0 2 0 0
R4: 1 4 2 0

Fill easy singles:
R1 missing {3,4}; Col2 can't be 1 so R1C2=3 → R1C3=4.
R4 missing 3 → R4C4=3.
Col4 missing {2,4}; R2 must take 2 → R2C4=2 → R2C2=1.
Col1 missing 3 → R3C1=3.
Col3 missing 1 → R3C3=1 → R3C4=4.

Final grid:
R1: 2 3 4 1
R2: 4 1 3 2
R3: 3 2 1 4
R4: 1 4 2 3""", "2341413232141423"),
)


def countdown_d1(numbers: Sequence[int], target: int) -> str:
    """d1's training prompt for Countdown."""
    return (
        f"{_REASONING_AND_ANSWER}\nUsing only the numbers {list(numbers)}, create an arithmetic expression that evaluates "
        f"to exactly {target}. You must use all numbers from the list, and each number must be used exactly once. "
        "You may use the operations +, -, *, and / as needed. After reasoning, provide only your final expression inside "
        "<answer></answer> tags without including an equals sign or the target number. For example, if the numbers are "
        "[2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
    )


def sudoku_d1(puzzle: str) -> str:
    """d1's training prompt for 4x4 Sudoku: no examples."""
    return f"{_SUDOKU_RULES}\n\nSolve the following Sudoku puzzle: {puzzle}\n"


def sudoku_spg(puzzle: str) -> str:
    """SPG's training prompt for 4x4 Sudoku: d1's rules and three examples."""
    examples = "\n\n".join(example.text for example in SPG_EXAMPLES)
    return f"{_SUDOKU_RULES}\n\n{examples}\n\nQuestion: Solve the following Sudoku puzzle: {puzzle}\nAnswer:\n"
