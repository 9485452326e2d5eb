"""A worker: forks a tester once and a process for each program, waits, and leaves nothing of a program behind.

    standard input    jobs, read by the tester only; its end is the end of the worker
    standard output   one JSON line per event: `ready`, a record for each test, the `end` of the program

A worker has one thread and has imported next to nothing, so forking is safe and cheap. It never learns what a job
holds, because the process of the next program is a copy of it; and it forks that process before the job arrives.
Isolated, a worker is process 1 of its namespaces, which no signal from within can kill or stop, and every program's
process is process 1 of a namespace below, with a /tmp of its own: its end is the end of all that it has started.
"""

from __future__ import annotations

import gc
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from dllm_rl.sandboxing import confine, filter
from dllm_rl.sandboxing.codec import frame, read_frame
from dllm_rl.sandboxing.program import Session, end_normally
from dllm_rl.sandboxing.remote import run_assertion
from dllm_rl.sandboxing.tester import IDLE_EXIT, Tester

PROGRAM_FD = 3  # the only descriptor of a program's process besides 0 to 2, which are /dev/null
JOBS_FD, REPORTS_FD = 10, 11  # of a tester, whose 0 to 2 are /dev/null as well: tests may print
TESTER_KILLED = 9  # how a worker ends when something has killed its tester
PRELOADED = ("bisect", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "re", "string",
             "typing")


class Abandoned(Exception):
    """The caller's process has closed the jobs, or is no more."""


class TesterEnded(Exception):
    """The tester has no more work, or has been killed."""


class Worker:
    """The settings: `isolated`; `uid`, for programs, and the next one for the tester, or None to keep the user; `scratch`,
    the folder of isolated programs, and `disk_mb`, its size; `idle_seconds`, after which a worker without a job ends."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.isolated: bool = settings["isolated"]
        self.uid: int | None = settings["uid"]
        self.scratch: str = settings["scratch"]
        self.disk_mb: int = settings["disk_mb"]
        self.idle_seconds: float = settings["idle_seconds"]
        self.folders = 0
        self.namespace = os.open("/proc/self/ns/pid", os.O_RDONLY) if self.isolated else -1

    def run(self) -> int:
        """Serves programs until there is no more work or something is odd; the exit status."""
        confine.prctl(confine.PR_SET_DUMPABLE, 0)  # without privileges, nobody opens its descriptors or memory
        if self.isolated:
            confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
        self._try_spare_user()
        _warm_up()
        gc.freeze()  # children then share these pages instead of copying them
        self.tester, self.control = self._start_tester()
        try:
            while True:
                self._serve_one()
        except (Abandoned, TesterEnded) as reason:
            return self._end(kill_tester=isinstance(reason, Abandoned))

    def _try_spare_user(self) -> None:
        """Programs must be able to load the standard library as another user; if not, they keep the user."""
        if self.uid is None or _succeeds(lambda: _read_library(self.uid)):
            return
        if self.isolated:
            raise PermissionError("other users may not read Python's standard library")
        self.uid = None

    def _start_tester(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        worker = os.getpid()
        tester = os.fork()
        if tester == 0:
            ours.close()
            _never_return(lambda: self._run_tester(theirs, worker))
        theirs.close()
        return tester, ours

    def _run_tester(self, control: socket.socket, worker: int) -> int:
        os.dup2(0, JOBS_FD, inheritable=False)
        os.dup2(1, REPORTS_FD, inheritable=False)
        _silence(0, 1)
        confine.give_up_rights(None if self.uid is None else self.uid + 1)
        confine.die_with_parent(worker)
        return Tester(JOBS_FD, REPORTS_FD, control, self.idle_seconds).run()

    def _serve_one(self) -> None:
        folder = self._make_folder()
        ours, theirs = socket.socketpair()
        program = self._start_program(theirs, folder)
        theirs.close()
        code = None
        try:
            self._send_channel(ours)
            code = self._exit_status(program, self._seconds_allowed())
        finally:
            self._clean_up(program, code is not None, folder)
        try:
            self.control.sendall(frame(code))
        except OSError:
            raise TesterEnded from None

    def _start_program(self, channel: socket.socket, folder: str) -> int:
        worker = os.getpid()
        if self.isolated:
            confine.number_children_anew(self.namespace)
        program = os.fork()
        if program == 0:
            _never_return(lambda: self._run_program(channel, folder, worker))
        return program

    def _send_channel(self, channel: socket.socket) -> None:
        with channel, suppress(OSError):  # the tester has ended, as the next step finds out
            socket.send_fds(self.control, [b"p"], [channel.fileno()])

    def _seconds_allowed(self) -> float:
        """What the tester says when it has done with the program: for how long it may still go on to end by itself."""
        self._wait(None, self.control.fileno())
        try:
            return float(read_frame(self.control.recv))
        except (EOFError, ConnectionError):
            raise TesterEnded from None

    def _exit_status(self, program: int, seconds: float) -> int | None:
        """How the program's process has ended, if it does in time."""
        deadline, pause = time.monotonic() + seconds, 0.0002
        while True:
            pid, status = os.waitpid(program, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                return None
            self._wait(pause)
            pause = min(2 * pause, 0.01)

    def _wait(self, seconds: float | None, readable: int | None = None) -> None:
        """Waits for something to read, if given; raises Abandoned as soon as the caller's process has closed the jobs."""
        poll = select.poll()
        poll.register(0, 0)  # nothing but its end
        if readable is not None:
            poll.register(readable, select.POLLIN)
        if any(descriptor == 0 for descriptor, _ in poll.poll(None if seconds is None else 1000 * seconds)):
            raise Abandoned

    def _make_folder(self) -> str:
        if self.isolated:
            return self.scratch  # each program's process hides it under one of its own
        self.folders += 1
        folder = os.path.abspath(f"{self.folders}")
        os.mkdir(folder, 0o700)
        if self.uid is not None:
            os.chown(folder, self.uid, self.uid)
        return folder

    def _clean_up(self, program: int, ended: bool, folder: str) -> None:
        """Ends a program's process, unless it has ended, and all that it has started; removes its files."""
        with suppress(OSError):
            os.killpg(program, signal.SIGKILL)
        if not ended:
            os.kill(program, signal.SIGKILL)
            os.waitpid(program, 0)
        if not self.isolated:
            _kill_orphans(self.tester)
            remove(folder)

    def _end(self, kill_tester: bool) -> int:
        """The exit status of the worker: 0 if there is no more work."""
        if kill_tester:
            os.kill(self.tester, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.tester, 0)[1])
        if not self.isolated:
            remove(os.getcwd())
        return 0 if kill_tester or code == IDLE_EXIT else TESTER_KILLED if code < 0 else code

    def _run_program(self, channel: socket.socket, folder: str, worker: int) -> int:
        """What a program's process does before, while and after it is the program's; the exit status."""
        self._confine_program(channel, folder, worker)
        read, write = os.read, os.write

        def send(message: Any) -> None:
            data = memoryview(frame(message))
            while data:
                data = data[write(PROGRAM_FD, data):]

        def receive() -> Any:
            return read_frame(lambda most: read(PROGRAM_FD, most))

        session = Session()
        send(True)
        limits = receive()
        confine.limit_resources(limits, self._allowed_processes(limits["processes"]))
        while True:
            request = receive()
            if request[0] == "finish":
                end_normally()
                return 0
            send(session.answer(request))

    def _confine_program(self, channel: socket.socket, folder: str, worker: int) -> None:
        os.dup2(channel.fileno(), PROGRAM_FD)
        channel.detach()
        os.closerange(PROGRAM_FD + 1, 64)  # descriptors are given out lowest first: there are none beyond
        _silence(0, 1, 2)
        os.setsid()
        if self.isolated:
            confine.get_own_files(folder, self.disk_mb, own_ipc=not filter.is_supported())  # with it, no call can use any
        os.chdir(folder)
        confine.give_up_rights(self.uid)
        confine.die_with_parent(0 if self.isolated else worker)
        for name in [name for name in sys.modules if name.partition(".")[0] == "dllm_rl"]:
            del sys.modules[name]
        if filter.is_supported():
            confine.filter_calls(filter.instructions(os.getpid()))

    def _allowed_processes(self, wanted: int) -> int:
        """The limit on the processes of the program's user that lets a program have as many as wanted."""
        if self.uid is not None:
            return wanted
        return wanted + 2 if self.isolated else 0  # this one and the tester; or all that the caller's user has running


def remove(folder: str) -> None:
    """Removes a folder, whatever a program has done to what is in it."""
    with suppress(OSError):
        os.rmdir(folder)
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):  # deep trees are too much for shutil
        if os.path.exists(folder):
            program = shutil.which(command[0], path="/bin:/usr/bin") or command[0]
            subprocess.run([program, *command[1:], folder], env={}, stderr=subprocess.DEVNULL, check=False)


def _kill_orphans(tester: int) -> None:
    """Kills what a program left behind; killing an orphan may orphan its own children, hence the rounds."""
    children = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(children):
        with open(children) as file:
            orphans = {int(pid) for pid in file.read().split()} - {tester}
        if not orphans:
            return
        for pid in orphans:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _warm_up() -> None:
    """Does what testers and programs will do: what the interpreter prepares at first use, they inherit."""
    for name in PRELOADED:
        __import__(name)
    library = confine.c_library()
    for name in ("unshare", "setns", "mount", "capset", "prctl"):
        getattr(library, name, None)
    if filter.is_supported():
        filter.instructions(1)
    request = read_frame(io.BytesIO(frame(["evaluate", "len(x)", {"x": [1]}])).read)
    Session().answer(["execute", "def f(x):\n    return [x]"])
    Session().answer(request)
    run_assertion("assert len(x) == 1", "x = [1]", {})


def _succeeds(run: Callable[[], int]) -> bool:
    """Whether `run` returns 0 in a process of its own."""
    child = os.fork()
    if child == 0:
        _silence(2)
        _never_return(run)
    return os.waitpid(child, 0)[1] == 0


def _read_library(uid: int | None) -> int:
    confine.give_up_rights(uid)
    with open(str(subprocess.__file__)):
        return 0


def _silence(*descriptors: int) -> None:
    """Puts /dev/null in their place."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    if null not in descriptors:
        os.close(null)


def _never_return(run: Callable[[], int], leave: Callable[[int], NoReturn] = os._exit) -> NoReturn:
    """Ends the process with what `run` returns; `leave` is os._exit as it was before a program could replace it."""
    code = 1
    try:
        code = run()
    except BaseException as error:
        with suppress(BaseException):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        leave(code)


def main() -> NoReturn:
    """Started by `pool.py` as a script would be; the settings are the last argument."""
    os.environ.clear()  # the interpreter itself sets LC_CTYPE
    _never_return(lambda: Worker(json.loads(sys.argv[-1])).run())
