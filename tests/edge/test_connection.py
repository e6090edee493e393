"""A connection on two rings, with a client that is nothing but keys, and deaths anywhere."""

import itertools
import random
import struct
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn import channel
from pkvpn.channel import EdgeDrop, Mode, State
from pkvpn.edge import connection, tls_records
from pkvpn.edge.checkpoint import Checkpoint, Identity, Slot, checkpoint_size
from pkvpn.edge.connection import (
    Connection,
    ConnectionEnds,
    OwnRecords,
    Target,
    Turn,
    scratch_size,
)
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import (
    AES_128_GCM,
    ALERT,
    APPLICATION_DATA,
    HANDSHAKE,
    Opener,
    Sealer,
    TLSError,
)
from pkvpn.protocol.blocks import BlockDecoder
from pkvpn.protocol.errors import ProtocolError

RX, TX = 65536, 131072
REQUEST = b"POST /x HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"
MACS = [bytes([2, 0, 0, 0, 0, number]) for number in range(4)]


class Client:
    """The other end of a connection: keys, and what the kernel would count."""

    def __init__(self, world: "World", conn: int) -> None:
        self.world = world
        self.sealer = Sealer(AES_128_GCM, bytes([conn]) * 32)
        self.opener = Opener(AES_128_GCM, bytes([conn + 100]) * 32)
        slot = world.checkpoint.take()
        assert slot is not None
        start = 1000 * conn  # the bytes of the handshake
        rx, tx = (Ring(m, start, start, start) for m in (slot.rx_memory, slot.tx_memory))
        records = OwnRecords(
            rx, tx,
            Opener(AES_128_GCM, self.sealer.secret), Sealer(AES_128_GCM, self.opener.secret),
        )  # fmt: skip
        self.edge = Connection(
            Identity(conn, 1, 0.0, AES_128_GCM.number, "peer", "local", "tls"),
            records, rx, tx,
            turn=world.turn, flows=world.tables.setdefault(conn, {}), slot=slot,
            login_bytes=100_000, now=0.0,
        )  # fmt: skip
        slot.create(self.edge.identity, self.edge.hot(), self.edge.cold())
        # What the kernel has received and handed on, and what it was given to send.
        self.unread = b""
        self.taken = b""
        self.received = start
        self.sent = start
        self.alerts: list[int] = []
        self.updates = 0
        self.asked = 0
        self.requests: list[bytes] = []
        world.clients.append(self)

    def send(self, data: bytes, *, size: int = 16384) -> None:
        for at in range(0, len(data), size):
            self.unread += self.sealer.seal_bytes(data[at : at + size])

    def turn(self, limit: int = 1 << 20, now: float = 0.0) -> None:
        """What the shell does when the socket is readable, and at the end of the turn."""
        edge = self.edge
        if edge.wants_bytes:
            piece = edge.rx.free()
            size = min(len(piece), limit, len(self.unread))
            piece[:size] = self.unread[:size]
            self.unread = self.unread[size:]
            self.received += size
            edge.rx.put(size)
        self.work(now)

    def work(self, now: float = 0.0) -> None:
        asked = bool(self.edge.request)
        try:
            self.edge.receive(now)
        finally:
            for blocks in self.edge.take_misses():
                assert len(blocks) <= channel.MAX_BLOCKS
                self.world.core.append((self.edge.conn, channel.split_blocks(blocks)))
        if self.edge.request and not asked:
            self.requests.append(self.edge.request)
        self.edge.save()

    def flush(self, limit: int = 1 << 20) -> None:
        tx = self.edge.tx
        while tx.start < tx.end and limit:
            piece = bytes(tx.first_piece()[:limit])
            limit -= len(piece)
            self.taken += piece
            tx.start += len(piece)
            self.sent += len(piece)
        if tx.start == tx.end:
            tx.rewind()

    def read(self) -> bytes:
        """Open all that has come: plain text; alerts and KeyUpdates are counted."""
        text = b""
        while len(self.taken) >= 5:
            size = tls_records.record_size(self.taken)
            if len(self.taken) < size:
                break
            out = bytearray(size)
            kind, length = self.opener.open(memoryview(self.taken)[:size], memoryview(out))
            self.taken = self.taken[size:]
            if kind == APPLICATION_DATA:
                text += out[:length]
            elif kind == ALERT:
                self.alerts.append(out[1])
            else:
                self.asked += tls_records.read_key_update(bytes(out[:length]))
                self.updates += 1
                self.opener.update()
        return text

    def state(self, number: int, mode: Mode = Mode.BLOCKS, **more: Any) -> State:
        values: dict[str, Any] = {
            "reply": b"",
            "close": "",
            "timeout": 20.0,
            "key_update": False,
            "blob": b"",
        }
        return State(self.edge.conn, number, mode=mode, **(values | more))

    def to_blocks(self) -> "Client":
        assert self.edge.apply(self.state(1), 0.0)
        return self


class World:
    """The memory of an edge, its connections, and the core that hears of misses."""

    def __init__(self) -> None:
        self.memory = bytearray(checkpoint_size(4, RX, TX))
        self.checkpoint = Checkpoint.make(memoryview(self.memory), 4, RX, TX)
        self.turn = Turn(memoryview(bytearray(scratch_size(RX))))
        self.tables: dict[int, dict[bytes, Target]] = {}
        self.clients: list[Client] = []
        self.core: list[tuple[int, list[bytes]]] = []

    def die(self) -> None:
        """A successor goes on, with nothing but the memory and what the kernel says."""
        self.turn = Turn(memoryview(bytearray(scratch_size(RX))))
        self.checkpoint = Checkpoint(memoryview(self.memory))
        flows = {
            conn: {key: cast(Connection, to).conn for key, to in table.items()}
            for conn, table in self.tables.items()
        }
        self.tables = {}
        found, _ = self.checkpoint.left()
        adopted = {conn: self.checkpoint.slot(index) for conn, index in found.items()}
        for client in self.clients:
            client.edge = self.adopt(client, adopted[client.edge.conn])
        by_conn = {client.edge.conn: client.edge for client in self.clients}
        for conn, table in flows.items():
            for key, to in table.items():
                self.tables[conn][key] = by_conn[to]

    def adopt(self, client: Client, slot: Slot) -> Connection:
        return Connection.adopt(
            slot, client.received, client.sent,
            turn=self.turn, flows=lambda conn: self.tables.setdefault(conn, {}),
            login_bytes=100_000, now=0.0,
        )  # fmt: skip


def frame(to: int, source: int, size: int = 60, fill: int = 0) -> bytes:
    return (MACS[to] + MACS[source] + b"\x08\0" + bytes([fill]) * size)[:size]


def batch(*frames: bytes) -> bytes:
    return struct.pack("!I", len(frames)) + channel.join_blocks(list(frames))


def keep_alive(size: int) -> bytes:
    return struct.pack("!II", 0xFFFFFFFF, size) + bytes(size)


# --- what strangers may try ---------------------------------------------------------------------


def test_what_lies_behind_a_request_is_not_read_before_its_answer() -> None:
    client = Client(World(), 1)
    client.send(REQUEST + b"\0 is no request\n\n" * 1000)
    client.turn()
    assert client.requests == [REQUEST]


def test_a_client_that_sends_byte_by_byte_does_not_have_all_opened_again_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = []
    original = Opener.open

    def count(self: Opener, record: memoryview, out: memoryview) -> tuple[int, int]:
        opened.append(len(record))
        return original(self, record, out)

    monkeypatch.setattr(Opener, "open", count)
    client = Client(World(), 1)
    client.send(REQUEST[:20])
    client.send(REQUEST[20:])
    while client.unread:
        client.turn(limit=1)
    assert client.requests == [REQUEST]
    # The first when it is whole, again when the size of the second is known, and with it.
    assert len(opened) == 4


@pytest.mark.parametrize("key_update", [True, False])
def test_a_state_comes_in_force_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, key_update: bool
) -> None:
    world = World()
    client = Client(world, 1)
    client.send(REQUEST)
    client.turn()
    left = []
    original = Slot.save

    def save(self: Slot, hot: Any) -> None:
        # What a kill leaves right before the switch.
        checkpoint = Checkpoint(memoryview(bytearray(world.memory)))
        left.append(checkpoint.slot(checkpoint.left()[0][1]).load())
        original(self, hot)

    monkeypatch.setattr(Slot, "save", save)
    before = client.edge.cold()
    state = client.state(1, reply=b"welcome", key_update=key_update, blob=b"new")
    assert client.edge.apply(state, 0.0)
    assert [cold for _, _, cold in left] == [before]
    assert client.edge.slot is not None
    assert client.edge.slot.load()[2] == client.edge.cold() != before


# --- requests and states ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 16384])
def test_a_request_is_cut_once_and_what_follows_waits_for_the_state(size: int) -> None:
    client = Client(World(), 1)
    client.send(REQUEST, size=size)
    client.send(batch(frame(1, 0)))
    for _ in range(100):
        client.turn(limit=50)
    assert client.requests == [REQUEST]
    assert client.world.core == []

    assert client.edge.apply(client.state(1, reply=b"welcome", key_update=True, blob=b"b"), 0.0)
    client.turn()
    client.turn()
    client.flush()
    assert client.read() == b"welcome"
    assert client.updates == 1
    assert client.world.core == [(1, [frame(1, 0)])]
    assert client.edge.replay() == channel.Replay(1, 1, Mode.BLOCKS, "peer", "local", "tls", b"b")


def test_a_state_counts_once() -> None:
    client = Client(World(), 1)
    for _ in range(2):
        client.edge.apply(client.state(1, Mode.HTTP, reply=b"once"), 0.0)
    client.flush()
    assert client.read() == b"once"
    assert client.edge.number == 1


def test_requests_behind_each_other_are_answered_one_by_one() -> None:
    client = Client(World(), 1)
    client.send(REQUEST * 3)
    for number in (1, 2, 3):
        client.turn()
        assert len(client.requests) == number
        client.edge.apply(client.state(number, Mode.HTTP, reply=b"%d" % number), 0.0)
    client.turn()
    client.flush()
    assert client.read() == b"123"
    assert client.edge.rx.start == client.edge.rx.end


@pytest.mark.parametrize(
    ("data", "size", "why"),
    [
        (b"\x01\x02\x03", 16384, "not the first line"),
        (b"POST / HTTP/1.1\r\nContent-Length: 70000\r\n\r\n", 16384, "70000 bytes"),
        (b"POST / HTTP/1.1\r\nX: " + b"x" * 1000, 1, "more than 64 records"),
        (b"G" * 5000, 16384, "longer than 4096"),
    ],
)
def test_what_is_no_request_ends_the_connection(data: bytes, size: int, why: str) -> None:
    client = Client(World(), 1)
    client.send(data, size=size)
    with pytest.raises(ConnectionEnds, match=why):
        client.turn()


def test_many_requests_without_a_login_end_the_connection() -> None:
    client = Client(World(), 1)
    body = b"POST / HTTP/1.1\r\nContent-Length: 40000\r\n\r\n" + bytes(40000)
    for number in (1, 2):
        client.send(body)
        client.turn()
        client.edge.apply(client.state(number, Mode.HTTP), 0.0)
    client.send(body)
    with pytest.raises(ConnectionEnds, match="100000 bytes before a login"):
        client.turn()


def test_a_close_is_the_last_thing_that_is_said() -> None:
    client = Client(World(), 1).to_blocks()
    client.edge.apply(client.state(2, Mode.CLOSING, reply=b"bye", close="kicked"), 0.0)
    assert client.edge.closing == "kicked"
    assert not client.edge.apply(client.state(3, reply=b"more"), 0.0)
    client.send(batch(frame(1, 0)))
    client.turn()
    client.edge.deliver(memoryview(bytearray(batch(frame(0, 1)) + b"\0")), 0, 68, 1, 60, 0.0)
    client.flush()
    assert client.read() == b"bye"
    assert client.alerts == [tls_records.Alert.CLOSE_NOTIFY]
    assert client.world.core == []
    assert client.world.turn.drops == {EdgeDrop.NOT_OPEN: 1}


# --- records ------------------------------------------------------------------------------------


def test_a_key_update_is_answered_once_even_inside_a_message() -> None:
    client = Client(World(), 1).to_blocks()
    data = batch(frame(1, 0, 1000))
    client.send(data[:300])
    client.unread += client.sealer.seal_key_update(ask=True)
    client.turn()
    client.send(data[300:600])
    client.turn()
    client.send(data[600:])
    client.turn()
    client.flush()
    assert client.world.core == [(1, [frame(1, 0, 1000)])]
    assert (client.read(), client.updates, client.asked) == (b"", 1, 0)


def test_a_successor_meets_a_key_update_inside_a_message_again() -> None:
    world = World()
    client = Client(world, 1).to_blocks()
    data = batch(frame(1, 0, 1000))
    client.send(data[:300])
    client.unread += client.sealer.seal_key_update(ask=True)
    client.send(data[300:600])
    client.turn()
    client.flush()
    world.die()
    client.work()
    client.send(data[600:])
    client.turn()
    assert world.core == [(1, [frame(1, 0, 1000)])]
    client.flush()
    assert client.read() == b""
    assert client.updates == 2  # one of each process: the client does not mind


def test_too_many_key_updates_end_the_connection() -> None:
    client = Client(World(), 1).to_blocks()
    for now in (1.0, 2.0):
        for _ in range(10):
            client.unread += client.sealer.seal_key_update(ask=True)
            client.turn(now=now)
    client.unread += client.sealer.seal_key_update(ask=True)
    with pytest.raises(TLSError, match="too many"):
        client.turn(now=2.5)


def test_key_updates_of_a_client_that_does_not_read_never_overflow_the_ring() -> None:
    client = Client(World(), 1).to_blocks()
    while client.edge.records.room() > 2000:
        client.edge.deliver(
            memoryview(bytearray(batch(frame(0, 1, 1500)) + b"\0")), 0, 1508, 1, 1500, 0.0
        )

    def ask_for_keys() -> None:
        for second in range(1000):
            client.unread += client.sealer.seal_key_update(ask=True)
            client.turn(now=float(second))

    with pytest.raises(ConnectionEnds, match="no room for a KeyUpdate"):
        ask_for_keys()
    client.edge.close("so it ends")
    client.flush()
    client.read()
    assert client.alerts == [0]


def worn(client: Client) -> OwnRecords:
    """Both directions have used their keys for long."""
    records = client.edge.records
    assert isinstance(records, OwnRecords)
    for direction in (client.sealer, client.opener, records.sealer, records.opener):
        direction.sequence = tls_records.RECORDS_PER_KEY
    client.edge.save()
    return records


def test_worn_keys_are_renewed_once_and_the_client_is_asked_to_renew_its_own() -> None:
    client = Client(World(), 1).to_blocks()
    records = worn(client)
    for _ in range(3):
        client.send(batch(frame(1, 0)))
        client.turn()
    client.flush()
    client.read()
    assert (client.updates, client.asked, records.sealer.sequence) == (1, 1, 0)
    client.unread += client.sealer.seal_key_update(ask=False)
    client.send(batch(frame(1, 0)))
    client.turn()
    assert records.opener.sequence == 1
    client.world.die()
    client.send(batch(frame(1, 0)))
    client.turn()
    assert len(client.world.core) == 5


def test_a_client_that_only_reads_gets_new_keys_too() -> None:
    client = Client(World(), 1).to_blocks()
    records = worn(client)
    records.opener.sequence = client.sealer.sequence = 5
    client.edge.expire(0.0, lambda: 0.5)
    client.flush()
    client.read()
    assert (client.updates, client.asked) == (1, 0)


def test_a_client_that_does_not_renew_its_key_is_ended() -> None:
    client = Client(World(), 1).to_blocks()
    records = worn(client)
    records.opener.sequence = client.sealer.sequence = 2 * tls_records.RECORDS_PER_KEY
    client.send(batch(frame(1, 0)))
    with pytest.raises(ConnectionEnds, match="renew"):
        client.turn()


@pytest.mark.parametrize(
    ("content", "kind", "error"),
    [
        (b"\x01\x00", ALERT, ConnectionEnds),  # close_notify
        (b"\x02\x28", ALERT, ConnectionEnds),
        (b"\x02", ALERT, TLSError),
        (b"\x04\0\0\0", HANDSHAKE, TLSError),
        (b"\x18\0\0\1\0\x18\0\0\1\0", HANDSHAKE, TLSError),
    ],
)
def test_other_records_end_the_connection(
    content: bytes, kind: int, error: type[Exception]
) -> None:
    client = Client(World(), 1).to_blocks()
    client.send(batch(frame(1, 0)))
    client.unread += client.sealer.seal_bytes(content, kind)
    with pytest.raises(error):
        client.turn()


def test_an_alert_that_says_nothing_is_ignored() -> None:
    client = Client(World(), 1).to_blocks()
    client.unread += client.sealer.seal_bytes(b"\x01\x5a", ALERT)  # user_canceled
    client.send(batch(frame(1, 0)))
    client.turn()
    assert client.world.core == [(1, [frame(1, 0)])]


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack("!II", 1, 3201), "block of 3201"),
        (struct.pack("!I", 4097), "batch of 4097"),
        (struct.pack("!I", 0xFFFFFFFE), "batch of"),
        (struct.pack("!II", 0xFFFFFFFF, 513), "keep-alive of 513"),
    ],
)
def test_a_stream_out_of_step_ends_at_once(data: bytes, why: str) -> None:
    client = Client(World(), 1).to_blocks()
    client.send(data)
    with pytest.raises(ConnectionEnds, match=why):
        client.turn()


def test_frames_of_a_client_that_may_not_send_are_dropped() -> None:
    client = Client(World(), 1)
    client.edge.apply(client.state(1, Mode.BLOCKS_OUT), 0.0)
    client.send(batch(frame(1, 0)))
    client.turn()
    assert client.world.core == []
    assert client.world.turn.drops == {EdgeDrop.DIRECTION: 1}


def test_whole_batches_to_one_destination_stay_as_they_came() -> None:
    """The path that must be fast: one slice, the client's own headers in it."""
    world = World()
    a, b = Client(world, 1).to_blocks(), Client(world, 2).to_blocks()
    world.tables[1][MACS[1] + MACS[0]] = b.edge
    data = batch(frame(1, 0), frame(1, 0, 99)) + batch(frame(1, 0, 1514))
    a.send(data)
    a.turn()
    b.flush()
    assert b.read() == data
    assert a.edge.counts()[:2] == b.edge.counts()[2:4] == (3, 60 + 99 + 1514)


def test_a_run_longer_than_a_record_loses_no_byte_at_the_borders() -> None:
    world = World()
    a, b = Client(world, 1).to_blocks(), Client(world, 2).to_blocks()
    world.tables[1][MACS[1] + MACS[0]] = b.edge
    data = batch(*(frame(1, 0, 1514, 1 + number) for number in range(35)))
    a.send(data)
    a.turn()
    b.flush()
    assert b.read() == data


FRAMES = st.builds(
    frame,
    st.integers(0, 3),
    st.just(0),
    st.sampled_from([0, 5, 13, 14, 60, 60, 60, 300, 1514, 1514, 1600, 1601, 3200]),
    st.integers(0, 255),
)
UNITS = st.one_of(
    st.lists(FRAMES, max_size=6).map(lambda frames: batch(*frames)),
    st.integers(0, 512).map(keep_alive),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(UNITS, max_size=8),
    st.integers(0, 2**32),
    st.sampled_from([61, 200, 5000, 16384]),
    st.sampled_from([100, 1000, 1 << 20]),
    st.booleans(),
)
def test_every_frame_goes_where_it_belongs_whatever_the_cuts_and_deaths(
    units: list[bytes], seed: int, record: int, arrival: int, deaths: bool
) -> None:
    """Against the decoder of the client, which cuts frame by frame."""
    world = World()
    source, one, two = (Client(world, conn).to_blocks() for conn in (1, 2, 3))
    # To MAC 1 and 3: client one; to MAC 2: client two; to MAC 0: nobody knows.
    for mac, to in ((1, one), (2, two), (3, one)):
        world.tables[1][MACS[mac] + MACS[0]] = to.edge
    chance = random.Random(seed)
    stream = b"".join(units)
    source.send(stream, size=record)
    parsers = {1: BlockDecoder(), 2: BlockDecoder()}
    got: dict[int, list[bytes]] = {1: [], 2: []}

    while source.unread:
        source.turn(limit=arrival)
        if deaths and chance.random() < 0.3:
            world.die()
            source.work()  # what lies in the ring raises no event
        for client in (one, two):
            client.flush(limit=chance.choice([10, 1 << 20]))
    for index, client in ((1, one), (2, two)):
        client.flush()
        got[index] += parsers[index].feed(client.read())

    frames = BlockDecoder().feed(stream)  # drops what must be dropped
    assert got[1] == [f for f in frames if f[:6] in {MACS[1], MACS[3]}]
    assert got[2] == [f for f in frames if f[:6] == MACS[2]]
    missed = [f for _, part in world.core for f in part]
    assert missed == [f for f in frames if f[:6] == MACS[0]]
    assert source.edge.rx.start == source.edge.rx.end


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(1, 100))
def test_noise_in_the_data_phase_raises_nothing_but_what_it_may(noise: bytes, cut: int) -> None:
    client = Client(World(), 1).to_blocks()
    data = batch(frame(0, 1)) + noise
    client.send(data, size=cut)
    try:
        expected = BlockDecoder().feed(data)
    except ProtocolError:
        with pytest.raises(ConnectionEnds):
            client.turn()
        return
    if cut * 64 < len(data):
        return  # it may be a message in too many records
    client.turn()
    assert [f for _, part in client.world.core for f in part] == expected


# --- deaths -------------------------------------------------------------------------------------


def test_what_left_is_never_sealed_anew_with_another_text() -> None:
    """A death before the switch: the number is used again, but nobody has seen its first use."""
    world = World()
    client = Client(world, 1).to_blocks()
    client.edge.deliver(memoryview(bytearray(batch(frame(0, 1)) + b"\0")), 0, 68, 1, 60, 0.0)
    client.flush(limit=30)  # a record cut in the middle
    records = client.edge.records
    assert isinstance(records, OwnRecords)
    number = records.sealer.sequence
    # Sealed, not in force, not sent.
    records.write(memoryview(bytearray(b"lost text\0")), 0, 9)
    assert records.sealer.sequence == number + 1
    world.die()
    assert isinstance(client.edge.records, OwnRecords)
    assert client.edge.records.sealer.sequence == number
    client.edge.deliver(memoryview(bytearray(batch(frame(0, 2)) + b"\0")), 0, 68, 1, 60, 0.0)
    client.flush()
    assert client.read() == batch(frame(0, 1)) + batch(frame(0, 2))


def test_frames_in_the_destination_ring_survive_before_the_source_is_saved() -> None:
    world = World()
    a, b = Client(world, 1).to_blocks(), Client(world, 2).to_blocks()
    world.tables[1][MACS[1] + MACS[0]] = b.edge
    a.send(batch(frame(1, 0)))
    piece = a.edge.rx.free()
    piece[: len(a.unread)] = a.unread
    a.edge.rx.put(len(a.unread))
    a.received += len(a.unread)
    a.edge.receive(0.0)
    world.die()  # the source has not been saved
    a.work()
    b.flush()
    assert b.read() == batch(frame(1, 0)) * 2  # twice is allowed, never is not


def test_a_successor_goes_on_with_keys_mode_blob_and_close() -> None:
    world = World()
    client = Client(world, 1)
    client.edge.apply(client.state(1, key_update=True, blob=b"my blob", timeout=7.0), 0.0)
    client.unread += client.sealer.seal_key_update(ask=False)
    client.turn()
    world.die()
    edge = client.edge
    assert (edge.mode, edge.number, edge.blob, edge.timeout) == (Mode.BLOCKS, 1, b"my blob", 7.0)
    client.send(batch(frame(1, 0)))
    client.turn()
    assert world.core == [(1, [frame(1, 0)])]
    edge.close("kicked")
    world.die()
    assert client.edge.closing == "kicked"
    client.flush()
    assert client.read() == b""
    assert client.alerts == [0]


def test_a_batch_cut_by_a_death_goes_on_in_its_middle() -> None:
    world = World()
    client = Client(world, 1).to_blocks()
    frames = [frame(1, 0, 100, fill) for fill in range(5)]
    data = batch(*frames)
    client.send(data[:250])
    client.turn()
    world.die()
    client.send(data[250:])
    client.turn()
    assert [f for _, part in world.core for f in part] == frames


# --- going out ----------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(14, 300), max_size=5), min_size=1, max_size=6),
    st.integers(0, 3000),
)
def test_what_does_not_fit_is_cut_at_a_frame(batches: list[list[int]], room: int) -> None:
    data = b"".join(batch(*(frame(0, 1, size) for size in sizes)) for sizes in batches)
    buffer = memoryview(bytearray(data))
    end, frames, octets = connection._cut(buffer, 0, min(room, len(data)))
    assert end <= room
    kept = BlockDecoder().feed(bytes(buffer[:end]))
    assert len(kept) == frames
    assert sum(map(len, kept)) == octets
    sizes = [size for sizes in batches for size in sizes]
    assert [len(f) for f in kept] == sizes[:frames]
    if frames < len(sizes):
        # One more, with a header of its own, would not have fitted.
        assert end + 8 + sizes[frames] > room


def test_no_write_is_larger_than_the_room() -> None:
    client = Client(World(), 1).to_blocks()
    sent = 0
    for number in range(200):
        data = bytearray(batch(*(frame(0, 1, 1514, number % 256) for _ in range(20))) + b"\0")
        client.edge.deliver(memoryview(data), 0, len(data) - 1, 20, 20 * 1514, 0.0)
        if number % 3 == 0:
            client.flush(limit=20000)
        sent += 20
    dropped = sum(client.edge.drops)
    assert client.edge.frames_out + dropped == sent
    assert client.world.turn.drops == {EdgeDrop.SLOW_CLIENT: dropped}
    client.flush()
    assert len(BlockDecoder().feed(client.read())) == client.edge.frames_out


def test_large_misses_reach_the_core_in_pieces_of_whole_frames() -> None:
    client = Client(World(), 1).to_blocks()
    frames = [frame(1, 0, 1514, fill) for fill in range(40)]
    client.send(batch(*frames[:20]) + batch(*frames[20:]))
    client.turn()
    assert len(client.world.core) == 1
    assert [f for _, part in client.world.core for f in part] == frames
    pieces = connection._pieces(channel.join_blocks(frames * 3))
    assert [f for piece in pieces for f in channel.split_blocks(piece)] == frames * 3
    assert max(map(len, pieces)) <= channel.MAX_BLOCKS


# --- time ---------------------------------------------------------------------------------------


def test_keep_alives_come_at_once_and_then_at_random_within_bounds() -> None:
    client = Client(World(), 1).to_blocks()
    parser = BlockDecoder()
    sent = []
    chance = random.Random(1)
    for tenth in range(400):
        client.edge.heard_at = tenth / 10
        client.edge.expire(tenth / 10, chance.random)
        client.flush()
        before = parser.keep_alives
        assert parser.feed(client.read()) == []
        if parser.keep_alives > before:
            sent.append(tenth / 10)
    assert sent[0] == 0.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(sent)]
    assert min(gaps) >= 4.0
    assert max(gaps) <= 10.1
    assert len(set(gaps)) > 1


def test_frames_postpone_the_next_keep_alive() -> None:
    client = Client(World(), 1).to_blocks()
    client.edge.expire(0.0, lambda: 0.0)  # the next one is due at 4 s
    client.edge.deliver(memoryview(bytearray(batch(frame(0, 1)) + b"\0")), 0, 68, 1, 60, 3.0)
    client.flush()
    client.read()
    client.edge.expire(6.9, lambda: 0.0)
    assert client.edge.tx.start == client.edge.tx.end
    client.edge.expire(7.0, lambda: 0.0)
    assert client.edge.tx.start < client.edge.tx.end


def test_silence_ends_a_connection_and_only_whole_blocks_are_heard() -> None:
    client = Client(World(), 1).to_blocks()
    client.send(keep_alive(3))
    client.turn(now=5.0)
    client.edge.expire(25.0, lambda: 0.5)
    client.send(struct.pack("!II", 0xFFFFFFFF, 5))  # not whole
    client.turn(now=24.0)
    with pytest.raises(ConnectionEnds, match="silent for 20 s"):
        client.edge.expire(25.1, lambda: 0.5)


def test_a_client_that_only_listens_may_be_silent() -> None:
    client = Client(World(), 1)
    client.edge.apply(client.state(1, Mode.BLOCKS_OUT), 0.0)
    client.edge.expire(1000.0, lambda: 0.5)
