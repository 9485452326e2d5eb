"""What the generated tasks share: checked fields, distinct draws and a stable split.

Example: the question `Ann has 5 apples and loses 3` is held out for the test split because `is_held_out` says so of
its text, whatever the sizes of the splits.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping
from random import Random
from typing import TypeVar

from dllm_rl.errors import UserError, bad_value, check

Item = TypeVar("Item")
Draw = Callable[[Random], Item | None]
"""One random item, or None where the draw does not fit (the caller draws again)."""

MAX_REJECTIONS = 100_000


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises `UserError` unless the field `name` of the task is an integer in [low, high].

    Example: `check_integer("train_size", 0, 1)` reads `task.train_size=0: must be an integer >= 1`.
    """
    valid = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
    check(fits, f"task.{name}", value, valid)


def check_text(name: str, value: object) -> None:
    """Raises `UserError` unless the field `name` of the task is a string."""
    check(isinstance(value, str), f"task.{name}", value, "a string")


def check_mistakes(demonstrations_from: str, mistake_rate: float | None, defaults: Mapping[str, float]) -> None:
    """Checks the two fields that say how demonstrations go wrong; `defaults` has the rate of each kind."""
    known = isinstance(demonstrations_from, str) and demonstrations_from in defaults
    check(known, "task.demonstrations_from", demonstrations_from, f"one of {', '.join(defaults)}")
    if mistake_rate is None:
        return
    number = isinstance(mistake_rate, int | float) and not isinstance(mistake_rate, bool)
    check(number and 0 <= mistake_rate <= 1, "task.mistake_rate", mistake_rate, "a number from 0 to 1, or null")
    check(defaults[demonstrations_from] > 0 or mistake_rate == 0, "task.mistake_rate", mistake_rate,
          f"0 or null: demonstrations_from={demonstrations_from} makes no mistakes")


def is_held_out(key: str) -> bool:
    """Whether an item belongs to the test split: one in eight, decided by its key alone.

    Because the sizes of the splits play no part, no item of a larger test split was ever trained on.
    """
    return zlib.crc32(key.encode()) % 8 == 0


def drawn(draw: Draw[Item], rng: Random) -> Item:
    """The first fitting draw.

    Raises:
        UserError: none of the first 100,000 draws fits.
    """
    for _ in range(MAX_REJECTIONS):
        item = draw(rng)
        if item is not None:
            return item
    raise UserError("task: hardly any problem fits these settings (100,000 draws failed); allow more of them")


def distinct(draw: Draw[Item], rng: Random, count: int, name: str, key: Callable[[Item], Hashable]) -> list[Item]:
    """`count` draws of distinct keys, in the order in which they came.

    Args:
        draw: draws one item.
        rng: the source of randomness.
        count: the value of the field `name`, for the error message.
        name: see `count`.
        key: two items with the same key are the same.

    Raises:
        UserError: there seem to be fewer distinct items than `count`.
    """
    found: dict[Hashable, Item] = {}
    for _ in range(5 * count + 20_000):
        item = drawn(draw, rng)
        found.setdefault(key(item), item)
        if len(found) == count:
            return list(found.values())
    raise bad_value(f"task.{name}", count, f"at most about {len(found)}, the number of distinct problems there are")
