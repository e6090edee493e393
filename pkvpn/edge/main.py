"""The edge's shell: one thread, one epoll, all the sockets; it decides nothing that lasts.

Strategy: a turn of the loop reads each socket that is ready once, hands what came to the pure
parts, and at its end writes each connection that has something to send once.  Control messages of
the core come before its frames, both before the clients.  Whatever goes wrong with one connection
ends that one.

What grows with the number of connections is a *chore*, done in slices of a millisecond between
the turns: looking after each of them some times a second, telling a new core of all, and adopting
what a predecessor left.  Of that, connections with something to do come first; the others *sleep*
in their slots until a frame, an event or the core wakes them, or the chore comes to them.

Everything is imported here, before the fork: a new edge costs a fork and not an import.
"""

import errno
import fcntl
import gc
import itertools
import logging
import mmap
import os
import random
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from pkvpn import channel
from pkvpn.channel import ChannelError, EdgeDrop, Mode, Refusal
from pkvpn.edge import kernel
from pkvpn.edge.checkpoint import (
    Checkpoint,
    CheckpointError,
    Identity,
    Slot,
    checkpoint_size,
    slots_that_fit,
)
from pkvpn.edge.connection import (
    BrokenProtocol,
    Connection,
    ConnectionEnds,
    OwnRecords,
    Records,
    Target,
    Turn,
    scratch_size,
)
from pkvpn.edge.flows import Flows
from pkvpn.edge.handshake import (
    Handshake,
    HandshakeError,
    HandshakeServer,
    OpenSSLRecords,
)
from pkvpn.edge.rehearsal import rehearse
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import Alert, Opener, Sealer, TLSError
from pkvpn.watchdog.child import Child
from pkvpn.watchdog.lifeline import next_moment

_log = logging.getLogger("pkvpn.edge")

# How often limits, keep-alives and what could not be done at once are looked at.
_TICK = 0.4  # with each second beat by default
_COUNTS_INTERVAL = 2.0
_FLOWS_SEEN_INTERVAL = 10.0
_MEMORY_INTERVAL = 10.0
# Connections of this machine itself that are served beyond the limit.  The canary's are among
# them: it cannot tell an edge that is full from one that is deaf.
_RESERVE = 8
# Who waits for a place here and not in the kernel, since somebody of ours may wait behind them.
_MAX_WAITING = 1024

# Of a ring; whole pages.
_KEPT_MEMORY = 16384
_PAGE = mmap.PAGESIZE
# What OpenSSL allocates for one connection from its first byte on.
_OPENSSL_MEMORY = 48 << 10
# While memory is short, a client that does not read has so much of its send ring.
_SHORT_RING = 32768

# New connections in one turn: who came first is not to wait until all others are let in.
_ACCEPTS_PER_TURN = 4
# While all places are taken, in one tick.
_ACCEPTS_PER_TICK = 64
# Handshakes under way.  Where there are more, the oldest ones have come to nothing.
_MAX_HANDSHAKES = 1024
# Steps of handshakes in one turn, for the same reason: frames wait for it.
_HANDSHAKES_PER_TURN = 8
# Messages of the core in one turn.
_CONTROL_PER_TURN = 256
_FRAMES_PER_TURN = 64
# Connections without anything to do that are adopted with one tick.
_ADOPTED_PER_TICK = 100
# So long a turn may hear the core's messages (one that wakes a sleeper takes a tenth of that), and
# so long it may do chores, and then none for a while: frames wait for both, and on a busy machine
# who never rests is made to.
_CONTROL_TIME = 0.001
_CHORES_TIME = 0.001
_CHORES_REST = 0.002

# Where all places are taken, a connection that is not in the data phase after so long makes room
# for a new one: else whoever holds them open keeps everybody out, the canary too, whose failure
# accuses this edge.  Not at once: when many come back at the same time, each needs its turn.
_STRANGER_STAYS = 1.0

# Requests of strangers that the core has at a time; the others wait here.  A storm of logins is
# then no queue in front of the core, nor one of its answers, behind which the canary would wait for
# so long that the core is accused of it.
_MAX_ASKED = 32

# What is queued for a core that does not read; above it no new connection is accepted.
_MAX_BACKLOG = 1000

# After the frames socket was full, for so long a connection may send only one small message a
# turn: so one that floods does not take all that becomes free.
_CROWDED = 0.1
_CROWDED_QUOTA = 4096

# Flows of a core that is gone stay so long: after the new one has heard all, and at most.
_OLD_FLOWS_TIMEOUT = 2.0
_CORE_TIMEOUT = 60.0

# How long a client may take to read what is left and to close its side.
_LINGER = 2.0
# How long a stop may take.
_STOP_TIMEOUT = 3.0
# A request of a client is answered by the core within this, or the client gives up first.
_ANSWER_TIMEOUT = 60.0

# The connections of a rehearsal.
_REHEARSED = 4

_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 2, 4


@dataclass(frozen=True)
class EdgeSettings:
    """Times in seconds, sizes in bytes."""

    index: int  # 1 and up; connection ids begin with it
    max_connections: int = 10000
    max_per_address: int = 0  # 0: no limit
    login_timeout: float = 30.0  # from accept to the data phase, however busy the client is
    # From the first byte to the data phase.  A login is some kilobytes.
    login_bytes: int = 65536
    # All rings, and what OpenSSL has; 0: no limit.
    memory_max: int = 0
    # Whole pages; a receive ring holds more than the longest request.
    receive_ring: int = 262144
    send_ring: int = 524288


# Some work of many small steps; what a step yields: it cannot go on before the core has read.
Chore = Generator[bool, None, None]


class Sleeper:
    """Where frames go for a connection that nobody has woken yet."""

    __slots__ = ("_conn", "_edge")

    def __init__(self, edge: "Edge", conn: int) -> None:
        self._edge = edge
        self._conn = conn

    def deliver(
        self, buffer: memoryview, start: int, end: int, frames: int, octets: int, now: float
    ) -> None:
        self._edge.deliver(self._conn, buffer, start, end, frames, octets, now)


class Peer:
    """A client's socket and what has become of it."""

    __slots__ = (
        "accepted_at",
        "address",
        "conn",
        "connection",
        "deadline",
        "eof",
        "fd",
        "given",
        "handshake",
        "interest",
        "left_at",
        "local",
        "ours",
        "peer",
        "received",
        "sent",
        "shut",
        "slot",
        "sock",
        "unsent",
    )

    def __init__(self, sock: socket.socket, conn: int, now: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.conn = conn
        self.accepted_at = now
        self.address = ""
        self.peer = ""
        self.local = ""
        self.ours = False  # from this machine itself, as the canary is
        # From its first byte until the handshake is done.
        self.handshake: Handshake | None = None
        self.unsent = b""
        self.received = 0
        self.sent = 0
        # From then on.
        self.connection: Connection | None = None
        self.slot: Slot | None = None
        # The watchdog has, or was asked to have, a duplicate.
        self.given = False
        self.interest = 0
        self.left_at: tuple[float, int] = (0.0, 0)  # see `_leave_pages`
        self.eof = False
        # Our side is shut down; when closing must be over at the latest.
        self.shut = False
        self.deadline = 0.0

    @property
    def key(self) -> bytes:
        """Under which the watchdog has it."""
        return _key(self.conn)


def main(child: Child, settings: EdgeSettings) -> None:
    """Be an edge until asked to stop."""
    (source,) = child.held("certificate")
    tls = HandshakeServer(source)
    if child.standing_by:
        load_certificate(tls)
        small = replace(settings, max_connections=_REHEARSED, max_per_address=0, memory_max=0)
        rehearse(child, lambda staged: Edge(staged, small, tls))
    mistrust = try_kernel(child)
    child.stand_by()
    edge = Edge(child, settings, tls, mistrust)
    try:
        # Who is here already does not wait for what only new clients need.
        edge.adopt()
        edge.turn(0.0)
        if not tls.loaded:
            load_certificate(tls)
        edge.run()
    finally:
        edge.close()
        tls.close()


def load_certificate(tls: HandshakeServer) -> None:
    """Get ready for handshakes.  Raises SystemExit."""
    try:
        tls.load()
    except (OSError, ValueError) as error:
        raise SystemExit(f"the certificate and key that are held for us: {error}") from None


def try_kernel(child: Child) -> str:
    """Why connections of edges before us cannot be adopted: what this kernel does not tell.

    The first edge finds out, for all after it; to be called while there are sockets to be had.
    """
    (checkpoint,) = child.held(f"checkpoint:{child.name}")
    if os.fstat(checkpoint).st_size:
        return ""
    try:
        return kernel.check_positions()
    except OSError as error:
        _log.warning("not tried whether this kernel tells positions of sockets: %s", error)
        return ""


class Edge:
    """One edge process."""

    def __init__(
        self, child: Child, settings: EdgeSettings, tls: HandshakeServer, mistrust: str = ""
    ) -> None:
        """``mistrust``: what `try_kernel` says, if it is the first one here."""
        self.child = child
        self.settings = settings
        self.now = time.monotonic()
        self._started = self.now
        self._counter = 0
        self._tls = tls
        self._mistrust = mistrust
        control, frames = child.held(f"channel:{child.name}")
        self._control = socket.socket(fileno=control)
        self._frames = socket.socket(fileno=frames)
        self._listeners = {fd: socket.socket(fileno=fd) for fd in child.held("listen")}
        self._lock = -1
        self._checkpoint = self._map_checkpoint()
        # Pages of it that nobody touches cost a new edge nothing.
        scratch = mmap.mmap(-1, scratch_size(self._checkpoint.rx_size))
        self._turn = Turn(memoryview(scratch))
        drops, refusals = self._checkpoint.load_totals()
        self._turn.drops.update(dict(zip(EdgeDrop, drops, strict=True)))
        self._turn.refusals.update(dict(zip(Refusal, refusals, strict=True)))
        self._flows: Flows[Target] = Flows()
        self._peers: dict[int, Peer] = {}  # by connection
        self._by_fd: dict[int, Peer] = {}
        # Of a predecessor, not adopted yet: connection -> slot, descriptor -> connection (if an
        # event of it would be seen), and what the watchdog has given us that nobody has taken.
        self._sleeping: dict[int, int] = {}
        self._asleep_at: dict[int, int] = {}
        self._given: dict[bytes, int] = {}
        self._poisoned = 0
        self._chores: deque[Chore] = deque()
        self._chores_wait = False  # all of them, for the core
        self._chores_at = 0.0  # when there is time for them again
        self._urgent = False  # connections that cannot wait are not adopted yet
        self._adopting = False  # some of the others are just being adopted
        self._sweeping = False
        self._per_address: dict[str, int] = {}
        # Accepted, without a place: the socket, whose it is, until when it may wait.
        self._waiting: deque[tuple[socket.socket, tuple[Any, ...], float]] = deque()
        self._backlog: list[bytes] = []
        # Connections that wait for the core, the one that waits longest first.
        self._asked: dict[int, float] = {}
        # Those whose turn to ask has not come yet, likewise.
        self._unasked: dict[int, None] = {}
        # Connections that are not in the data phase, the one that waits longest first.
        self._strangers: dict[int, None] = {}
        # Handshakes under way, the oldest first; and connections that wait to begin one.
        self._shaking: dict[int, None] = {}
        self._unshaken: dict[int, None] = {}
        self._openssl: set[int] = set()  # connections for which it has memory
        self._short = False  # of memory
        self._not_given: set[int] = set()
        self._not_dropped: set[bytes] = set()
        self._counted: dict[int, tuple[int, int, int, int, tuple[int, ...]]] = {}
        self._totals_told: channel.Totals | None = None
        self._epoch = 0
        self._greetings = 0
        self._told_all = 0  # the epoch of a core that knows all when it has read the backlog
        self._heeds_core = True  # it speaks our version
        self._inherits = True  # flows of a predecessor still count
        self._old_flows_end = 0.0  # when flows of other epochs end; 0.0: there are none
        self._core_read_at = self.now
        self._crowded_until = 0.0
        self._crowded_used: dict[int, int] = {}
        self._next_tick = self.now
        self._next_counts = self.now + _COUNTS_INTERVAL
        self._next_seen = self.now + _FLOWS_SEEN_INTERVAL
        self._next_memory = self.now + _MEMORY_INTERVAL
        self._logged_drops: Counter[EdgeDrop | Refusal] = self._dropped()
        self._accepting = False
        self._accept = child.duty("accept")
        self._login = child.duty("login")
        self._forward = child.duty("forward")
        self._look = child.duty("look")
        self._hear = child.duty("hear")
        self._heard = 0  # of it, at the last tick
        # Frames of the core, and who has yet to get them, the next one last.
        self._blocks, self._blocks_count = memoryview(b""), 0
        self._without: list[int] = []
        self._epoll = select.epoll()
        self._epoll.register(child.fileno(), select.EPOLLIN)
        self._epoll.register(self._control, select.EPOLLIN)
        self._epoll.register(self._frames, select.EPOLLIN)

    def close(self) -> None:
        """Give back what is ours; what was held for us stays open."""
        for peer in list(self._peers.values()):
            self._epoll_forget(peer)
            peer.sock.close()
        self._peers.clear()
        self._chores.clear()  # each has us in its frame: the memory would stay mapped
        self._epoll.close()
        for sock, _, _ in self._waiting:
            sock.close()
        for sock in (self._control, self._frames, *self._listeners.values()):
            sock.detach()
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # the mapping has the same open file
        os.close(self._lock)

    # --- start ------------------------------------------------------------------------------------

    def _map_checkpoint(self) -> Checkpoint:
        """Map the memory that outlives us, as soon as nobody else does."""
        child, settings = self.child, self.settings
        (held,) = child.held(f"checkpoint:{child.name}")
        # A lock belongs to an open file: one of our own, not the one that is handed down.
        self._lock = os.open(f"/proc/self/fd/{held}", os.O_RDWR | os.O_CLOEXEC)
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                child.turn(time.monotonic())
                time.sleep(0.01)
        places = settings.max_connections + _RESERVE
        sizes = (places, settings.receive_ring, settings.send_ring)
        size = os.fstat(self._lock).st_size
        if not size:
            size = checkpoint_size(*sizes)
            os.ftruncate(self._lock, size)
            try:
                fcntl.fcntl(self._lock, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            except OSError as error:
                _log.warning("checkpoint memory cannot be sealed: %s", error)
            self._memory = mmap.mmap(self._lock, size)
            return self._fresh_checkpoint(*sizes)
        memory = self._memory = mmap.mmap(self._lock, size)
        try:
            # Its own sizes count: connections of before another setting are in it.
            return Checkpoint(memoryview(memory))
        except CheckpointError as error:
            _log.error("all connections are lost, their clients log in again: %s", error)
            memory.madvise(mmap.MADV_REMOVE)
            # It cannot grow.
            slots = min(places, slots_that_fit(size, *sizes[1:]))
            return self._fresh_checkpoint(slots, *sizes[1:])

    def _fresh_checkpoint(self, slots: int, rx_size: int, tx_size: int) -> Checkpoint:
        made = Checkpoint.make(memoryview(self._memory), slots, rx_size, tx_size)
        if self._mistrust:
            made.refuse_adoption()
            _log.error(
                "this kernel does not tell how far a connection has come (%s): when an edge dies,"
                " its clients have to come back by their session keys",
                self._mistrust,
            )
        return made

    def adopt(self) -> None:
        """Go on with what predecessors left: at once where something waits, soon with the rest."""
        self._poisoned = self._checkpoint.poisoned()
        self._given = dict(self.child.given())
        self._sleeping, first = self._checkpoint.left()
        self._say(channel.Adopted(channel.VERSION))
        self._chores.append(self._adopt_all(first))
        self._urgent = True
        # What is adopted stays.  To look again and again, while it grows, whether it is garbage
        # costs as much as to adopt it, and each time all at once.
        gc.disable()
        self._do_chores()

    def _adopt_all(self, first: list[int]) -> Chore:
        """What cannot wait: who has something to do, and that the others can be woken."""
        began, found = time.monotonic(), len(self._sleeping)
        for conn in first[:_ADOPTED_PER_TICK]:
            self._go_on(self._wake(conn))
            yield False
        # From here on an event wakes its connection.
        for conn in list(self._sleeping):
            fd = self._given.get(_key(conn), -1)
            if conn in self._sleeping and fd >= 0:
                try:
                    self._epoll.register(fd, select.EPOLLIN)
                    self._asleep_at[fd] = conn
                except OSError:
                    self._find(conn)  # it is no socket, and will say so
                yield False
        # Many, if the predecessor died over a broadcast: those who say something come before them.
        for conn in first[_ADOPTED_PER_TICK:]:
            self._go_on(self._wake(conn))
            yield False
        self._urgent = False
        # No slot tells of these: they died in their handshakes, or their slots made no sense.
        known = {_key(conn) for conn in self._sleeping}
        for key in [key for key in self._given if key not in known]:
            os.close(self._given.pop(key))
            self._drop(key)
            yield False
        if found:
            spent = time.monotonic() - began
            _log.info("took over %d connections, %d at once, in %.3f s", found, len(first), spent)

    def _adopt_some(self) -> Chore:
        """A few of those that nothing has woken.  One after another tick, since it is no hurry,
        and who has all of them awake dies more slowly (`_leave_pages`)."""
        for conn in list(itertools.islice(self._sleeping, _ADOPTED_PER_TICK)):
            self._find(conn)
            peer = self._peers.get(conn)
            if peer is not None:
                self._leave_pages(peer)
            yield False
        self._adopting = False

    def _wake(self, conn: int) -> Peer | None:
        """The connection of that name, adopted now if nobody has done it yet."""
        index = self._sleeping.pop(conn, None)
        if index is None:
            return self._peers.get(conn)
        slot = self._checkpoint.slot(index)
        sock = None
        fd = self._given.pop(_key(conn), None)
        try:
            if fd is None:
                raise CheckpointError(f"slot {index}: nobody has its descriptor")
            sock = socket.socket(fileno=fd)
            peer = self._adopt(slot, sock, conn)
        except (CheckpointError, kernel.PositionError, OSError, ValueError, KeyError) as error:
            _log.warning("connection %#x is lost: %s", conn, error)
            self._flows.close(conn)
            self._say(channel.Closed(conn, f"not adopted: {error}"[:200]))
            self._drop(_key(conn))
            if sock is not None:
                if self._asleep_at.pop(sock.fileno(), None) is not None:
                    self._epoll.unregister(sock)
                sock.close()
            elif fd is not None:
                os.close(fd)
            self._give_back(slot)
            return None
        return peer

    def _adopt(self, slot: Slot, sock: socket.socket, conn: int) -> Peer:
        """Raises what says that this connection cannot be gone on with."""
        identity, _, _ = slot.load()
        if conn != identity.conn or kernel.cookie(sock) != identity.cookie:
            raise CheckpointError(f"slot {slot.index}: its descriptor is another socket")
        sock.setblocking(False)
        # What came while nobody was there is acknowledged by a timer of 40 ms only, and a
        # client that waits for that (Nagle) sends nothing more: say it now.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        received, sent = kernel.positions(sock)
        connection = Connection.adopt(
            slot,
            received,
            sent,
            turn=self._turn,
            flows=self._flows.table,
            login_bytes=self.settings.login_bytes,
            now=self.now,
        )
        peer = Peer(sock, conn, identity.accepted_at)
        peer.connection = connection
        peer.slot = slot
        peer.given = True
        peer.peer, peer.local = identity.peer, identity.local
        host = identity.peer.rpartition(":")[0]
        peer.ours = host == identity.local.rpartition(":")[0]
        peer.address = _network(host)
        self._add(peer)
        self._counted[conn] = connection.counts()
        self._flows.redirect(conn, connection)
        if not self._inherits:
            # The core has said by now what holds, and would have woken this one.
            slot.flows.clear()
        self._flows.save_in(conn, slot.flows)
        self._flows.restore(conn, self._target)
        if connection.mode is Mode.HTTP:
            self._strangers[conn] = None
        if not connection.number:
            # The predecessor may have died before it could say so.
            self._say(channel.Opened(conn, identity.peer, identity.local, identity.tls))
        if conn == self._poisoned:
            _log.error("connection %#x from %s killed two edges: closed unread", conn, peer.peer)
            self._close(peer, channel.POISONED)
        elif connection.closing:
            # Told again, for the same reason.
            self._tell_closed(peer, connection.closing)
            peer.deadline = self.now + _LINGER
        return peer

    def _find(self, conn: int) -> Peer | None:
        """The connection of that name, awake and at work."""
        if conn in self._sleeping:
            self._go_on(self._wake(conn))
        return self._peers.get(conn)

    def _go_on(self, peer: Peer | None) -> None:
        """Do what a predecessor could not: what lies in a ring already raises no event."""
        if peer is not None and peer.slot is not None and peer.slot.dirty:
            self._work(peer)
            self._flush(peer)

    def _target(self, conn: int) -> Target | None:
        """Where frames for this connection go."""
        if conn in self._sleeping:
            return Sleeper(self, conn)
        peer = self._peers.get(conn)
        if peer is None or peer.connection is None or peer.connection.closing:
            return None
        return peer.connection

    def deliver(
        self,
        conn: int,
        buffer: memoryview,
        start: int,
        end: int,
        frames: int,
        octets: int,
        now: float,
    ) -> None:
        """Wake the connection for these frames; to be called by its `Sleeper`."""
        # In the middle of somebody else's `receive`: what lies in its own rings comes after that.
        peer = self._wake(conn)
        if peer is None or peer.connection is None:
            self._turn.drops[EdgeDrop.NO_CONNECTION] += frames
            return
        peer.connection.deliver(buffer, start, end, frames, octets, now)

    def _add(self, peer: Peer) -> None:
        self._peers[peer.conn] = peer
        self._by_fd[peer.fd] = peer
        self._per_address[peer.address] = self._per_address.get(peer.address, 0) + 1
        peer.interest = select.EPOLLIN
        if self._asleep_at.pop(peer.fd, None) is None:
            self._epoll.register(peer.fd, select.EPOLLIN)

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until asked to stop, then say goodbye to everybody whom no successor can serve."""
        child = self.child
        child.ready()
        self._accept_or_not()
        stop_at, making_way = 0.0, False
        while not stop_at or (self._peers and self.now < stop_at):
            due = self._next_tick
            if self._chores and not self._chores_wait:
                due = min(due, self._chores_at)
            self.turn(min(child.turn(self.now), max(0.0, due - self.now)))
            # Also when a stop comes while we make way: then no successor comes after all.
            if child.stopping and (not stop_at or child.yielding != making_way):
                stop_at, making_way = self.now + _STOP_TIMEOUT, child.yielding
                self._accept_or_not()
                if not making_way:
                    for conn in list(self._sleeping):
                        self._find(conn)
                for peer in list(self._peers.values()):
                    if not (making_way and self._can_be_left(peer)):
                        self._close(peer, "service stops")
                self._flush_touched()
            if (
                making_way
                and not self._without
                and all(peer.given for peer in self._peers.values())
            ):
                return
        for peer in list(self._peers.values()):
            if not (making_way and peer.given and self._can_be_left(peer)):
                self._gone(peer, "service stops")

    def turn(self, timeout: float) -> None:
        """Wait for ``timeout`` seconds at most, serve what there is, send what came of it."""
        events = dict(self._epoll.poll(0.0 if self._without else timeout))
        self.now = time.monotonic()
        self._serve(events)
        self._flush_touched()
        if self._chores and self.now >= self._chores_at:
            self._do_chores()
            self._flush_touched()
        self._forward.done = self._turn.forwarded

    def _do_chores(self) -> None:
        """A moment for each of them in turn."""
        now = time.monotonic()
        until = now + _CHORES_TIME
        idle = 0  # how many in a row could not go on
        while self._chores and idle < len(self._chores) and now < until:
            chore = self._chores.popleft()
            try:
                idle = idle + 1 if next(chore) else 0
            except StopIteration:
                continue
            self._chores.append(chore)
            now = time.monotonic()
        self._chores_wait = idle >= len(self._chores)
        self._chores_at = now if self._urgent else now + _CHORES_REST

    @staticmethod
    def _can_be_left(peer: Peer) -> bool:
        """A successor can go on with it now, or will be able to when its handshake is done."""
        connection = peer.connection
        return connection is None or (connection.slot is not None and not connection.closing)

    def _serve(self, events: dict[int, int]) -> None:
        if self.child.fileno() in events and "reload" in self.child.receive():
            self._reload()
        if self._control.fileno() in events:
            self._drain_backlog()
            self._read_control()
        if self._without or self._frames.fileno() in events:
            self._read_frames()
        shaking, calling = [], []
        until = time.monotonic() + _CONTROL_TIME
        for fd, event in events.items():
            peer = self._by_fd.get(fd)
            if peer is None and fd in self._asleep_at:
                if time.monotonic() > until:
                    continue  # it comes again with the next turn
                peer = self._find(self._asleep_at[fd])
            if peer is None:
                if fd in self._listeners:
                    calling.append(self._listeners[fd])
            elif peer.connection is not None:
                self._ready(peer, event)
            else:
                shaking.append((peer, event))
        # The others come again with the next turn.  The newest first: where there are more than can
        # be served, whoever has waited for long has mostly given up, and a queue that is served in
        # its order serves nobody in time.  The canary before all.
        shaking.sort(key=lambda item: (item[0].ours, item[0].conn), reverse=True)
        for peer, event in shaking[:_HANDSHAKES_PER_TURN]:
            self._ready(peer, event)
        for listener in calling:
            self._accept_some(listener)
        if self.now >= self._next_tick:
            self._next_tick = next_moment(self.now, _TICK)
            self._tick()

    def _reload(self) -> None:
        try:
            self._tls.load()
        except (OSError, ValueError) as error:
            _log.error("the certificate in use stays: %s", error)

    def _tick(self) -> None:
        """What is due some times a second."""
        now = self.now
        self._look.done += 1
        self._accept_or_not()
        self._accept_our_own()
        self._end_old_handshakes()
        for conn in list(self._not_given):
            self._give(self._peers[conn])
        for key in list(self._not_dropped):
            self._drop(key)
        for key, why in self.child.refusals():
            _log.warning("connection %s is not protected: %s", key.hex(), why)
        if self.settings.memory_max:
            self._watch_memory(self.settings.memory_max)
        if not self._sweeping:
            self._sweeping = True
            self._chores.append(self._sweep())
        if self._sleeping and not self._adopting and not self._urgent:
            self._adopting = True
            self._chores.append(self._adopt_some())
        if not self._sleeping and not gc.isenabled():
            gc.freeze()
            gc.enable()
        self._look_for_unheard()
        # A core of another version does not hear us.
        waits = next(iter(self._asked.values()), 0.0) if self._heeds_core else 0.0
        self._login.waiting_since = waits
        if self._old_flows_end and now >= self._old_flows_end:
            self._old_flows_end, self._inherits = 0.0, False
            self._flows.remove_others(self._epoch)
        if not kernel.unsent(self._control.fileno()) and not self._backlog:
            self._core_read_at = now
        elif now - self._core_read_at > _CORE_TIMEOUT and len(self._flows):
            _log.error("the core has read nothing for %d s: flows end", _CORE_TIMEOUT)
            self._flows.clear()

    def _look_for_unheard(self) -> None:
        """Where what the core has said lies unread, it is this edge that is deaf, not the core."""
        duty = self._hear
        if not any(kernel.unread(sock.fileno()) for sock in (self._control, self._frames)):
            duty.waiting_since = 0.0
        elif not duty.waiting_since or duty.done != self._heard:
            duty.waiting_since = self.now
        self._heard = duty.done

    def _sweep(self) -> Chore:
        """Look after each connection."""
        now = self.now
        memory, counts, seen = False, False, False
        if now >= self._next_memory:
            self._next_memory, memory = now + _MEMORY_INTERVAL, True
            self._log_drops()
        if not self._backlog:  # counts are cumulative, and can wait
            if now >= self._next_counts:
                self._next_counts, counts = now + _COUNTS_INTERVAL, True
            if now >= self._next_seen:
                self._next_seen, seen = now + _FLOWS_SEEN_INTERVAL, True
        for peer in list(self._peers.values()):
            if peer.conn in self._peers:
                self._expire(peer)
                connection = peer.connection
                if connection is not None:
                    if memory or self._short:
                        self._give_back_memory(peer, connection)
                    if memory and now - connection.heard_at > _MEMORY_INTERVAL / 2:
                        self._leave_pages(peer)
                    tx = connection.tx
                    tx.limit = min(_SHORT_RING, tx.size) if self._short else tx.size
                if connection is not None and counts:
                    self._report_counts(peer, connection)
                if connection is not None and seen:
                    for key in connection.seen:
                        self._say(channel.FlowSeen(peer.conn, key))
                    connection.seen.clear()
            yield False
        if counts:
            self._report_totals()
        self._sweeping = False

    def _expire(self, peer: Peer) -> None:
        now = self.now
        connection = peer.connection
        if peer.deadline:
            if now >= peer.deadline:
                self._gone(peer, "closed")
            return
        if connection is None or connection.mode is Mode.HTTP:
            limit = peer.accepted_at + self.settings.login_timeout
            if connection is not None and connection.request:
                limit += _ANSWER_TIMEOUT  # it is the core that is late, not the client
            if now >= limit:
                self._turn.refusals[Refusal.SLOW_LOGIN] += 1
                self._end(peer, "login takes too long")
            return
        try:
            connection.expire(now, random.random)
        except ConnectionEnds as error:
            self._close(peer, str(error))

    def _watch_memory(self, limit: int) -> None:
        """Keep what all connections use together below the limit, or near it.

        While memory is short nobody new is taken in, and the sweep has what holds nothing given
        back and clients that do not read lose frames sooner.  If that is not enough, those end for
        which most is kept.
        """
        used = os.fstat(self._lock).st_blocks * 512 + len(self._openssl) * _OPENSSL_MEMORY
        # Not there and back with every tick.
        short = used > (limit - limit // 8 if self._short else limit)
        if short != self._short:
            self._short = short
            state = "short" if short else "enough again"
            _log.warning("memory is %s: %d of %d MiB", state, used >> 20, limit >> 20)
        if used > limit + limit // 4:
            self._end_largest(used - limit)

    def _end_largest(self, excess: int) -> None:
        peers = [peer for peer in self._peers.values() if peer.connection is not None]
        peers.sort(key=_queued, reverse=True)
        for peer in peers:
            if excess <= 0 or _queued(peer) <= _SHORT_RING:
                return
            excess -= _queued(peer)
            if not peer.deadline:  # else it is ending already
                self._turn.refusals[Refusal.NO_MEMORY] += 1
                self._close(peer, "no memory for what it does not read")

    def _give_back_memory(self, peer: Peer, connection: Connection) -> None:
        """Rings keep a little; what holds nothing of the rest is given back."""
        if peer.slot is None:
            return
        for ring, at in zip((connection.rx, connection.tx), peer.slot.rings_at(), strict=True):
            if ring.high > _KEPT_MEMORY or ring.end - ring.base > _KEPT_MEMORY:
                for begin, end in ring.spare(_KEPT_MEMORY):
                    first, behind = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
                    if first < behind:
                        self._punch(at + first, behind - first)

    def _leave_pages(self, peer: Peer) -> None:
        """Take the memory of one that rests out of our page tables; what is in it stays.

        When we die, the kernel takes apart what is mapped, half a microsecond a page, before
        anybody hears of it: with thousands of connections that would be most of a gap.
        """
        connection, slot = peer.connection, peer.slot
        if connection is None or slot is None:
            return
        touched = (connection.heard_at, connection.tx.end)
        if touched == peer.left_at:
            return
        peer.left_at = touched
        for at, size in slot.extents():
            self._memory.madvise(mmap.MADV_DONTNEED, at, size)

    def _punch(self, at: int, size: int) -> None:
        try:
            self._memory.madvise(mmap.MADV_REMOVE, at, size)
        except OSError as error:
            _log.warning("memory of rings is not given back: %s", error)

    def _dropped(self) -> "Counter[EdgeDrop | Refusal]":
        dropped: Counter[EdgeDrop | Refusal] = Counter(self._turn.drops)
        dropped.update(self._turn.refusals)
        return dropped

    def _log_drops(self) -> None:
        dropped = self._dropped()
        new = dropped - self._logged_drops
        if new:
            text = ", ".join(f"{count} {why.value}" for why, count in new.items())
            _log.info("dropped: %s", text)
            self._logged_drops = dropped

    def _totals(self) -> channel.Totals:
        turn = self._turn
        return channel.Totals(
            tuple(turn.drops[why] for why in EdgeDrop),
            tuple(turn.refusals[why] for why in Refusal),
        )

    def _report_totals(self) -> None:
        totals = self._totals()
        if totals != self._totals_told:
            self._totals_told = totals
            self._checkpoint.save_totals(*totals)
            self._say(totals)

    def _report_counts(self, peer: Peer, connection: Connection) -> None:
        counts = connection.counts()
        before = self._counted.get(peer.conn)
        if connection.slot is not None:
            # Not whoever got a broadcast, which is everybody.
            connection.slot.set_busy(before is not None and before[0] != counts[0])
        if before != counts:
            self._counted[peer.conn] = counts
            if connection.slot is not None:
                connection.slot.save_counts(*counts[:4], *counts[4])
            self._say(channel.Counts(peer.conn, *counts))

    # --- accepting --------------------------------------------------------------------------------

    def _accept_or_not(self, *, pause: bool = False) -> None:
        """Let new clients wait in the kernel while there is no place for them."""
        while self._waiting and self._may_accept() and not self._is_full():
            sock, address, _ = self._waiting.popleft()
            self._take_in(sock, address)
        wanted = not pause and self._may_accept() and not self._is_full()
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners.values():
                if wanted:
                    # One edge wakes up for a new client, not all of them.
                    self._epoll.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
                else:
                    self._epoll.unregister(listener)

    def _may_accept(self) -> bool:
        return self._tls.loaded and len(self._backlog) < _MAX_BACKLOG and not self.child.stopping

    def _is_full(self) -> bool:
        return self._has_no_place() and not self._can_make_room()

    def _has_no_place(self) -> bool:
        return self._short or self._taken() >= self.settings.max_connections

    def _taken(self) -> int:
        """How many places are."""
        return len(self._peers) + len(self._sleeping)

    def _can_make_room(self) -> bool:
        """Has a stranger stayed for long enough?"""
        for oldest in self._strangers:
            return self.now - self._peers[oldest].accepted_at > _STRANGER_STAYS
        return False

    def _make_room(self) -> None:
        """To be called if all places are taken and `_can_make_room`."""
        oldest = next(iter(self._strangers))
        del self._strangers[oldest]
        self._turn.refusals[Refusal.MADE_ROOM] += 1
        peer, why = self._peers[oldest], "no place for who does not log in"
        self._end(peer, why)
        # Its place is wanted now: it gets its goodbye, but nobody listens until it closes.
        self._flush(peer)
        self._gone(peer, why)

    def _accept_our_own(self) -> None:
        """While this edge is full: see whether the canary is among those whom no other edge took.

        To be called some times a second.  The others wait on, here.
        """
        while self._waiting and self._waiting[0][2] <= self.now:
            self._waiting.popleft()[0].close()
        if not self._is_full() or not self._may_accept():
            return
        for listener in self._listeners.values():
            for _ in range(_ACCEPTS_PER_TICK):
                accepted = self._accept_one(listener)
                if accepted is None:
                    break
                sock, address = accepted
                ours = sock.getsockname()[0] == address[0]
                if ours and self._taken() < self.settings.max_connections + _RESERVE:
                    self._take_in(sock, address)
                elif len(self._waiting) < _MAX_WAITING:
                    self._waiting.append((sock, address, self.now + self.settings.login_timeout))
                else:
                    why = Refusal.NO_MEMORY if self._short else Refusal.NO_PLACE
                    self._turn.refusals[why] += 1
                    sock.close()

    def _accept_some(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            self._accept_or_not()
            accepted = self._accept_one(listener) if self._accepting else None
            if accepted is None:
                return
            self._take_in(*accepted)

    def _accept_one(self, listener: socket.socket) -> tuple[socket.socket, tuple[Any, ...]] | None:
        try:
            accepted = listener.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in {errno.ECONNABORTED, errno.EPROTO}:
                # Most likely there is no descriptor left: look again with the next tick.
                _log.warning("accept: %s", error)
                self._accept_or_not(pause=True)
            return None
        self._accept.done += 1
        return accepted

    def _take_in(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        network = _network(address[0])
        limit = self.settings.max_per_address
        if limit and self._per_address.get(network, 0) >= limit:
            self._turn.refusals[Refusal.ADDRESS] += 1
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer = Peer(sock, self._next_conn(), self.now)
        peer.address = network
        peer.peer = f"{address[0]}:{address[1]}"
        local = sock.getsockname()
        peer.local = f"{local[0]}:{local[1]}"
        peer.ours = address[0] == local[0]
        if self._has_no_place() and self._can_make_room():
            self._make_room()
        self._add(peer)
        self._strangers[peer.conn] = None

    def _next_conn(self) -> int:
        """A name that no connection had or will have."""
        self._counter += 1
        if self._counter == channel.CONNS_PER_START:
            # As if we had been started now; a million connections take longer than the
            # millisecond that tells two starts apart.
            self._started, self._counter = self.now, 1
        return channel.conn_id(self.settings.index, self._started, self._counter)

    # --- one connection ---------------------------------------------------------------------------

    def _ready(self, peer: Peer, event: int) -> None:
        try:
            if peer.connection is None:
                self._shake(peer, event)
            else:
                if event & select.EPOLLOUT:
                    self._flush(peer)
                if event & select.EPOLLIN and peer.interest & select.EPOLLIN:
                    self._read(peer)
                elif event & (select.EPOLLERR | select.EPOLLHUP):
                    self._gone(peer, "connection reset")
        except OSError as error:
            self._gone(peer, error.strerror or str(error))

    def _shake(self, peer: Peer, event: int) -> None:
        handshake = peer.handshake or self._begin_handshake(peer, event)
        if handshake is None:
            return
        if peer.unsent:
            self._send_unsent(peer)
        if not event & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
            return
        try:
            data = peer.sock.recv(16384)
        except BlockingIOError:
            return
        if not data:
            self._gone(peer, "closed in the handshake")
            return
        peer.received += len(data)
        try:
            peer.unsent += handshake.feed(data)
        except HandshakeError as error:
            _log.info("handshake with %s: %s", peer.peer, error)
            self._turn.refusals[Refusal.HANDSHAKE] += 1
            peer.unsent += handshake.alert()
            try:
                self._send_unsent(peer)
            finally:
                self._gone(peer, str(error))
            return
        self._send_unsent(peer)
        if handshake.done:
            self._open(peer, handshake)

    def _begin_handshake(self, peer: Peer, event: int) -> Handshake | None:
        """Not before its first byte: it is the memory that makes a stranger dear.

        None: it waits for another's to end.
        """
        if event & (select.EPOLLERR | select.EPOLLHUP):
            self._gone(peer, "connection reset")
            return None
        if len(self._shaking) >= _MAX_HANDSHAKES and not peer.ours:
            self._watch(peer, 0)
            self._unshaken[peer.conn] = None
            return None
        peer.handshake = self._tls.begin()
        self._shaking[peer.conn] = None
        self._openssl.add(peer.conn)
        return peer.handshake

    def _end_handshake(self, conn: int) -> None:
        """To be called when it has succeeded or the connection is gone."""
        if conn in self._shaking:
            del self._shaking[conn]
            if self._unshaken:
                # The newest again.
                waiting, _ = self._unshaken.popitem()
                self._watch(self._peers[waiting], select.EPOLLIN)

    def _end_old_handshakes(self) -> None:
        """While others wait to begin theirs.  To be called some times a second."""
        for _ in range(min(len(self._unshaken), len(self._shaking))):
            oldest = self._peers[next(iter(self._shaking))]
            if self.now - oldest.accepted_at <= _STRANGER_STAYS:
                return
            self._turn.refusals[Refusal.MADE_ROOM] += 1
            self._gone(oldest, "others wait to begin their handshakes")

    def _send_unsent(self, peer: Peer) -> None:
        if peer.unsent:
            try:
                size = peer.sock.send(peer.unsent)
            except BlockingIOError:
                size = 0
            peer.sent += size
            peer.unsent = peer.unsent[size:]
        self._watch(peer, select.EPOLLIN | (select.EPOLLOUT if peer.unsent else 0))

    def _open(self, peer: Peer, handshake: Handshake) -> None:
        """The handshake is done: go on with records of our own, or with OpenSSL's."""
        slot = self._checkpoint.take()
        if slot is None:
            # The memory was made for fewer connections than the settings allow now.
            self._gone(peer, "no slot left")
            return
        self._end_handshake(peer.conn)
        secrets = handshake.secrets()
        if secrets:
            self._openssl.discard(peer.conn)
        leftover = handshake.leftover() if secrets else b""
        start = peer.received - len(leftover)
        rx = Ring(slot.rx_memory, start, start, start)
        tx = Ring(slot.tx_memory, peer.sent, peer.sent, peer.sent)
        rx.high = tx.high = 0  # what another had of it has been given back
        rx.append(leftover)
        tx.append(peer.unsent)
        records: Records
        if secrets:
            records = OwnRecords(
                rx, tx, Opener(secrets.suite, secrets.read), Sealer(secrets.suite, secrets.write)
            )
        else:
            records = OpenSSLRecords(rx, tx, handshake)
        identity = Identity(
            peer.conn,
            kernel.cookie(peer.sock),
            peer.accepted_at,
            secrets.suite.number if secrets else 0,
            peer.peer,
            peer.local,
            handshake.describe(records.kind),
        )
        connection = Connection(
            identity,
            records,
            rx,
            tx,
            turn=self._turn,
            flows=self._flows.table(peer.conn),
            slot=slot if secrets and self._checkpoint.adoptable else None,
            login_bytes=self.settings.login_bytes,
            now=self.now,
        )
        peer.slot = slot
        peer.handshake = None
        peer.unsent = b""
        peer.connection = connection
        if connection.slot is not None:
            slot.create(identity, connection.hot(), connection.cold())
            self._flows.save_in(peer.conn, slot.flows)
            self._give(peer)
        self._say(channel.Opened(peer.conn, peer.peer, peer.local, identity.tls))
        self._work(peer)
        # Most clients have sent their first request by now, and the core then wakes once.
        self._read(peer)
        self._flush(peer)

    def _give(self, peer: Peer) -> None:
        """Have the watchdog keep a duplicate; again later if it cannot now."""
        peer.given = self.child.give(peer.key, peer.fd)
        if peer.given:
            self._not_given.discard(peer.conn)
        else:
            self._not_given.add(peer.conn)

    def _drop(self, key: bytes) -> None:
        if self.child.drop(key):
            self._not_dropped.discard(key)
        else:
            self._not_dropped.add(key)

    def _read(self, peer: Peer) -> None:
        connection = peer.connection
        assert connection is not None  # the caller looked
        if connection.closing:
            self._discard(peer)
            return
        rx = connection.rx
        piece = rx.free()
        if connection.request or not piece:
            self._watch(peer, peer.interest & ~select.EPOLLIN)
            return
        if connection.mode is Mode.HTTP:
            # What is too much for a login has no need of memory; one byte more ends it.
            piece = piece[: max(1, self.settings.login_bytes + 1 - rx.end)]
        if connection.slot is not None:
            connection.slot.set_dirty(True)
        try:
            size = peer.sock.recv_into(piece)
        except BlockingIOError:
            return
        if not size:
            peer.eof = True
            self._close(peer, "client left")
            return
        rx.put(size)
        self._work(peer)

    def _discard(self, peer: Peer) -> None:
        """Read what nobody wants any more, so that our goodbye is not followed by a reset."""
        for _ in range(16):
            try:
                if not peer.sock.recv(65536):
                    peer.eof = True
                    self._flush(peer)
                    return
            except BlockingIOError:
                return

    def _work(self, peer: Peer) -> None:
        """Go on with what lies in the receive ring."""
        connection = peer.connection
        assert connection is not None  # the callers looked
        checkpoint = self._checkpoint
        asked = bool(connection.request)
        checkpoint.mark(peer.conn, connection.rx.start)
        ends, alert = "", Alert.CLOSE_NOTIFY
        try:
            connection.receive(self.now)
        except ConnectionEnds as error:
            ends = str(error)
            self._turn.refusals[Refusal.GARBAGE] += isinstance(error, BrokenProtocol)
        except TLSError as error:
            ends, alert = str(error), error.alert
            self._turn.refusals[Refusal.GARBAGE] += 1
        except Exception:  # noqa: BLE001  # a bug of ours costs one connection, not all of them
            _log.exception("connection %#x of %s", peer.conn, peer.peer)
            ends, alert = "internal error", Alert.INTERNAL_ERROR
        if connection.misses:
            self._send_frames(connection)
        if ends:
            self._close(peer, ends, alert)
        else:
            if connection.request and not asked:
                self._ask_in_turn(peer, connection)
            connection.save()
        checkpoint.mark(0, 0)
        if not connection.touched:  # else it is flushed at the end of the turn, which looks again
            self._note_empty(connection)
            self._watch_connection(peer)

    def _ask_in_turn(self, peer: Peer, connection: Connection) -> None:
        """Have the core answer its request, now or after others."""
        if len(self._asked) < _MAX_ASKED or peer.ours:
            self._ask(connection)
        else:
            self._unasked[peer.conn] = None

    def _answered(self, conn: int) -> bool:
        """To be called when the core need not answer this connection any more: it is another's
        turn.  Whether it had been asked."""
        self._unasked.pop(conn, None)
        asked = self._asked.pop(conn, None) is not None
        while self._unasked and len(self._asked) < _MAX_ASKED:
            waiting = next(iter(self._unasked))
            del self._unasked[waiting]
            connection = self._peers[waiting].connection
            assert connection is not None  # it has a request
            self._ask(connection)
        return asked

    def _ask(self, connection: Connection) -> None:
        self._asked[connection.conn] = self.now
        self._say(channel.Request(connection.conn, connection.number + 1, connection.request))

    def _send_frames(self, connection: Connection) -> None:
        """Show the core what no known flow took."""
        crowded = self.now < self._crowded_until
        for blocks in connection.take_misses():
            if crowded:
                used = self._crowded_used.get(connection.conn, 0)
                if used and used + len(blocks) > _CROWDED_QUOTA:
                    connection.drop(EdgeDrop.CORE_BUSY, channel.count_blocks(blocks))
                    continue
                self._crowded_used[connection.conn] = used + len(blocks)
            try:
                self._frames.send(channel.encode(channel.Frames(connection.conn, blocks)))
            except BlockingIOError:
                connection.drop(EdgeDrop.CORE_BUSY, channel.count_blocks(blocks))
                if not crowded:
                    crowded = True
                    self._crowded_used.clear()
                self._crowded_until = self.now + _CROWDED

    def _flush_touched(self) -> None:
        turn = self._turn
        touched, turn.touched = turn.touched, []
        for connection in touched:
            connection.touched = False
            peer = self._peers.get(connection.conn)
            if peer is not None:
                self._flush(peer)
        self._crowded_used.clear()

    def _flush(self, peer: Peer) -> None:
        """Send what is in force and not sent yet; the end of closing comes here too."""
        connection = peer.connection
        if connection is None:
            return
        tx = connection.tx
        try:
            while tx.start < tx.end:
                piece = tx.first_piece()
                size = peer.sock.send(piece)
                tx.start += size
                if size < len(piece):
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self._gone(peer, error.strerror or str(error))
            return
        if tx.start == tx.end:
            tx.rewind()
            if connection.closing:
                self._shut(peer)
                return
            self._note_empty(connection)
        self._watch_connection(peer)

    @staticmethod
    def _note_empty(connection: Connection) -> None:
        """Where nothing lies in the rings, a successor has no need to look at once."""
        rx, tx = connection.rx, connection.tx
        if connection.slot is not None and rx.start == rx.end and tx.start == tx.end:
            connection.slot.set_dirty(False)

    def _watch_connection(self, peer: Peer) -> None:
        connection = peer.connection
        if connection is None or peer.conn not in self._peers:
            return
        interest = 0
        if connection.closing:
            interest = 0 if peer.eof else select.EPOLLIN
        elif peer.interest & select.EPOLLIN or connection.wants_bytes:
            # Bytes that are not wanted now are seldom sent: `_read` looks away when they are.
            interest = select.EPOLLIN
        if connection.tx.start < connection.tx.end:
            interest |= select.EPOLLOUT
        self._watch(peer, interest)

    def _watch(self, peer: Peer, interest: int) -> None:
        if interest != peer.interest:
            peer.interest = interest
            self._epoll.modify(peer.fd, interest)

    # --- the end of a connection ------------------------------------------------------------------

    def _end(self, peer: Peer, why: str) -> None:
        """Close a connection in whatever state it is."""
        if peer.connection is None:
            self._gone(peer, why)
        else:
            self._close(peer, why)

    def _close(self, peer: Peer, why: str, alert: int = Alert.CLOSE_NOTIFY) -> None:
        """Begin to close: goodbye, flush, shut, read until the end or the deadline, forget."""
        connection = peer.connection
        if connection is None:
            self._gone(peer, why)
            return
        if connection.closing and peer.deadline:
            return
        connection.close(why, alert)
        self._tell_closed(peer, connection.closing)
        peer.deadline = self.now + _LINGER
        self._watch_connection(peer)

    def _tell_closed(self, peer: Peer, why: str) -> None:
        self._flows.close(peer.conn)
        self._strangers.pop(peer.conn, None)
        self._answered(peer.conn)
        self._counted.pop(peer.conn, None)
        connection = peer.connection
        if connection is not None:
            counts = connection.counts()
            if any(counts[:4]) or any(counts[4]):
                self._say(channel.Counts(peer.conn, *counts))
            self._say(channel.Closed(peer.conn, why[:200]))

    def _shut(self, peer: Peer) -> None:
        """Everything is sent: say so to TCP, and wait for the client to say the same."""
        if not peer.shut:
            peer.shut = True
            peer.deadline = self.now + _LINGER
            try:
                peer.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._gone(peer, "closed")
                return
        if peer.eof:
            self._gone(peer, "closed")
        else:
            self._watch_connection(peer)

    def _gone(self, peer: Peer, why: str) -> None:
        """The last thing that happens to a connection."""
        if self._peers.pop(peer.conn, None) is None:
            return
        connection = peer.connection
        if connection is not None and not peer.deadline:
            self._tell_closed(peer, why)
            connection.closing = why
        self._epoll_forget(peer)
        self._strangers.pop(peer.conn, None)
        self._unshaken.pop(peer.conn, None)
        self._end_handshake(peer.conn)
        self._openssl.discard(peer.conn)
        self._not_given.discard(peer.conn)
        left = self._per_address[peer.address] - 1
        if left:
            self._per_address[peer.address] = left
        else:
            del self._per_address[peer.address]
        try:
            # The watchdog's duplicate would keep the connection open.
            peer.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the client has gone first
        if peer.given:
            self._drop(peer.key)
        peer.sock.close()
        if connection is not None:
            # Its slot will be another's: whoever still knows it must not write there.
            connection.slot, connection.mode = None, Mode.CLOSING
        if peer.slot is not None:
            self._give_back(peer.slot)

    def _give_back(self, slot: Slot) -> None:
        """The slot, and the memory of its rings."""
        _, rings = slot.extents()
        self._checkpoint.give_back(slot)
        self._punch(*rings)

    def _epoll_forget(self, peer: Peer) -> None:
        if self._by_fd.pop(peer.fd, None) is not None:
            # By hand: while a duplicate lives, closing does not do it.
            self._epoll.unregister(peer.fd)

    # --- the core ---------------------------------------------------------------------------------

    def _say(self, message: channel.FromEdge) -> None:
        data = channel.encode(message)
        if self._backlog or not self._try_control(data):
            if not self._backlog:
                self._epoll.modify(self._control, select.EPOLLIN | select.EPOLLOUT)
            self._backlog.append(data)

    def _try_control(self, data: bytes) -> bool:
        try:
            self._control.send(data)
        except BlockingIOError:
            return False
        return True

    def _drain_backlog(self) -> None:
        sent = 0
        for data in self._backlog:
            if not self._try_control(data):
                break
            sent += 1
        if sent:
            del self._backlog[:sent]
            if not self._backlog:
                self._epoll.modify(self._control, select.EPOLLIN)
                self._note_told()

    def _read_control(self) -> None:
        until = time.monotonic() + _CONTROL_TIME
        for _ in range(_CONTROL_PER_TURN):
            if time.monotonic() > until:
                return
            try:
                data = self._control.recv(channel.MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            self._hear.done += 1
            try:
                message = channel.decode_from_core(data)
            except ChannelError as error:
                if self._heeds_core:
                    _log.error("message of the core: %s", error)
                continue
            if not self._heeds_core and not isinstance(message, channel.Hello):
                continue
            match message:
                case channel.State():
                    self._apply(message)
                case channel.Flow():
                    self._add_flow(message)
                case channel.Unflow(conn, key):
                    self._find(conn)
                    if key == channel.ALL_FLOWS:
                        self._flows.remove_all(conn)
                    else:
                        self._flows.remove(conn, key)
                case channel.Hello():
                    self._greet(message)
                case channel.FramesOut():
                    _log.error("frames of the core on the control socket")

    def _apply(self, state: channel.State) -> None:
        peer = self._find(state.conn)
        if peer is None or peer.connection is None:
            return  # it has closed meanwhile, and the core is being told
        connection = peer.connection
        try:
            if not connection.apply(state, self.now):
                return
        except ConnectionEnds as error:
            self._close(peer, str(error))
            return
        except TLSError as error:
            self._close(peer, str(error), error.alert)
            return
        if self._answered(state.conn):
            self._login.done += 1
        if connection.closing:
            self._close(peer, connection.closing)
            return
        if connection.mode is not Mode.HTTP:
            self._strangers.pop(state.conn, None)
        self._work(peer)

    def _add_flow(self, flow: channel.Flow) -> None:
        peer = self._find(flow.conn)
        target = self._target(flow.to_conn)
        # Never back to where it came from: a connection that is being read must not be saved.
        if peer is None or target is None or flow.conn == flow.to_conn:
            return
        if peer.connection is not None:
            self._flows.add(flow.conn, flow.key, flow.to_conn, target, self._epoch)

    def _greet(self, hello: channel.Hello) -> None:
        """A core serves: tell it all there is, and ask again what was not answered."""
        self._heeds_core = hello.version == channel.VERSION
        if not self._heeds_core:
            _log.error(
                "the core speaks version %d of the channel, this edge %d: neither heeds the other"
                " until both are of one version",
                hello.version,
                channel.VERSION,
            )
            self._say(channel.Adopted(channel.VERSION))
            return
        self._epoch = hello.epoch
        self._greetings += 1
        self._told_all = 0
        # Those that an earlier core said hold until this one has heard all.
        self._old_flows_end = 0.0
        if self._checkpoint.epoch == hello.epoch:
            pairs = self._checkpoint.directory()
            # Those that are in no slot.
            pairs += [
                (peer.conn, peer.connection.number)
                for peer in self._peers.values()
                if peer.connection is not None and peer.connection.slot is None
            ]
            for at in range(0, len(pairs), channel.MAX_PRESENT):
                self._say(channel.Present(tuple(pairs[at : at + channel.MAX_PRESENT])))
            self._end_replay()
        else:
            self._chores.append(self._replay(self._greetings))

    def _replay(self, greeting: int) -> Chore:
        for conn in [*self._peers, *self._sleeping]:
            while self._backlog:
                yield True
            peer = self._find(conn)
            if self._greetings != greeting:
                return
            connection = peer.connection if peer is not None else None
            if connection is not None and not connection.closing:
                self._say(connection.replay())
                counts = connection.counts()
                if any((*counts[:4], *counts[4])):
                    self._say(channel.Counts(conn, *counts))
            yield False
        for conn, key in self._flows:
            while self._backlog:
                yield True
            if self._greetings != greeting:
                return
            self._say(channel.FlowSeen(conn, key))
            yield False
        self._end_replay()

    def _end_replay(self) -> None:
        self._say(channel.Replayed(self._epoch))
        self._totals_told = None
        self._old_flows_end = self.now + _OLD_FLOWS_TIMEOUT
        self._told_all = self._epoch
        self._note_told()
        for conn in list(self._asked):
            peer = self._peers[conn]
            if peer.connection is not None:
                self._ask(peer.connection)

    def _note_told(self) -> None:
        """A successor need not tell again what the core can read."""
        if self._told_all and not self._backlog:
            self._checkpoint.epoch, self._told_all = self._told_all, 0

    def _read_frames(self) -> None:
        until = time.monotonic() + _CONTROL_TIME
        for _ in range(_FRAMES_PER_TURN):
            if not self._hand_out(until):
                return
            try:
                data = self._frames.recv(channel.MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            self._hear.done += 1
            try:
                message = channel.decode_from_core(data)
                if not isinstance(message, channel.FramesOut):
                    raise ChannelError(f"{type(message).__name__} on the frames socket")
                self._blocks_count = channel.count_blocks(message.blocks)
            except ChannelError as error:
                _log.error("frames of the core: %s", error)
                continue
            self._blocks = memoryview(bytearray(b"".join((b"\0\0\0\0", message.blocks, b"\0"))))
            self._without = sorted(message.conns, key=self._is_awake)
        self._hand_out(until)

    def _hand_out(self, until: float) -> bool:
        """Give frames of the core to those who are yet without them; whether all have them now.

        First those who are awake.  A broadcast in a large hub wakes thousands of sleepers, and
        what others have to do does not wait for that: the rest of them get it in later turns.
        """
        batch, count = self._blocks, self._blocks_count
        while self._without:
            conn = self._without.pop()
            slept = conn in self._sleeping
            peer = self._find(conn)
            if peer is None or peer.connection is None:
                self._turn.drops[EdgeDrop.NO_CONNECTION] += count
                continue
            # Each time: who has not room for all of it cuts it.
            batch[:4] = channel.U32.pack(count)
            octets = len(batch) - 5 - 4 * count
            peer.connection.deliver(batch, 0, len(batch) - 1, count, octets, self.now)
            if slept and time.monotonic() > until:
                break
        return not self._without

    def _is_awake(self, conn: int) -> bool:
        return conn not in self._sleeping


def _key(conn: int) -> bytes:
    """Under which the watchdog has the connection's descriptor."""
    return conn.to_bytes(8, "big")


def _queued(peer: Peer) -> int:
    """How many bytes are kept for a connection that has been opened."""
    assert peer.connection is not None  # it is open
    rx, tx = peer.connection.rx, peer.connection.tx
    return rx.end - rx.start + tx.end - tx.start


def _network(host: str) -> str:
    """What connections are counted by: an IPv4 address, or the /64 of an IPv6 address, all of
    which one stranger has."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex()
