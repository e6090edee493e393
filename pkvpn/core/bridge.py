"""A hub joined to the machine: a TAP device, and if asked a Linux bridge that it is part of.

Strategy: the watchdog opens the device and keeps it open from start to stop, so ifindex, address
and bridge membership stay whatever dies; the core only reads and writes frames on the descriptor.
Nothing heavy is imported: the watchdog pays for it.
"""

import errno
import os
import socket
import struct
import subprocess
import sys

_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000  # frames without the four bytes of packet information
_SIOCGIFFLAGS = 0x8913
_IFF_UP = 0x0001
_DEVICE = "/dev/net/tun"
# struct ifreq: the name, the flags, the rest of the union.
_IFREQ = struct.Struct("16sH22x")

_IP_TIMEOUT = 5.0

_SIZE = struct.Struct("!I")
# A frame with a tag, and what a larger MTU of the device might bring.
_MAX_READ = 3200
# Frames taken from the device in one turn of the loop.
_READ_AT_ONCE = 64


class BridgeError(Exception):
    """A local bridge that cannot be; names the device and what the system refuses."""


def open_tap(name: str, bridge: str | None = None, opened: int | None = None) -> int:
    """Open the TAP ``name`` (made if there is none), set it up, make it a port of ``bridge``.

    Returns a non-blocking descriptor; the device lives as long as one of them, unless somebody
    made it to stay.  ``opened``: a descriptor of it that is open already, to be duplicated; the
    system lets nobody open a TAP twice.  Raises BridgeError.
    """
    if sys.platform != "linux":
        raise BridgeError(
            f"bridge {name}: there is no local bridge on {sys.platform}, only on Linux"
        )
    fd = _open(name) if opened is None else os.dup(opened)
    try:
        if bridge:
            _ip(name, "set", "dev", name, "master", bridge)
        elif opened is not None:
            _ip(name, "set", "dev", name, "nomaster")
        _ip(name, "set", "dev", name, "up")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_deleted(fd: int) -> bool:
    """Whether somebody has deleted the device of this descriptor, which is of no use then."""
    import fcntl  # see `_open`

    try:
        fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size))
    except OSError as error:
        return error.errno == errno.EBADFD
    return False


def _open(name: str) -> int:
    import fcntl  # this module is known to the core on systems that have neither

    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BridgeError(f"bridge {name}: {_DEVICE}: {error.strerror}{_cause(error)}") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        os.close(fd)
        text = f"bridge {name}: the TAP device {name}: {error.strerror}{_cause(error)}"
        raise BridgeError(text) from error
    return fd


def _ip(name: str, *words: str) -> None:
    command = ["ip", "link", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_IP_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BridgeError(f"bridge {name}: {' '.join(command)}: {error}") from error
    if done.returncode and not _is_up(name, words):
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise BridgeError(f"bridge {name}: {' '.join(command)}: {why}")


def _is_up(name: str, words: tuple[str, ...]) -> bool:
    """A device that belongs to the user may be up already, and only root may set it."""
    if words[-1] != "up":
        return False
    import fcntl

    try:
        # Not by /sys, which shows the network of whoever mounted it.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            found = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
    except OSError:
        return False
    return bool(_IFREQ.unpack(found)[1] & _IFF_UP)


def _cause(error: OSError) -> str:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return " (a device of one's own, or the capability CAP_NET_ADMIN, is needed)"
        case errno.EBUSY:
            return " (another program has opened it)"
        case errno.EINVAL:
            return " (a device of this name is there, and is no TAP)"
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return " (the kernel module tun is not there)"
    return ""


class Tap:
    """The core's end of a bridge: frames as blocks (u32 size, frame)."""

    def __init__(self, device: str, fd: int) -> None:
        self.device = device
        self.fd = fd
        self.state = "open"

    def read(self) -> bytes:
        """The blocks of the frames that wait, at most 64; empty if there are none."""
        parts: list[bytes] = []
        for _ in range(_READ_AT_ONCE):
            try:
                frame = os.read(self.fd, _MAX_READ)
            except BlockingIOError:
                break
            except OSError as error:  # EBADFD: the device was deleted under us
                self._fail(error)
                break
            parts += (_SIZE.pack(len(frame)), frame)
        return b"".join(parts)

    def write(self, blocks: bytes) -> int:
        """Send the frames of these blocks; how many the device did not take."""
        lost = at = 0
        while at < len(blocks):
            (size,) = _SIZE.unpack_from(blocks, at)
            at += 4
            try:
                os.write(self.fd, blocks[at : at + size])
            except BlockingIOError:
                lost += 1
            except OSError as error:
                # EIO: the device is down, and may be up again.
                if error.errno != errno.EIO:
                    self._fail(error)
                lost += 1
            at += size
        return lost

    def _fail(self, error: OSError) -> None:
        self.state = f"failed: {error.strerror}"
