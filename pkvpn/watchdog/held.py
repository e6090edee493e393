"""Descriptors that outlive a child: opened once by the watchdog, or given by a child.

Strategy: the watchdog never looks into what it holds; it keeps a number open and hands it to
each incarnation.  What children give lies far above everything else, so that the children it
does not belong to close it with one call, however much it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable

from pkvpn.watchdog.child import (
    DROP,
    GIVE,
    HANDED,
    HANDED_AT_ONCE,
    LET_GO,
    MAX_KEY,
    REFUSED,
    SERVE,
    pack_keys,
)
from pkvpn.watchdog.spec import HeldSpec

_log = logging.getLogger(__name__)

# Descriptors given by children start here; below are the watchdog's own.
GIVEN_FLOOR = 512
# More than lies in a gift socket at once; a child that floods it does not keep the loop.
_BATCH = 1024
# More than a socket's buffer takes, so all that a dead child had sent.
_MOST_QUEUED = 100_000


class HeldDescriptors:
    """What the openers of the tree's spec returned, by name."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[HeldSpec, list[int]]] = {}

    def open(self, spec: HeldSpec, inherited: Iterable[int] = (), *, anew: bool = False) -> bool:
        """Open ``spec`` unless it is open with the same key; True if anything was opened.

        ``inherited``: what somebody before us held under the name: the opener goes on with it as
        with what is open, and makes what is missing.
        ``anew``: also if it is open.

        What was open under the name is closed after the new one is there.
        Raises what the opener raises; then the old one stays.
        """
        before = self._open.get(spec.name)
        if before is not None and before[0] == spec and not anew:
            return False
        if inherited := list(inherited):
            spec.adopt(inherited)
        try:
            descriptors = spec.open()
        finally:
            close_all(inherited)
        for fd in descriptors:
            os.set_inheritable(fd, False)
        self._open[spec.name] = (spec, descriptors)
        if before is not None:
            close_all(before[1])
        return True

    def adopt(self, spec: HeldSpec, descriptors: list[int]) -> None:
        """Go on holding what the image before an upgrade held."""
        self._open[spec.name] = (spec, descriptors)

    def keep_only(self, names: set[str]) -> None:
        """Close what a reload no longer names."""
        for name in set(self._open) - names:
            close_all(self._open.pop(name)[1])

    def descriptors(self, name: str) -> list[int]:
        return self._open[name][1]

    def counts(self) -> dict[str, int]:
        return {name: len(descriptors) for name, (_, descriptors) in self._open.items()}

    def close(self) -> None:
        self.keep_only(set())


class Kept:
    """What the incarnations of one child gave and have not dropped, at most ``limit``.

    ``floor``: its descriptors are this number or higher; those of another child lie elsewhere.
    """

    def __init__(self, limit: int, floor: int = GIVEN_FLOOR) -> None:
        self.limit = limit
        self._floor = floor
        self.refused = 0
        self.descriptors: dict[bytes, int] = {}
        # Of the standby, which follows: what it has, and what it has not heard of yet.
        self._followed: set[bytes] = set()
        self._given: dict[bytes, None] = {}
        self._dropped: dict[bytes, None] = {}
        # Told of each that comes, and of each number that is closed: for good, or because the key
        # has been given again, perhaps with the same open file.
        self.on_keep: Callable[[bytes, int], None] = lambda _key, _fd: None
        self.on_drop: Callable[[int, bool], None] = lambda _fd, _for_good: None

    def follow(self) -> dict[bytes, int]:
        """What there is now, for a standby that is born with it; `tell` goes on from there."""
        self._followed = set(self.descriptors)
        self._given.clear()
        self._dropped.clear()
        return dict(self.descriptors)

    def untold(self) -> int:
        """How much the standby has not heard of."""
        return len(self._given) + len(self._dropped)

    def tell(self, gifts: socket.socket) -> None:
        """Tell the standby what was dropped and given since it was told last.

        Raises OSError if it does not take it now; what it has taken need not be told again.
        """
        while self._dropped:
            some = list(self._dropped)[:HANDED_AT_ONCE]
            gifts.send(LET_GO + pack_keys(some))
            for key in some:
                del self._dropped[key]
                self._followed.discard(key)
        while self._given:
            some = list(self._given)[:HANDED_AT_ONCE]
            message = HANDED + pack_keys(some)
            socket.send_fds(gifts, [message], [self.descriptors[key] for key in some])
            for key in some:
                del self._given[key]
                self._followed.add(key)

    def drain(self, gifts: socket.socket, *, dead: bool = False) -> None:
        """Take what lies in the child's gift socket now.

        To be called with each beat of the child, and once more when it is ``dead``: all that it
        had sent belongs to its successor.
        """
        for _ in range(_MOST_QUEUED if dead else _BATCH):
            try:
                message, fds, flags, _ = socket.recv_fds(gifts, MAX_KEY + 1, 4)
            except OSError:
                return  # nothing more, or the other end is gone and all it sent has been read
            if not message and not fds:
                return
            why = self._take(message, fds, truncated=bool(flags & socket.MSG_CTRUNC))
            if why:
                self.refused += 1
                close_all(fds)
                with contextlib.suppress(OSError):
                    gifts.send(REFUSED + message[1:] + b"\0" + why.encode())

    def hand_over(self, gifts: socket.socket, number: int) -> bool:
        """Tell the standby that it is incarnation ``number`` now, with all that is kept.

        False: it does not take it; then it is of no use.
        """
        try:
            self.tell(gifts)
            gifts.send(SERVE + number.to_bytes(4, "big"))
        except OSError as error:
            _log.warning("a standby did not take over: %s", error)
            return False
        return True

    def _take(self, message: bytes, fds: list[int], *, truncated: bool) -> str:
        """Return why not, or nothing."""
        what, key = message[:1], message[1:]
        if what == DROP and not fds:
            fd = self.descriptors.pop(key, None)
            if fd is not None:
                self.on_drop(fd, True)
                close_all([fd])
                self._note_dropped(key)
            return ""
        if what != GIVE or not key:
            return "not a message that gives or drops"
        if truncated or len(fds) != 1:
            return "exactly one descriptor goes with a message"
        if len(self.descriptors) >= self.limit and key not in self.descriptors:
            return f"at most {self.limit} are kept"
        try:
            high = self._lift(fds[0])
        except OSError as error:
            return f"cannot be kept: {error.strerror}"
        before = self.descriptors.pop(key, None)
        if before is not None:
            self.on_drop(before, False)
            close_all([before])
            self._note_dropped(key)
        self.descriptors[key] = high
        self._given[key] = None
        self.on_keep(key, high)
        return ""

    def adopt(self, key: bytes, fd: int) -> int:
        """Go on keeping what a watchdog before us kept; returns its number from now on."""
        self.descriptors[key] = self._lift(fd)
        return self.descriptors[key]

    def _lift(self, fd: int) -> int:
        """The same open file in our band; the other number is closed.  Raises OSError."""
        try:
            high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self._floor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # The band lies above RLIMIT_NOFILE: then in the way of the others.
            os.set_inheritable(fd, False)
            return fd
        os.close(fd)
        return high

    def _note_dropped(self, key: bytes) -> None:
        self._given.pop(key, None)
        if key in self._followed:
            self._dropped[key] = None

    def close(self) -> None:
        close_all(self.descriptors.values())
        self.descriptors.clear()


def close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        with contextlib.suppress(OSError):
            _clear_linger(fd)
        with contextlib.suppress(OSError):
            os.close(fd)


def _clear_linger(fd: int) -> None:
    """With SO_LINGER, which a child may have set, the close of the last copy of a socket waits for
    the peer, for as long as the child said, non-blocking or not.  Raises OSError if it is none."""
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    finally:
        sock.detach()
