"""The tester of a worker: tests one program after the other and never executes a line of any.

The worker hands it a channel to each program's process, which was forked before the job was there to read. What a test
leaves behind here is the data set's doing, not a program's; all that comes from a program is plain data.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from dllm_rl.sandboxing import confine
from dllm_rl.sandboxing.codec import frame, read_frame
from dllm_rl.sandboxing.remote import Remote, run_tests

IDLE_EXIT = 3  # the exit status when no job has come for a while, or none will ever come


class Tester:
    """Reads jobs, writes reports, and asks the worker, over `control`, for programs and how they ended."""

    def __init__(self, jobs: int, reports: int, control: socket.socket, idle_seconds: float) -> None:
        self.jobs, self.reports, self.control, self.idle_seconds = jobs, reports, control, idle_seconds

    def run(self) -> int:
        """Serves until there is no more work; the exit status."""
        while True:
            descriptors = socket.recv_fds(self.control, 1, 1)[1]
            if not descriptors:  # the worker has ended
                return IDLE_EXIT
            with socket.socket(fileno=descriptors[0]) as channel:
                confined = read_frame(channel.recv)
                if confined is not True:
                    raise OSError(f"the program's process could not be confined: {confined}")
                self._report({"ready": True})
                job = self._next_job()
                if job is None:
                    return IDLE_EXIT
                self._do(job, channel)

    def _next_job(self) -> dict[str, Any] | None:
        if not select.select([self.jobs], [], [], self.idle_seconds)[0]:
            return None
        try:
            job: dict[str, Any] = read_frame(lambda most: os.read(self.jobs, most))
        except EOFError:
            return None
        return job

    def _do(self, job: dict[str, Any], channel: socket.socket) -> None:
        limits = job["limits"]
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"] + 60)  # should a test hang while the caller is stopped
        confine.limit_memory(limits["memory_mb"], for_good=False)
        remote = Remote(channel, limits["seconds"], limits["output_bytes"])
        channel.sendall(frame(limits))
        good = run_tests(remote, job["source"], job["tests"], self._report)
        code = self._end_program(remote, good)
        good = good and code == 0 and remote.ending is None
        self._report({"end": remote.ending or "exit", "code": code, "nonce": job["nonce"] if good else ""})
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _end_program(self, remote: Remote, good: bool) -> int | None:
        """The exit status of the program's process, None if it was killed; nothing of it is left then."""
        may_end_by_itself = good or remote.ending == "exit"
        if may_end_by_itself:
            with suppress(OSError):
                remote.tell("finish")
        seconds = remote.deadline - time.monotonic() if may_end_by_itself else 0
        self.control.sendall(frame(max(0, seconds)))
        code: int | None = read_frame(self.control.recv)
        if may_end_by_itself and code is None:
            remote.ending = "timeout"
        return code

    def _report(self, message: dict[str, Any]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(self.reports, line):]
