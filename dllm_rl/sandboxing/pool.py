"""Workers as the caller's process sees them: starting, keeping and replacing them, and sharing out a batch of programs.

Workers are kept for the next batch, as nothing of a program is left in them; one that dies, hangs or says anything odd
is replaced. Idle ones end by themselves after a few seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import select
import selectors
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dllm_rl.sandboxing.codec import frame
from dllm_rl.sandboxing.isolation import Launch
from dllm_rl.sandboxing.zygote import TESTER_KILLED, remove

GRACE_SECONDS = 0.75  # a tester ends its program in time; if it cannot, because a test hangs, the worker is closed
CLOSE_SECONDS = 10.0  # what a worker without isolation may need to remove the files of a program
ATTEMPTS = 2
MAX_FAILED_STARTS = 3


@dataclass
class Report:
    """What a worker has said about a program."""

    ending: str = ""
    """`exit`, `timeout`, `output`, `garbage`, `killed` (the tester was) or `infra`."""
    code: int | None = None
    """The exit status of the program's process, if it ended by itself."""
    records: list[dict[str, Any]] = field(default_factory=list)
    confirmed: bool = False
    """Whether the nonce came back: every test had a result, and the program's process has ended well after the last."""
    trouble: str = ""


class Worker:
    """One worker process, see `zygote.py`."""

    def __init__(self, launch: Launch) -> None:
        self.folder = launch.folder()
        self.busy: int | None = None
        """The number of the program that it is running."""
        self.ready = False
        self.deadline = 0.0
        self.report = Report()
        self.nonce = ""
        self.received = bytearray()
        try:
            self.process = subprocess.Popen(
                launch.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                cwd=self.folder, env={}, start_new_session=True,
            )
        except OSError:
            self._remove_folder()
            raise
        assert self.process.stdin and self.process.stdout
        self.jobs, self.events = self.process.stdin, self.process.stdout
        os.set_blocking(self.events.fileno(), False)

    def start(self, number: int, job: dict[str, Any]) -> None:
        """Hands it a program with a nonce of its own; raises OSError if it is gone."""
        self.busy, self.ready, self.report, self.nonce = number, False, Report(), secrets.token_hex(16)
        self.deadline = time.monotonic() + job["limits"]["seconds"] + GRACE_SECONDS
        data = memoryview(frame({**job, "nonce": self.nonce}))
        while data:
            data = data[os.write(self.jobs.fileno(), data):]

    def listen(self) -> bool:
        """Takes note of what it has said; False once it has ended."""
        chunk: bytes | None = b"-"
        while chunk:
            chunk = self.events.read(65536)
            self.received += chunk or b""
        *lines, rest = self.received.split(b"\n")
        self.received = bytearray(rest)
        for line in lines:
            self._note(json.loads(line))
        return chunk is None  # nothing for now

    def _note(self, event: dict[str, Any]) -> None:
        if "ready" in event:
            self.ready = True
        elif "end" in event:
            self.report.ending, self.report.code = event["end"], event["code"]
            self.report.confirmed = secrets.compare_digest(event["nonce"], self.nonce)
        else:
            self.report.records.append(event)

    def close(self) -> str:
        """Ends it and everything in it; what it had to say about that."""
        with suppress(OSError):
            self.jobs.close()  # a worker without a caller kills what it runs and ends
        try:
            self.process.wait(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr
        os.set_blocking(self.process.stderr.fileno(), False)
        reason = (self.process.stderr.read() or b"").decode(errors="replace").strip().split("\n")[-1]
        self.forget()
        self._remove_folder()
        return f"the worker ended with code {self.process.returncode} {reason}".strip()

    def forget(self) -> None:
        """Closes the descriptors: all that a forked copy of this process may do."""
        for stream in (self.jobs, self.events, self.process.stderr):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _remove_folder(self) -> None:
        if self.folder:
            remove(self.folder)


class Pool:
    """Workers of one kind that have nothing to do. Safe to use from several threads."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def take(self) -> Worker:
        """An idle worker, or a new one."""
        with self._lock:
            ended = [worker for worker in self._idle if worker.process.poll() is not None]  # idle for too long
            self._idle = [worker for worker in self._idle if worker not in ended]
            found = self._idle.pop() if self._idle else None
        for worker in ended:
            worker.close()
        return found or Worker(self.launch)

    def try_out(self, seconds: float) -> str:
        """Why no worker can be started; empty if one can."""
        try:
            worker = Worker(self.launch)
        except OSError as error:
            return str(error)
        deadline = time.monotonic() + seconds
        while not worker.ready and time.monotonic() < deadline:
            select.select([worker.events], [], [], seconds)
            if not worker.listen():
                return worker.close()
        if not worker.ready:
            worker.close()
            return f"no worker was ready within {seconds:g} s"
        self.give(worker)
        return ""

    def give(self, worker: Worker) -> None:
        """Takes back a worker that has no program."""
        with self._lock:
            self._idle.append(worker)

    def close(self) -> None:
        """Ends all idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            if os.getpid() == self._owner:
                worker.close()
            else:
                worker.forget()


class Batch:
    """Programs to be run by workers of a pool, `parallel` at a time, within `seconds`."""

    def __init__(self, pool: Pool, jobs: list[dict[str, Any]], parallel: int, seconds: float) -> None:
        self.pool, self.jobs, self.parallel = pool, jobs, parallel
        self.deadline, self.seconds = time.monotonic() + seconds, seconds
        self.reports: dict[int, Report] = {}
        self.waiting = deque(range(len(jobs)))
        self.attempts = [0] * len(jobs)
        self.workers: list[Worker] = []
        self.failed_starts = 0
        self.trouble = ""
        self.selector = selectors.DefaultSelector()

    def run(self) -> list[Report]:
        """The reports of all programs; `infra` for those that the workers could not finish."""
        try:
            while len(self.reports) < len(self.jobs) and not self.trouble:
                self._step()
        except OSError as error:
            self.trouble = f"no worker could be started: {error}"
        finally:  # an interrupt must not leave any program running
            for worker in self.workers:
                if worker.busy is None and not self.trouble:
                    self.pool.give(worker)
                else:
                    worker.close()
            self.selector.close()
        return [self.reports.get(number) or Report("infra", trouble=self.trouble) for number in range(len(self.jobs))]

    def _step(self) -> None:
        while len(self.workers) < min(self.parallel, len(self.jobs) - len(self.reports)):
            worker = self.pool.take()
            self.workers.append(worker)
            self.selector.register(worker.events, selectors.EVENT_READ, worker)
        for worker in [worker for worker in self.workers if worker.ready]:
            if self.waiting:
                self._start(worker)
        deadlines = [self.deadline, *(worker.deadline for worker in self.workers if worker.busy is not None)]
        heard = [key.data for key, _ in self.selector.select(max(0.0, min(deadlines) - time.monotonic()))]
        for worker in heard:
            self._listen(worker)
        self._look_at_the_clock(heard)

    def _start(self, worker: Worker) -> None:
        number = self.waiting.popleft()
        try:
            worker.start(number, self.jobs[number])
        except OSError:
            self._lose(worker)

    def _listen(self, worker: Worker) -> None:
        alive = worker.listen()
        if worker.busy is not None and worker.report.ending:
            self.reports[worker.busy] = worker.report
            worker.busy = None
        if worker.ready:
            self.failed_starts = 0
        if not alive:
            self._lose(worker)

    def _lose(self, worker: Worker) -> None:
        """Goes on without a worker that has ended; its program is tried once more."""
        was_ready = worker.ready
        reason = self._drop(worker)
        number = worker.busy
        if number is None:
            self.failed_starts += not was_ready
            if self.failed_starts >= MAX_FAILED_STARTS:
                self.trouble = reason
            return
        self.attempts[number] += 1
        if self.attempts[number] < ATTEMPTS:
            self.waiting.appendleft(number)
        elif worker.process.returncode == TESTER_KILLED:
            self.reports[number] = Report("killed", records=worker.report.records)
        else:
            self.reports[number] = Report("infra", trouble=reason)

    def _look_at_the_clock(self, heard: list[Worker]) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self.workers if worker not in heard]:  # what is said counts, however late
            if worker.busy is not None and now > worker.deadline:
                self.reports[worker.busy] = Report("timeout", records=worker.report.records)
                self._drop(worker)
        if now > self.deadline:
            self.trouble = f"the batch did not finish within {self.seconds:g} s"

    def _drop(self, worker: Worker) -> str:
        self.selector.unregister(worker.events)
        self.workers.remove(worker)
        return worker.close()


_pools: dict[Launch, Pool] = {}
_lock = threading.Lock()


def pool_of(launch: Launch) -> Pool:
    """The pool of this process for a kind of worker."""
    with _lock:
        return _pools.setdefault(launch, Pool(launch))


def close_all() -> None:
    """Ends all idle workers of this process."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for pool in _pools.values():
        pool._lock = threading.Lock()
    close_all()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
