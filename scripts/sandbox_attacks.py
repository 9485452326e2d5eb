"""Programs that try to earn a reward they do not deserve, to steal, or to do harm; shared by the tests and the benchmark.

Each is run against tests that it does not solve: `add(2, 3) == 5` and `add(4, 5) == 9` for those that want a verdict, and
`loot() == SECRET` for thieves, where SECRET is what the test expects, an environment variable of the caller and the
content of a file of the caller's. A `World` tells whether anything outside has changed.

The programs are in sandbox_attacks.txt. Names that they find defined: MARKER, a folder of the caller's that everybody may
write to; CANARY, a file in it; SECRET_FILE; HOST_PID, the caller's process; NEIGHBOUR, another one, with the secret in its
environment; PORT, where the caller listens.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dllm_rl import sandbox
from dllm_rl.sandbox import Assertion, Call, Program


@dataclass(frozen=True)
class Attack:
    """One program of sandbox_attacks.txt."""

    wants: str
    """`verdict` or `theft`."""
    needs_isolation: bool
    """Whether a sandbox without isolation does not claim to stop it, or would be harmed if it did not."""
    source: str


def _load() -> dict[str, Attack]:
    _, prelude, *sections = Path(__file__).with_suffix(".txt").read_text().split("\n=== ")
    attacks = {}
    for section in sections:
        heading, source = section.split("\n", 1)
        wants, name = heading.split(": ", 1)
        needs_isolation = name.endswith(" (needs isolation)")
        source = prelude.removeprefix("prelude\n") + source
        attacks[name.removesuffix(" (needs isolation)")] = Attack(wants, needs_isolation, source)
    return attacks


ATTACKS = _load()


def in_scope(isolated: bool) -> list[str]:
    """The names of the attacks that a sandbox with or without isolation must stop."""
    return [name for name, attack in ATTACKS.items() if isolated or not attack.needs_isolation]


class World:
    """Something to harm or to steal, around a `with` block; `harm()` is what has changed since then.

    Processes that lose their parents become children of this one (Linux), so that none gets away unseen.
    """

    def __init__(self, folder: Path) -> None:
        self.secret = f"s3cr3t-{secrets.token_hex(16)}"
        self.marker, self.temporary = folder / "marker", folder / "temporary"
        for place in (folder, self.marker, self.temporary):
            place.mkdir(exist_ok=True)
            place.chmod(0o777)
        self.canary, self.secret_file = self.marker / "canary", folder / "secret"
        self.canary.write_text("alive")
        self.secret_file.write_text(self.secret)
        self.canary.chmod(0o666)

    def __enter__(self) -> World:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.open_secret = self.secret_file.open()
        os.set_inheritable(self.open_secret.fileno(), True)
        os.environ["SANDBOX_SECRET"] = self.secret
        self.neighbour = subprocess.Popen(["sleep", "3600"])
        self.old_temporary, tempfile.tempdir = tempfile.tempdir, str(self.temporary)
        sandbox.close()
        self.children, self.descriptors = _children(), _descriptors()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tempfile.tempdir = self.old_temporary
        os.environ.pop("SANDBOX_SECRET", None)
        self.listener.close()
        self.open_secret.close()
        self.neighbour.kill()
        self.neighbour.wait()

    def programs(self, name: str) -> list[Program]:
        """An attack on calls, and the same on assertions."""
        names = {"MARKER": str(self.marker), "CANARY": str(self.canary), "SECRET_FILE": str(self.secret_file),
                 "HOST_PID": os.getpid(), "NEIGHBOUR": self.neighbour.pid, "PORT": self.listener.getsockname()[1]}
        source = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + ATTACKS[name].source
        if ATTACKS[name].wants == "theft":
            calls = [Call("loot()", self.secret)]
            asserts = [Assertion(f"assert loot() == {self.secret!r}")]
        else:
            calls = [Call("add(2, 3)", 5), Call("add(4, 5)", 9)]
            asserts = [Assertion("assert add(2, 3) == 5 or abs(add(2, 3) - 5) < 1e-6"), Assertion("assert add(4, 5) == 9")]
        return [Program(source, calls), Program(source, asserts)]

    def harm(self) -> list[str]:
        """What is not as it was, once idle workers have been sent home."""
        sandbox.close()
        return [*self._files(), *self._connections(), *self._processes()]

    def await_children(self) -> None:
        """Waits until processes that have lost their parents have ended, and buries them."""
        deadline = time.monotonic() + 10
        while _children() - self.children and time.monotonic() < deadline:
            for pid in _children() - self.children:
                with suppress(OSError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)

    def _files(self) -> list[str]:
        found = [f"file {path}" for path in (*self.marker.iterdir(), *self.temporary.iterdir()) if path != self.canary]
        if not self.canary.is_file() or self.canary.read_text() != "alive" or self.canary.stat().st_mode & 0o777 != 0o666:
            found.append("the canary is not well")
        return found

    def _connections(self) -> list[str]:
        with suppress(BlockingIOError):
            self.listener.accept()
            return ["a connection"]
        return []

    def _processes(self) -> list[str]:
        deadline = time.monotonic() + 3  # the last ones may still be on their way out
        while _children() != self.children and time.monotonic() < deadline:
            time.sleep(0.01)
        found = [f"process {pid}" for pid in _children() - self.children]
        found += ["the neighbour is not well"] if self.neighbour.poll() is not None else []
        for pid in _children() - self.children:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if _descriptors() != self.descriptors:
            found.append(f"descriptors {sorted(_descriptors() ^ self.descriptors)}")
        return found


def _children() -> set[int]:
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found |= {int(pid) for pid in path.read_text().split()}
    return found


def _descriptors() -> set[int]:
    found = set()
    for number in range(256):
        with suppress(OSError):
            os.fstat(number)
            found.add(number)
    return found
