"""What became of numbered frames on their way in one direction.

Strategy: pure.  Numbers count up from 0 without a hole, so what comes tells what did not: a number
that is jumped over is missing until it comes after all.  Silence is the time between two arrivals
and is known by its longest in a window, which `begin` starts.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# A frame between the two clients: Ethernet header, then a number of 8 bytes, filled to 60 bytes.
# The EtherType is the one for experiments, and nobody but us speaks it.
_HEADER = struct.Struct("!6s6sH")
_NUMBER = struct.Struct("!Q")
_ETHERTYPE = 0x88B5
_SIZE = 60


def encode(destination: bytes, source: bytes, number: int) -> bytes:
    """The frame with that number; both addresses have 6 bytes."""
    head = _HEADER.pack(destination, source, _ETHERTYPE) + _NUMBER.pack(number)
    return head.ljust(_SIZE, b"\0")


def decode(frame: bytes) -> int | None:
    """The number of a frame; None for one that is not of ours."""
    if len(frame) != _SIZE or _HEADER.unpack_from(frame)[2] != _ETHERTYPE:
        return None
    return int(_NUMBER.unpack_from(frame, _HEADER.size)[0])


class Account(NamedTuple):
    """Frames since the first one.  ``lost``: jumped over and not come until now.  ``silence``:
    the longest time between two arrivals in this window, in seconds."""

    sent: int
    arrived: int
    lost: int
    twice: int
    reordered: int
    silence: float


class Ledger:
    """Knows what was sent in one direction, and what has come of it."""

    def __init__(self) -> None:
        self.sent = 0
        self._arrived = 0
        self._twice = 0
        self._reordered = 0
        self._highest = -1
        self._missing: set[int] = set()
        self._last_at: float | None = None  # None: nothing has come yet, so nothing is silent
        self._silence = 0.0

    def next_number(self) -> int:
        """The number of the frame that is sent now."""
        self.sent += 1
        return self.sent - 1

    def arrive(self, number: int, now: float) -> None:
        """To be called for each frame that comes."""
        if number > self._highest:
            self._missing.update(range(self._highest + 1, number))
            self._highest = number
        elif number in self._missing:
            self._missing.remove(number)
            self._reordered += 1
        else:
            self._twice += 1
            return
        self._arrived += 1
        if self._last_at is not None:
            self._silence = max(self._silence, now - self._last_at)
        self._last_at = now

    @property
    def on_the_way(self) -> int:
        """Sent, and nothing sent later has come yet: nobody can say whether they are lost."""
        return self.sent - self._highest - 1

    def begin(self, now: float) -> None:
        """Begin a window: what silence there was is over, but one that lasts goes on."""
        self._silence = 0.0
        if self._last_at is None:
            self._last_at = now

    def give_up(self) -> None:
        """Count all that is on the way as lost.  To be called when nothing can come any more."""
        self._missing.update(range(self._highest + 1, self.sent))
        self._highest = self.sent - 1

    def account(self, now: float) -> Account:
        lasting = 0.0 if self._last_at is None else now - self._last_at
        return Account(
            self.sent,
            self._arrived,
            len(self._missing),
            self._twice,
            self._reordered,
            max(self._silence, lasting),
        )
