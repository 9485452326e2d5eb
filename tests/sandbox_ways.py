"""The two ways of running programs, for tests; and the attack catalogue, which the benchmark shares."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dllm_rl import sandbox
from dllm_rl.errors import UserError
from dllm_rl.sandbox import SandboxConfig, configure
from dllm_rl.sandboxing import isolation

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from sandbox_attacks import ATTACKS, World, in_scope

__all__ = ["ATTACKS", "WAYS", "World", "choose_way", "in_scope"]

WAYS = ("isolated", "unisolated")


@contextmanager
def choose_way(way: str) -> Iterator[None]:
    """Runs programs with bubblewrap, or as if there were none; skips the test if there is none."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "programs run without isolation")
        sandbox._launch.cache_clear()
        if way == "unisolated":
            patch.setattr(isolation, "executable", lambda: None)
        configure(SandboxConfig(allow_unisolated=way == "unisolated"))
        try:
            sandbox._launch(way == "unisolated")
            configure(SandboxConfig(allow_unisolated=True))
            sandbox._launch(True)
            yield
        except UserError as error:
            if way == "isolated" and "accept programs" in str(error):
                pytest.skip(str(error))
            raise
        finally:
            configure(SandboxConfig(allow_unisolated=True))
            sandbox._launch.cache_clear()
