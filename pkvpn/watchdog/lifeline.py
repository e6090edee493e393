"""What is said on the lifeline: beats go up to the watchdog, orders go down to the child.

Strategy: frames of fixed size, far below PIPE_BUF, so that a write is whole or absent; each
carries magic, version, a running number and a checksum, so that garbage from a child run
wild is told from a beat and never interpreted.  Counters are cumulative: a lost beat costs
nothing.  Nothing is ever unpickled.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from pkvpn.watchdog.verdict import Beat

# Up, 256 bytes, big endian:
#   2  magic "pk"    1  version    1  kind    4  running number    4  loop's lag, s (float)
#   BEAT: 8 times { 8  how much is done   8  since when something waits, s, 0: nothing }
#   other kinds: UTF-8 text, padded with zeros
#   4  CRC-32 of all before
_HEAD = struct.Struct("!2sBBIf")
_DUTY = struct.Struct("!Qd")
_CRC = struct.Struct("!I")
FRAME_SIZE = 256
MAX_DUTIES = 8
MAX_TEXT = FRAME_SIZE - _HEAD.size - _CRC.size

# Down, 8 bytes: 2 magic, 1 version, 1 order, 4 running number.
_ORDER = struct.Struct("!2sBBI")

_MAGIC = b"pk"
_VERSION = 1


class Kind(IntEnum):
    """What a child says."""

    BEAT = 1
    READY = 2
    SAY = 3  # progress of the start, or why it failed
    ASKED = 4  # somebody sent TERM to this child: the service is to end
    DUMPED = 5  # somebody sent QUIT to this child: its stacks are written
    PREPARED = 6  # it stands by


class Order(IntEnum):
    """What the watchdog tells a child."""

    STOP = 1  # end, and end what you do for others
    RELOAD = 2
    YIELD = 3  # end, and leave all as it is: a successor goes on with it


class Said(NamedTuple):
    """One frame of a child that is not a beat."""

    kind: Kind
    text: str


class Duty:
    """One thing a child is there for.  ``done`` counts up; ``waiting_since``: monotonic
    seconds since when something waits to be done, 0.0 if nothing does."""

    __slots__ = ("done", "waiting_since")

    def __init__(self) -> None:
        self.done = 0
        self.waiting_since = 0.0


class CorruptLifeline(Exception):
    """What came is not what a child of ours says."""


def encode_beat(seq: int, lag: float, duties: list[tuple[int, float]]) -> bytes:
    """One beat.  ``duties``: at most `MAX_DUTIES` times (done, waiting since)."""
    body = b"".join(_DUTY.pack(done, since) for done, since in duties)
    return _frame(Kind.BEAT, seq, lag, body)


def encode_said(kind: Kind, seq: int, text: str = "") -> bytes:
    """Anything but a beat; a longer text is cut at `MAX_TEXT` bytes."""
    return _frame(kind, seq, 0.0, text.encode()[:MAX_TEXT])


def encode_order(order: Order, seq: int) -> bytes:
    return _ORDER.pack(_MAGIC, _VERSION, order, seq & 0xFFFFFFFF)


def _frame(kind: Kind, seq: int, lag: float, body: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, _VERSION, kind, seq & 0xFFFFFFFF, lag)
    whole = (head + body).ljust(FRAME_SIZE - _CRC.size, b"\0")
    return whole + _CRC.pack(zlib.crc32(whole))


class LifelineDecoder:
    """Cuts what a child wrote into beats and sayings.

    ``duties``: how many the child's spec names; a beat carries exactly so many.
    """

    def __init__(self, duties: int) -> None:
        self._duties = struct.Struct("!" + "Qd" * duties)
        self._rest = b""

    def feed(self, data: bytes) -> list[Beat | Said]:
        """Return the whole frames; keep the rest.  Raises `CorruptLifeline` and nothing else."""
        data = self._rest + data
        whole = len(data) - len(data) % FRAME_SIZE
        self._rest = data[whole:]
        return [self._decode(data[at : at + FRAME_SIZE]) for at in range(0, whole, FRAME_SIZE)]

    def _decode(self, frame: bytes) -> Beat | Said:
        magic, version, number, seq, lag = _HEAD.unpack_from(frame)
        (crc,) = _CRC.unpack_from(frame, FRAME_SIZE - _CRC.size)
        if magic != _MAGIC or version != _VERSION:
            raise CorruptLifeline(f"not a frame of version {_VERSION}: {frame[:8].hex()}")
        if crc != zlib.crc32(frame[: -_CRC.size]):
            raise CorruptLifeline(f"checksum of frame {seq} is wrong")
        if number not in Kind._value2member_map_:
            raise CorruptLifeline(f"frame {seq} is of unknown kind {number}")
        if number == Kind.BEAT:
            told = self._duties.unpack_from(frame, _HEAD.size)
            return Beat(seq, lag, tuple(zip(told[::2], told[1::2], strict=True)))
        text = frame[_HEAD.size : -_CRC.size].rstrip(b"\0").decode(errors="replace")
        return Said(Kind(number), text)


class OrderDecoder:
    """Cuts what the watchdog wrote into orders; what is unknown is passed over."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Order]:
        data = self._rest + data
        whole = len(data) - len(data) % _ORDER.size
        self._rest = data[whole:]
        orders = []
        for at in range(0, whole, _ORDER.size):
            magic, _version, order, _seq = _ORDER.unpack_from(data, at)
            if magic == _MAGIC and order in Order._value2member_map_:
                orders.append(Order(order))
        return orders


def next_moment(now: float, interval: float) -> float:
    """The next moment for what is done every ``interval`` seconds (all CLOCK_MONOTONIC).

    The same for all processes and all that they do so often: they wake up together, and once.
    """
    return now - now % interval + interval
