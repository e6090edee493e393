"""The data plane on Windows: sockets, TLS by OpenSSL, and the same connections and flows.

Strategy: it lives in one process and one loop with the core, which it tells and hears through
queues (`LocalLink`).  What is read, cut, known and forwarded is `pkvpn.edge.connection`'s, as
everywhere; a connection ends with the process, and its client comes back by its session key.
"""

from __future__ import annotations

import logging
import mmap
import random
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pkvpn import channel
from pkvpn.channel import EdgeDrop, Mode, Refusal
from pkvpn.core.link import Link
from pkvpn.edge.checkpoint import Identity
from pkvpn.edge.connection import (
    BrokenProtocol,
    Connection,
    ConnectionEnds,
    Target,
    Turn,
    scratch_size,
)
from pkvpn.edge.flows import Flows
from pkvpn.edge.handshake import TLS12_CIPHERS, Handshake, HandshakeError, KeyLog, OpenSSLRecords
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import Alert, TLSError

_log = logging.getLogger("pkvpn.edge")

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_TICK = 0.4
_COUNTS_INTERVAL = 2.0
_FLOWS_SEEN_INTERVAL = 10.0
_LINGER = 2.0
_ANSWER_TIMEOUT = 60.0
_ACCEPTS_PER_TURN = 4
# Messages of one kind that the core takes in one turn.
_READ_AT_ONCE = 64


class LocalLink(Link):
    """The channel between this core and this edge, which share a loop."""

    def __init__(self) -> None:
        (control, self._ring_control), (frames, self._ring_frames) = (
            socket.socketpair(),
            socket.socketpair(),
        )
        super().__init__(1, control.detach(), frames.detach())
        self._up: deque[bytes] = deque()
        self._frames_up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()  # of the core, for the edge
        self.frames_down: deque[bytes] = deque()

    @property
    def has_news(self) -> bool:
        """Something waits for either side."""
        return bool(self._up or self._frames_up or self.down or self.frames_down)

    def say(self, message: channel.FromEdge) -> None:
        """To the core."""
        if not self._up:
            self._ring_control.send(b"!")
        self._up.append(channel.encode(message))

    def show(self, message: channel.Frames) -> None:
        """Frames, to the core."""
        if not self._frames_up:
            self._ring_frames.send(b"!")
        self._frames_up.append(channel.encode(message))

    def read_control(self) -> Iterator[bytes]:
        return _take(self._up, self.control)

    def read_frames(self) -> Iterator[bytes]:
        return _take(self._frames_up, self.frames)

    def flush(self, epoch: int) -> None:
        """All of it: the edge reads before the core goes on."""
        self.down.extend(self._backlog)
        self._backlog.clear()
        self._backlog_size = 0
        while self.outbox:
            self.frames_down.append(self.outbox.first())
            self.outbox.sent()

    def wanted(self) -> tuple[int, int]:
        return _READ, _READ

    def close(self) -> None:
        super().close()
        self._ring_control.close()
        self._ring_frames.close()


def _take(waiting: deque[bytes], bell: socket.socket) -> Iterator[bytes]:
    """What the core takes now.  It is rung for again as long as something is left."""
    for _ in range(min(len(waiting), _READ_AT_ONCE)):
        data = waiting.popleft()
        if not waiting:
            bell.recv(16)
        yield data


class _NoKeyLog(KeyLog):
    """Nobody asks for the secrets: OpenSSL keeps the records."""

    def __init__(self) -> None:
        pass

    def empty(self) -> None:
        pass

    def read(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class EdgeSettings:
    """Times in seconds, sizes in bytes."""

    certificate: str
    key: str
    # select() of Windows' Python takes 512 sockets; some are ours.
    max_connections: int = 480
    max_per_address: int = 0  # 0: no limit
    login_timeout: float = 30.0
    login_bytes: int = 65536
    receive_ring: int = 262144
    send_ring: int = 524288


class Peer:
    """A client's socket and what has become of it."""

    def __init__(self, sock: socket.socket, conn: int, handshake: Handshake, now: float) -> None:
        self.sock = sock
        self.conn = conn
        self.handshake: Handshake | None = handshake
        self.accepted_at = now
        self.address = ""
        self.peer = self.local = ""
        self.unsent = b""
        self.connection: Connection | None = None
        self.interest = _READ
        self.eof = self.shut = False
        self.deadline = 0.0


class Edge:
    """All clients of this process."""

    def __init__(
        self,
        listeners: list[int],
        link: LocalLink,
        settings: EdgeSettings,
        selector: selectors.BaseSelector,
    ) -> None:
        """Raises OSError if certificate and key are of no use."""
        self.settings = settings
        self.accepted = 0
        self.answered = 0
        self.now = time.monotonic()
        self._started = self.now
        self._counter = 0
        self._link = link
        self._selector = selector
        self._listeners = [socket.socket(fileno=fd) for fd in listeners]
        self._accepting = False
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls.set_ciphers(TLS12_CIPHERS)
        self._tls.num_tickets = 0
        self._tls.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
        self._tls.load_cert_chain(settings.certificate, settings.key)
        self._turn = Turn(memoryview(mmap.mmap(-1, scratch_size(settings.receive_ring))))
        self._flows: Flows[Target] = Flows()
        self._peers: dict[int, Peer] = {}
        self._per_address: dict[str, int] = {}
        # Of whom the core has a request: since when.
        self.asked: dict[int, float] = {}
        self._counted: dict[int, tuple[int, int, int, int, tuple[int, ...]]] = {}
        self._epoch = 0
        self._next_tick = self._next_counts = self.now
        self._next_seen = self.now + _FLOWS_SEEN_INTERVAL

    @property
    def forwarded(self) -> int:
        return self._turn.forwarded

    def close(self) -> None:
        """Say goodbye to everybody, as far as a moment allows."""
        for peer in list(self._peers.values()):
            self._end(peer, "service stops")
            self._gone(peer, "service stops")
        for listener in self._listeners:
            listener.close()

    # --- a turn -----------------------------------------------------------------------------------

    def serve(self, events: list[tuple[selectors.SelectorKey, int]], now: float) -> None:
        """What came of the selector; to be followed by `hear`."""
        self.now = now
        for key, mask in events:
            if isinstance(key.data, Peer):
                self._ready(key.data, mask)
            elif key.fileobj in self._listeners:
                self._accept(key.fileobj)
        if now >= self._next_tick:
            self._next_tick = now + _TICK
            self._tick()

    def hear(self) -> None:
        """What the core has said, and send what came of all."""
        while self._link.down:
            self._hear(self._link.down.popleft())
        while self._link.frames_down:
            self._deliver(self._link.frames_down.popleft())
        touched, self._turn.touched = self._turn.touched, []
        for connection in touched:
            connection.touched = False
            peer = self._peers.get(connection.conn)
            if peer is not None:
                self._flush(peer)

    def _tick(self) -> None:
        now = self.now
        wanted = len(self._peers) < self.settings.max_connections
        if wanted != self._accepting:
            self._accepting = wanted
            for listener in self._listeners:
                if wanted:
                    self._selector.register(listener, _READ)
                else:
                    self._selector.unregister(listener)
        for peer in list(self._peers.values()):
            self._expire(peer)
        if now >= self._next_counts:
            self._next_counts = now + _COUNTS_INTERVAL
            for peer in self._peers.values():
                if peer.connection is not None:
                    counts = peer.connection.counts()
                    if self._counted.get(peer.conn) != counts:
                        self._counted[peer.conn] = counts
                        self._link.say(channel.Counts(peer.conn, *counts))
            turn = self._turn
            self._link.say(
                channel.Totals(
                    tuple(turn.drops[why] for why in EdgeDrop),
                    tuple(turn.refusals[why] for why in Refusal),
                )
            )
        if now >= self._next_seen:
            self._next_seen = now + _FLOWS_SEEN_INTERVAL
            for peer in self._peers.values():
                if peer.connection is not None:
                    for key in peer.connection.seen:
                        self._link.say(channel.FlowSeen(peer.conn, key))
                    peer.connection.seen.clear()

    def _expire(self, peer: Peer) -> None:
        connection = peer.connection
        if peer.deadline:
            if self.now >= peer.deadline:
                self._gone(peer, "closed")
            return
        if connection is None or connection.mode is Mode.HTTP:
            limit = peer.accepted_at + self.settings.login_timeout
            if connection is not None and connection.request:
                limit += _ANSWER_TIMEOUT  # it is the core that is late, not the client
            if self.now >= limit:
                self._turn.refusals[Refusal.SLOW_LOGIN] += 1
                self._end(peer, "login takes too long")
            return
        try:
            connection.expire(self.now, random.random)
        except ConnectionEnds as error:
            self._close(peer, str(error))

    # --- one connection ---------------------------------------------------------------------------

    def _accept(self, listener: object) -> None:
        assert isinstance(listener, socket.socket)
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, address = listener.accept()
            except OSError:
                return  # nobody, or he has left again
            self.accepted += 1
            host, limit = address[0], self.settings.max_per_address
            full = len(self._peers) >= self.settings.max_connections
            if full or (limit and self._per_address.get(host, 0) >= limit):
                self._turn.refusals[Refusal.NO_PLACE if full else Refusal.ADDRESS] += 1
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._counter += 1
            if self._counter == channel.CONNS_PER_START:
                self._started, self._counter = self.now, 1
            conn = channel.conn_id(1, self._started, self._counter)
            peer = Peer(sock, conn, Handshake(self._tls, _NoKeyLog()), self.now)
            local = sock.getsockname()
            peer.address = host
            peer.peer, peer.local = f"{host}:{address[1]}", f"{local[0]}:{local[1]}"
            self._peers[conn] = peer
            self._per_address[host] = self._per_address.get(host, 0) + 1
            self._selector.register(sock, _READ, peer)

    def _ready(self, peer: Peer, event: int) -> None:
        if peer.conn not in self._peers:
            return  # gone earlier in this very turn
        try:
            if peer.handshake is not None:
                self._shake(peer, peer.handshake, event)
                return
            if event & _WRITE:
                self._flush(peer)
            if event & _READ and peer.conn in self._peers and peer.interest & _READ:
                self._read(peer)
        except OSError as error:
            self._gone(peer, error.strerror or str(error))

    def _shake(self, peer: Peer, handshake: Handshake, event: int) -> None:
        if event & _READ:
            data = peer.sock.recv(16384)
            if not data:
                self._gone(peer, "closed in the handshake")
                return
            try:
                peer.unsent += handshake.feed(data)
            except HandshakeError as error:
                self._turn.refusals[Refusal.HANDSHAKE] += 1
                _log.info("handshake with %s: %s", peer.peer, error)
                peer.unsent += handshake.alert()
                self._send_unsent(peer)
                self._gone(peer, str(error))
                return
        self._send_unsent(peer)
        if handshake.done:
            self._open(peer, handshake)

    def _send_unsent(self, peer: Peer) -> None:
        if peer.unsent:
            try:
                peer.unsent = peer.unsent[peer.sock.send(peer.unsent) :]
            except BlockingIOError:
                pass
        self._watch(peer, _READ | (_WRITE if peer.unsent else 0))

    def _open(self, peer: Peer, handshake: Handshake) -> None:
        """The handshake is done: its records go on with OpenSSL."""
        settings = self.settings
        rx = Ring(memoryview(mmap.mmap(-1, settings.receive_ring)), 0, 0, 0)
        tx = Ring(memoryview(mmap.mmap(-1, settings.send_ring)), 0, 0, 0)
        tx.append(peer.unsent)
        records = OpenSSLRecords(rx, tx, handshake)
        identity = Identity(
            peer.conn, 0, peer.accepted_at, 0, peer.peer, peer.local,
            handshake.describe(records.kind),
        )  # fmt: skip
        peer.connection = Connection(
            identity, records, rx, tx, turn=self._turn, flows=self._flows.table(peer.conn),
            slot=None, login_bytes=settings.login_bytes, now=self.now,
        )  # fmt: skip
        peer.handshake, peer.unsent = None, b""
        self._link.say(channel.Opened(peer.conn, peer.peer, peer.local, identity.tls))
        self._work(peer, peer.connection)
        self._flush(peer)

    def _read(self, peer: Peer) -> None:
        connection = peer.connection
        assert connection is not None  # the caller looked
        if connection.closing:
            if not peer.sock.recv(65536):
                peer.eof = True
                self._flush(peer)
            return
        piece = connection.rx.free()
        if connection.request or not piece:
            self._watch(peer, peer.interest & ~_READ)
            return
        if connection.mode is Mode.HTTP:
            # What is too much for a login has no need of memory; one byte more ends it.
            piece = piece[: max(1, self.settings.login_bytes + 1 - connection.rx.end)]
        try:
            size = peer.sock.recv_into(piece)
        except BlockingIOError:
            return
        if not size:
            peer.eof = True
            self._close(peer, "client left")
            return
        connection.rx.put(size)
        self._work(peer, connection)

    def _work(self, peer: Peer, connection: Connection) -> None:
        """Go on with what lies in the receive ring."""
        asked = bool(connection.request)
        ends, alert = "", Alert.CLOSE_NOTIFY
        try:
            connection.receive(self.now)
        except ConnectionEnds as error:
            ends = str(error)
            self._turn.refusals[Refusal.GARBAGE] += isinstance(error, BrokenProtocol)
        except TLSError as error:
            ends, alert = str(error), error.alert
            self._turn.refusals[Refusal.GARBAGE] += 1
        for blocks in connection.take_misses():
            self._link.show(channel.Frames(connection.conn, blocks))
        if ends:
            self._close(peer, ends, alert)
            return
        if connection.request and not asked:
            self.asked[peer.conn] = self.now
            self._link.say(channel.Request(peer.conn, connection.number + 1, connection.request))
        connection.save()
        if not connection.touched:
            self._watch_connection(peer)

    def _flush(self, peer: Peer) -> None:
        """Send what is sealed; the end of closing comes here too."""
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
        self._watch_connection(peer)

    def _watch_connection(self, peer: Peer) -> None:
        connection = peer.connection
        if connection is None or peer.conn not in self._peers:
            return
        reads = not peer.eof if connection.closing else connection.wants_bytes
        writes = connection.tx.start < connection.tx.end
        self._watch(peer, (_READ if reads else 0) | (_WRITE if writes else 0))

    def _watch(self, peer: Peer, interest: int) -> None:
        if interest == peer.interest:
            return
        if not interest:
            self._selector.unregister(peer.sock)
        elif not peer.interest:
            self._selector.register(peer.sock, interest, peer)
        else:
            self._selector.modify(peer.sock, interest, peer)
        peer.interest = interest

    # --- the end of a connection ------------------------------------------------------------------

    def _end(self, peer: Peer, why: str) -> None:
        """Close a connection in whatever state it is."""
        if peer.connection is None:
            self._gone(peer, why)
        else:
            self._close(peer, why)
            self._flush(peer)

    def _close(self, peer: Peer, why: str, alert: int = Alert.CLOSE_NOTIFY) -> None:
        """Begin to close: goodbye, flush, shut, read until the end or the deadline, forget."""
        connection = peer.connection
        assert connection is not None  # only one that is open is closed
        if connection.closing and peer.deadline:
            return
        connection.close(why, alert)
        self._tell_closed(peer, connection, connection.closing)
        peer.deadline = self.now + _LINGER
        self._watch_connection(peer)

    def _tell_closed(self, peer: Peer, connection: Connection, why: str) -> None:
        self._flows.close(peer.conn)
        self.asked.pop(peer.conn, None)
        self._counted.pop(peer.conn, None)
        self._link.say(channel.Counts(peer.conn, *connection.counts()))
        self._link.say(channel.Closed(peer.conn, why[:200]))

    def _shut(self, peer: Peer) -> None:
        """Everything is sent: say so to TCP, and wait for the client to say the same."""
        if not peer.shut:
            peer.shut = True
            try:
                peer.sock.shutdown(socket.SHUT_WR)
            except OSError:
                peer.eof = True
        if peer.eof:
            self._gone(peer, "closed")
        else:
            self._watch_connection(peer)

    def _gone(self, peer: Peer, why: str) -> None:
        """The last thing that happens to a connection."""
        if self._peers.pop(peer.conn, None) is None:
            return
        connection = peer.connection
        if connection is not None:
            if not peer.deadline:
                self._tell_closed(peer, connection, why)
            connection.closing, connection.mode = connection.closing or why, Mode.CLOSING
        self._watch(peer, 0)
        left = self._per_address[peer.address] - 1
        if left:
            self._per_address[peer.address] = left
        else:
            del self._per_address[peer.address]
        peer.sock.close()

    # --- the core ---------------------------------------------------------------------------------

    def _hear(self, data: bytes) -> None:
        message = channel.decode_from_core(data)
        match message:
            case channel.State():
                self._apply(message)
            case channel.Flow(conn, key, to_conn):
                source, to = self._peers.get(conn), self._peers.get(to_conn)
                target = to.connection if to is not None else None
                # Never back to where it came from.
                if source is None or target is None or target.closing or conn == to_conn:
                    return
                self._flows.add(conn, key, to_conn, target, self._epoch)
            case channel.Unflow(conn, key):
                if key == channel.ALL_FLOWS:
                    self._flows.remove_all(conn)
                else:
                    self._flows.remove(conn, key)
            case channel.Hello():
                # It is born with us: there is nothing to tell.
                self._epoch = message.epoch
                self._link.say(channel.Replayed(self._epoch))

    def _apply(self, state: channel.State) -> None:
        peer = self._peers.get(state.conn)
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
        self.answered += self.asked.pop(state.conn, None) is not None
        if connection.closing:
            self._close(peer, connection.closing)
        else:
            self._work(peer, connection)

    def _deliver(self, data: bytes) -> None:
        message = channel.decode_from_core(data)
        assert isinstance(message, channel.FramesOut)  # nothing else is said there
        count, size = channel.count_blocks(message.blocks), len(message.blocks)
        batch = memoryview(bytearray(b"".join((b"\0\0\0\0", message.blocks, b"\0"))))
        for conn in message.conns:
            peer = self._peers.get(conn)
            if peer is None or peer.connection is None:
                self._turn.drops[EdgeDrop.NO_CONNECTION] += count
                continue
            # Each time: who has not room for all of it cuts it.
            batch[:4] = channel.U32.pack(count)
            peer.connection.deliver(batch, 0, 4 + size, count, size - 4 * count, self.now)
