"""Any series of steps of an edge, killed between any two of them: the streams stay whole.

Strategy: the edge's shell is replaced by one of a few lines with the same order of steps, and the
kernel by two counters and two byte strings for each connection.  Everything that a real edge does
to what outlives it passes a `Fuse`, which ends the process before or after the step that it was set
to.  A successor then begins with the memory, the kernel's counters, and nothing else.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pkvpn import channel
from pkvpn.channel import Mode, State
from pkvpn.edge.checkpoint import Checkpoint, Identity, SavedFlows, Slot, checkpoint_size
from pkvpn.edge.connection import Connection, OwnRecords, Target, Turn, scratch_size
from pkvpn.edge.flows import Flows
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import (
    AES_128_GCM,
    APPLICATION_DATA,
    Opener,
    Sealer,
    read_key_update,
    record_size,
)
from pkvpn.protocol.blocks import BlockDecoder
from tests.edge.test_connection import batch

RX, TX = 65536, 262144
# Nobody may have to drop a frame here: what is on its way to one client is kept below this.
MOST = 100_000
A, B, NOBODY, CORE = (bytes([2, 0, 0, 0, 0, number]) for number in range(4))


class Killed(BaseException):
    """The process is gone, in the middle of whatever it did."""


class Fuse:
    """Ends the edge at one of its steps."""

    def __init__(self) -> None:
        self.left = -1
        self.lives = False  # the edge does something; what clients do kills nobody

    def burn(self) -> None:
        if self.lives and self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any) -> Any:
            self.burn()
            result = function(*args)
            self.burn()
            return result

        return wrapped

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """At all that writes into the memory, or changes what is written there next."""
        with mock.patch.multiple(
            Slot,
            save=self.wrap(Slot.save),
            save_cold=self.wrap(Slot.save_cold),
            set_dirty=self.wrap(Slot.set_dirty),
        ), mock.patch.multiple(
            SavedFlows, put=self.wrap(SavedFlows.put), remove=self.wrap(SavedFlows.remove)
        ), mock.patch.multiple(
            Ring,
            put=self.wrap(Ring.put),
            append=self.wrap(Ring.append),
            rewind=self.wrap(Ring.rewind),
        ), mock.patch.object(Sealer, "seal", self.wrap(Sealer.seal)):  # fmt: skip
            yield


class Client:
    """A client, and the kernel's end of its connection."""

    def __init__(self, conn: int) -> None:
        self.conn = conn
        self.sealer = Sealer(AES_128_GCM, bytes([conn]) * 32)
        self.opener = Opener(AES_128_GCM, bytes([conn + 100]) * 32)
        self.received = self.sent = 1000 * conn
        self.unread = self.taken = b""
        self.decoder = BlockDecoder()
        self.got: list[bytes] = []

    def read(self) -> None:
        """Open what has come; a record that was sealed twice, or is missing, raises."""
        while len(self.taken) >= 5 and len(self.taken) >= (size := record_size(self.taken)):
            out = bytearray(size)
            kind, length = self.opener.open(memoryview(self.taken)[:size], memoryview(out))
            self.taken = self.taken[size:]
            if kind == APPLICATION_DATA:
                self.got += self.decoder.feed(bytes(out[:length]))
            else:
                read_key_update(bytes(out[:length]))
                self.opener.update()

    def numbers(self, source: bytes) -> list[int]:
        return [struct.unpack("!I", f[14:18])[0] for f in self.got if f[6:12] == source]


def frame(to: bytes, source: bytes, number: int, size: int) -> bytes:
    return to + source + b"\x08\0" + struct.pack("!I", number) + bytes(size)


class Edge(RuleBasedStateMachine):
    """Two clients that send to each other, and to nobody whom a flow knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = Fuse()
        self.patches = self.fuse.everywhere()
        self.patches.__enter__()
        self.memory = bytearray(checkpoint_size(2, RX, TX))
        self.checkpoint = Checkpoint.make(memoryview(self.memory), 2, RX, TX)
        self.clients = {A: Client(1), B: Client(2)}
        self.begin()
        for client in self.clients.values():
            self.open(client)
        for here, there in ((A, B), (B, A)):
            one, two = (self.clients[mac].conn for mac in (here, there))
            self.flows.add(one, there + here, two, self.edge[two], 1)
        self.sent = {(A, B): 0, (B, A): 0, (A, NOBODY): 0, (B, NOBODY): 0}
        self.missed: dict[int, list[int]] = {1: [], 2: []}
        # What the core has said: each State, in its order.
        self.states = {1: [self.state(1, 1)], 2: [self.state(2, 1)]}
        self.updates = {1: 0, 2: 0}
        self.kills = 0

    def teardown(self) -> None:
        try:
            self.go_on()
            for mac, other in ((A, B), (B, A)):
                self.check_stream(self.clients[mac].numbers(other), self.sent[other, mac])
                conn = self.clients[mac].conn
                self.check_stream(self.missed[conn], self.sent[mac, NOBODY])
                # A State counts once, whoever applied it.
                replies = [n for n in self.clients[mac].numbers(CORE) if n < 1 << 20]
                assert replies == [state.number for state in self.states[conn][1:]]
        finally:
            self.patches.__exit__(None, None, None)

    def check_stream(self, numbers: list[int], sent: int) -> None:
        """All came; a kill may repeat what came last, and nothing else comes out of turn."""
        assert set(numbers) == set(range(sent))
        back = 0
        for before, number in zip([-1, *numbers], numbers, strict=False):
            assert number <= before + 1
            back += number != before + 1
        assert back <= self.kills

    # --- the shell, and its death

    def begin(self) -> None:
        """What every edge begins with."""
        self.turn = Turn(memoryview(bytearray(scratch_size(RX))))
        self.flows: Flows[Target] = Flows()
        self.edge: dict[int, Connection] = {}

    def open(self, client: Client) -> None:
        slot = self.checkpoint.take()
        assert slot is not None
        start = client.received
        rx, tx = (Ring(m, start, start, start) for m in (slot.rx_memory, slot.tx_memory))
        records = OwnRecords(
            rx, tx,
            Opener(AES_128_GCM, client.sealer.secret), Sealer(AES_128_GCM, client.opener.secret),
        )  # fmt: skip
        edge = Connection(
            Identity(client.conn, 1, 0.0, AES_128_GCM.number, "peer", "local", "tls"),
            records, rx, tx,
            turn=self.turn, flows=self.flows.table(client.conn), slot=slot,
            login_bytes=100_000, now=0.0,
        )  # fmt: skip
        slot.create(edge.identity, edge.hot(), edge.cold())
        self.flows.save_in(client.conn, slot.flows)
        assert edge.apply(self.state(client.conn, 1), 0.0)
        self.edge[client.conn] = edge

    def doing(self, step: Callable[[], None]) -> None:
        """Do it, or die of it and be succeeded; successors are not killed before they serve."""
        self.fuse.lives = True
        try:
            step()
        except Killed:
            self.fuse.lives = False
            self.kills += 1
            self.succeed()
        self.fuse.lives = False

    def succeed(self) -> None:
        self.begin()
        self.checkpoint = Checkpoint(memoryview(self.memory))
        left, first = self.checkpoint.left()
        slots = {conn: self.checkpoint.slot(index) for conn, index in left.items()}
        for client in self.clients.values():
            self.edge[client.conn] = Connection.adopt(
                slots[client.conn], client.received, client.sent,
                turn=self.turn, flows=self.flows.table, login_bytes=100_000, now=0.0,
            )  # fmt: skip
        for conn, slot in slots.items():
            self.flows.save_in(conn, slot.flows)
            self.flows.restore(conn, self.edge.get)
        # Only where something may lie in a ring does it look at once.
        for conn in first:
            self.work(self.by_conn(conn))
            self.flush(self.by_conn(conn), 1 << 20)
        for conn, number in self.checkpoint.directory():
            for state in self.states[conn]:
                if state.number > number:  # the core says it again
                    self.apply(state)

    def by_conn(self, conn: int) -> Client:
        return next(client for client in self.clients.values() if client.conn == conn)

    def receive(self, client: Client, limit: int) -> None:
        edge = self.edge[client.conn]
        assert edge.slot is not None
        edge.slot.set_dirty(True)
        # One call of the kernel: the bytes lie there, and the count says so.
        piece = edge.rx.free()
        size = min(len(piece), limit, len(client.unread))
        piece[:size], client.unread = client.unread[:size], client.unread[size:]
        client.received += size
        edge.rx.put(size)
        self.work(client)

    def work(self, client: Client) -> None:
        edge = self.edge[client.conn]
        edge.receive(0.0)
        for blocks in edge.take_misses():
            self.missed[client.conn] += [
                struct.unpack("!I", f[14:18])[0] for f in channel.split_blocks(blocks)
            ]
            self.fuse.burn()
        edge.save()

    def flush(self, client: Client, limit: int) -> None:
        edge = self.edge[client.conn]
        tx = edge.tx
        while tx.start < tx.end and limit:
            piece = bytes(tx.first_piece()[:limit])
            self.fuse.burn()
            client.taken += piece
            client.sent += len(piece)
            self.fuse.burn()
            tx.start += len(piece)
            limit -= len(piece)
        if tx.start == tx.end:
            tx.rewind()
            assert edge.slot is not None
            if edge.rx.start == edge.rx.end:
                edge.slot.set_dirty(False)

    def apply(self, state: State) -> None:
        if self.edge[state.conn].apply(state, 0.0):
            self.work(self.by_conn(state.conn))

    def go_on(self) -> None:
        """Everything that is on its way arrives."""
        while any(client.unread for client in self.clients.values()):
            for client in self.clients.values():
                if client.unread:
                    self.receive(client, 1 << 20)
                for each in self.clients.values():
                    self.flush(each, 1 << 20)
        for client in self.clients.values():
            self.flush(client, 1 << 20)
            client.read()

    @staticmethod
    def state(conn: int, number: int, **more: Any) -> State:
        values: dict[str, Any] = {"reply": b"", "key_update": False, "blob": b""} | more
        return State(conn, number, mode=Mode.BLOCKS, close="", timeout=20.0, **values)

    # --- what happens

    @rule(at=st.integers(0, 60))
    def will_be_killed(self, at: int) -> None:
        self.fuse.left = at

    @rule(
        mac=st.sampled_from([A, B]),
        known=st.sampled_from([True, True, False]),
        sizes=st.lists(st.sampled_from([0, 100, 1400]), min_size=1, max_size=12),
        record=st.sampled_from([300, 5000, 16384]),
    )
    def a_client_sends(self, mac: bytes, known: bool, sizes: list[int], record: int) -> None:
        client = self.clients[mac]
        if len(client.unread) > MOST // 4:
            return
        to = (B if mac == A else A) if known else NOBODY
        at = self.sent[mac, to]
        self.sent[mac, to] = at + len(sizes)
        data = batch(*(frame(to, mac, at + i, size) for i, size in enumerate(sizes)))
        for start in range(0, len(data), record):
            client.unread += client.sealer.seal_bytes(data[start : start + record])

    @rule(mac=st.sampled_from([A, B]), ask=st.booleans())
    def a_client_renews_its_key(self, mac: bytes, ask: bool) -> None:
        client = self.clients[mac]
        # Ten a second are allowed, and time stands still here.
        if client.sealer.sequence and self.updates[client.conn] < 9:
            self.updates[client.conn] += 1
            client.unread += client.sealer.seal_key_update(ask=ask)

    @rule(mac=st.sampled_from([A, B]), limit=st.sampled_from([1, 700, 9000, 1 << 20]))
    def an_edge_reads(self, mac: bytes, limit: int) -> None:
        other = self.edge[self.clients[B if mac == A else A].conn]
        if self.clients[mac].unread and other.tx.end - other.tx.start < MOST:
            self.doing(lambda: self.receive(self.clients[mac], limit))

    @rule(mac=st.sampled_from([A, B]), limit=st.sampled_from([1, 30, 4000, 1 << 20]))
    def an_edge_sends(self, mac: bytes, limit: int) -> None:
        self.doing(lambda: self.flush(self.clients[mac], limit))

    @rule(mac=st.sampled_from([A, B]), key_update=st.booleans())
    def the_core_changes_the_state(self, mac: bytes, key_update: bool) -> None:
        conn = self.clients[mac].conn
        number = len(self.states[conn]) + 1
        reply = batch(frame(mac, CORE, number, 50))
        state = self.state(conn, number, reply=reply, key_update=key_update, blob=b"%d" % number)
        self.states[conn].append(state)
        self.doing(lambda: self.apply(state))

    @rule(mac=st.sampled_from([A, B]))
    def the_core_sends_a_frame(self, mac: bytes) -> None:
        conn = self.clients[mac].conn
        data = bytearray(batch(frame(mac, CORE, 1 << 20, 100)) + b"\0")
        self.doing(
            lambda: self.edge[conn].deliver(
                memoryview(data), 0, len(data) - 1, 1, len(data) - 9, 0.0
            )
        )

    @rule(kill=st.booleans())
    def the_core_withdraws_a_flow_and_says_it_again(self, kill: bool) -> None:
        def withdraw_and_say() -> None:
            self.flows.remove(1, b"x" * 12)
            self.flows.add(1, b"x" * 12, 2, self.edge[2], 1)
            if kill:
                raise Killed

        self.doing(withdraw_and_say)

    @invariant()
    def flows_of_the_living_are_those_of_a_successor(self) -> None:
        for conn, edge in self.edge.items():
            assert edge.slot is not None
            kept = SavedFlows(memoryview(self.memory), edge.slot.flows._at - 8192).load()
            assert {key for key, _ in kept} == set(self.flows.table(conn))


TestEdge = Edge.TestCase
TestEdge.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_kill_at_each_step_loses_nothing() -> None:
    """What chance may miss above: one course of things, killed at each of its steps in turn."""
    at = 0
    while killed_at(at):
        at += 1
    assert at > 200


def killed_at(at: int) -> bool:
    """Whether it came to this step."""
    edge = Edge()
    try:
        edge.fuse.left = at
        for round_ in range(2):
            for mac, other in ((A, B), (B, A)):
                edge.a_client_sends(mac, known=True, sizes=[100, 1400], record=300)
                edge.a_client_sends(mac, known=False, sizes=[100], record=5000)
                edge.an_edge_reads(mac, limit=700)
                edge.a_client_renews_its_key(mac, ask=bool(round_))
                edge.a_client_sends(mac, known=True, sizes=[0], record=5000)
                edge.the_core_changes_the_state(mac, key_update=bool(round_))
                edge.an_edge_reads(mac, limit=1 << 20)
                edge.an_edge_sends(other, limit=30)
                edge.the_core_sends_a_frame(mac)
                edge.the_core_withdraws_a_flow_and_says_it_again(kill=False)
                edge.flows_of_the_living_are_those_of_a_successor()
    finally:
        edge.teardown()
    return bool(edge.kills)
