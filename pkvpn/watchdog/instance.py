"""One instance: the lock that a whole tree carries.

Strategy: the lock file bears two locks, which answer two questions.

- flock, exclusive: *is any process of a tree left?*  It belongs to the open file, so every process
  that inherited the descriptor holds it, until the last one is gone.
- a record lock (fcntl), the *claim*: *is there a watchdog?*  It belongs to one process, is not
  inherited by a fork, survives an exec, and the kernel names its owner.

So a tree whose watchdog is dead is told from one that lives without asking any file what was once
written into it, and only who has the claim may sweep what was left.  The pid file is information
for people only.

A process loses its claim when it closes *any* descriptor of the lock file.  Nothing in the
watchdog may open the lock by its path; the functions here answer the owner from memory.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from dataclasses import dataclass

from pkvpn.watchdog import procfs

__all__ = [
    "LOCK_NAME",
    "PID_NAME",
    "Claim",
    "InstanceError",
    "InstanceLock",
    "PidFile",
    "holders",
    "lock_is_held",
    "pid_file_is_alive",
    "prepare_directory",
    "read_pid_file",
    "watchdog_pid",
    "write_pid_file",
]

LOCK_NAME = "lock"
PID_NAME = "pid"

# Somebody who only looks (`lock_is_held`) has the lock for some microseconds: try again before
# believing that it is taken.
_TRIES = 5
_TRY_AGAIN = 0.002

# struct flock: l_type, l_whence, l_start, l_len, l_pid
_FLOCK = struct.Struct("@hhqqi4x")


class InstanceError(Exception):
    """The directory or the lock cannot be used; the text names it and says why."""


def prepare_directory(path: str) -> None:
    """Make the run-time directory (0700) or check that nobody else can write into it."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise InstanceError(f"{path}: {error.strerror}") from error
    if found.st_uid != os.geteuid():
        raise InstanceError(f"{path} belongs to uid {found.st_uid}, not to us ({os.geteuid()})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InstanceError(f"{path} can be written by others (mode {found.st_mode & 0o7777:04o})")


class Claim:
    """Holds the claim alone, without the tree's lock: who sweeps keeps every start out."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, path: str) -> Claim | None:
        """None: a watchdog, or another sweeper, has it.  Raises `InstanceError`."""
        if _own(path) is not None:
            return None
        fd = _open(path, os.O_RDWR | os.O_CREAT)
        if not _claim(fd):
            os.close(fd)
            return None
        return cls(fd)

    def release(self) -> None:
        os.close(self._fd)


class InstanceLock:
    """Holds both locks as long as the process lives; ``fd`` is for the children to inherit."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.owner = os.getpid()
        _remember(self)

    @classmethod
    def acquire(cls, path: str) -> InstanceLock | None:
        """Take both locks; None: somebody has one of them.  Raises `InstanceError`.

        To be called in the process that will be the watchdog: a fork leaves the claim behind.
        """
        prepare_directory(os.path.dirname(path) or ".")
        while True:
            fd = _open(path, os.O_RDWR | os.O_CREAT)
            if not (_claim(fd) and _take(fd)):
                os.close(fd)
                return None
            # Between open and lock the file may have been removed and made anew by another.
            if _is_named(fd, path):
                return cls(fd, path)
            os.close(fd)

    @classmethod
    def adopt(cls, fd: int, path: str) -> InstanceLock:
        """Go on with a lock that came through an exec of this very process."""
        return cls(fd, path)

    def release(self) -> None:
        """Close it.  The tree's lock is free only when the last child has gone as well."""
        if _ours is self:
            _remember(None)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


# The lock of this process, by which the functions below answer without opening the file.
_ours: InstanceLock | None = None


def _remember(lock: InstanceLock | None) -> None:
    global _ours  # noqa: PLW0603 - the claim is the process's, not an object's
    _ours = lock


def _own(path: str) -> InstanceLock | None:
    if _ours is None or _ours.owner != os.getpid() or _ours.fd < 0:
        return None
    return _ours if _is_named(_ours.fd, path) else None


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InstanceError(f"{path}: {error.strerror}") from error


def _claim(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _take(fd: int) -> bool:
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if left:
                time.sleep(_TRY_AGAIN)
        else:
            return True
    return False


def _is_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def lock_is_held(path: str) -> bool:
    """Whether any process of a tree lives.  No lock file: no.  Raises `InstanceError`."""
    if _own(path) is not None:
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InstanceError(f"{path}: {error.strerror}") from error
    try:
        # Shared: two who look do not see each other.  Closing gives it back at once.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def watchdog_pid(path: str) -> int | None:
    """The pid of the process that has the claim; None: nobody.

    0: somebody whom we cannot see (another pid namespace).
    """
    own = _own(path)
    if own is not None:
        return own.owner
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    except OSError:
        return None
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else max(pid, 0)


def holders(path: str) -> list[int]:
    """Processes that hold the tree's lock, ourselves excepted.

    Also those that hold it through a file of that name which was removed: their tree is one of
    ours too.  Who merely has the file open, to look or to wait, is no holder.
    """
    real = os.path.realpath(path)
    try:
        named: os.stat_result | None = os.stat(real)
    except OSError:
        named = None
    me = os.getpid()
    return [pid for pid in procfs.pids() if pid != me and _holds(pid, real, named)]


def _holds(pid: int, real: str, named: os.stat_result | None) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    wanted = os.path.basename(real)
    for name in names:
        link = f"/proc/{pid}/fd/{name}"
        try:
            target = os.readlink(link)
            # The name first: a stat of each of ten thousand connections would take long.  The
            # path may differ (a bind mount), the file decides.
            if target != f"{real} (deleted)":
                if os.path.basename(target) != wanted or named is None:
                    continue
                if not os.path.samestat(os.stat(link), named):
                    continue
        except OSError:
            continue  # closed meanwhile
        if _has_flock(pid, name):
            return True
    return False


def _has_flock(pid: int, fd_name: str) -> bool:
    """Whether this open file bears an exclusive flock."""
    try:
        with open(f"/proc/{pid}/fdinfo/{fd_name}") as file:
            text = file.read()
    except OSError:
        return False
    return any(
        line.startswith("lock:") and "FLOCK" in line and "WRITE" in line
        for line in text.splitlines()
    )


# The pid file


@dataclass(frozen=True, slots=True)
class PidFile:
    """Who wrote it: pid, start time in ticks, and the start of the machine it belongs to."""

    pid: int
    start_time: int
    boot_id: str


def write_pid_file(path: str) -> None:
    """Write our own; the first line is the pid alone, as other tools expect it.  Atomic."""
    pid = os.getpid()
    identity = procfs.read_identity(pid) or (0, procfs.boot_id())
    tmp = f"{path}.{pid}"
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w") as file:
        file.write(f"{pid}\n{identity[0]} {identity[1]}\n")
    os.replace(tmp, path)


def read_pid_file(path: str) -> PidFile | None:
    """What it says; None if there is none or it is damaged."""
    try:
        with open(path, errors="replace") as file:
            words = file.read(256).split()
    except OSError:
        return None
    if len(words) < 2 or not (words[0].isdigit() and words[1].isdigit()) or int(words[0]) < 1:
        return None
    return PidFile(int(words[0]), int(words[1]), words[2] if len(words) > 2 else "")


def pid_file_is_alive(pid_file: PidFile | None) -> bool:
    """Whether the very process that wrote it lives; False for a zombie."""
    if pid_file is None:
        return False
    identity = procfs.read_identity(pid_file.pid)
    if identity is None or procfs.is_zombie(pid_file.pid):
        return False
    return identity == (pid_file.start_time, pid_file.boot_id)
