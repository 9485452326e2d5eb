r"""Whether two answers are equal by algebra: math-verify in processes of its own, with deadlines that hold.

    equal("3\\sqrt{13}", "\\sqrt{117}")  # "right"

math-verify's own deadlines are signals, which fail outside the main thread and cannot stop C code such as `9**9**9`.
Here this process watches the clock: a worker that is late is killed and a fresh one takes its place, so no answer can hang
or crash a run. Any number of threads may compare at once. Results are kept, since the answers of a group repeat.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["right", "wrong", "timeout", "infra_error"]
Pair = tuple[str, str]
"""The right answer and a given one. The order matters to math-verify."""

WORKERS = 2
SECONDS = 5.0
START_SECONDS = 120.0
MEMORY_MB = 1024
KEPT = 65536
_SCRIPT = Path(__file__).with_name("symbolic_worker.py")


class _StartError(Exception):
    """No worker can be started."""


class _Worker:
    """One process that compares pairs, one after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        try:
            # -I: neither the folder of the script (which has a numbers.py) nor variables decide what is imported.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, bufsize=0,
            )
        except OSError as error:
            raise _StartError(str(error)) from None
        path = [os.path.abspath(folder) for folder in sys.path if folder]
        reply = self._reply({"path": path, "memory_mb": MEMORY_MB, "seconds": seconds}, START_SECONDS)
        if reply != "ready":
            self.close()
            raise _StartError(str(reply or "it ended or hung before it was ready"))

    def equal(self, pair: Pair) -> bool | None:
        """None: it was late or died, and must be closed."""
        reply = self._reply(pair, self._seconds)
        return reply if isinstance(reply, bool) else None

    def close(self) -> None:
        """Kills the process and waits for its end."""
        self._process.kill()
        with self._process:  # closes the pipes, then waits
            pass

    def _reply(self, message: Any, seconds: float) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        received = b""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                    return None
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    return None
                received += read
        except OSError:  # it died
            return None
        return json.loads(received)


class Pool:
    """Workers that start when they are first needed.

    Example: `Pool(workers=4).outcomes([("3\\\\sqrt{13}", "\\\\sqrt{117}")])` is `["right"]`.
    """

    def __init__(self, workers: int = WORKERS, seconds: float = SECONDS) -> None:
        """`seconds`: wall clock per pair. A pair that is late has one more try on a fresh worker."""
        self._seconds = seconds
        self._size = workers
        self._lock = threading.Lock()
        self._kept: OrderedDict[Pair, Outcome] = OrderedDict()
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self.trouble = ""
        """Why the last worker could not be started."""
        for _ in range(workers):
            self._idle.put(None)

    def outcomes(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """One outcome per pair; a pair that comes again is not compared again. Never raises for any text."""
        with self._lock:
            found = {pair: self._kept.get(pair) for pair in pairs}
        missing = [pair for pair, outcome in found.items() if outcome is None]
        if not missing:
            return [outcome for pair in pairs if (outcome := found[pair])]
        failed = threading.Event()
        with ThreadPoolExecutor(min(self._size, len(missing))) as threads:
            fresh = dict(zip(missing, threads.map(lambda pair: self._outcome(pair, failed), missing), strict=True))
        with self._lock:
            self._kept.update((pair, outcome) for pair, outcome in fresh.items() if outcome != "infra_error")
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return [found[pair] or fresh[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the idle workers; the pool can be used again."""
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for worker in idle:
            if worker is not None:
                worker.close()
            self._idle.put(None)

    def _outcome(self, pair: Pair, failed: threading.Event) -> Outcome:
        worker, equal = self._idle.get(), None
        try:
            for _ in range(2):
                if failed.is_set():  # do not wait for a start that fails once for every pair
                    return "infra_error"
                worker = worker or _Worker(self._seconds)
                equal = worker.equal(pair)
                if equal is not None:
                    return "right" if equal else "wrong"
                worker.close()
                worker = None
            return "timeout"
        except _StartError as error:
            self.trouble = str(error)
            failed.set()
            return "infra_error"
        finally:
            self._idle.put(worker)


_pools: dict[tuple[int, float], Pool] = {}
_pools_lock = threading.Lock()


def pool(workers: int = WORKERS, seconds: float = SECONDS) -> Pool:
    """The pool of this process with these settings."""
    with _pools_lock:
        return _pools.setdefault((workers, seconds), Pool(workers, seconds))


def equal(gold: str, answer: str) -> Outcome:
    """Whether an answer is equal to the right one.

    Example: `equal("(3,4]", "3 < x \\\\le 4")` is `right`.
    """
    return pool().outcomes([(gold, answer)])[0]


def close() -> None:
    """Ends the idle workers of this process."""
    for each in list(_pools.values()):
        each.close()


def _forget() -> None:
    """In a forked process: its parent's workers are not its own."""
    global _pools_lock
    _pools_lock = threading.Lock()
    _pools.clear()


atexit.register(close)
os.register_at_fork(after_in_child=_forget)
