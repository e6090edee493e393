"""What Windows has instead of descriptors that are inherited and of signals that follow a death.

A socket is duplicated into a process by its number (`Passed`), and all children belong to a job
that ends with its last handle, which only the watchdog has (`Job`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from multiprocess import context

LOCK_NAME = "lock"


class AlreadyRunning(Exception):
    """Another watchdog has the directory."""


class Passed:
    """A socket that comes along when this is sent to a process that is being started.

    There it is the number of a socket of its own, as `socket.socket(fileno=...)` takes it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __reduce__(self) -> tuple[Callable[[bytes], int], tuple[bytes]]:
        process = context.get_spawning_popen()
        return _take, (_share(self._sock, process.pid),)


if sys.platform == "win32":
    import msvcrt

    # What a console tells all of its processes when somebody wants them to end.
    END_SIGNALS = (signal.SIGINT, signal.SIGBREAK)

    def _share(sock: socket.socket, pid: int) -> bytes:
        return sock.share(pid)

    def _take(shared: bytes) -> int:
        return socket.fromshare(shared).detach()

    def _lock(path: str) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOINHERIT)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.close(fd)
            raise AlreadyRunning(path) from None
        return fd

else:  # so that all of this can be read and its types checked elsewhere
    END_SIGNALS = (signal.SIGINT,)

    def _share(sock: socket.socket, pid: int) -> bytes:
        raise NotImplementedError

    def _take(shared: bytes) -> int:
        raise NotImplementedError

    def _lock(path: str) -> int:
        raise NotImplementedError


class Job:
    """The children: the system ends them when the watchdog has ended, however it did.

    One that is started in the moment of that death is in no job yet; it ends by the end of file
    where it reads what it is born with.
    """

    def __init__(self) -> None:
        import win32job  # type: ignore[import-untyped,unused-ignore]

        self._job: Any = win32job.CreateJobObject(None, "")
        kind = win32job.JobObjectExtendedLimitInformation
        limits = win32job.QueryInformationJobObject(self._job, kind)
        limits["BasicLimitInformation"]["LimitFlags"] |= win32job.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
        win32job.SetInformationJobObject(self._job, kind, limits)

    def take_in(self, process: int) -> None:
        """``process``: its handle.  Raises OSError."""
        import pywintypes  # type: ignore[import-untyped,unused-ignore]
        import win32job

        try:
            win32job.AssignProcessToJobObject(self._job, process)
        except pywintypes.error as error:
            raise OSError(f"the job does not take it in: {error.strerror}") from None


@contextmanager
def only_one(directory: str) -> Iterator[None]:
    """Be the only watchdog with this directory; the system forgets it with the process.

    Raises AlreadyRunning, or OSError.
    """
    os.makedirs(directory, exist_ok=True)
    fd = _lock(os.path.join(directory, LOCK_NAME))
    try:
        yield
    finally:
        os.close(fd)
