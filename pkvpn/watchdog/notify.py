"""What the watchdog tells the service manager of the machine (systemd's notification protocol).

Strategy: a datagram for each thing, never waited for; without a manager everything here is nothing.
News that a manager is too busy for are dropped, what it is to keep or to let go of is sent again.
The manager's own watchdog is fed from the judging loop, and only while the tree is well: a watchdog
that is stopped, or whose children cannot be kept alive, is the manager's to replace.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import MutableMapping


class Notify:
    """Knows where the manager listens, and when it wants to be fed."""

    def __init__(self, path: str, period: float = math.inf) -> None:
        """``path``: of a unix datagram socket, "@..." for an abstract one; empty: there is none.
        ``period``: seconds after which the manager believes us dead."""
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._period = period
        self._fed_at = -math.inf
        self._waiting: deque[tuple[bytes, int]] = deque()

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str], pid: int) -> Notify:
        """What the manager put into the environment.  It stays there: an upgrade needs it again."""
        meant = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        period = environ.get("WATCHDOG_USEC", "") if meant else ""
        return cls(
            environ.get("NOTIFY_SOCKET", ""), int(period) / 1e6 if period.isdigit() else math.inf
        )

    def ready(self, status: str) -> None:
        """We serve, for the first time or after a reload."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """From now to the next `ready`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def feed(self, now: float) -> None:
        """To be called again and again while all is well."""
        if self._period < math.inf and now - self._fed_at >= self._period / 3:
            self._fed_at = now
            self._send("WATCHDOG=1")

    def store(self, name: str, fd: int) -> None:
        """Have the manager keep a duplicate of it under the name, for the next process."""
        self._must_send(f"FDSTORE=1\nFDNAME={name}", fd)

    def unstore(self, name: str) -> None:
        """Have it let go of all that it keeps under the name."""
        self._must_send(f"FDSTOREREMOVE=1\nFDNAME={name}", -1)

    @property
    def behind(self) -> bool:
        """Whether something waits until the manager reads; then `catch_up` is to be called."""
        return bool(self._waiting)

    def catch_up(self) -> None:
        while self._waiting and self._try_to_send(*self._waiting[0]):
            _, fd = self._waiting.popleft()
            if fd >= 0:
                os.close(fd)

    def _must_send(self, text: str, fd: int) -> None:
        if not self._address:
            return
        message = text.encode()
        self.catch_up()  # in their order
        if self._waiting or not self._try_to_send(message, fd):
            # Ours may be closed, and its number be another's, before there is room.
            self._waiting.append((message, os.dup(fd) if fd >= 0 else -1))

    def _try_to_send(self, message: bytes, fd: int) -> bool:
        """False: not now."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect(self._address)
                socket.send_fds(sock, [message], [fd] if fd >= 0 else [])
        except BlockingIOError:
            return False
        except OSError:
            return True  # nobody is there
        return True

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # A manager that does not read, or is gone, is no reason to wait or to end.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto(text.encode(), self._address)
