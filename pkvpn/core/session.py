"""Sessions: who is logged in, over which TCP connections, and for how long after the last one.

Strategy: a session key is self-describing.  It says which session, which generation of a user, and
how the session was agreed, under a MAC of a secret on disk; so any later core knows a session by
its key alone.  What a key cannot say, that its session has ended, follows from time: only within T
of its own start may a core meet a session it has not been told of, and only if its key was made
in the last weeks: else a key that was stolen once would be good at each start of a core for ever.
Keys that must not be honoured even then (kicked, other password, deleted user) are on disk: see
`store`.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from pkvpn.channel import EdgeDrop
from pkvpn.protocol.messages import Direction

# 5 bytes session: 3 bytes counter, 2 bytes random, so that a counter that starts again makes no
#   key that was there before; 4 generation of the user; 1 flags; 2 week in which the session
#   began (of the wall clock, since 1970); 8 MAC.
_KEY = struct.Struct("!3s2sIBH")
# A forger has as many tries as there are logins: 64 bits are enough.
_MAC_SIZE = 8
KEY_SIZE = _KEY.size + _MAC_SIZE  # 20: the protocol has no room for more
_HALF = 0x80
_COUNTERS = 1 << 24

WEEK = 7 * 24 * 3600.0
# A session that is older, and that no core knows any more, begins anew with a login.
MAX_KEY_AGE = 4  # weeks

# SoftEther: MAX_TCP_CONNECTION.
MAX_CONNECTIONS = 32


class Claim(NamedTuple):
    """What a session key says."""

    session: int  # counter << 16 | random
    generation: int
    half: bool
    max_connection: int
    week: int = 0


class SessionKeys:
    """Makes and reads session keys under one secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, claim: Claim) -> bytes:
        """The 20 bytes for the client."""
        number = claim.session.to_bytes(5, "big")
        flags = (_HALF if claim.half else 0) | (claim.max_connection - 1)
        head = _KEY.pack(number[:3], number[3:], claim.generation, flags, claim.week)
        return head + self._mac(head)

    def read(self, key: bytes) -> Claim | None:
        """None: this key is none of ours."""
        if len(key) != KEY_SIZE:
            return None
        head = key[: _KEY.size]
        if not hmac.compare_digest(self._mac(head), key[_KEY.size :]):
            return None
        counter, random, generation, flags, week = _KEY.unpack(head)
        session = int.from_bytes(counter + random, "big")
        return Claim(session, generation, bool(flags & _HALF), (flags & 31) + 1, week)

    def _mac(self, head: bytes) -> bytes:
        return hmac.digest(self._secret, b"session key" + head, hashlib.sha256)[:_MAC_SIZE]


@dataclass(eq=False, slots=True)
class Session:
    """One logged-in client.  ``connections`` is in the order in which they came."""

    claim: Claim
    key: bytes
    name: str  # SID-USER-n
    hub_id: int
    user_id: int
    user: str
    created_at: float
    unique_id: bytes = b""  # of the client's installation; empty: it did not say
    client: str = ""  # what it calls itself
    connections: dict[int, Direction] = field(default_factory=dict)
    # When the last connection went; None: there is one.
    orphan_at: float | None = None
    # Of connections that are gone, and of those that are there: frames in, bytes in, frames out,
    # bytes out, drops per `EdgeDrop`.
    past_counts: tuple[int, ...] = (0,) * (4 + len(EdgeDrop))
    counts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    # Connections that may carry frames to the client; kept by attach and detach.
    to_client: tuple[int, ...] = ()

    def total_counts(self) -> tuple[int, ...]:
        """Frames in (from the client), bytes in, frames out, bytes out; what the edge dropped, per
        `EdgeDrop`."""
        return tuple(
            sum(column) for column in zip(self.past_counts, *self.counts.values(), strict=True)
        )

    def first_direction(self) -> Direction:
        """Of the connection of the login."""
        return Direction.TO_SERVER if self.claim.half else Direction.BOTH

    def next_direction(self) -> Direction:
        """Of one more connection."""
        if not self.claim.half:
            return Direction.BOTH
        to_client = sum(way is Direction.TO_CLIENT for way in self.connections.values())
        others = len(self.connections) - to_client
        return Direction.TO_SERVER if to_client > others else Direction.TO_CLIENT


class Sessions:
    """All sessions of all hubs.  ``timeout`` is T; ``started_at`` when this core began.

    ``week`` is the number of this one, kept by the caller.
    """

    def __init__(
        self, keys: SessionKeys, *, timeout: float, started_at: float, week: int = 0
    ) -> None:
        self.week = week
        self.timeout = timeout
        self._keys = keys
        self._resume_deadline = started_at + timeout
        self._counters: dict[int, int] = {}  # of each hub, for the names
        self._connection_counter = 0
        self._by_id: dict[int, Session] = {}
        self._of_connection: dict[int, Session] = {}
        self._in_hub: dict[int, dict[int, Session]] = {}
        self._orphans: dict[int, Session] = {}  # the oldest first
        # What ended here while a key alone may still bring a session back.
        self._ended: set[int] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> list[Session]:
        """In the order of their logins."""
        return list(self._by_id.values())

    def in_hub(self, hub_id: int) -> list[Session]:
        """In the order of their logins."""
        return list(self._in_hub.get(hub_id, {}).values())

    def count(self, hub_id: int) -> int:
        """How many sessions the hub has, orphans too."""
        return len(self._in_hub.get(hub_id, {}))

    def of_connection(self, conn: int) -> Session | None:
        """The session that a connection belongs to."""
        return self._of_connection.get(conn)

    def orphans(self) -> list[Session]:
        """The sessions without a connection, the longest alone first."""
        return list(self._orphans.values())

    def next_connection_number(self) -> int:
        """The n of CID-n."""
        self._connection_counter = (self._connection_counter + 1) & 0xFFFFFFFF
        return self._connection_counter

    def connection_seen(self, number: int) -> None:
        """A connection of an earlier core has this number."""
        self._connection_counter = max(self._connection_counter, number)

    def open(
        self,
        *,
        hub_id: int,
        user_id: int,
        user: str,
        generation: int,
        half: bool,
        max_connection: int,
        random: bytes,
        now: float,
        unique_id: bytes = b"",
        client: str = "",
    ) -> Session:
        """A client has logged in.  ``random``: 2 bytes."""
        counter = self._counters.get(hub_id, 0)
        while True:
            counter = counter % (_COUNTERS - 1) + 1
            number = counter << 16 | int.from_bytes(random, "big")
            if number not in self._by_id:
                break
        self._counters[hub_id] = counter
        claim = Claim(number, generation, half, max_connection, self.week)
        session = self._add(claim, hub_id, user_id, user, created_at=now, now=now)
        session.unique_id = unique_id
        session.client = client
        return session

    def find(self, claim: Claim) -> Session | None:
        """The living session of this key."""
        session = self._by_id.get(claim.session)
        return session if session is not None and session.claim == claim else None

    def taken(self, claim: Claim) -> bool:
        """Is there a session of this number, if perhaps of another user?"""
        return claim.session in self._by_id

    def may_rebuild(self, claim: Claim, now: float) -> bool:
        """May a session live of which only the key is known?"""
        return (
            now < self._resume_deadline
            # A clock that was set back by some hours makes no key too young.
            and -1 <= self.week - claim.week <= MAX_KEY_AGE
            and claim.session not in self._ended
            and not self.taken(claim)
        )

    def rebuild(
        self, claim: Claim, *, hub_id: int, user_id: int, user: str, created_at: float, now: float
    ) -> Session:
        """A session of an earlier core, from its key or from a replay.

        To be called only if its number is not `taken`.
        """
        self._counters[hub_id] = max(self._counters.get(hub_id, 0), claim.session >> 16)
        return self._add(claim, hub_id, user_id, user, created_at=created_at, now=now)

    def attach(self, session: Session, conn: int, direction: Direction) -> None:
        """One more connection.  To be called after the caller has looked at max_connection."""
        session.connections[conn] = direction
        session.orphan_at = None
        self._orphans.pop(session.claim.session, None)
        self._of_connection[conn] = session
        _list_to_client(session)

    def detach(self, conn: int, now: float) -> Session | None:
        """A connection is gone; its session, if it had one, waits for T if it was the last."""
        session = self._of_connection.pop(conn, None)
        if session is None:
            return None
        del session.connections[conn]
        counts = session.counts.pop(conn, None)
        if counts is not None:
            session.past_counts = tuple(
                a + b for a, b in zip(session.past_counts, counts, strict=True)
            )
        _list_to_client(session)
        if not session.connections:
            self._orphan(session, now)
        return session

    def end(self, session: Session, now: float) -> list[int]:
        """The session is over; the connections it had, for the caller to close."""
        number = session.claim.session
        if self._by_id.pop(number, None) is None:
            return []
        del self._in_hub[session.hub_id][number]
        self._orphans.pop(number, None)
        if now < self._resume_deadline:
            self._ended.add(number)
        conns = list(session.connections)
        for conn in conns:
            del self._of_connection[conn]
        session.connections.clear()
        session.to_client = ()
        return conns

    def next_deadline(self) -> float | None:
        """When the next orphan is to end."""
        for session in self._orphans.values():
            assert session.orphan_at is not None
            return session.orphan_at + self.timeout
        return None

    def expire(self, now: float) -> list[Session]:
        """End the sessions whose client did not come back; these."""
        gone = []
        for session in list(self._orphans.values()):
            assert session.orphan_at is not None
            if now - session.orphan_at < self.timeout:
                break
            self.end(session, now)
            gone.append(session)
        if now >= self._resume_deadline:
            self._ended.clear()
        return gone

    def _add(
        self,
        claim: Claim,
        hub_id: int,
        user_id: int,
        user: str,
        *,
        created_at: float,
        now: float,
    ) -> Session:
        name = f"SID-{user.upper()}-{claim.session >> 16}"
        session = Session(claim, self._keys.make(claim), name, hub_id, user_id, user, created_at)
        self._by_id[claim.session] = session
        self._in_hub.setdefault(hub_id, {})[claim.session] = session
        self._orphan(session, now)
        return session

    def _orphan(self, session: Session, now: float) -> None:
        session.orphan_at = now
        self._orphans[session.claim.session] = session


def _list_to_client(session: Session) -> None:
    session.to_client = tuple(
        conn for conn, way in session.connections.items() if way is not Direction.TO_SERVER
    )
