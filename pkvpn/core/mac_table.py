"""Which MAC address is behind which port.

Strategy: a key is a MAC (6 bytes) or a MAC and the VLAN tag it was seen with (8 bytes).  Entries
stand in the order in which they were last seen, so ageing looks only at those that are over.  The
table is bounded, and so is each port's part of it: a port that makes up addresses fills its own
part and nobody else's.
"""

import enum
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

P = TypeVar("P", bound=Hashable)

# An entry is put in its new place in the order at most this often: a frame then costs one look-up.
_FRESH = 1.0


class Learnt(enum.Enum):
    """What a source address told."""

    KNOWN = enum.auto()
    NEW = enum.auto()
    MOVED = enum.auto()
    FULL = enum.auto()


class _Entry(Generic[P]):
    __slots__ = ("port", "seen_at")

    def __init__(self, port: P, seen_at: float) -> None:
        self.port = port
        self.seen_at = seen_at


class MacTable(Generic[P]):
    """Learns, finds and forgets; ``ageing`` is in seconds, the limits count entries."""

    def __init__(self, *, ageing: float = 600.0, limit: int = 16384, share: int = 4096) -> None:
        self._ageing = ageing
        self._limit = limit
        self._share = share
        self._entries: OrderedDict[bytes, _Entry[P]] = OrderedDict()
        self._of_port: dict[P, set[bytes]] = {}
        # MAC -> its keys with a tag.  Always: an 8-byte key is in the table if and only if it is
        # in here.
        self._tagged: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def learn(self, key: bytes, port: P, now: float) -> Learnt:
        """A frame with this source came from ``port``."""
        entry = self._entries.get(key)
        if entry is None:
            mine = self._of_port.setdefault(port, set())
            if len(self._entries) >= self._limit or len(mine) >= self._share:
                return Learnt.FULL
            self._entries[key] = _Entry(port, now)
            mine.add(key)
            if len(key) > 6:
                self._tagged.setdefault(key[:6], set()).add(key)
            return Learnt.NEW
        if entry.port is port:
            if now - entry.seen_at > _FRESH:
                entry.seen_at = now
                self._entries.move_to_end(key)
            return Learnt.KNOWN
        mine = self._of_port.setdefault(port, set())
        if len(mine) >= self._share:
            return Learnt.FULL
        self._of_port[entry.port].discard(key)
        mine.add(key)
        entry.port = port
        entry.seen_at = now
        self._entries.move_to_end(key)
        return Learnt.MOVED

    def find(self, key: bytes, now: float) -> P | None:
        """The port behind which the address is; None: not known, or not seen for too long."""
        entry = self._entries.get(key)
        if entry is None or now - entry.seen_at > self._ageing:
            return None
        return entry.port

    def settled(self, mac: bytes, port: P) -> bool:
        """Is the MAC behind this port, and not seen with any tag?"""
        entry = self._entries.get(mac)
        return entry is not None and entry.port is port and mac not in self._tagged

    def forget_port(self, port: P) -> list[bytes]:
        """Remove all of a port; the keys."""
        keys = list(self._of_port.pop(port, ()))
        for key in keys:
            del self._entries[key]
            self._untag(key)
        return keys

    def expire(self, now: float) -> list[bytes]:
        """Remove what was not seen for too long; the keys."""
        keys: list[bytes] = []
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if now - entry.seen_at <= self._ageing:
                break
            del self._entries[key]
            self._of_port[entry.port].discard(key)
            self._untag(key)
            keys.append(key)
        return keys

    def next_deadline(self) -> float | None:
        """When the oldest entry is over."""
        for entry in self._entries.values():
            return entry.seen_at + self._ageing
        return None

    def entries(self) -> list[tuple[bytes, P, float]]:
        """(key, port, when it was last seen, to a second), the oldest first."""
        return [(key, entry.port, entry.seen_at) for key, entry in self._entries.items()]

    def _untag(self, key: bytes) -> None:
        if len(key) > 6:
            keys = self._tagged[key[:6]]
            keys.discard(key)
            if not keys:
                del self._tagged[key[:6]]
