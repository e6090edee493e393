"""The shell of the core: sockets, time and randomness around hubs, sessions and logins.

Strategy: one loop, one thread; `admin.StoreThread` is the only other one, and it waits for the disk
so that this one does not.  Everything is decided by the pure parts; here their decisions become
messages to the edges.

What a dead core leaves: the edges have every connection with its `Blob`, the database has the
accounts, the watchdog the sockets with what is queued in them.  A new core says Hello, hears the
replays, and serves logins when it knows what there is, or after ``replay_timeout``.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import selectors
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pkvpn import channel
from pkvpn.channel import (
    ALL_FLOWS,
    Adopted,
    ChannelError,
    Closed,
    Counts,
    EdgeDrop,
    Flow,
    FlowSeen,
    Frames,
    Mode,
    Opened,
    Present,
    Refusal,
    Replay,
    Replayed,
    Request,
    State,
    Totals,
    Unflow,
)
from pkvpn.core import blob as blobs
from pkvpn.core.accounts import Accounts, Change
from pkvpn.core.admin import Calls, Server, StoreThread, live_in_loop
from pkvpn.core.blob import Blob, BlobError, Stage
from pkvpn.core.bridge import Tap
from pkvpn.core.control import Control, Page, Refused, SessionName, page_key
from pkvpn.core.flows import KnownFlow
from pkvpn.core.hub import Drop, Hub, Port, Run
from pkvpn.core.link import Link
from pkvpn.core.login import CANARY_HUB, CANARY_HUB_ID, RANDOM_SIZE, LoginDesk, Outcome, address_key
from pkvpn.core.poison import QUARANTINE, Mark, Quarantine, hub_key
from pkvpn.core.poison import SIZE as MARK_SIZE
from pkvpn.core.rehearsal import rehearse
from pkvpn.core.session import WEEK, Session, SessionKeys, Sessions
from pkvpn.core.settings import CoreSettings
from pkvpn.core.store import Store, StoreError, session_secret
from pkvpn.protocol.messages import Direction
from pkvpn.watchdog.control import Answer, ControlError, ControlServer
from pkvpn.watchdog.lifeline import next_moment

if TYPE_CHECKING:
    from pkvpn.watchdog.child import Child

_log = logging.getLogger("pkvpn.core")

_CANARY_SECRET_SIZE = 32

# The key under which the watchdog keeps the memory of `poison`.
_MARK_KEY = b"core mark"

# Frames of connections that were not replayed yet.
_MAX_EARLY_FRAMES = 4 << 20
# Of one edge; a login is a millisecond or two.
_REQUESTS_PER_TURN = 8
# Requests that wait until this core knows what there is.
_MAX_EARLY_REQUESTS = 4096
# Connections that one edge may speak of, and flows that it may name before it has told all: more
# than any has.  Edges read what strangers send: one that was taken over must not fill our memory.
_MAX_CONNECTIONS = 1 << 18
_MAX_OLD_FLOWS = 1 << 20
# How long after a replay an edge may still name flows that an earlier core has taught it.
_OLD_FLOWS_TIMEOUT = 2.0

# How long the end waits for the store thread, which may wait for the disk.
_END_TIMEOUT = 2.0

_TICK = 1.0  # with each fifth beat by default
_AGEING_TICK = 5.0

_MODES = {
    Direction.BOTH: Mode.BLOCKS,
    Direction.TO_CLIENT: Mode.BLOCKS_OUT,
    Direction.TO_SERVER: Mode.BLOCKS_IN,
}


class Connection:
    """One TCP connection, as far as the core has to know it."""

    __slots__ = (
        "answer", "blob", "conn", "hub", "link", "local", "number", "peer", "port", "session", "tls"
    )  # fmt: skip

    def __init__(self, conn: int, link: Link, peer: str, local: str, tls: str) -> None:
        self.conn = conn
        self.link = link
        self.peer = peer
        self.local = local
        self.tls = tls
        self.number = 0  # of the last State
        self.answer: State | None = None  # the last State; None: an earlier core sent it
        self.blob = Blob()
        # The port that its frames come from; None: not in a session.
        self.session: Session | None = None
        self.hub: Hub | None = None
        self.port: Port | None = None

    @property
    def id(self) -> str:
        return f"{self.conn:016x}"

    @property
    def records(self) -> str:
        """Whose TLS record layer it has: "own" or "openssl"."""
        # An edge says "TLSv1.3 own TLS_AES_256_GCM_SHA384 8d51c3c0a1b2c3d4".
        return self.tls.split(" ")[1] if " " in self.tls else "unknown"

    @property
    def certificate(self) -> str:
        """The beginning of the fingerprint of what it was shown; "" if the edge did not say."""
        words = self.tls.split(" ")
        return words[3] if len(words) > 3 else ""


class Core:
    """Everything that a core is.  `run` is its life; the `Live` methods are for `Control`."""

    def __init__(
        self,
        child: Child,
        settings: CoreSettings,
        store: Store,
        accounts: Accounts,
        keys: SessionKeys,
        links: list[Link] | None = None,
        marks: tuple[Mark, Quarantine] | None = None,
    ) -> None:
        """``links`` and ``marks``: where there are no descriptors of the watchdog's for them."""
        now = time.monotonic()
        self._child = child
        self._settings = settings
        self._epoch = time.monotonic_ns()
        self._started_at = now
        self._store = store
        self._accounts = accounts
        self._sessions = Sessions(
            keys, timeout=settings.session_timeout, started_at=now, week=_week()
        )
        self._desk = LoginDesk(
            self._accounts, self._sessions, keys, settings, _canary_password(child)
        )
        self._hubs: dict[int, Hub] = {
            CANARY_HUB_ID: Hub(CANARY_HUB, reflects=True, storm_frames=settings.storm_frames)
        }
        self._past_counts: dict[int, tuple[int, ...]] = {}  # of sessions that are over, by hub
        self._ports: dict[int, Port] = {}  # of sessions, by their number
        self._taps: dict[str, tuple[Tap, Hub, Port]] = {}
        self._connections: dict[int, Connection] = {}
        self._early_frames: list[tuple[int, bytes]] = []
        self._early_size = 0
        self._early_requests: list[tuple[Link, Request]] = []
        self._serving = False
        self._lost: dict[str, int] = {}  # frames and requests that belong to no port
        self._switched = child.duty("switch")
        self._logged_in = child.duty("login")
        self._mark, self._quarantine = marks or _take_mark(child)
        self._desk.kept_out = self._quarantine.holds
        self._poisoned, hub_of_deaths = self._mark.judge(now)
        if hub_of_deaths in accounts.hubs:
            self._keep_out_hub(accounts.hubs[hub_of_deaths].name, now)
        self._calls = Calls()
        self._links = links or _open_links(child.held("channel:core"))
        self._selector = selectors.DefaultSelector()
        self._tick_at = self._ageing_at = now

    # --- life

    def run(self) -> None:
        """Until the watchdog asks for the end."""
        listener = os.dup(self._child.held("admin")[0])
        self.live(lambda selector, answer: ControlServer(listener, selector, answer), self.turn)

    def live(
        self,
        serve: Callable[[selectors.BaseSelector, Answer], Server],
        turn: Callable[[], None],
    ) -> None:
        """`run`, with a server for operators that ``serve`` makes, and turns of the caller's."""
        control = Control(self._store, live_in_loop(self, self._calls), self._accounts)
        duty = self._child.duty("store")

        def answer(verb: str, args: dict[str, Any]) -> Any:
            """In the store thread."""
            duty.waiting_since = time.monotonic()
            try:
                return control.answer(verb, args)
            except Refused as refused:
                raise ControlError(str(refused)) from refused
            except Exception as error:
                _log.exception("%s failed", verb)
                raise ControlError(f"{verb}: {type(error).__name__}: {error}") from error
            finally:
                duty.done += 1
                duty.waiting_since = 0.0

        thread = StoreThread(self._store, control, lambda selector: serve(selector, answer))
        try:
            self.begin()
            self._child.ready()
            while not self._child.stopping:
                # Operators wait for clients: two threads take turns of milliseconds.
                if self._serving and not thread.ident:
                    thread.start()
                turn()
                if thread.failure is not None:
                    raise thread.failure
        finally:
            if thread.ident:
                thread.ask_to_end()
                # It may be waiting for something that only this loop can do.
                deadline = time.monotonic() + _END_TIMEOUT
                while thread.is_alive() and time.monotonic() < deadline:
                    self._calls.run()
                    thread.join(0.01)
            self.close()

    def begin(self) -> None:
        """Greet the edges."""
        self._reconcile(time.monotonic())
        for why in self._settings.refused_bridges().values():
            _log.error("refused: %s", why)
        self._selector.register(self._child, selectors.EVENT_READ, self._take_orders)
        self._selector.register(self._calls, selectors.EVENT_READ, self._take_calls)
        for link in self._links:
            self._selector.register(link.control, selectors.EVENT_READ, self._control_of(link))
            self._selector.register(link.frames, selectors.EVENT_READ, self._frames_of(link))
            link.greet(self._epoch)
            self._flush(link)

    def turn(self, longest: float = math.inf) -> None:
        """Wait for something to do, or for the next beat, or ``longest``, and do it."""
        now = time.monotonic()
        if now >= self._tick_at:
            self._tick(now)
            self._tick_at = next_moment(now, _TICK)
            if now >= self._ageing_at:
                self._age(now)
                self._ageing_at = now + _AGEING_TICK
            self._flush_all()
        timeout = min(self._child.turn(now), self._tick_at - now, longest)
        if not self._serving:
            timeout = min(timeout, 0.05)
        events = self._selector.select(max(0.0, timeout))
        now = time.monotonic()
        for key, mask in events:
            if mask & selectors.EVENT_READ:
                key.data(now)
        if not self._serving:
            self._begin_to_serve(now)
        if events:
            self._flush_all()

    def close(self) -> None:
        """Give back what is ours; what is held for us stays open."""
        self._selector.close()
        self._calls.close()
        self._mark.close()
        self._quarantine.close()
        for link in self._links:
            link.close()

    def _take_orders(self, _now: float) -> None:
        self._child.receive()

    def _take_calls(self, _now: float) -> None:
        self._calls.run()

    def _control_of(self, link: Link) -> Any:
        def read(now: float) -> None:
            last = self._logged_in.done + _REQUESTS_PER_TURN
            for data in link.read_control():
                self._hear(link, data, now)
                if self._logged_in.done >= last:
                    return  # the others wait in the socket: frames are not to wait for logins

        return read

    def _frames_of(self, link: Link) -> Any:
        def read(now: float) -> None:
            for data in link.read_frames():
                self._hear(link, data, now)

        return read

    def _flush_all(self) -> None:
        for link in self._links:
            self._flush(link)

    def _flush(self, link: Link) -> None:
        link.flush(self._epoch)
        for sock, wanted in zip((link.control, link.frames), link.wanted(), strict=True):
            key = self._selector.get_key(sock)
            if key.events != wanted:
                self._selector.modify(sock, wanted, key.data)

    # --- what edges say

    def _hear(self, link: Link, data: bytes, now: float) -> None:
        try:
            message = channel.decode_from_edge(data)
        except ChannelError as error:
            if link.heeded:
                _log.error("edge-%d said what is no message: %s", link.index, error)
            return
        if not link.heeded and not isinstance(message, Adopted):
            return
        if (
            not isinstance(message, Replayed | Adopted | Present | Totals)
            and channel.edge_of(message.conn) != link.index
        ):
            # Edges read what strangers send: one that was taken over must not reach further.
            _log.error("edge-%d speaks of connection %#x of another", link.index, message.conn)
            return
        match message:
            case Frames(conn, blocks):
                self._switched.done += 1
                self._hear_frames(conn, bytes(blocks), now)
            case Counts():
                self._hear_counts(message)
            case Totals():
                link.totals = message
            case FlowSeen(conn, key):
                self._hear_flow(link, conn, key, now)
            case Opened(conn, peer, local, tls):
                if conn not in self._connections:
                    self._meet(Connection(conn, link, peer, local, tls))
                _see(link, conn)
            case Request():
                self._logged_in.done += 1
                self._hear_request(link, message, now)
            case Closed(conn, why):
                link.present.discard(conn)
                if why == channel.POISONED and conn in self._connections:
                    self._keep_out(self._connections[conn], "edges died of what it sent", now)
                self._forget(conn, why, now)
            case Replay():
                self._hear_replay(link, message, now)
            case Present(pairs):
                for conn, number in pairs:
                    self._hear_present(link, conn, number)
            case Replayed(epoch):
                if epoch == self._epoch:
                    self._end_replay(link, now)
            case Adopted(version):
                link.heeded = version == channel.VERSION
                if link.heeded:
                    link.greet(self._epoch)
                else:
                    _log.error(
                        "edge-%d speaks version %d of the channel, this core %d: neither heeds the"
                        " other until both are of one version",
                        link.index,
                        version,
                        channel.VERSION,
                    )

    # --- requests

    def _hear_request(self, link: Link, request: Request, now: float) -> None:
        if not self._serving:
            if len(self._early_requests) < _MAX_EARLY_REQUESTS:
                self._early_requests.append((link, request))
            else:
                self._lose("requests before the replay")
            return
        connection = self._connections.get(request.conn)
        if connection is None:
            self._lose("requests of unknown connections")
            return
        if request.number <= connection.number:
            if connection.answer is not None:
                link.send(connection.answer)
            return
        # The edge counts what it has applied; a core that took over has that from the replay.
        connection.number = request.number - 1
        if request.conn == self._poisoned:
            _log.error("%s: closed: cores died of its requests", connection.peer)
            self._keep_out(connection, "cores died of a request", now)
            self._answer(connection, Outcome(close="cores died of it"))
            return
        if self._quarantine.holds(address_key(connection.peer), now):
            self._answer(connection, Outcome(close="in quarantine"))
            return
        self._mark.begin(request.conn, request.number)
        try:
            outcome = self._desk.answer(
                connection.blob,
                address_key(connection.peer),
                bytes(request.data),
                now,
                secrets.token_bytes(RANDOM_SIZE),
            )
        except Exception:  # noqa: BLE001  a stranger could repeat it: it costs one connection only
            _log.exception("%s: request %d", connection.peer, request.number)
            outcome = Outcome(close="internal error")
        if outcome.note:
            _log.log(_level(outcome.session), "%s: %s", connection.peer, outcome.note)
        if outcome.replaces is not None:
            self._end_session(outcome.replaces, "its client has logged in again", now)
        if outcome.session is not None:
            self._join(connection, outcome.session, connection.blob.direction, now)
        for conn in outcome.displaces:
            self._close(conn, "the client has made a new connection", now)
        if outcome.close:
            self._leave(connection, now)
        self._answer(connection, outcome)
        self._mark.end()

    def _keep_out(self, connection: Connection, why: str, now: float) -> None:
        """Whoever is behind it would go on with a new connection."""
        name = self._desk.user_of(connection.blob)
        if not name:
            host, local = (text.rpartition(":")[0] for text in (connection.peer, connection.local))
            if host == local or connection.hub is self._hubs[CANARY_HUB_ID]:
                return  # the canary, or somebody whom the address does not tell from it
            name = address_key(connection.peer)
        self._quarantine.put(name, why, now)
        _log.error(
            "%s is in quarantine for %d s: %s; `vpnserver quarantine lift %s` ends it",
            name, QUARANTINE, why, name,
        )  # fmt: skip

    def _keep_out_hub(self, name: str, now: float) -> None:
        """Its sessions stay, and its known flows, which the core does not see."""
        why = "cores died of its frames, whoever sent them"
        self._quarantine.put(hub_key(name), why, now)
        _log.error(
            "frames of hub %s that no flow knows are in quarantine for %d s: %s;"
            " `vpnserver quarantine lift %s` ends it",
            name, QUARANTINE, why, hub_key(name),
        )  # fmt: skip

    def _answer(self, connection: Connection, outcome: Outcome) -> None:
        blob = connection.blob
        mode, timeout = Mode.HTTP, 0.0
        if outcome.close:
            blob.stage = Stage.CLOSING
            mode = Mode.CLOSING
        elif blob.stage is Stage.IN_SESSION:
            mode, timeout = _MODES[blob.direction], self._settings.session_timeout
        self._send_state(
            connection,
            outcome.reply,
            mode,
            close=outcome.close,
            timeout=timeout,
            key_update=outcome.session is not None,
        )

    def _send_state(
        self,
        connection: Connection,
        reply: bytes,
        mode: Mode,
        *,
        close: str = "",
        timeout: float = 0.0,
        key_update: bool = False,
    ) -> None:
        connection.number += 1
        connection.answer = State(
            connection.conn,
            connection.number,
            reply,
            mode,
            close,
            timeout,
            key_update,
            connection.blob.encode(),
        )
        connection.link.send(connection.answer)

    # --- connections and sessions

    def _join(
        self, connection: Connection, session: Session, direction: Direction, now: float
    ) -> None:
        """The connection is part of the session from now on."""
        hub = self._hubs[session.hub_id]
        number = session.claim.session
        if number not in self._ports:
            self._ports[number] = hub.join(session.name, session, now)
        self._sessions.attach(session, connection.conn, direction)
        connection.session = session
        connection.hub = hub
        connection.port = self._ports[number]

    def _meet(self, connection: Connection) -> bool:
        """Know it from now on; False: its edge has too many."""
        link = connection.link
        if connection.conn not in self._connections:
            if link.connections >= _MAX_CONNECTIONS:
                self._lose("connections beyond all limits")
                return False
            link.connections += 1
        self._connections[connection.conn] = connection
        return True

    def _forget(self, conn: int, why: str, now: float) -> None:
        """The connection is gone."""
        connection = self._connections.pop(conn, None)
        if connection is None:
            return
        connection.link.connections -= 1
        if connection.session is not None:
            session = connection.session
            _log.log(
                _level(session), "%s: %s: connection ended: %s", connection.peer, session.name, why
            )
        self._leave(connection, now)

    def _leave(self, connection: Connection, now: float) -> None:
        session, hub = connection.session, connection.hub
        if session is None or hub is None:
            return
        connection.session = connection.hub = connection.port = None
        self._sessions.detach(connection.conn, now)
        self._end_flows(hub, connection)
        if not session.connections and session.hub_id == CANARY_HUB_ID:
            # It never comes back; and one more every few seconds would be many within T.
            self._end_session(session, "the canary has gone", now)

    def _end_flows(self, hub: Hub, connection: Connection) -> None:
        if hub.connection_gone(connection.conn):
            connection.link.send(Unflow(connection.conn, ALL_FLOWS))

    def _close(self, conn: int, why: str, now: float) -> None:
        """Have the edge close a connection; it says Closed when that is done."""
        connection = self._connections.get(conn)
        if connection is None or connection.blob.stage is Stage.CLOSING:
            return
        self._leave(connection, now)
        connection.blob.stage = Stage.CLOSING
        self._send_state(connection, b"", Mode.CLOSING, close=why)

    def _end_session(self, session: Session, why: str, now: float) -> None:
        """The session is over, and with it its connections."""
        _log.log(_level(session), "%s: session ended: %s", session.name, why)
        for conn in self._sessions.end(session, now):
            connection = self._connections[conn]
            hub = connection.hub
            connection.session = connection.hub = connection.port = None
            if hub is not None:
                self._end_flows(hub, connection)
            self._close(conn, why, now)
        self._leave_hub(session)

    def _leave_hub(self, session: Session) -> None:
        port = self._ports.pop(session.claim.session, None)
        hub = self._hubs.get(session.hub_id)
        if port is not None and hub is not None:
            past = self._past_counts.get(session.hub_id, ())
            self._past_counts[session.hub_id] = _sums(past, session.total_counts())
            hub.leave(port)
            self._withdraw(hub)

    # --- what there was before us

    def _hear_present(self, link: Link, conn: int, number: int) -> None:
        """A connection that this core has heard of before, from an edge that is gone."""
        _see(link, conn)
        connection = self._connections.get(conn)
        if (
            connection is not None
            and connection.link is link
            and connection.answer is not None
            and connection.number > number
        ):
            link.send(connection.answer)

    def _hear_replay(self, link: Link, replay: Replay, now: float) -> None:
        self._hear_present(link, replay.conn, replay.number)
        connection = self._connections.get(replay.conn)
        if connection is not None and connection.number >= replay.number:
            return
        if connection is not None:
            # An edge knows better than what an older replay in the queue said.
            self._leave(connection, now)
        connection = Connection(replay.conn, link, replay.peer, replay.local, replay.tls)
        if not self._meet(connection):
            return
        connection.number = replay.number
        try:
            connection.blob = blobs.decode(replay.blob)
        except BlobError as error:
            _log.error("%s: cannot be adopted: %s", replay.peer, error)
            self._close(replay.conn, "adopted in a state that cannot be read", now)
            return
        if connection.blob.stage is Stage.IN_SESSION:
            if replay.conn == self._poisoned:
                _log.error("%s: closed: cores died of its frames", replay.peer)
                self._keep_out(connection, "cores died of its frames", now)
                self._close(replay.conn, "cores died of it", now)
                return
            session = self._desk.restore(connection.blob, now)
            if session is None:
                self._close(replay.conn, "its session is not allowed any more", now)
                return
            self._join(connection, session, connection.blob.direction, now)

    def _end_replay(self, link: Link, now: float) -> None:
        for conn in [
            conn
            for conn, connection in self._connections.items()
            if connection.link is link and conn not in link.present
        ]:
            self._forget(conn, "the edge does not have it any more", now)
        link.replayed = True
        link.replayed_at = now
        self._desk.loading = not all(one.replayed for one in self._links)
        # What the edge lost when it was replaced, then what it has and we do not know.
        for connection in self._connections.values():
            if connection.link is link and connection.hub is not None:
                for flow, to_conn in connection.hub.flows.of_connection(connection.conn):
                    link.send(Flow(flow.conn, flow.key, to_conn))
        old_flows, link.old_flows = link.old_flows, []
        for conn, key in old_flows:  # first learn all sources, since they are the destinations
            self._relearn(conn, key, now)
        for conn, key in old_flows:
            self._relearn_and_teach(link, conn, key, now)

    def _begin_to_serve(self, now: float) -> None:
        """Serve logins when all edges have told what they have, or after a while."""
        loading = not all(link.replayed for link in self._links)
        if loading and now < self._started_at + self._settings.replay_timeout:
            return
        self._serving = True
        self._desk.loading = loading
        requests, self._early_requests = self._early_requests, []
        for link, request in requests:
            self._hear_request(link, request, now)
        frames, self._early_frames = self._early_frames, []
        for conn, blocks in frames:
            self._hear_frames(conn, blocks, now)

    # --- frames

    def _hear_frames(self, conn: int, blocks: bytes, now: float) -> None:
        if not self._serving:
            # Also those of a connection we know: whom they are for may not be replayed yet.
            self._keep_early(conn, blocks)
            return
        connection = self._connections.get(conn)
        if (
            connection is None
            or connection.session is None
            or connection.port is None
            or connection.hub is None
        ):
            self._lose("frames of connections without a session")
            return
        session, hub, port = connection.session, connection.hub, connection.port
        if self._quarantine.holds(hub_key(hub.name), now):
            self._lose("frames of hubs in quarantine")
            return
        self._mark.begin(conn, 0, session.hub_id, session.user_id)
        runs, candidates = hub.switch(port, blocks, now)
        for run in runs:
            self._deliver(port, run, blocks)
        # In this order: what has moved may be taught anew at once.
        self._withdraw(hub)
        if candidates:
            self._teach(connection, hub, port, candidates, now)
        self._mark.end()

    def _keep_early(self, conn: int, blocks: bytes) -> None:
        """Frames that came before all edges have told what there is; in their order."""
        if self._early_size + len(blocks) > _MAX_EARLY_FRAMES:
            self._lose("frames before the replay")
            return
        self._early_frames.append((conn, blocks))
        self._early_size += len(blocks)

    def _deliver(self, sender: Port, run: Run, blocks: bytes) -> None:
        part = blocks if run.end - run.start == len(blocks) else blocks[run.start : run.end]
        of_edges: dict[int, list[int]] = {}
        for port in run.ports:
            owner = port.owner
            if isinstance(owner, Tap):
                lost = owner.write(part)
                if lost:
                    port.drop(Drop.QUEUE_FULL, lost)
                continue
            conns = owner.to_client
            if not conns:
                port.drop(Drop.NO_CONNECTION, run.frames)
                continue
            # Always the same for one sender: frames stay in order.
            conn = conns[sender.number % len(conns)]
            of_edges.setdefault(channel.edge_of(conn), []).append(conn)
        for edge, list_of_conns in of_edges.items():
            full = self._links[edge - 1].outbox.put(tuple(list_of_conns), part)
            for conn in full:
                to = self._connections.get(conn)
                if to is not None and to.port is not None:
                    to.port.drop(Drop.QUEUE_FULL, run.frames)

    def _hear_counts(self, counts: Counts) -> None:
        session = self._sessions.of_connection(counts.conn)
        if session is not None:
            session.counts[counts.conn] = (*counts[1:5], *counts.drops)

    def _lose(self, what: str) -> None:
        self._lost[what] = self._lost.get(what, 0) + 1

    # --- known flows

    def _teach(
        self,
        connection: Connection,
        hub: Hub,
        sender: Port,
        candidates: dict[bytes, Port],
        now: float,
    ) -> None:
        link = connection.link
        for key, port in candidates.items():
            if isinstance(port.owner, Tap) or not port.owner.to_client or not link.may_teach():
                continue
            conns = port.owner.to_client
            to_conn = conns[sender.number % len(conns)]
            if channel.edge_of(to_conn) == channel.edge_of(connection.conn) and hub.offer_flow(
                KnownFlow(connection.conn, key), to_conn, now
            ):
                link.send(Flow(connection.conn, key, to_conn))

    def _hear_flow(self, link: Link, conn: int, key: bytes, now: float) -> None:
        connection = self._connections.get(conn)
        if not link.replayed and len(link.old_flows) < _MAX_OLD_FLOWS:
            link.old_flows.append((conn, key))
        if connection is None or connection.hub is None or connection.port is None:
            return
        if connection.hub.flow_seen(KnownFlow(conn, key), connection.port, now):
            self._withdraw(connection.hub)
        elif link.replayed:
            if now < link.replayed_at + _OLD_FLOWS_TIMEOUT:
                self._relearn_and_teach(link, conn, key, now)
            else:
                link.send(Unflow(conn, key))

    def _relearn(self, conn: int, key: bytes, now: float) -> Port | None:
        connection = self._connections.get(conn)
        if connection is None or connection.hub is None or connection.port is None:
            return None
        port = connection.hub.relearn(key, connection.port, now)
        self._withdraw(connection.hub)
        return port

    def _relearn_and_teach(self, link: Link, conn: int, key: bytes, now: float) -> None:
        port = self._relearn(conn, key, now)
        connection = self._connections.get(conn)
        if port is None or connection is None:
            link.send(Unflow(conn, key))
        elif connection.hub is not None and connection.port is not None:
            self._teach(connection, connection.hub, connection.port, {key: port}, now)

    def _withdraw(self, hub: Hub) -> None:
        for flow in hub.take_withdrawn():
            self._links[channel.edge_of(flow.conn) - 1].send(Unflow(flow.conn, flow.key))

    # --- bridges

    def _open_bridges(self, now: float) -> None:
        for device, (tap, hub, port) in list(self._taps.items()):
            record = self._accounts.bridges.get(device)
            if record is None or self._hubs.get(record.hub_id) is not hub:
                del self._taps[device]
                if tap.state == "open":
                    self._selector.unregister(tap.fd)
                hub.leave(port)
                self._withdraw(hub)
        for record in self._accounts.bridges.values():
            if record.device in self._taps:
                continue
            try:
                (fd,) = self._child.held(f"tap:{record.device}")
            except (KeyError, ValueError):
                continue  # added while we run: the watchdog opens it at the next reload
            tap = Tap(record.device, fd)
            hub = self._hubs[record.hub_id]
            port = hub.join(f"bridge {record.device}", tap, now)
            self._taps[record.device] = (tap, hub, port)
            read = self._tap_of(tap, record.hub_id, hub, port)
            self._selector.register(fd, selectors.EVENT_READ, read)

    def _tap_of(self, tap: Tap, hub_id: int, hub: Hub, port: Port) -> Any:
        def read(now: float) -> None:
            blocks = tap.read()
            if blocks and self._quarantine.holds(hub_key(hub.name), now):
                self._lose("frames of hubs in quarantine")
            elif blocks:
                self._switched.done += 1
                self._mark.begin(0, 0, hub_id, 0)
                runs, _ = hub.switch(port, blocks, now)
                for run in runs:
                    self._deliver(port, run, blocks)
                self._withdraw(hub)
                self._mark.end()
            if tap.state != "open":
                # It would be readable for ever.
                _log.error("bridge %s: %s", tap.device, tap.state)
                self._selector.unregister(tap.fd)

        return read

    # --- time

    def _tick(self, now: float) -> None:
        self._sessions.week = _week()
        for session in self._sessions.expire(now):
            _log.info("%s: session ended: its client did not come back", session.name)
            self._leave_hub(session)

    def _age(self, now: float) -> None:
        for hub in self._hubs.values():
            hub.expire(now)
            self._withdraw(hub)

    # --- what the database says

    def apply(self, changes: list[Change]) -> None:
        """`Live.apply`."""
        for change in changes:
            self._accounts.apply(change)
        self._reconcile(time.monotonic())
        self._flush_all()

    def replace(self, accounts: Accounts) -> None:
        """`Live.replace`."""
        self._accounts.replace(accounts)
        self._reconcile(time.monotonic())
        self._flush_all()

    def _reconcile(self, now: float) -> None:
        """Make hubs, sessions and bridges what the accounts allow."""
        for record in self._accounts.hubs.values():
            hub = self._hubs.get(record.id)
            storm_frames = record.storm_frames or self._settings.storm_frames
            if hub is None:
                hub = self._hubs[record.id] = Hub(
                    record.name,
                    ageing=self._settings.mac_ageing,
                    max_macs=self._settings.max_macs,
                )
            hub.storm_frames = storm_frames
            hub.set_online(online=record.online)
            self._withdraw(hub)
        for session in self._sessions.all():
            why = self._why_not(session)
            if why:
                self._end_session(session, why, now)
        self._open_bridges(now)
        for hub_id in list(self._hubs):
            if hub_id not in self._accounts.hubs and hub_id != CANARY_HUB_ID:
                del self._hubs[hub_id]
                self._past_counts.pop(hub_id, None)

    def _why_not(self, session: Session) -> str:
        """Why a session may not go on; "": it may."""
        if session.hub_id == CANARY_HUB_ID:
            return ""
        hub = self._accounts.hubs.get(session.hub_id)
        if hub is None:
            return "the hub was deleted"
        if not hub.online:
            return "the hub is offline"
        claim = session.claim
        if (claim.generation, claim.session) in self._accounts.kicked:
            return "kicked"
        user = self._accounts.user_of_generation(claim.generation)
        if user is None or user.id != session.user_id:
            return "the user was changed or deleted"
        return ""

    # --- what operators ask

    def sessions(self, hub_id: int | None, page: Page) -> list[dict[str, Any]]:
        """`Live.sessions`."""
        now = time.monotonic()
        hubs = self._accounts.hubs
        of_hubs = self._sessions.all() if hub_id is None else self._sessions.in_hub(hub_id)
        found = [
            (page_key(hubs[session.hub_id].name, session.name), session)
            for session in of_hubs
            if session.hub_id in hubs  # not the canary's
        ]
        return [self._show_session(session, now) for session in page.of(found)]

    def _show_session(self, session: Session, now: float) -> dict[str, Any]:
        frames_in, bytes_in, frames_out, bytes_out, *edge_drops = session.total_counts()
        connections = [self._connections[conn] for conn in session.connections]
        drops = Counter(self._ports[session.claim.session].named_drops())
        drops.update(_named(EdgeDrop, edge_drops))
        return {
            "name": session.name,
            "hub": self._accounts.hubs[session.hub_id].name,
            "user": session.user,
            "client": session.client,
            "peer": connections[0].peer if connections else "",
            "tls": " ".join(connections[0].tls.split(" ")[:3]) if connections else "",
            "certificate": "+".join(sorted({one.certificate for one in connections})),
            "records": "+".join(sorted({one.records for one in connections})),
            "connections": len(connections),
            "max_connections": session.claim.max_connection,
            "half_duplex": session.claim.half,
            "age": round(now - session.created_at, 1),
            "orphan_for": None if session.orphan_at is None else round(now - session.orphan_at, 1),
            "frames_in": frames_in,
            "bytes_in": bytes_in,
            "frames_out": frames_out,
            "bytes_out": bytes_out,
            "drops": drops,
        }

    def sessions_not_shown(self, certificate: str) -> list[str]:
        """`Live.sessions_not_shown`."""
        return [
            f"{hub.name}/{session.name}"
            for session in self._sessions.all()
            if (hub := self._accounts.hubs.get(session.hub_id)) is not None
            and any(
                not certificate.startswith(self._connections[conn].certificate or "?")
                for conn in session.connections
            )
        ]

    def sessions_of_users(self, hub_id: int) -> dict[str, int]:
        """`Live.sessions_of_users`."""
        return Counter(session.user for session in self._sessions.in_hub(hub_id))

    def connections(self, page: Page) -> list[dict[str, Any]]:
        """`Live.connections`."""
        found = [(page_key(one.id), one) for one in self._connections.values()]
        return [
            {
                "id": one.id,
                "peer": one.peer,
                "local": one.local,
                "tls": one.tls,
                "records": one.records,
                "session": "" if one.session is None else one.session.name,
                "hub": "" if one.hub is None else one.hub.name,
            }
            for one in page.of(found)
        ]

    def sessions_named(self, hub_id: int, name: str) -> list[SessionName]:
        """`Live.sessions_named`."""
        return [
            SessionName(session.claim.generation, session.claim.session, session.name)
            for session in self._sessions.in_hub(hub_id)
            if session.name.lower() == name.lower()
        ]

    def macs(self, hub_id: int, page: Page) -> list[dict[str, Any]]:
        """`Live.macs`."""
        now = time.monotonic()
        found = []
        for key, port, seen_at in self._hubs[hub_id].macs.entries():
            mac = key[:6].hex(":")
            vlan = int.from_bytes(key[6:], "big") if len(key) > 6 else None
            shown = {"mac": mac, "vlan": vlan, "port": port.name, "age": round(now - seen_at, 1)}
            found.append((page_key(mac, vlan), shown))
        return page.of(found)

    def hub(self, hub_id: int) -> dict[str, Any]:
        """`Live.hub`."""
        hub = self._hubs[hub_id]
        counts = [session.total_counts() for session in self._sessions.in_hub(hub_id)]
        totals = _sums((0,) * 4, self._past_counts.get(hub_id, ()), *counts)
        drops = hub.drops()
        drops.update(_named(EdgeDrop, totals[4:]))
        return {
            "sessions": self._sessions.count(hub_id),
            "macs": len(hub.macs),
            "macs_not_learnt": hub.macs_not_learnt,
            "flows": len(hub.flows),
            "frames_in": totals[0],
            "bytes_in": totals[1],
            "frames_out": totals[2],
            "bytes_out": totals[3],
            "drops": drops,
        }

    def bridges(self) -> dict[str, str]:
        """`Live.bridges`."""
        refused = self._settings.refused_bridges().items()
        return {device: f"refused: {why}" for device, why in refused} | {
            device: tap.state for device, (tap, _, _) in self._taps.items()
        }

    def quarantine(self) -> list[dict[str, Any]]:
        """`Live.quarantine`."""
        return self._quarantine.entries(time.monotonic())

    def lift(self, name: str) -> bool:
        """`Live.lift`."""
        return self._quarantine.lift(name)

    def status(self) -> dict[str, Any]:
        """`Live.status`."""
        drops: Counter[str] = Counter()
        refusals: Counter[str] = Counter()
        for hub in self._hubs.values():
            drops.update(hub.drops())
        for link in self._links:
            if link.totals is not None:
                drops.update(_named(EdgeDrop, link.totals.drops))
                refusals.update(_named(Refusal, link.totals.refusals))
        return {
            "sessions": len(self._sessions) - self._sessions.count(CANARY_HUB_ID),
            "connections": len(self._connections),
            "records": Counter(one.records for one in self._connections.values()),
            "flows": sum(len(hub.flows) for hub in self._hubs.values()),
            "uptime": round(time.monotonic() - self._started_at, 1),
            "incarnation": self._child.incarnation,
            "loading": self._desk.loading,
            "drops": drops,
            "refused": refusals,
            "refused_logins": {str(int(code)): n for code, n in self._desk.refused.items()},
            "lost": dict(self._lost),
            "quarantine": len(self._quarantine.entries(time.monotonic())),
        }


def _see(link: Link, conn: int) -> None:
    """The edge has this connection."""
    if len(link.present) < _MAX_CONNECTIONS:
        link.present.add(conn)


def _week() -> int:
    return int(max(0.0, time.time()) // WEEK) & 0xFFFF


def _sums(*counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(*counts, fillvalue=0)))


def _named(names: type[EdgeDrop | Refusal], counts: Iterable[int]) -> dict[str, int]:
    """What there is of each, by name."""
    return {name.value: n for name, n in zip(names, counts, strict=False) if n}


def _open_links(fds: list[int]) -> list[Link]:
    return [Link(index + 1, fds[2 * index], fds[2 * index + 1]) for index in range(len(fds) // 2)]


def _take_mark(child: Child) -> tuple[Mark, Quarantine]:
    """What the core before us has left, or new ones for the core after us."""
    fd = child.given().get(_MARK_KEY)
    if fd is not None:
        try:
            return open_mark(fd)
        except (OSError, ValueError) as error:
            # A core that has run wild gave it; its successors are not to die of it one by one.
            _log.error("what the core before was working on is not known: %s", error)
    fd = os.memfd_create("core-mark", os.MFD_CLOEXEC)
    try:
        made = open_mark(fd)
        child.give(_MARK_KEY, fd)
        return made
    finally:
        os.close(fd)


def open_mark(fd: int) -> tuple[Mark, Quarantine]:
    """Raises OSError or ValueError if this is no memory."""
    if os.fstat(fd).st_size < MARK_SIZE:  # new, or of a core of older code
        os.ftruncate(fd, MARK_SIZE)
    return Mark(fd), Quarantine(fd)


def _level(session: Session | None) -> int:
    """The canary comes every few seconds: what it does is no news."""
    return (
        logging.DEBUG if session is not None and session.hub_id == CANARY_HUB_ID else logging.INFO
    )


def _canary_password(child: Child) -> str:
    """The secret that only the canary and the core hold, as the canary types it."""
    try:
        (fd,) = child.held("canary")
    except (KeyError, ValueError):
        return ""  # this tree has no canary
    secret = os.pread(fd, _CANARY_SECRET_SIZE, 0)
    return secret.hex() if len(secret) == _CANARY_SECRET_SIZE else ""


def main(child: Child, settings: CoreSettings) -> None:
    """The target of the core's child spec.

    Held: "channel:core" (control and frames of each edge), "admin" (a listening unix socket),
    "canary" (a memfd with 32 bytes; may be absent), "tap:NAME" for each bridge.
    Duties: "switch", "login", "store".
    """
    try:
        store = Store(settings.state_dir)
        keys = SessionKeys(session_secret(settings.state_dir))
        accounts = store.load()
        if child.standing_by:
            rehearse(child, lambda staged, played: Core(staged, settings, store, played, keys))
        child.stand_by()
        if store.changed_by_others():
            accounts = store.load()
    except StoreError as error:
        raise SystemExit(str(error)) from error
    Core(child, settings, store, accounts, keys).run()
