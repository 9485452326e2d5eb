"""The one error for mistakes a user can mend.

Commands print a `UserError` as one line and exit with code 2; every other exception is a defect of ours and keeps its
traceback. The message names the configuration key or the file (with its line), the bad value, and what is valid.
"""

from __future__ import annotations


class UserError(ValueError):
    """A bad configuration value, file or folder. The message is one line."""


def bad_value(key: str, value: object, valid: str) -> UserError:
    """The error for one configuration key.

    Example: `bad_value("likelihood.num_samples", 0, "an integer >= 1")` reads
    `likelihood.num_samples=0: must be an integer >= 1`.
    """
    return UserError(f"{key}={value}: must be {valid}")


def check(condition: bool, key: str, value: object, valid: str) -> None:
    """Raises `bad_value(key, value, valid)` unless the condition holds."""
    if not condition:
        raise bad_value(key, value, valid)
