r"""The ways in which math questions are worded in the literature, and what an answer to each looks like.

Example: under `drift` the question "What is 1 + 1?" reads

    You need to put your final answer in \boxed{}. This is the problem:
    What is 1 + 1?
"""

from __future__ import annotations

import re

PROTOCOLS = ("bgpo", "d1", "drift")
"""`bgpo`: the bare question (THU-KEG/BGPO). `d1`: reasoning and answer in tags. `drift`: a sentence that asks for a box."""

# dllm-reasoning/d1 (Apache-2.0), what its training puts into the user's turn; its evaluation words it differently.
_D1 = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n\n"
_D1_BOX = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. "
    "Wrap the final answer in a \\boxed{}. \n\n"
)
# ant-research/Drift (Apache-2.0); Gen-Verse/dLLM-RL (Apache-2.0) has the same sentence.
_DRIFT = "You need to put your final answer in \\boxed{}. This is the problem:\n"
_TAGS = re.compile(r"\s*<reasoning>.*</reasoning>\s*<answer>.*</answer>\s*", re.DOTALL)


def worded(question: str, protocol: str, *, boxed: bool) -> str:
    """The prompt of a question; `boxed` says whether d1 asks for a box inside its tags, as it does for MATH.

    Example: `worded("What is 1 + 1?", "bgpo", boxed=False)` is `What is 1 + 1?`.
    """
    preface = {"bgpo": "", "d1": _D1 + (_D1_BOX if boxed else ""), "drift": _DRIFT}
    return preface[protocol] + question


def written(solution: str, answer: str, protocol: str, *, boxed: bool) -> str:
    """A solution and its answer in the form that the protocol asks for, to imitate.

    Example: `written("1 + 1 = 2", "2", "d1", boxed=False)` ends on `<answer>\\n2\\n</answer>`.
    """
    inner = f"\\boxed{{{answer}}}" if boxed or protocol == "drift" else answer
    if protocol == "d1":
        return f"<reasoning>\n{solution}\n</reasoning>\n<answer>\n{inner}\n</answer>"
    return f"{solution}\n{inner}".strip()


def format_parts(completion: str, protocol: str, *, boxed: bool) -> dict[str, float]:
    r"""Whether a completion has the form that was asked for; nothing where none was. It is reported, never rewarded.

    Example: `format_parts("So it is \\boxed{2}", "drift", boxed=True)` is `{"format": 1.0}`.
    """
    if protocol == "bgpo":
        return {}
    tagged = protocol != "d1" or _is_tagged(completion)
    in_box = "\\boxed{" in completion or not (boxed or protocol == "drift")
    return {"format": float(tagged and in_box)}


def _is_tagged(completion: str) -> bool:
    once = all(completion.count(tag) == 1 for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    return once and _TAGS.fullmatch(completion) is not None
