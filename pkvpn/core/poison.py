"""Which connection a core was working on when it died.

Strategy: before a core touches what a connection sent, it writes down which one, in memory that the
watchdog keeps for its successor.  A request comes again after a death, so dying twice on the same
one is proof enough; frames do not, so there it takes several deaths close to each other.

Whoever sent it could go on with a new connection: the user, or of somebody who has not logged in
the address, is in quarantine for a while.  That is kept in the same memory, so it outlives every
core, and ends with the service.
"""

import json
import mmap
import struct
from typing import Any

# conn, number of the request (0: frames) that is being worked on;
# then of the last death: conn, number, how many in a row, when (monotonic seconds).
_MARK = struct.Struct("=QQ")
_DEATHS = struct.Struct("=QQQd")
_MARKS_SIZE = _MARK.size + _DEATHS.size
# Behind them, from the second page on: which of two copies is in force, then the copies, each
# u32 size and JSON.  A core that dies while it writes one leaves the other.
_SWITCH_AT = 4096
_COPIES_AT = (8192, 24576)
_LENGTH = struct.Struct("=I")
SIZE = 40960

# The oldest makes room.
MAX_QUARANTINED = 64
QUARANTINE = 3600.0
_TEXT = 128

REQUEST_DEATHS = 2
FRAME_DEATHS = 4
# Deaths on frames that are further apart are not counted as a row.
IN_A_ROW = 10.0


class Mark:
    """The marks in such a memory, a descriptor of SIZE bytes, all zeros at first."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _MARKS_SIZE)

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    def begin(self, conn: int, number: int) -> None:
        """Work begins on a request, or with number 0 on frames, of this connection."""
        _MARK.pack_into(self._memory, 0, conn, number)

    def end(self) -> None:
        """It has ended well."""
        _MARK.pack_into(self._memory, 0, 0, 0)

    def judge(self, now: float) -> int:
        """To be called once by a new core: the connection to be closed, or 0."""
        conn, number = _MARK.unpack_from(self._memory, 0)
        self.end()
        if not conn:
            return 0
        last_conn, last_number, deaths, at = _DEATHS.unpack_from(self._memory, _MARK.size)
        if (conn, number) != (last_conn, last_number) or (not number and now - at > IN_A_ROW):
            deaths = 0
        deaths += 1
        _DEATHS.pack_into(self._memory, _MARK.size, conn, number, deaths, now)
        return int(conn) if deaths >= (REQUEST_DEATHS if number else FRAME_DEATHS) else 0


class Quarantine:
    """Who is kept out, by name ("HUB/USER" or an address), in the same memory."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SIZE)
        # name -> until when (monotonic), why; the oldest first.
        self._entries = self._load()

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    def put(self, name: str, why: str, now: float) -> None:
        """Keep somebody out from now on."""
        name = name.lower()[:_TEXT]
        self._entries.pop(name, None)
        self._entries[name] = (now + QUARANTINE, why[:_TEXT])
        while len(self._entries) > MAX_QUARANTINED:
            del self._entries[next(iter(self._entries))]
        self._save()

    def lift(self, name: str) -> bool:
        """Let him in again; False: he was not kept out."""
        found = self._entries.pop(name.lower()[:_TEXT], None) is not None
        self._save()
        return found

    def holds(self, name: str, now: float) -> bool:
        """Is he to be kept out?"""
        return bool(self._entries) and now < self._entries.get(name.lower()[:_TEXT], (0.0, ""))[0]

    def entries(self, now: float) -> list[dict[str, Any]]:
        """Who is, why, and for how many seconds more."""
        return [
            {"name": name, "why": why, "left": round(until - now, 1)}
            for name, (until, why) in self._entries.items()
            if now < until
        ]

    def _load(self) -> dict[str, tuple[float, str]]:
        """What is in force; nothing where a core wrote that had run wild: its successor is not to
        die of it."""
        at = _COPIES_AT[self._memory[_SWITCH_AT] & 1]
        (size,) = _LENGTH.unpack_from(self._memory, at)
        text = self._memory[at + _LENGTH.size : at + _LENGTH.size + size]
        try:
            return {
                str(name): (float(until), str(why))
                for name, until, why in (json.loads(text) if text else [])
            }
        except (ValueError, TypeError, RecursionError):
            return {}

    def _text(self) -> bytes:
        return json.dumps([[name, *entry] for name, entry in self._entries.items()]).encode()

    def _save(self) -> None:
        other = self._memory[_SWITCH_AT] & 1 ^ 1
        text = self._text()
        while len(text) > _COPIES_AT[1] - _COPIES_AT[0] - _LENGTH.size:
            del self._entries[next(iter(self._entries))]
            text = self._text()
        at = _COPIES_AT[other]
        self._memory[at + _LENGTH.size : at + _LENGTH.size + len(text)] = text
        _LENGTH.pack_into(self._memory, at, len(text))
        self._memory[_SWITCH_AT] = other
