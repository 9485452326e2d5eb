"""Whether the graders agree with the data sets: every right answer must score 1, and a wrong one made from it 0.

    DLLM_RL_DATA=data scripts/check_graders --json graders.json
    DLLM_RL_DATA=data scripts/check_graders --sets gsm8k_test math500

`gold_right` of `gold_total` rows had every right completion graded right, `mutated_right` had the wrong one graded right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dllm_rl.errors import UserError
from dllm_rl.task import Prompt, Reward, Split, Task
from dllm_rl.tasks.code.humaneval import HumanEval
from dllm_rl.tasks.code.mbpp import MBPP
from dllm_rl.tasks.math.competition import Math
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.planning.countdown import Countdown
from dllm_rl.tasks.planning.known_grades import countdown_grades, sudoku_grades
from dllm_rl.tasks.planning.sudoku import Sudoku

CODE_SECONDS = 30.0  # some canonical solutions are slow, and this measures graders, not speed


class Cases(NamedTuple):
    """A data set as this script needs it; the last two have one entry per prompt."""

    task: Task
    prompts: Sequence[Prompt]
    right: Sequence[Sequence[str]]
    """Completions that must score 1, one or more for each prompt."""
    wrong: Sequence[str]
    """A completion that must score 0."""


def gsm8k(data: Path, split: Split) -> Cases:
    """The worked answers, which end on `#### 18`, and the same with a final number that is one too large."""
    task = GSM8K(data=str(data / "gsm8k"))
    prompts = task.prompts(split)
    solutions = [json.loads(line)["answer"] for line in (data / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()]
    right = [(solution, f"So it is \\boxed{{{prompt.data['answer']}}}.")
             for prompt, solution in zip(prompts, solutions, strict=True)]
    wrong = [f"{solution.rpartition('####')[0]}#### {int(prompt.data['answer']) + 1}"
             for prompt, solution in zip(prompts, solutions, strict=True)]
    return Cases(task, prompts, right, wrong)


def competition(data: Path, split: Split) -> Cases:
    """The right answers, alone and in a sentence, and those answers changed in one place."""
    task = Math(data=str(data / "math" / "train.json"), test_data=str(data / "math" / "math500.json"))
    prompts = task.prompts(split)
    golds = [prompt.data["answer"] for prompt in prompts]
    right = [(f"\\boxed{{{gold}}}", f"There are 2 cases, so the answer is $\\boxed{{{gold}}}$, as 1 + 1 = 2.")
             for gold in golds]
    return Cases(task, prompts, right, [f"So the answer is $\\boxed{{{mutated(gold)}}}$." for gold in golds])


def mutated(gold: str) -> str:
    r"""A wrong answer: the first digit one higher, else the first letter of the words changed, else the sign.

    Example: `mutated("\\frac{3}{2}")` is `\frac{4}{2}`, and of `\pi` it is `-(\pi)`.
    """
    digit = re.search("[0-9]", gold)
    if digit:
        return f"{gold[:digit.start()]}{(int(digit[0]) + 1) % 10}{gold[digit.end():]}"
    words = re.search(r"\\(?:text|mbox)\s*\{\W*([A-Za-z])|^([A-Z])", gold)
    if words:
        place = words.start(1 if words[1] else 2)
        return f"{gold[:place]}{chr(ord(gold[place]) + 1)}{gold[place + 1:]}"
    return f"{gold}, 0" if gold[0] in "([" else f"-({gold})"


def listed(task: Task, rows: Iterable[tuple[Prompt, str, str]]) -> Cases:
    """Rows of (prompt, right completion, wrong completion)."""
    prompts, right, wrong = zip(*rows, strict=True)
    return Cases(task, prompts, [(text,) for text in right], wrong)


def humaneval(data: Path) -> Cases:
    """The canonical solutions, and programs whose results are altered."""
    task = HumanEval(data=str(data / "humaneval" / "HumanEval.jsonl.gz"), timeout_seconds=CODE_SECONDS)
    return listed(task, task.solved_rows())


def mbpp(data: Path) -> Cases:
    """All 974 rows, as `humaneval`."""
    task = MBPP(data=str(data / "mbpp" / "mbpp.jsonl"), timeout_seconds=CODE_SECONDS)
    return listed(task, task.solved_rows())


def countdown(data: Path) -> Cases:
    """Solutions by brute force, and expressions with other numbers, an equals sign or a number used three times."""
    path = str(data / "countdown" / "cd3_test.jsonl")
    return listed(Countdown(data=path), countdown_grades(path))


def sudoku(data: Path) -> Cases:
    """A solution of each puzzle, and grids with a wrong blank, with other clues or cut short."""
    path = str(data / "sudoku" / "4x4_test.csv")
    return listed(Sudoku(data=path), sudoku_grades(path))


SETS: dict[str, Callable[[Path], Cases]] = {
    "gsm8k_test": lambda data: gsm8k(data, "test"),
    "gsm8k_train": lambda data: gsm8k(data, "train"),
    "math500": lambda data: competition(data, "test"),
    "math_train": lambda data: competition(data, "train"),
    "humaneval": humaneval,
    "mbpp": mbpp,
    "countdown": countdown,
    "sudoku": sudoku,
}


def checked(name: str, data: Path) -> dict[str, float]:
    """The figures of one set; the rows that the grader gets wrong are printed."""
    cases = SETS[name](data)
    start = time.perf_counter()
    pairs = [(prompt, text) for prompt, texts in zip(cases.prompts, cases.right, strict=True) for text in texts]
    graded = iter(cases.task.score_batch(*map(list, zip(*pairs, strict=True))))
    gold_right = mutated_right = 0
    for prompt, texts in zip(cases.prompts, cases.right, strict=True):
        grades = [is_right(next(graded), prompt, text, True) for text in texts]
        gold_right += all(grades)
    rewards = cases.task.score_batch(cases.prompts, cases.wrong)
    for prompt, text, reward in zip(cases.prompts, cases.wrong, rewards, strict=True):
        mutated_right += is_right(reward, prompt, text, False)
    return {"gold_right": gold_right, "gold_total": len(cases.prompts), "mutated_right": mutated_right,
            "seconds": round(time.perf_counter() - start, 2)}


def is_right(reward: Reward, prompt: Prompt, text: str, expected: bool) -> bool:
    right = reward.value == 1.0 and reward.verdict == "correct"
    if right != expected or reward.verdict == "infra_error":
        print(f"  {prompt.id}: {reward.verdict}, value {reward.value}: {text[-200:]!r}")
    return right


def main() -> None:
    options_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options_of.add_argument("--sets", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    options_of.add_argument("--json", type=Path, help="file for the figures")
    options = options_of.parse_args()
    data = Path(os.environ.get("DLLM_RL_DATA", Path(__file__).parents[1] / "../shared/data"))
    try:
        found = {}
        for name in options.sets:
            found[name] = checked(name, data)
            print(f"{name:12}" + "  ".join(f"{key} {figure}" for key, figure in found[name].items()), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
