"""A TAP device of Linux: the client's end of the virtual cable."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

# struct ifreq: 16 bytes of name, 2 of flags, the rest of 40 unused here
_IFREQ = struct.Struct("16sH22x")
_TUNSETIFF = 0x400454CA
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000  # frames as they are, nothing in front of them
_IFF_UP = 0x1

MAX_NAME = 15  # IFNAMSIZ - 1

# More than any frame we pass on; a larger one would be cut, and is dropped by its size.
_READ = 4096


class Tap:
    """An open TAP device; it goes with the last descriptor unless it was made persistent.

    Opening raises `OSError` when the system refuses (no /dev/net/tun, no CAP_NET_ADMIN, the
    name in use) and `ValueError` for what cannot be a name.
    """

    def __init__(self, name: str) -> None:
        raw = name.encode("ascii", "replace")
        if not 1 <= len(raw) <= MAX_NAME or not name.isascii() or "/" in name or " " in name:
            raise ValueError(f"{name!r} cannot be the name of a TAP device")
        self.name = name
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(self._fd, _TUNSETIFF, _IFREQ.pack(raw, _IFF_TAP | _IFF_NO_PI))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                got = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(raw, 0))
                flags = _IFREQ.unpack(got)[1]
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(raw, flags | _IFF_UP))
        except OSError as error:
            os.close(self._fd)
            raise OSError(error.errno, f"TAP device {name}: {error.strerror}") from None

    def fileno(self) -> int:
        """Readable when `read` has a frame."""
        return self._fd

    def read(self, limit: int) -> list[bytes]:
        """At most ``limit`` frames that wait; none if there are none."""
        frames: list[bytes] = []
        while len(frames) < limit:
            try:
                frames.append(os.read(self._fd, _READ))
            except BlockingIOError:
                break
        return frames

    def write(self, frame: bytes) -> bool:
        """Give the system one frame.  False: it does not want it (device down, queue full)."""
        try:
            os.write(self._fd, frame)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)
