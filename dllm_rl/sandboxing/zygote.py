"""A worker: forks a tester and a program's process for each program, waits, and leaves nothing behind.

    standard input    jobs, read by the testers only; its end is the end of the worker
    standard output   one JSON line per event: `ready`, a record for each test, the `end` of the program

A worker has one thread and has imported next to nothing, so forking is safe and cheap. It never learns what a job
holds, because the process of the next program is a copy of it. Both processes of a program are forked before its job
arrives. Isolated, a worker is process 1 of its namespaces, which no signal from within can kill or stop, and every
program gets process numbers and a /tmp of its own.
"""

from __future__ import annotations

import gc
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
from dllm_rl.sandboxing.tester import Remote, run_tests

PROGRAM_FD = 3  # the only descriptor of a program's process besides 0 to 2, which are /dev/null
JOBS_FD, REPORTS_FD = 10, 11  # of a tester, whose 0 to 2 are /dev/null as well: tests may print
IDLE_EXIT = 3  # how a tester ends when no job has come for a while, or when none will ever come
TESTER_KILLED = 9  # how a worker ends when something has killed the tester
PRELOADED = ("bisect", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "re", "string",
             "typing")


class Worker:
    """The settings: `isolated`; `uid`, for the program, and the next one for the tester, or None to keep the user;
    `disk_mb`, for /tmp; `idle_seconds`, after which a worker without a job ends."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.isolated: bool = settings["isolated"]
        self.uid: int | None = settings["uid"]
        self.disk_mb: int = settings["disk_mb"]
        self.idle_seconds: float = settings["idle_seconds"]
        self.folders = 0

    def run(self) -> int:
        """Serves programs until there is no more work or something is odd; the exit status."""
        confine.prctl(confine.PR_SET_DUMPABLE, 0)  # without privileges, nobody opens its descriptors or memory
        if self.isolated:
            confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
        self._try_spare_user()
        for name in PRELOADED:
            __import__(name)
        Session().answer(["evaluate", "len(x)", {"x": [1]}])  # what the interpreter prepares at first use, children inherit
        gc.freeze()  # children then share these pages instead of copying them
        code = 0
        while code == 0:
            code = self._serve_one()
        if not self.isolated:
            remove(os.getcwd())
        return 0 if code == IDLE_EXIT else code

    def allowed_processes(self, wanted: int) -> int:
        """The limit on the processes of the program's user that lets a program have as many as wanted."""
        if self.uid is not None:
            return wanted
        return wanted + 2 if self.isolated else 0  # its own, this one and the tester; or all that the caller has running

    def _try_spare_user(self) -> None:
        """Programs must be able to load the standard library as another user; if not, they keep the user."""
        if self.uid is None or _succeeds(lambda: _read_library(self.uid)):
            return
        if self.isolated:
            raise PermissionError("other users may not read Python's standard library")
        self.uid = None

    def _serve_one(self) -> int:
        folder = self._make_folder()
        alive, held = os.pipe()  # the tester holds the other end until it ends
        worker = os.getpid()
        tester = os.fork()
        if tester == 0:
            os.close(alive)
            _never_return(lambda: Tester(self, folder, worker).run())
        os.close(held)
        poll = select.poll()
        poll.register(0, 0)  # nothing but its end, when the caller's process has closed it or is no more
        poll.register(alive, 0)
        abandoned = any(descriptor == 0 for descriptor, _ in poll.poll())
        if abandoned:
            os.kill(tester, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(tester, 0)[1])
        os.close(alive)
        self._clean_up(folder)
        return IDLE_EXIT if abandoned else TESTER_KILLED if code < 0 else code

    def _make_folder(self) -> str:
        if self.isolated:
            return "/tmp"  # hidden by the tester under one of its own
        self.folders += 1
        folder = os.path.abspath(f"{self.folders}")
        os.mkdir(folder, 0o700)
        if self.uid is not None:
            os.chown(folder, self.uid, self.uid)
        return folder

    def _clean_up(self, folder: str) -> None:
        if self.isolated:
            with suppress(OSError):  # nothing is left, as a rule
                os.kill(-1, signal.SIGKILL)
            with suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)
        else:
            _kill_orphans()
            remove(folder)


def remove(folder: str) -> None:
    """Removes a folder, whatever a program has done to what is in it."""
    with suppress(OSError):
        os.rmdir(folder)
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):  # deep trees are too much for shutil
        if os.path.exists(folder):
            program = shutil.which(command[0], path="/bin:/usr/bin") or command[0]
            subprocess.run([program, *command[1:], folder], env={}, stderr=subprocess.DEVNULL, check=False)


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


def _kill_orphans() -> None:
    """Kills what a program left behind; killing an orphan may orphan its own children, hence the rounds."""
    children = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(children):
        with open(children) as file:
            orphans = [int(pid) for pid in file.read().split()]
        if not orphans:
            return
        for pid in orphans:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


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


class Tester:
    """The tester of one program, and before it has learnt anything, the one that forks the program's process."""

    def __init__(self, worker: Worker, folder: str, parent: int) -> None:
        self.worker, self.folder, self.parent = worker, folder, parent
        self.child = 0

    def run(self) -> int:
        """Waits for a job, does it, reports; the exit status."""
        for descriptor, place in ((0, JOBS_FD), (1, REPORTS_FD)):
            os.dup2(descriptor, place, inheritable=False)
        _silence(0, 1)
        if self.worker.isolated:
            extra = 0 if filter.is_supported() else confine.CLONE_NEWIPC  # with it, no call can use such a namespace
            confine.new_namespaces(extra, self.worker.disk_mb)
        channel = self._start_program()
        confine.give_up_rights(None if self.worker.uid is None else self.worker.uid + 1)
        confine.die_with_parent(self.parent)
        confined = read_frame(channel.recv)
        if confined is not True:
            raise OSError(f"the program's process could not be confined: {confined}")
        self._report({"ready": True})
        if not select.select([JOBS_FD], [], [], self.worker.idle_seconds)[0]:
            return IDLE_EXIT
        try:
            job = read_frame(lambda most: os.read(JOBS_FD, most))
        except EOFError:
            return IDLE_EXIT
        self._do(job, channel)
        return 0

    def _start_program(self) -> socket.socket:
        channel, theirs = socket.socketpair()
        tester = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            _never_return(lambda: _run_program(self.worker, theirs, self.folder, tester))
        theirs.close()
        return channel

    def _do(self, job: dict[str, Any], channel: socket.socket) -> None:
        limits = job["limits"]
        _silence(2)
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"] + 60)  # should a test hang while the caller is stopped
        remote = Remote(channel, limits["seconds"], limits["output_bytes"])
        channel.sendall(frame(limits))
        confine.limit_memory(limits)
        good = run_tests(remote, job["source"], job["tests"], self._report)
        code = self._end_program(remote, good)
        good = good and code == 0 and remote.ending is None
        self._report({"end": remote.ending or "exit", "code": code, "nonce": job["nonce"] if good else ""})

    def _end_program(self, remote: Remote, good: bool) -> int | None:
        """The exit status of the program's process, None if it had to be killed."""
        code = None
        if good or remote.ending == "exit":
            with suppress(OSError):
                remote.tell("finish")
            code = self._wait(remote.deadline)
            if code is None:
                remote.ending = "timeout"
        for kill in (os.kill, os.killpg):  # in vain where this process has another user: the worker does it then
            with suppress(OSError):
                kill(self.child, signal.SIGKILL)
        return code

    def _wait(self, deadline: float) -> int | None:
        pause = 0.0002
        while True:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def _report(self, message: dict[str, Any]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(REPORTS_FD, line):]


def _run_program(worker: Worker, channel: socket.socket, folder: str, tester: int) -> int:
    """What the program's process does before, while and after it is the program's; the exit status."""
    os.dup2(channel.fileno(), PROGRAM_FD)
    channel.detach()
    os.closerange(PROGRAM_FD + 1, 64)  # descriptors are given out lowest first: there are none beyond
    _silence(2)
    os.setsid()
    os.chdir(folder)
    confine.give_up_rights(worker.uid)
    confine.die_with_parent(0 if worker.isolated else tester)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dllm_rl"]:
        del sys.modules[name]
    read, write = os.read, os.write

    def send(message: Any) -> None:
        data = memoryview(frame(message))
        while data:
            data = data[write(PROGRAM_FD, data):]

    def receive() -> Any:
        return read_frame(lambda most: read(PROGRAM_FD, most))

    session = Session()
    if filter.is_supported():
        confine.filter_calls(filter.instructions(os.getpid()))
    send(True)
    limits = receive()
    confine.limit_resources(limits, worker.allowed_processes(limits["processes"]))
    while True:
        request = receive()
        if request[0] == "finish":
            end_normally()
            return 0
        send(session.answer(request))


def _silence(*descriptors: int) -> None:
    """Puts /dev/null in their place."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


def main() -> NoReturn:
    """Started by `pool.py` as a script would be; the settings are the last argument."""
    os.environ.clear()  # the interpreter itself sets LC_CTYPE
    _never_return(lambda: Worker(json.loads(sys.argv[-1])).run())
