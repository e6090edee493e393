"""Which connection a core was working on when it died.

Strategy: before a core touches what a connection sent, it writes down which one, in memory that the
watchdog keeps for its successor.  A request comes again after a death, so dying twice on the same
one is proof enough; frames do not, so there it takes a row of deaths close to each other, all on
frames of one hub.  If they were mostly of one connection, it is to blame; if they were of several
users, none of them is, but what they have in common, the hub.

Whoever sent it could go on with a new connection: the user, or of somebody who has not logged in
the address, is in quarantine for a while; of a hub, it is the frames that would pass the core.
That is kept in the same memory, so it outlives every core, and ends with the service.
"""

import json
import mmap
import struct
from typing import Any, NamedTuple

# What is being worked on: connection (0: a bridge), number of the request (0: frames), and of
# frames the hub and the user by their numbers; all 0: nothing.  (Earlier code had it at 0.)
_MARK = struct.Struct("=QQqq")
_MARK_AT = 64
# How many deaths are in the row, and each of them: the same four, and when (monotonic seconds).
_COUNT = struct.Struct("=Q")
_COUNT_AT = 128
_DEATH = struct.Struct("=QQqqd")
_DEATHS_AT = 136
_MAX_ROW = 16
_MARKS_SIZE = _DEATHS_AT + _MAX_ROW * _DEATH.size
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
# Who has two accounts must not have the power over a hub that one with three gets here.
HUB_DEATHS, HUB_USERS = 5, 3
# Deaths on frames that are further apart are not counted as a row, nor those with another between.
IN_A_ROW = 10.0


class Death(NamedTuple):
    """What a core was working on when it died, as in the mark, and when that was."""

    conn: int
    number: int
    hub: int
    user: int
    at: float


class Guilty(NamedTuple):
    """The connection to be closed, or the hub whose frames are to be kept out; 0: none."""

    conn: int = 0
    hub: int = 0


class Mark:
    """The marks in such a memory, a descriptor of SIZE bytes, all zeros at first."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _MARKS_SIZE)

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    def begin(self, conn: int, number: int, hub: int = 0, user: int = 0) -> None:
        """Work begins on a request of this connection, or with number 0 on frames that this user
        sends into this hub."""
        _MARK.pack_into(self._memory, _MARK_AT, conn, number, hub, user)

    def end(self) -> None:
        """It has ended well."""
        _MARK.pack_into(self._memory, _MARK_AT, 0, 0, 0, 0)

    def judge(self, now: float) -> Guilty:
        """To be called once by a new core."""
        conn, number, hub, user = _MARK.unpack_from(self._memory, _MARK_AT)
        death = Death(conn, number, hub, user, now)
        self.end()
        row = self._row()
        if not death.conn and not death.hub:
            if row and not row[-1].number:
                self._keep([])
            return Guilty()
        if row and not _goes_on(row[-1], death):
            row = []
        row = [*row, death][-_MAX_ROW:]
        self._keep(row)
        return _guilty(row)

    def _row(self) -> list[Death]:
        (count,) = _COUNT.unpack_from(self._memory, _COUNT_AT)
        return [
            Death(*_DEATH.unpack_from(self._memory, _DEATHS_AT + at * _DEATH.size))
            for at in range(min(count, _MAX_ROW))
        ]

    def _keep(self, row: list[Death]) -> None:
        for at, death in enumerate(row):
            _DEATH.pack_into(self._memory, _DEATHS_AT + at * _DEATH.size, *death)
        _COUNT.pack_into(self._memory, _COUNT_AT, len(row))


def _goes_on(last: Death, death: Death) -> bool:
    """Is it of one row with the one before?"""
    if last.number or death.number:
        return last[:2] == death[:2]
    return last.hub == death.hub and death.at - last.at <= IN_A_ROW


def _guilty(row: list[Death]) -> Guilty:
    last = row[-1]
    if last.number:
        return Guilty(last.conn if len(row) >= REQUEST_DEATHS else 0)
    if len(row) >= HUB_DEATHS and len({death.user for death in row}) >= HUB_USERS:
        return Guilty(hub=last.hub)
    if sum(death.conn == last.conn for death in row) >= FRAME_DEATHS:
        # Behind a bridge there is nobody else to blame.
        return Guilty(last.conn) if last.conn else Guilty(hub=last.hub)
    return Guilty()


def hub_key(name: str) -> str:
    """Under which a hub is in quarantine; no user has an empty name."""
    return f"{name}/"


class Quarantine:
    """Who is kept out, by name ("HUB/USER", "HUB/" or an address), in the same memory."""

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
