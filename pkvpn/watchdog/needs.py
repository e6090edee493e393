"""What a watchdog cannot do without, and what of it this system has not got.

Strategy: everything is tried, since a call may be there by its name and be refused by an older
kernel, or by a container's filter.  There is no second way of doing any of it that keeps the
promises: a pid without its pidfd may be somebody else's by the time a signal is sent to it, memory
without a memfd does not outlive who made it, and without /proc nobody knows what hangs.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable


def missing() -> list[str]:
    """Everything that is not there, each with what it is for and why it is not."""
    found = []
    for name, what_for, attempt in _NEEDS:
        try:
            attempt()
        except AttributeError:  # of another UNIX: Python itself has no name for it
            found.append(f"{name} ({what_for}): not known here")
        except OSError as error:
            found.append(f"{name} ({what_for}): {error.strerror}")
    return found


def _pidfd() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)


def _memfd() -> None:
    os.close(os.memfd_create("needs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))


def _proc() -> None:
    with open("/proc/self/stat", encoding="utf-8") as file:
        file.read(1)


def _epoll() -> None:
    select.epoll().close()


# By name as in the manual pages of Linux; with Linux 5.4 or later all are there.
_NEEDS: tuple[tuple[str, str, Callable[[], None]], ...] = (
    ("pidfd_open", "to end a process and never another of the same number", _pidfd),
    ("memfd_create", "for connections that outlive a process", _memfd),
    ("/proc", "to see what a process is at", _proc),
    ("epoll", "to serve many connections", _epoll),
)
