"""How a worker is started: in bubblewrap (https://github.com/containers/bubblewrap), or as a plain subprocess.

Isolated, a worker sees of this machine the system's libraries, the Python it runs in without installed packages, and
this folder, all read-only, and nothing else: no home folder, no project, no data, no network, no other process.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DISK_MB = 16
IDLE_SECONDS = 10.0
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LIBRARY = "/sandbox"
_SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
_FIRST_UID = 2_000_000_000  # far from those that people and services have
_START = "import sys; sys.path.append({!r}); from dllm_rl.sandboxing.zygote import main; sys.path.pop(); main()"

_worker_numbers = itertools.count()


@dataclass(frozen=True)
class Launch:
    """A way of starting workers."""

    isolated: bool
    change_user: bool
    """Whether programs run as users of their own, which takes the rights of root."""

    def command(self) -> list[str]:
        """The command line of one worker."""
        uid = spare_uid() if self.change_user else None
        settings = {"isolated": self.isolated, "uid": uid, "scratch": scratch(), "disk_mb": DISK_MB,
                    "idle_seconds": IDLE_SECONDS}
        library = _LIBRARY if self.isolated else str(Path(__file__).parents[2])
        start = [interpreter(), "-I", "-S", "-c", _START.format(library), json.dumps(settings)]
        return [*bubblewrap(self.change_user), *start] if self.isolated else start

    def folder(self) -> str | None:
        """A new folder for the files of one worker's programs; None where they stay in memory."""
        return None if self.isolated else tempfile.mkdtemp(prefix="dllm-rl-")


def launches() -> Iterator[Launch]:
    """The ways of starting isolated workers here, best first."""
    if os.geteuid() == 0 and spare_uid() is not None:
        yield Launch(isolated=True, change_user=True)
    yield Launch(isolated=True, change_user=False)


def plain_launch() -> Launch:
    """Without isolation."""
    return Launch(isolated=False, change_user=os.geteuid() == 0 and spare_uid() is not None)


def executable() -> str | None:
    """Where bubblewrap is, if it is installed."""
    return shutil.which("bwrap") if sys.platform == "linux" else None


def interpreter() -> str:
    """The Python that runs workers: the one below a virtual environment, which knows no installed package."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def scratch() -> str:
    """Where isolated programs may write: /tmp, unless that would hide the interpreter."""
    return "/scratch" if interpreter().startswith("/tmp/") else "/tmp"


def spare_uid() -> int | None:
    """The first of two user numbers that nobody has, other ones on each call; None where there are not enough.

    The limit on processes counts those of a user, and does not bind root.
    """
    try:
        ranges = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return None
    room = max(first + count for first, _, count in ranges) - _FIRST_UID
    if room < 1 << 28:
        return None
    return _FIRST_UID + 2 * ((os.getpid() * 64 + next(_worker_numbers) % 64) % (1 << 27))


def bubblewrap(change_user: bool) -> list[str]:
    """The bubblewrap command, up to the command to be isolated. Root that changes users needs no namespace for them."""
    user = [] if change_user else ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    needed = ("SYS_ADMIN", "SETUID", "SETGID", "KILL") if change_user else ("SYS_ADMIN",)
    return [
        executable() or "bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        *user, "--new-session", "--as-pid-1", "--clearenv", "--cap-drop", "ALL",
        *(word for name in needed for word in ("--cap-add", f"CAP_{name}")),
        *_system(), *_python(), *_workers_own(), "--proc", "/proc", "--dir", scratch(),
        "--chdir", scratch(), "--dir", "/dev",
        # Not --dev, for which bubblewrap needs a second user namespace, in which a worker could not return to its own.
        *(word for name in _DEVICES for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")), "--remount-ro", "/",
    ]


def _system() -> Iterator[str]:
    for folder in _SYSTEM_FOLDERS:
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            yield from ("--ro-bind", folder, folder)
    if os.path.exists("/etc/ld.so.cache"):
        yield from _seen_at(Path("/etc/ld.so.cache"), Path("/etc/ld.so.cache"))


def _python() -> Iterator[str]:
    """The interpreter and its standard library; folders of installed packages are covered by empty ones."""
    if not interpreter().startswith(tuple(f"{folder}/" for folder in _SYSTEM_FOLDERS)):
        parts = {Path(interpreter()), Path(sys.base_prefix, "lib"), Path(sys.base_exec_prefix, sys.platlibdir)}
        for part in sorted(path for path in parts if path.exists()):
            yield from _seen_at(part, part)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for prefix, python, packages in itertools.product(
        sorted({sys.base_prefix, "/usr", "/usr/local"}), ("python3", version), ("site-packages", "dist-packages"),
    ):
        folder = Path(prefix, "lib", python, packages)
        if folder.is_dir():
            yield from ("--tmpfs", str(folder), "--remount-ro", str(folder))


def _workers_own() -> Iterator[str]:
    here = Path(__file__).parent
    for path in (here.parent / "__init__.py", here):
        yield from _seen_at(path, Path(_LIBRARY, "dllm_rl", path.name))


def _seen_at(path: Path, place: Path) -> Iterator[str]:
    for folder in reversed(place.parents[:-1]):  # nobody else may pass those that bubblewrap makes by itself
        yield from ("--dir", str(folder))
    yield from ("--ro-bind", str(path), str(place))
