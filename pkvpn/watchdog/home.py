"""The runtime directory, as others find it: notices when something of it is taken away.

Strategy: the kernel tells (inotify), so nobody looks again and again, and nothing waits for a
file system.  A /run that is cleared takes the control socket, the pid file and the name of the
lock with it, and a tree that nobody can ask, or that a second start does not see, is of no use.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

_IN_MOVED_FROM, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x40, 0x200, 0x400, 0x800
_REMOVED = _IN_MOVED_FROM | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF


class Home:
    """Watches one directory.  ``fileno()`` is readable when something in it was removed."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Where the kernel has none to give, what is removed stays so until the next start.
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch()

    def fileno(self) -> int:
        """-1: nothing is noticed."""
        return self._fd

    def watch(self) -> None:
        """Begin, or begin again with a directory that was made anew."""
        if self._fd >= 0:
            _libc.inotify_add_watch(self._fd, os.fsencode(self.path), _REMOVED)

    def missing(self, names: tuple[str, ...]) -> set[str]:
        """To be called when readable: which of ``names`` are gone."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 65536):
                pass
        return {name for name in names if not os.path.lexists(os.path.join(self.path, name))}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
