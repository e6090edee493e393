"""What the service manager keeps for us: descriptors that outlive the watchdog itself.

Strategy: whatever is held or given, and could not be made anew, is handed to the manager as soon
as we have it (sd_notify(3), FDSTORE); the next process of the service is born with all of it
(sd_listen_fds(3)), whether the one before was asked to restart or killed.  Names are for kinds:
what is held has its own name, and all that children give has one short name, since the manager
passes all names in one string of 128 KiB.  Which is which of those is in a *ledger*, a memory file
that is kept like the others: a line for each gift, with a mark by which its descriptor is known
again.  A line whose descriptor is gone means nothing.

The manager lets go of a socket by itself when both sides are shut down, so that is how a given
connection is removed; of anything else by its name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Iterable, Mapping, MutableMapping

from pkvpn.watchdog.notify import Notify

# SD_LISTEN_FDS_START
FIRST = 3
# Set by a manager that keeps descriptors (systemd 254), or by our unit.
ENABLED = "FDSTORE"

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
# One character for each of thousands; the others carry a number behind it.
_GIFT, _LEDGER = "g", "ledger-"
# A ledger with so many lines, and most of them of what is gone, is written anew.
_LINES = 10_000
_SO_COOKIE = 57
_COOKIE = struct.Struct("=Q")

Gift = tuple[str, bytes]  # child, key


def take_inherited(environ: MutableMapping[str, str], pid: int) -> dict[str, list[int]]:
    """What the manager handed to this very process, by name.

    The variables are removed: neither a child nor the next image is meant by them.
    """
    meant, count, names, _ = (environ.pop(name, "") for name in _VARIABLES)
    if meant != str(pid) or not count.isdigit():
        return {}
    words = names.split(":") if names else []
    found: dict[str, list[int]] = {}
    for number in range(int(count)):
        fd = FIRST + number
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            name = words[number] if number < len(words) else "unknown"
            found.setdefault(name, []).append(fd)
    return found


class FdStore:
    """Knows what the manager keeps for us."""

    def __init__(self, manager: Notify, *, enabled: bool) -> None:
        self._manager = manager
        self._enabled = enabled
        self._held: set[str] = set()
        self._ledger = -1
        self._ledger_name = ""
        self._lines = 0
        self._gifts: dict[int, tuple[Gift, str]] = {}  # by descriptor, with its name there

    # -- what is held

    def hold(self, name: str, descriptors: Iterable[int]) -> None:
        """Keep these, and no others, under the name."""
        if not self._enabled:
            return
        written = written_name(name)
        if written in self._held:
            self._manager.unstore(written)
        self._held.add(written)
        for fd in descriptors:
            self._manager.store(written, fd)

    def release(self, name: str) -> None:
        written = written_name(name)
        if written in self._held:
            self._held.discard(written)
            self._manager.unstore(written)

    # -- what children give

    def begin(self, gifts: Mapping[int, Gift], ledgers: Iterable[str]) -> None:
        """Write a ledger of these gifts, which the manager keeps already, in place of the others.

        To be called once in each image, before anything else is given.
        """
        if not self._enabled:
            return
        for fd, gift in gifts.items():
            self._gifts[fd] = (gift, _name_of(fd))
        self._write_anew()
        for name in ledgers:
            self._manager.unstore(name)

    def ledgers(self) -> list[str]:
        """For the next image."""
        return [self._ledger_name] if self._ledger_name else []

    def keep(self, child: str, key: bytes, fd: int) -> None:
        if not self._enabled:
            return
        name = _name_of(fd)
        self._gifts[fd] = ((child, key), name)
        # First: a descriptor without a line would be of no use.
        os.write(self._ledger, _line((child, key), fd))
        self._manager.store(name, fd)
        self._lines += 1
        if self._lines > _LINES and self._lines > 4 * len(self._gifts):
            self._write_anew()

    def drop(self, fd: int, for_good: bool) -> None:
        """To be called before it is closed; not ``for_good``: what it is may be kept under another
        number."""
        _, name = self._gifts.pop(fd, (None, ""))
        if name and for_good:
            self._let_go(name, fd)

    def discard(self, fd: int) -> None:
        """Close what the manager keeps and nobody wants."""
        self._let_go(_name_of(fd), fd)
        os.close(fd)

    def _let_go(self, name: str, fd: int) -> None:
        if name == _GIFT:
            sock = socket.socket(fileno=fd)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.detach()
        else:
            self._manager.unstore(name)

    def forget(self) -> None:
        """The end of the service: nobody is to go on with anything."""
        for name in (*self._held, *{name for _, name in self._gifts.values()}, self._ledger_name):
            if name:
                self._manager.unstore(name)

    def close(self) -> None:
        if self._ledger >= 0:
            os.close(self._ledger)
        self._ledger = -1

    def _write_anew(self) -> None:
        before, self._ledger_name = self._ledger_name, f"{_LEDGER}{time.monotonic_ns()}"
        self.close()
        self._ledger = os.memfd_create("ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(self._ledger, b"".join(_line(gift, fd) for fd, (gift, _) in self._gifts.items()))
        self._lines = len(self._gifts)
        self._manager.store(self._ledger_name, self._ledger)
        if before:
            self._manager.unstore(before)


def sort_inherited(
    inherited: dict[str, list[int]],
) -> tuple[dict[str, list[int]], dict[int, Gift], list[str]]:
    """Tell what was handed over: what was held, by name; what children gave, by descriptor; and
    the names of ledgers.  A gift that no line knows is nobody's."""
    ledgers = sorted(name for name in inherited if name.startswith(_LEDGER))
    known: dict[str, Gift] = {}
    for name in ledgers:
        for fd in inherited.pop(name):
            text = os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
            for line in text.splitlines():
                mark, _, rest = line.partition(" ")
                key, _, child = rest.partition(" ")
                with contextlib.suppress(ValueError):
                    known[mark] = (child, bytes.fromhex(key))
            os.close(fd)
    gifts: dict[int, Gift] = {}
    for name in [name for name in inherited if name.rstrip("0123456789") == _GIFT]:
        for fd in inherited.pop(name):
            gifts[fd] = known.get(_mark(fd), ("", b""))
    return inherited, gifts, ledgers


def written_name(name: str) -> str:
    """As the manager takes it: names are separated by colons."""
    return name.replace("%", "%25").replace(":", "%3A")


def _name_of(fd: int) -> str:
    found = os.fstat(fd)
    return _GIFT if stat.S_ISSOCK(found.st_mode) else f"{_GIFT}{found.st_ino}"


def _mark(fd: int) -> str:
    """By which an open file is known again, in this boot."""
    found = os.fstat(fd)
    if not stat.S_ISSOCK(found.st_mode):
        return f"{found.st_dev}.{found.st_ino}"
    sock = socket.socket(fileno=fd)
    try:
        (cookie,) = _COOKIE.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE.size))
    finally:
        sock.detach()
    return str(cookie)


def _line(gift: Gift, fd: int) -> bytes:
    child, key = gift
    return f"{_mark(fd)} {key.hex()} {child}\n".encode()
