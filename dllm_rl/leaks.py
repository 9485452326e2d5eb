"""The guard against leaks: no training prompt may be a test prompt.

Two prompts are the same question if the task's `fingerprint` of them is the same; by default that is the text in lower case
without punctuation at its ends and runs of white space. It finds copies, not paraphrases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dllm_rl.errors import UserError, check
from dllm_rl.task import Prompt, Task, normalised

MODES = ("refuse", "drop", "allow")
SHOWN = 3


class Leak(NamedTuple):
    """A training prompt that is also in the test split."""

    train: str
    """Id of the training prompt, or its place in a file."""
    test: str
    """Id of the test prompt."""
    fingerprint: str
    """What they have in common."""


class Item(NamedTuple):
    """A question of one of the splits."""

    place: str
    fingerprint: str


def items(task: Task, prompts: Iterable[Prompt]) -> list[Item]:
    """The questions of a split.

    Example: `[Item("train/0", "how many")]`
    """
    return [Item(prompt.id, task.fingerprint(prompt)) for prompt in prompts]


def text_item(place: str, text: str) -> Item:
    """A question of which only the text is known, such as a row of a file."""
    return Item(place, normalised(text))


def find_leaks(train: Sequence[Item], test: Sequence[Item]) -> list[Leak]:
    """Every training question that is also a test question."""
    held_out = {item.fingerprint: item.place for item in reversed(test)}
    return [Leak(item.place, held_out[item.fingerprint], item.fingerprint) for item in train if item.fingerprint in held_out]


def held_out_items(task: Task, with_texts: bool = False) -> list[Item]:
    """The test questions; `with_texts` adds their plain texts, to compare with rows of which only the text is known."""
    prompts = task.prompts("test")
    extra = [text_item(prompt.id, prompt.text) for prompt in prompts] if with_texts else []
    return [*items(task, prompts), *extra]


def guarded(task: Task, mode: str) -> list[Prompt]:
    """The training prompts: all of them, or with `drop` those that are not in the test split. Prints what it found.

    Raises:
        UserError: the splits share questions and `mode` is `refuse`, or none are left.
    """
    check(mode in MODES, "leaks", mode, ", ".join(MODES))
    prompts, test = list(task.prompts("train")), held_out_items(task)
    found = find_leaks(items(task, prompts), test)
    print(report(found, len(prompts), len(test), mode), flush=True)
    if not found or mode == "allow":
        return prompts
    leaked = {leak.train for leak in found}
    left = [prompt for prompt in prompts if prompt.id not in leaked]
    if not left:
        raise UserError("leaks=drop: every training prompt is also a test prompt; nothing is left")
    return left


def leaked_texts(task: Task, mode: str) -> frozenset[str]:
    """For demonstrations, of which only the text is known: the normalised prompts to leave out. Otherwise as `guarded`."""
    kept = guarded(task, mode)
    if mode != "drop" or len(kept) == len(task.prompts("train")):
        return frozenset()
    return frozenset(item.fingerprint for item in held_out_items(task, with_texts=True))


def report(found: Sequence[Leak], train: int, test: int, mode: str) -> str:
    """One line about the two splits.

    Raises:
        UserError: there are leaks and `mode` is `refuse`.
    """
    sizes = f"{train} training and {test} test prompts"
    if not found:
        return f"leak guard: {sizes}, none in common"
    examples = "; ".join(f"{leak.train} is {leak.test} ({_shortened(leak.fingerprint)})" for leak in found[:SHOWN])
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    line = f"{sizes}, {len(found)} in common: {examples}{more}"
    if mode == "refuse":
        raise UserError(f"leaks=refuse: {line}. leaks=drop trains without them, leaks=allow trains on them")
    return f"leak guard: {line}. " + ("They are left out." if mode == "drop" else "They STAY in the training set.")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
