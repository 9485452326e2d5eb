"""What a process of the sandbox does to itself: system calls, limits, and giving up rights. Runs inside workers."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
from functools import cache
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x8000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8


@cache
def c_library() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int, pointer: Any = None) -> bool:
    """Whether the Linux call prctl(option, value, pointer) succeeded."""
    if sys.platform != "linux":
        return False
    words = [ctypes.c_ulong(value), pointer or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)]
    return bool(c_library().prctl(option, *words) == 0)


def checked(result: int, what: str) -> None:
    """Raises OSError if a call of the C library failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def number_children_anew(own_namespace: int) -> None:
    """The next child will be process 1 of a new namespace; the descriptor is that of this process's own one."""
    checked(c_library().setns(own_namespace, CLONE_NEWPID), "setns")
    checked(c_library().unshare(CLONE_NEWPID), "unshare")


def get_own_files(folder: str, disk_mb: int, own_ipc: bool) -> None:
    """Puts an empty, small folder of this process's own there, and gives it queues of its own if asked to."""
    checked(c_library().unshare(CLONE_NEWNS | (CLONE_NEWIPC if own_ipc else 0)), "unshare")
    options = f"size={disk_mb}m,nr_inodes=4096,mode=1777".encode()
    checked(c_library().mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options), "mount")


def give_up_rights(uid: int | None) -> None:
    """Becomes an unprivileged user if it may, loses all capabilities, and cannot get any back."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if sys.platform == "linux":
        no_capabilities = (ctypes.c_uint32 * 6)()
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        checked(c_library().capset(header, no_capabilities), "capset")
        prctl(PR_SET_NO_NEW_PRIVS, 1)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls(instructions: bytes) -> None:
    """Refuses the system calls that a seccomp program (8 bytes per instruction) names, for good."""
    program = _FilterProgram(len(instructions) // 8, instructions)
    if not prctl(PR_SET_SECCOMP, 2, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), "seccomp")


def limit_resources(limits: dict[str, Any], processes: int) -> None:
    """Processor time, memory, processes, descriptors and the size of a file."""
    cpu_seconds = math.ceil(limits["seconds"]) + 1
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)  # SIGXCPU, then SIGKILL
    limit_memory(limits["memory_mb"], for_good=True)
    bounds = {"NPROC": processes, "FSIZE": limits["file_mb"] << 20, "NOFILE": 64, "CORE": 0, "STACK": 8 << 20}
    for name, bound in bounds.items():
        _limit(getattr(resource, f"RLIMIT_{name}"), bound, bound)


def limit_memory(megabytes: int, for_good: bool) -> None:
    """Address space, and data where the system limits nothing else."""
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        _limit(kind, megabytes << 20, megabytes << 20 if for_good else resource.RLIM_INFINITY)


def _limit(kind: int, soft: int, hard: int) -> None:
    most = resource.getrlimit(kind)[1]
    if most != resource.RLIM_INFINITY:
        soft = min(soft, most)
        hard = most if hard == resource.RLIM_INFINITY else min(hard, most)
    try:
        resource.setrlimit(kind, (soft, hard))
    except (ValueError, OSError):
        if sys.platform != "darwin":  # macOS refuses limits on address space
            raise


def die_with_parent(parent: int) -> None:
    """This process is killed when its parent ends (Linux); raises OSError if it already has."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the parent process has ended")
