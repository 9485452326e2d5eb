"""System calls that no honest program needs, refused by the kernel (seccomp, Linux on x86-64 and 64-bit ARM).

What is refused: sockets (a socketpair is no way out), signals to other processes, namespaces of one's own (in which one
could mount memory without a limit), memory that belongs to no process and so outlives limits and programs (System V and
POSIX queues, keys, memory files), other processes' memory, limits and priorities, and calls that have mostly been of
use to attack kernels. Numbers are from Linux's asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import os
import struct
import sys

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}  # AUDIT_ARCH_*

_REFUSED = {
    "socket": (41, 198), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "fanotify_init": (300, 262), "personality": (135, 92),
    "syslog": (103, 116), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
}
_TO_ITSELF = {"kill": (62, 129), "tgkill": (234, 131)}  # the first argument must be the process's own number
_PRLIMIT, _CLONE, _CLONE3 = (302, 261), (56, 220), (435, 435)
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW*

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # opcodes of classic BPF
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; arguments by their lower half
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000


def is_supported() -> bool:
    """Whether there is a filter for this machine."""
    return sys.platform == "linux" and sys.maxsize > 1 << 32 and os.uname().machine in _ARCHITECTURES


def instructions(own_process: int) -> bytes:
    """The seccomp program for the process of that number and its children, 8 bytes per instruction."""
    column, audit = _ARCHITECTURES[os.uname().machine]
    refuse = _step(_RETURN, _REFUSE | errno.EPERM)
    code = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, audit, 1, 0), _step(_RETURN, _KILL), _step(_LOAD, _NUMBER)]
    if column == 0:
        code += [_step(_AT_LEAST, 0x40000000, 0, 1), refuse]  # the x32 calls
    code += [_step(_EQUAL, _CLONE3[column], 0, 1), _step(_RETURN, _REFUSE | errno.ENOSYS)]  # clone has flags to look at
    for numbers in _REFUSED.values():
        code += [_step(_EQUAL, numbers[column], 0, 1), refuse]
    allowed = _step(_RETURN, _ALLOW)
    for numbers, test in (
        *((numbers, _step(_EQUAL, own_process, 1, 0)) for numbers in _TO_ITSELF.values()),
        (_PRLIMIT, _step(_EQUAL, 0, 1, 0)),
        (_CLONE, _step(_ANY_BIT, _NAMESPACE_FLAGS, 0, 1)),
    ):
        code += [_step(_EQUAL, numbers[column], 0, 4), _step(_LOAD, _FIRST_ARGUMENT), test, refuse, allowed]
    return b"".join([*code, allowed])


def _step(opcode: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", opcode, if_true, if_false, value)
