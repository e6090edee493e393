"""A whole edge in a process of its own, OpenSSL clients in front of it, a scripted core behind."""

import contextlib
import fcntl
import mmap
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn import channel
from pkvpn.channel import EdgeDrop, Mode
from pkvpn.edge import kernel, main
from pkvpn.edge.checkpoint import Checkpoint
from pkvpn.edge.connection import OwnRecords
from pkvpn.edge.main import EdgeSettings
from pkvpn.protocol.blocks import BlockDecoder
from tests.edge.conftest import Pem
from tests.edge.fake_child import FakeChild, FakeTree
from tests.support import eventually

pytestmark = pytest.mark.slow

REQUEST = b"POST /vpnsvc/connect.cgi HTTP/1.1\r\nContent-Length: 10\r\n\r\nVPNCONNECT"
A, B = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"


def frame(to: bytes, source: bytes, size: int = 60, fill: int = 0x55) -> bytes:
    return to + source + b"\x08\x00" + bytes([fill]) * (size - 14)


def batch(*frames: bytes) -> bytes:
    return struct.pack("!I", len(frames)) + channel.join_blocks(list(frames))


class Client:
    """A client that speaks TLS by OpenSSL."""

    def __init__(
        self,
        tree: FakeTree,
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        buffer: int = 0,
        source: str = "127.0.0.1",
    ) -> None:
        """``source``: from another address than it listens on, it is nobody of ours."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = version
        plain = socket.socket()
        if buffer:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        plain.settimeout(10)
        plain.bind((source, 0))
        plain.connect(tree.address)
        self.tree = tree
        tree.clients.append(plain)
        self.sock = context.wrap_socket(plain, suppress_ragged_eofs=False)
        tree.clients[-1] = self.sock
        opened = tree.core.wait_for(channel.Opened)
        self.conn: int = opened.conn
        self.tls: str = opened.tls
        assert opened.peer == "{}:{}".format(*self.sock.getsockname())

    def login(self, timeout: float = 20.0, blob: bytes = b"blob") -> "Client":
        """Go through one request to the data phase."""
        self.sock.sendall(REQUEST)
        request = self.tree.core.wait_for(channel.Request)
        assert request == (self.conn, 1, REQUEST)
        self.tree.core.say(
            channel.State(self.conn, 1, b"welcome", Mode.BLOCKS, "", timeout, True, blob)
        )
        assert self.read(7) == b"welcome"
        return self

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, data
            data += piece
        return data

    def read_frames(self, count: int) -> list[bytes]:
        """The next frames; keep-alives are skipped."""
        frames: list[bytes] = []
        while len(frames) < count:
            (n,) = struct.unpack("!I", self.read(4))
            if n == 0xFFFFFFFF:
                self.read(struct.unpack("!I", self.read(4))[0])
                continue
            frames += [self.read(struct.unpack("!I", self.read(4))[0]) for _ in range(n)]
        return frames

    def read_to_the_end(self) -> bytes:
        """All that comes before the close_notify; an end without one is an ssl.SSLEOFError."""
        data = b""
        while piece := self.sock.recv(65536):
            data += piece
        return data

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def tree(pem: Pem) -> Iterator[FakeTree]:
    tree = FakeTree(
        EdgeSettings(index=1, login_timeout=5.0, max_connections=50), pem.joined
    )  # fmt: skip
    tree.start()
    tree.core.expect(channel.Adopted)
    tree.core.say(channel.Hello(channel.VERSION, 1))
    assert tree.core.expect(channel.Replayed).epoch == 1
    yield tree
    tree.close()


@pytest.fixture
def pair(tree: FakeTree) -> Iterator[tuple[Client, Client]]:
    """Two clients in the data phase, with known flows between A of the first and B of the other."""
    a, b = Client(tree).login(), Client(tree).login()
    tree.core.say(channel.Flow(a.conn, B + A, b.conn))
    tree.core.say(channel.Flow(b.conn, A + B, a.conn))
    # Frames the core sends are behind the flows only if the edge has read the flows: ask it.
    tree.core.say(channel.Hello(channel.VERSION, 1))
    while not isinstance(tree.core.hear(), channel.Replayed):
        pass
    yield a, b
    a.close()
    b.close()


def test_what_is_no_message_of_the_core_is_passed_over(tree: FakeTree) -> None:
    client = Client(tree)
    for sock in (tree.core.control, tree.core.frames):
        for garbage in (b"", b"\xff", b"\x12" + bytes(65535), bytes(65600)):
            sock.send(garbage)
    client.login()
    tree.core.say(channel.FramesOut((client.conn,), channel.join_blocks([frame(A, B)])))
    assert client.read_frames(1) == [frame(A, B)]
    client.close()


def test_a_login_ends_in_the_data_phase_and_misses_reach_the_core(tree: FakeTree) -> None:
    client = Client(tree)
    assert client.tls.startswith("TLSv1.3 own TLS_AES_256_GCM")
    client.login()
    frames = [frame(b"\xff" * 6, A), frame(B, A, 1514)]
    client.sock.sendall(batch(*frames))
    assert tree.core.hear_frames() == (client.conn, frames)
    tree.core.say(channel.FramesOut((client.conn,), channel.join_blocks([frame(A, B)])))
    assert client.read_frames(1) == [frame(A, B)]
    client.close()
    assert tree.core.expect(channel.Closed).why == "client left"


def test_known_flows_do_not_reach_the_core(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    a, b = pair
    frames = [frame(B, A, 1514, fill) for fill in range(100)]
    a.sock.sendall(batch(*frames[:50]) + batch(*frames[50:]))
    assert b.read_frames(100) == frames
    # A stranger's source, from a connection it does not belong to.
    b.sock.sendall(batch(frame(B, A), frame(A, B)))
    assert a.read_frames(1) == [frame(A, B)]
    assert tree.core.hear_frames() == (b.conn, [frame(B, A)])


def test_flows_end_when_the_core_says_so(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    a, _ = pair
    tree.core.say(channel.Unflow(a.conn, B + A))
    eventually_misses(tree, a, frame(B, A))


def eventually_misses(tree: FakeTree, client: Client, missed: bytes) -> None:
    """Send the frame until it is not taken by a flow any more."""
    tree.core.frames.settimeout(0.05)

    def reaches_the_core() -> bool:
        client.sock.sendall(batch(missed))
        try:
            return tree.core.hear_frames() == (client.conn, [missed])
        except TimeoutError:
            return False

    eventually(reaches_the_core)
    tree.core.frames.settimeout(10)


def test_a_kick_ends_with_close_notify(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    a, b = pair
    tree.core.say(channel.State(a.conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    a.read_to_the_end()
    closed = tree.core.wait_for(channel.Closed)
    assert closed == (a.conn, "kicked")
    # Its flows went with it.
    eventually_misses(tree, b, frame(A, B))


def test_who_goes_on_sending_hears_the_goodbye_and_no_reset(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    """Stock clients are sending whenever they are kicked; a reset keeps them from coming back."""
    busy = pair[0].sock
    busy.setblocking(False)
    tree.core.say(channel.State(pair[0].conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    data = batch(*[frame(B, A, 1514)] * 50)

    def hears_goodbye() -> bool:
        with contextlib.suppress(ssl.SSLWantWriteError):
            busy.send(data)
        try:
            return not busy.recv(65536)
        except ssl.SSLWantReadError:
            return False

    eventually(hears_goodbye)
    with socket.socket(fileno=os.dup(busy.fileno())) as raw:
        assert raw.recv(1) == b""  # said to TCP as well, though a duplicate is kept elsewhere
        for _ in range(50):
            raw.sendall(data[:1000])
            eventually(lambda: not kernel.unsent(raw.fileno()))  # its answer has come, if any
    busy.close()
    assert tree.core.wait_for(channel.Closed).why == "kicked"
    eventually(lambda: len(tree.drain()) == 1)


def test_nobody_watches_a_connection_that_is_closed(tree: FakeTree) -> None:
    """As long as a duplicate lives, its entry would go on firing, for a number that is another's
    by then."""
    before = watched(tree)
    client = Client(tree).login()
    assert len(watched(tree)) == len(before) + 1
    tree.core.say(channel.State(client.conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    client.read_to_the_end()
    # The client does not close, and nobody has taken yet what the edge gave and dropped.
    eventually(lambda: watched(tree) == before)
    tree.drain()


def watched(tree: FakeTree) -> list[str]:
    """The entries of the edge's epoll."""
    for name in os.listdir(f"/proc/{tree.pid}/fd"):
        if os.readlink(f"/proc/{tree.pid}/fd/{name}") == "anon_inode:[eventpoll]":
            with open(f"/proc/{tree.pid}/fdinfo/{name}", encoding="ascii") as file:
                return sorted(line.split()[1] for line in file if line.startswith("tfd:"))
    raise AssertionError("the edge has no epoll")


def test_a_stop_says_goodbye_to_everybody(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    fresh = Client(tree)
    assert tree.stop() == 0
    for client in (*pair, fresh):
        client.read_to_the_end()
    assert tree.given == {}
    fresh.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x00\x00\x01\x00\x00\x0c\x81" + bytes(3201),  # a block of 3201 bytes
        b"\x00\x00\x10\x01",  # a batch of 4097
        b"\xff\xff\xff\xff\x00\x00\x02\x01",  # a keep-alive of 513
    ],
)
def test_a_stream_out_of_step_ends_with_close_notify(tree: FakeTree, garbage: bytes) -> None:
    client = Client(tree).login()
    client.sock.sendall(garbage)
    client.read_to_the_end()
    client.close()


def test_frames_of_odd_sizes_are_dropped_and_the_stream_goes_on(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    odd = [b"short", b"", frame(B, A, 1601), frame(B, A, 3200)]
    good = [frame(B, A, 1600), frame(B, A, 14), frame(B, A, 1514)]
    a.sock.sendall(batch(odd[0], good[0], odd[1], odd[2], good[1], odd[3], good[2]))
    assert b.read_frames(3) == good
    a.sock.sendall(b"\0\0\0\0" + b"\xff\xff\xff\xff\0\0\2\0" + bytes(512) + batch(good[0]))
    assert b.read_frames(1) == [good[0]]
    counts = tree.core.wait_for(channel.Counts)
    while counts.conn != a.conn or counts.frames_in < 4:
        counts = tree.core.wait_for(channel.Counts)
    dropped = {why.value: n for why, n in zip(EdgeDrop, counts.drops, strict=True) if n}
    assert dropped == {"short": 1, "oversize": 2}
    assert counts.bytes_in == 1600 + 14 + 1514 + 1600
    totals = tree.core.wait_for(channel.Totals)
    assert totals.drops == counts.drops
    # They outlive the edge.
    tree.kill()
    tree.start()
    tree.core.say(channel.Hello(channel.VERSION, 2))
    assert tree.core.wait_for(channel.Totals) == totals


def test_garbage_before_and_in_the_handshake_costs_one_connection(tree: FakeTree) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x10" + bytes(16)):
        with socket.create_connection(tree.address, timeout=10) as sock:
            sock.sendall(noise)
            while sock.recv(1000):
                pass
    Client(tree).close()


def test_noise_instead_of_a_request_ends_with_close_notify(tree: FakeTree) -> None:
    client = Client(tree)
    client.sock.sendall(b"\x01\x02\x03")
    client.read_to_the_end()
    client.close()


def test_a_login_that_takes_too_long_is_ended_however_busy(tree: FakeTree) -> None:
    client = Client(tree)
    client.sock.settimeout(0.2)

    def goodbye() -> bool:
        client.sock.sendall(b"G")  # one byte of a request line, again and again
        return not client.sock.recv(100)

    eventually(goodbye)
    assert tree.core.wait_for(channel.Closed).why == "login takes too long"
    client.close()


def test_tls_12_works_with_records_of_openssl(tree: FakeTree) -> None:
    old, new = Client(tree, ssl.TLSVersion.TLSv1_2).login(), Client(tree).login()
    assert old.tls.startswith("TLSv1.2 openssl")
    tree.core.say(channel.Flow(old.conn, B + A, new.conn))
    tree.core.say(channel.FramesOut((old.conn, new.conn), channel.join_blocks([frame(A, B)])))
    assert old.read_frames(1) == new.read_frames(1) == [frame(A, B)]
    frames = [frame(B, A, 1514, fill) for fill in range(100)]
    old.sock.sendall(batch(*frames))
    assert new.read_frames(100) == frames
    tree.core.say(channel.State(old.conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    old.read_to_the_end()
    old.close()
    new.close()


def test_memory_of_connections_that_are_gone_is_given_back(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    frames = [frame(B, A, 1514)] * 200
    a.sock.sendall(batch(*frames))
    assert b.read_frames(200) == frames
    used = os.fstat(tree.checkpoint).st_blocks * 512
    assert used > 50_000
    a.close()
    b.close()
    eventually(lambda: os.fstat(tree.checkpoint).st_blocks * 512 < 50_000)


def test_memory_of_connections_that_rest_is_not_mapped(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    """The kernel would take it apart, page by page, before anybody hears that the edge is dead."""

    def rest_soon() -> None:
        main._MEMORY_INTERVAL = 0.05

    def mapped() -> int:
        """KiB of the checkpoint."""
        text = Path(f"/proc/{tree.pid}/smaps").read_text()
        found = re.search(r"memfd:checkpoint.*?^Rss: +(\d+) kB", text, re.MULTILINE | re.DOTALL)
        return int(found[1]) if found else -1

    a, b = pair
    restart(tree, before=rest_soon)
    frames = [frame(B, A, 1514)] * 9
    a.sock.sendall(batch(*frames))
    assert b.read_frames(9) == frames
    # What was touched since, with what the kernel maps around it; the rings alone are 32.
    eventually(lambda: 0 <= mapped() <= 52)
    a.sock.sendall(batch(*frames))
    assert b.read_frames(9) == frames


def test_keep_alives_come_and_silence_ends(tree: FakeTree) -> None:
    client = Client(tree).login(timeout=2.0)
    for _ in range(2):
        head, size = struct.unpack("!II", client.read(8))
        assert head == 0xFFFFFFFF
        client.read(size)
        # Two may be as far apart as the silence that ends it: this one begins anew.
        client.sock.sendall(struct.pack("!II", head, 0))
    client.read_to_the_end()
    assert tree.core.wait_for(channel.Closed).why == "silent for 2 s"
    client.close()


def test_a_slow_client_costs_its_own_frames_only(tree: FakeTree) -> None:
    slow, quick, source = Client(tree, buffer=4096).login(), Client(tree).login(), Client(tree)
    source.login()
    tree.core.say(channel.Flow(source.conn, A + B, slow.conn))
    tree.core.say(channel.Flow(source.conn, B + B, quick.conn))
    sent = 0

    def some_were_dropped() -> bool:
        nonlocal sent
        source.sock.sendall(batch(*(frame(A, B, 1514) for _ in range(100))))
        source.sock.sendall(batch(frame(B, B, 1514, sent % 256)))
        assert quick.read_frames(1) == [frame(B, B, 1514, sent % 256)]
        sent += 1
        tree.core.control.setblocking(False)
        try:
            counts = tree.core.wait_for(channel.Counts)
        except BlockingIOError:
            return False
        return bool(counts.conn == slow.conn and any(counts.drops))

    # Known flows to it are there as soon as the first frame has come through.
    eventually(some_were_dropped, within=20.0)
    tree.core.control.settimeout(10)
    # What arrives is whole, and goes on.
    assert slow.read_frames(300) == [frame(A, B, 1514)] * 300
    for client in (slow, quick, source):
        client.close()


def test_a_new_core_hears_of_everything_and_is_asked_again(tree: FakeTree) -> None:
    live, asking = Client(tree).login(blob=b"my blob"), Client(tree)
    asking.sock.sendall(REQUEST)
    assert tree.core.wait_for(channel.Request).conn == asking.conn

    tree.core.say(channel.Hello(channel.VERSION, 2))
    replays = [tree.core.expect(channel.Replay) for _ in range(2)]
    assert [(r.conn, r.number, r.mode, r.blob) for r in replays] == [
        (live.conn, 1, Mode.BLOCKS, b"my blob"),
        (asking.conn, 0, Mode.HTTP, b""),
    ]
    assert tree.core.expect(channel.Replayed).epoch == 2
    assert tree.core.expect(channel.Request) == (asking.conn, 1, REQUEST)
    answer = channel.State(asking.conn, 1, b"once", Mode.HTTP, "", 0.0, False, b"")
    tree.core.say(answer)
    tree.core.say(answer)  # the dead core may have answered too
    assert asking.read(4) == b"once"
    asking.sock.sendall(REQUEST)
    assert tree.core.expect(channel.Request).number == 2
    live.close()
    asking.close()


def test_flows_outlive_a_core_and_end_if_the_new_one_does_not_want_them(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    tree.core.say(channel.Hello(channel.VERSION, 2))
    tree.core.wait_for(channel.Replayed)
    tree.core.say(channel.Flow(b.conn, A + B, a.conn))
    a.sock.sendall(batch(frame(B, A)))
    assert b.read_frames(1) == [frame(B, A)]
    eventually_misses(tree, a, frame(B, A))
    b.sock.sendall(batch(frame(A, B)))
    assert a.read_frames(1) == [frame(A, B)]


# --- the death of an edge -----------------------------------------------------------------------


def restart(
    tree: FakeTree, *, epoch: int = 1, before: Callable[[], None] = lambda: None
) -> list[channel.FromEdge]:
    """Kill the edge; what the next one tells the core of that epoch, up to its Replayed."""
    tree.kill()
    tree.start(before)
    tree.core.wait_for(channel.Adopted)
    tree.core.say(channel.Hello(channel.VERSION, epoch))
    heard: list[channel.FromEdge] = []
    while not isinstance(message := tree.core.hear(), channel.Replayed):
        heard.append(message)
    assert message.epoch == epoch
    return heard


def test_a_killed_edge_loses_no_connection(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    a, b = pair
    for round_ in range(4):
        if round_ % 2:  # a core that has not heard of them
            replays = restart(tree, epoch=1 + round_)
            assert {(r.conn, r.number, r.mode, r.blob) for r in replays} == {  # type: ignore[union-attr]
                (client.conn, 1, Mode.BLOCKS, b"blob") for client in pair
            }
            assert all(r.tls.startswith("TLSv1.3 own") for r in replays)  # type: ignore[union-attr]
        else:  # the one that knows them
            (present,) = restart(tree, epoch=max(1, round_))
            assert isinstance(present, channel.Present)
            assert set(present.pairs) == {(a.conn, 1), (b.conn, 1)}
        tree.core.say(channel.FramesOut((b.conn,), channel.join_blocks([frame(B, A, 99)])))
        assert b.read_frames(1) == [frame(B, A, 99)]
        # The core has not said the flow again.
        frames = [frame(B, A, 1000 + round_, fill) for fill in range(50)]
        a.sock.sendall(batch(*frames))
        assert b.read_frames(50) == frames
    tree.core.say(channel.State(a.conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    a.read_to_the_end()


def test_flows_of_a_dead_edge_end_if_the_core_does_not_say_them_again(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    restart(tree)
    tree.core.say(channel.Flow(b.conn, A + B, a.conn))
    eventually_misses(tree, a, frame(B, A))
    b.sock.sendall(batch(frame(A, B)))
    assert a.read_frames(1) == [frame(A, B)]
    # Nor does the next edge have them.
    restart(tree)
    a.sock.sendall(batch(frame(B, A, 70)))
    assert tree.core.hear_frames() == (a.conn, [frame(B, A, 70)])


def no_chores() -> None:
    """Runs in an edge: whoever sleeps sleeps until woken."""
    main._CHORES_TIME = 0.0


def all_asleep(tree: FakeTree) -> None:
    """As if nobody had said anything lately, in the memory of a dead edge."""
    data = bytearray(os.pread(tree.checkpoint, 8192, 0))
    (slots,) = struct.unpack_from("=I", data, 12)
    os.pwrite(tree.checkpoint, bytes(2 * slots), 4096 + slots)


def test_a_sleeper_is_woken_by_all_that_concerns_it(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    c = Client(tree).login()
    tree.core.say(channel.Flow(c.conn, B + B, b.conn))
    tree.core.say(channel.Hello(channel.VERSION, 1))
    tree.core.wait_for(channel.Replayed)
    tree.kill()
    all_asleep(tree)
    tree.start(no_chores)
    tree.core.wait_for(channel.Adopted)
    for client in (a, b, c):
        client.sock.sendall(batch(frame(A, A)))  # nobody reads it yet
    # By a flow from it; and a frame by a flow wakes whom it goes to.
    tree.core.say(channel.Flow(c.conn, A + B, a.conn))
    assert tree.core.hear_frames() == (c.conn, [frame(A, A)])
    c.sock.sendall(batch(frame(B, B), frame(A, B)))
    assert b.read_frames(1) == [frame(B, B)]
    assert a.read_frames(1) == [frame(A, B)]
    assert {tree.core.hear_frames()[0] for _ in range(2)} == {a.conn, b.conn}


def test_flows_wait_for_the_end_of_a_replay(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    """Also where a core before that one had heard all: its time for old flows is not over then."""

    def slow_replay() -> None:
        no_chores()
        main._OLD_FLOWS_TIMEOUT = 0.1

    a, b = pair
    restart(tree, before=slow_replay)
    tree.core.say(channel.Hello(channel.VERSION, 2))
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        tree.core.say(channel.FramesOut((a.conn,), channel.join_blocks([frame(A, B)])))
        assert a.read_frames(1) == [frame(A, B)]  # it has had a turn
        a.sock.sendall(batch(frame(B, A)))
        assert b.read_frames(1) == [frame(B, A)]


def test_a_sleeper_is_woken_by_a_frame_of_the_core_and_by_a_kick(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    tree.kill()
    all_asleep(tree)
    tree.start(no_chores)
    tree.core.say(channel.FramesOut((b.conn,), channel.join_blocks([frame(B, A)])))
    assert b.read_frames(1) == [frame(B, A)]
    tree.core.say(channel.State(a.conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    a.read_to_the_end()
    assert tree.core.wait_for(channel.Closed) == (a.conn, "kicked")


def test_who_has_said_something_and_got_no_answer_need_not_be_adopted_at_once(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    """Of thousands of idle clients that would be all who said a keep-alive."""

    def marked() -> int:
        data = os.pread(tree.checkpoint, 8192, 0)
        (slots,) = struct.unpack_from("=I", data, 12)
        return sum(data[4096 + slots : 4096 + 2 * slots])

    a, b = pair
    for client in (a, b):
        client.sock.sendall(batch(frame(A, A)))  # no flow
        assert tree.core.hear_frames() == (client.conn, [frame(A, A)])
    assert marked() < 2  # the edge may not yet be done with the last of them


def test_a_broadcast_wakes_sleepers_by_and_by_and_whoever_is_awake_has_it_first(
    tree: FakeTree, tmp_path: Path
) -> None:
    """Thousands of them would be the silence of everybody else."""
    trace = tmp_path / "trace"

    def slow() -> None:
        no_chores()
        main._CONTROL_TIME = 0.0  # one in a turn
        turn, wake = main.Edge.turn, main.Edge._wake

        def traced_turn(edge: main.Edge, timeout: float) -> None:
            with trace.open("a") as file:
                file.write(" ")
            turn(edge, timeout)

        def traced_wake(edge: main.Edge, conn: int) -> main.Peer | None:
            with trace.open("a") as file:
                file.write("w" if conn in edge._sleeping else ".")
            return wake(edge, conn)

        main.Edge.turn = traced_turn  # type: ignore[assignment, method-assign]
        main.Edge._wake = traced_wake  # type: ignore[assignment, method-assign]

    clients = [Client(tree).login() for _ in range(12)]
    tree.kill()
    all_asleep(tree)
    tree.start(slow)
    awake = clients[0]
    tree.core.say(channel.FramesOut((awake.conn,), channel.join_blocks([frame(A, B)])))
    assert awake.read_frames(1) == [frame(A, B)]
    everybody = frame(b"\xff" * 6, B)
    # Behind it comes what no sleeper gets before it.
    last = clients[-1]
    tree.core.say(
        channel.FramesOut(tuple(one.conn for one in clients), channel.join_blocks([everybody]))
    )
    tree.core.say(channel.FramesOut((last.conn,), channel.join_blocks([frame(A, B)])))
    for client in clients[:-1]:
        assert client.read_frames(1) == [everybody]
    assert last.read_frames(2) == [everybody, frame(A, B)]
    turns = trace.read_text().split(" ")
    assert sum(turn.count("w") for turn in turns) == len(clients)
    assert max(turn.count("w") for turn in turns) == 1


def test_sleepers_are_woken_by_their_clients_and_by_time(tree: FakeTree) -> None:
    clients = [Client(tree).login(timeout=2.0) for _ in range(20)]
    tree.kill()
    all_asleep(tree)
    clients[7].sock.sendall(batch(frame(B, A)))
    tree.start()
    assert tree.core.hear_frames() == (clients[7].conn, [frame(B, A)])
    # Nobody touches the others: their keep-alives come, and the silence of their clients ends them.
    for client in clients:
        client.read_to_the_end()


def test_sleepers_count_for_the_limit_and_are_told_goodbye(tree: FakeTree) -> None:
    clients = [Client(tree).login() for _ in range(5)]
    tree.kill()
    all_asleep(tree)
    tree.start(no_chores)
    assert tree.stop() == 0
    for client in clients:
        client.read_to_the_end()
    assert tree.given == {}


def test_a_connection_that_carried_nothing_has_nothing_to_count(tree: FakeTree) -> None:
    client = Client(tree)
    client.sock.close()
    assert tree.core.expect(channel.Closed).conn == client.conn


def test_a_connection_that_only_the_dead_edge_knew_is_told_to_the_core(tree: FakeTree) -> None:
    """As if the edge had died right before it said so."""
    client = Client(tree)
    tree.kill()
    tree.start()
    opened = tree.core.wait_for(channel.Opened)
    assert opened.conn == client.conn
    client.login()


def test_memory_of_another_version_starts_anew_and_says_so(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    tree.kill()
    os.pwrite(tree.checkpoint, struct.pack("=I", 99), 8)
    tree.start()
    for client in pair:
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            client.read_to_the_end()
    eventually(lambda: not tree.drain())
    Client(tree).login()


def test_where_the_kernel_does_not_tell_positions_nothing_is_adopted(pem: Pem) -> None:
    def check() -> str:
        return "told so by a test"

    def distrust() -> None:
        kernel.check_positions = check

    tree = FakeTree(EdgeSettings(index=1), pem.joined)
    try:
        tree.start(distrust)
        client = Client(tree).login()
        assert tree.drain() == {}
        tree.kill()
        tree.start()  # also an edge that has not tried it itself
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            client.read_to_the_end()
        client = Client(tree).login()
        assert tree.drain() == {}
        assert tree.stop(b"yield") == 0
        client.read_to_the_end()  # a goodbye, so that it comes back by its key
    finally:
        tree.close()


def test_an_edge_does_not_touch_what_another_still_has(tree: FakeTree) -> None:
    """Killed, and not dead yet: its lock on the memory is what tells."""
    tree.kill()
    still = os.open(f"/proc/self/fd/{tree.checkpoint}", os.O_RDWR)
    fcntl.flock(still, fcntl.LOCK_EX)
    ready_before: list[bool] = []

    def die() -> None:
        ready_before.append(tree.ready)
        os.close(still)

    dying = threading.Timer(0.5, die)
    dying.start()
    tree.start()
    dying.join()
    assert ready_before == [False]


def test_the_memory_neither_shrinks_nor_grows(tree: FakeTree) -> None:
    size = os.fstat(tree.checkpoint).st_size
    for other in (0, size - 4096, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(tree.checkpoint, other)


def test_a_slot_that_makes_no_sense_costs_its_own_connection(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    other = Client(tree).login()
    tree.kill()
    memory = Checkpoint(memoryview(mmap.mmap(tree.checkpoint, 0)))
    slot = memory.slot(memory.left()[0][a.conn])
    _, hot, _ = slot.load()
    # A position that lies outside the ring.
    slot.save(hot._replace(in_position=hot.in_position + 1, in_base=hot.in_base + 1))
    tree.start()
    eventually(lambda: len(tree.drain()) == 2)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        a.read_to_the_end()
    tree.core.say(channel.Flow(b.conn, A + B, other.conn))
    b.sock.sendall(batch(frame(A, B)))
    assert other.read_frames(1) == [frame(A, B)]


def test_descriptors_of_others_are_not_adopted(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    """Told by the cookie: names could be wrong, as after a bug in whoever kept them."""
    tree.kill()
    one, two = tree.given
    tree.given[one], tree.given[two] = tree.given[two], tree.given[one]
    tree.start()
    eventually(lambda: not tree.drain())
    for client in pair:
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            client.read_to_the_end()
    Client(tree).login()


def test_a_core_of_another_version_is_not_heeded_and_flows_go_on(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    tree.core.say(channel.Hello(channel.VERSION + 1, 2))
    assert tree.core.wait_for(channel.Adopted).version == channel.VERSION
    tree.core.say(channel.State(a.conn, 2, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
    tree.core.say(channel.Unflow(a.conn, B + A))
    tree.core.say(channel.Hello(channel.VERSION, 3))
    assert {tree.core.expect(channel.Replay).conn for _ in range(2)} == {a.conn, b.conn}
    a.sock.sendall(batch(frame(B, A)))
    assert b.read_frames(1) == [frame(B, A)]


def test_an_edge_that_makes_way_leaves_its_connections_to_the_next(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair
    old = Client(tree, ssl.TLSVersion.TLSv1_2)  # nobody can go on with this one
    assert tree.stop(b"yield") == 0
    old.read_to_the_end()
    assert len(tree.given) == 2
    tree.start()
    a.sock.sendall(batch(frame(B, A)))
    assert b.read_frames(1) == [frame(B, A)]


def test_what_was_sent_while_no_edge_lived_is_read_by_the_next(tree: FakeTree) -> None:
    client, idle = Client(tree).login(), Client(tree)
    data = batch(*(frame(B, A, 1000, fill) for fill in range(9)))
    client.sock.sendall(data[:5000])  # in the middle of a frame
    # A kill between telling the core and saving that it is told says it twice.
    seen: set[bytes] = set()
    while len(seen) < 4:
        seen.update(tree.core.hear_frames()[1])
    tree.kill()
    client.sock.sendall(data[5000:])
    idle.sock.sendall(REQUEST)
    tree.start()
    while len(seen) < 9:
        seen.update(tree.core.hear_frames()[1])
    assert seen == {frame(B, A, 1000, fill) for fill in range(9)}
    assert tree.core.wait_for(channel.Request) == (idle.conn, 1, REQUEST)
    client.close()
    idle.close()


def test_an_edge_that_does_not_hear_the_core_says_that_it_is_the_deaf_one(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    tree.core.say(channel.FramesOut((pair[0].conn,), channel.join_blocks([frame(A, B)])))
    assert pair[0].read_frames(1) == [frame(A, B)]
    tree.drain()
    assert "hear waits" not in tree.said
    tree.kill()
    tree.start(lambda: setattr(main.Edge, "_read_control", lambda _: None))
    tree.core.say(channel.Hello(channel.VERSION, 1))

    def said_so() -> bool:
        tree.drain()
        return "hear waits" in tree.said

    eventually(said_so)


def test_what_a_dead_edge_had_not_sent_yet_is_sent_by_the_next(tree: FakeTree) -> None:
    # Without a time-out there are no keep-alives, which would send what lies there with them.
    client = Client(tree, buffer=4096).login(timeout=0.0)
    # More than its kernel and its ring have room for.
    blocks = channel.join_blocks([frame(A, B, 1400)] * 40)
    for _ in range(200):
        tree.core.say(channel.FramesOut((client.conn,), blocks))
    counts = tree.core.wait_for(channel.Counts)
    while counts.frames_out + sum(counts.drops) < 8000:
        counts = tree.core.wait_for(channel.Counts)
    assert any(counts.drops)
    tree.kill()
    tree.start()
    assert client.read_frames(counts.frames_out) == [frame(A, B, 1400)] * counts.frames_out


def test_a_request_in_the_hands_of_a_dead_edge_is_asked_again(tree: FakeTree) -> None:
    client = Client(tree)
    client.sock.sendall(REQUEST)
    tree.core.wait_for(channel.Request)
    tree.kill()
    tree.start()
    assert tree.core.wait_for(channel.Request) == (client.conn, 1, REQUEST)
    tree.core.say(channel.State(client.conn, 1, b"hi", Mode.HTTP, "", 0.0, False, b""))
    assert client.read(2) == b"hi"
    client.close()


def test_under_load_no_kill_costs_a_connection_or_a_frame(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    """Frames are numbered, and a kill comes anywhere; each comes through at least once."""
    a, b = pair
    b.sock.settimeout(0.02)
    parser = BlockDecoder()
    pending: set[bytes] = set()
    number = 0

    def send() -> None:
        nonlocal number
        frames = [frame(B, A, 1510) + struct.pack("!I", number + i) for i in range(40)]
        number += 40
        pending.update(frames)
        a.sock.sendall(batch(*frames))

    def all_came() -> bool:
        # What comes before the flows are said again goes through the core.
        tree.core.frames.setblocking(False)
        try:
            while True:
                message = channel.decode_from_edge(tree.core.frames.recv(channel.MAX_MESSAGE))
                assert isinstance(message, channel.Frames)
                tree.core.say(channel.FramesOut((b.conn,), message.blocks))
        except BlockingIOError:
            pass
        try:
            while data := b.sock.recv(65536):
                pending.difference_update(parser.feed(data))
        except TimeoutError:
            pass
        return not pending

    for _ in range(12):
        for _ in range(3):  # more may find the send ring full, and be dropped as they should
            send()
        tree.kill()
        send()
        tree.start()
        tree.core.wait_for(channel.Adopted)
        tree.core.say(channel.Hello(channel.VERSION, 1))
        tree.core.say(channel.Flow(a.conn, B + A, b.conn))
        eventually(all_came)


def test_descriptors_that_nothing_is_known_of_are_closed(tree: FakeTree) -> None:
    ours, theirs = socket.socketpair()
    tree.kill()
    tree.given[b"who knows"] = theirs.detach()
    tree.start()
    assert ours.recv(1) == b""
    eventually(lambda: not tree.drain())
    ours.close()


def test_what_is_no_socket_costs_its_own_connection(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    tree.kill()
    one, two = tree.given
    os.close(tree.given[one])
    for key in (one, b"who knows"):
        tree.given[key] = os.memfd_create("no socket", os.MFD_CLOEXEC)
    tree.start()
    eventually(lambda: set(tree.drain()) == {two})
    tree.core.say(channel.FramesOut((pair[1].conn,), channel.join_blocks([frame(B, A)])))
    assert pair[1].read_frames(1) == [frame(B, A)]


def test_two_deaths_on_one_connection_close_it(tree: FakeTree, pair: tuple[Client, Client]) -> None:
    """The mark is written by hand: what kills an edge is what we do not know."""
    a, b = pair
    mark = struct.pack("=QQ", a.conn, 12345)
    for _ in range(2):
        tree.kill()
        os.pwrite(tree.checkpoint, mark, 64)
        tree.start()
    closed = tree.core.wait_for(channel.Closed)
    assert closed == (a.conn, "two edges died on it")
    a.read_to_the_end()
    b.sock.sendall(batch(frame(A, B)))
    assert tree.core.hear_frames()[0] == b.conn


def test_what_two_edges_die_of_is_closed_unread(
    tree: FakeTree, pair: tuple[Client, Client]
) -> None:
    a, b = pair

    def deadly() -> None:
        open_all = OwnRecords.open_all

        def open_or_die(self: OwnRecords, *args: Any) -> tuple[int, int]:
            if self.rx.start < self.rx.end and self.sealer.secret == doomed:
                os._exit(9)
            return open_all(self, *args)

        OwnRecords.open_all = open_or_die  # type: ignore[method-assign, assignment]

    tree.kill()
    memory = Checkpoint(memoryview(mmap.mmap(tree.checkpoint, 0)))
    doomed = memory.slot(memory.left()[0][a.conn]).load()[2].write_secret
    a.sock.sendall(batch(frame(B, A)))
    for _ in range(2):
        tree.start(deadly, wait=False)
        assert tree.wait_end() == 9
    tree.start(deadly)
    assert tree.core.wait_for(channel.Closed) == (a.conn, channel.POISONED)
    a.read_to_the_end()
    b.sock.sendall(batch(frame(A, B)))
    assert tree.core.hear_frames() == (b.conn, [frame(A, B)])


def test_who_is_there_is_served_before_the_certificate_is_read_and_new_ones_after(
    tree: FakeTree, pair: tuple[Client, Client], tmp_path: Path
) -> None:
    a, b = pair
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def wait_at_the_gate() -> None:
        load = main.load_certificate

        def load_late(*args: Any) -> None:
            gate.read_bytes()
            load(*args)

        main.load_certificate = load_late  # type: ignore[assignment]

    tree.kill()
    a.sock.sendall(batch(frame(B, A)))
    tree.start(wait_at_the_gate, wait=False)
    assert b.read_frames(1) == [frame(B, A)]
    assert not tree.drain().keys() - {client.conn.to_bytes(8, "big") for client in pair}
    assert not tree.ready
    gate.write_bytes(b"")
    tree.wait_ready()
    Client(tree).login()


def test_a_connection_in_its_handshake_dies_with_its_edge_and_nothing_of_it_stays(pem: Pem) -> None:
    """Its client may come back at once, where there is one place in all and one for an address."""
    tree = FakeTree(EdgeSettings(index=1, max_connections=1, max_per_address=1), pem.joined)
    tree.start()
    try:
        source = ("127.0.0.2", 0)  # not from where it listens: nobody of ours
        client = socket.create_connection(tree.address, 10, source)
        tree.clients.append(client)
        client.sendall(client_hello())
        assert client.recv(5)[:1] == b"\x16"  # the edge is in the middle of it
        tree.kill()
        with contextlib.suppress(ConnectionResetError):
            while client.recv(65536):
                pass
        assert tree.given == {}
        tree.start()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        again = context.wrap_socket(socket.create_connection(tree.address, 10, source))
        tree.clients.append(again)
        opened = tree.core.wait_for(channel.Opened)
        tree.kill()
        assert list(tree.given) == [opened.conn.to_bytes(8, "big")]
        memory = Checkpoint(memoryview(mmap.mmap(tree.checkpoint, 0)))
        assert list(memory.left()[0]) == [opened.conn]
    finally:
        tree.close()


def client_hello() -> bytes:
    """The first words of a client of TLS 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def test_what_the_watchdog_has_no_room_for_is_given_again(pem: Pem) -> None:
    def full_at_first() -> None:
        give, left = FakeChild.give, [2]

        def give_late(self: FakeChild, key: bytes, fd: int) -> bool:
            left[0] -= 1
            return left[0] < 0 and give(self, key, fd)

        FakeChild.give = give_late  # type: ignore[method-assign]

    tree = FakeTree(EdgeSettings(index=1), pem.joined)
    try:
        tree.start(full_at_first)
        client = Client(tree).login()
        eventually(tree.drain)
        tree.kill()
        tree.start()
        client.sock.sendall(batch(frame(B, A)))
        assert tree.core.hear_frames() == (client.conn, [frame(B, A)])
    finally:
        tree.close()


def test_a_full_ring_is_not_the_end_of_a_client(pem: Pem) -> None:
    """The kernel says 0 to who has no room to read into, as it does at the end."""
    tree = FakeTree(EdgeSettings(index=1, login_bytes=1 << 20), pem.joined)
    tree.start()
    try:
        client = Client(tree)
        frames = 0
        client.sock.sendall(REQUEST)
        assert tree.core.wait_for(channel.Request).conn == client.conn
        client.sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantWriteError):
            while True:  # until neither the ring nor the kernel takes any more
                assert client.sock.send(batch(frame(B, A, 1514))) == 1522
                frames += 1
        assert frames * 1522 > 1 << 18
        tree.core.say(
            channel.State(client.conn, 1, b"welcome", Mode.BLOCKS, "", 20.0, True, b"blob")
        )
        client.sock.settimeout(10)
        assert client.read(7) == b"welcome"
        tree.core.frames.setblocking(False)

        def all_came() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    tree.core.hear_frames()
            counts = tree.core.wait_for(channel.Counts)
            return bool(counts.frames_in == frames)

        eventually(all_came)
    finally:
        tree.close()


def test_no_name_of_a_connection_comes_again(pem: Pem) -> None:
    """Neither when the numbers of one edge are used up, nor in the next edge."""

    def few() -> None:
        channel.CONNS_PER_START = 3

    tree = FakeTree(EdgeSettings(index=1), pem.joined)
    try:
        names = []
        for _ in range(2):
            tree.start(few)
            names += [Client(tree).login().conn for _ in range(5)]
            tree.kill()
        assert len(set(names)) == 10
        assert 0 not in names
    finally:
        tree.close()


def test_who_holds_connections_open_keeps_nobody_out(pem: Pem) -> None:
    tree = FakeTree(
        EdgeSettings(index=1, login_timeout=600.0, max_connections=4), pem.joined
    )  # fmt: skip
    tree.start()
    try:
        session = Client(tree).login()
        for _ in range(8):
            tree.clients.append(socket.create_connection(tree.address))
        Client(tree).login()
        session.sock.sendall(batch(frame(B, A)))  # whoever has logged in stays
        assert tree.core.hear_frames() == (session.conn, [frame(B, A)])
    finally:
        tree.close()


def test_those_who_made_room_do_not_keep_it(pem: Pem) -> None:
    """They would for as long as they do not close, and then a newcomer would find no place."""
    tree = FakeTree(EdgeSettings(index=1, max_connections=4), pem.joined)
    tree.start(before=lambda: setattr(main, "_STRANGER_STAYS", 0.0))
    try:
        strangers = [Client(tree, source="127.0.0.2") for _ in range(30)]
        strangers[-1].login()
        assert strangers[0].sock.recv(1) == b""  # with a goodbye
    finally:
        tree.close()


def memory_of(tree: FakeTree) -> int:
    return os.fstat(tree.checkpoint).st_blocks * 512


def test_a_stranger_has_little_memory(tree: FakeTree) -> None:
    before = memory_of(tree)
    strangers = [Client(tree) for _ in range(10)]
    request = b"POST /x HTTP/1.1\r\nContent-Length: 40000\r\n\r\n" + bytes(40000)
    for stranger in strangers:
        stranger.sock.sendall(request[:-1])
    eventually(lambda: memory_of(tree) - before > 10 * 40000)
    stranger = strangers[0]
    stranger.sock.sendall(request[-1:])
    tree.core.wait_for(channel.Request)
    tree.core.say(channel.State(stranger.conn, 1, b"no", Mode.HTTP, "", 0.0, False, b""))
    assert stranger.read(2) == b"no"
    stranger.sock.sendall(request)
    assert "more than 65536 bytes before a login" in tree.core.wait_for(channel.Closed).why
    # Two pages for its slot, two rings that may begin and end within a page.
    assert memory_of(tree) - before < 10 * (65536 + 6 * 4096)


def test_all_together_have_so_much_memory_and_who_reads_gets_his_frames(pem: Pem) -> None:
    limit = 2 << 20
    tree = FakeTree(EdgeSettings(index=1, memory_max=limit), pem.joined)
    tree.start()
    try:
        quick = Client(tree).login()
        slow = [Client(tree, buffer=4096).login() for _ in range(10)]
        blocks = channel.join_blocks([frame(A, B, 1514)] * 40)

        def refused() -> int:
            """Frames that were dropped, and connections that were ended, for want of memory."""
            for _ in range(10):
                tree.core.say(channel.FramesOut(tuple(one.conn for one in slow), blocks))
            tree.core.say(channel.FramesOut((quick.conn,), channel.join_blocks([frame(A, B)])))
            assert quick.read_frames(1) == [frame(A, B)]
            # It lies above the limit for a moment, and never by as much as all could take.
            assert memory_of(tree) < 2 * limit
            tree.core.control.setblocking(False)
            try:
                totals = tree.core.wait_for(channel.Totals)
            except BlockingIOError:
                return 0
            drops = dict(zip(EdgeDrop, totals.drops, strict=True))
            refusals = dict(zip(channel.Refusal, totals.refusals, strict=True))
            # Which of both, depends on how much has come when the edge looks.
            return int(drops[EdgeDrop.NO_MEMORY] + refusals[channel.Refusal.NO_MEMORY])

        eventually(refused, within=20.0)
        tree.core.control.settimeout(10)
        for one in slow:
            one.close()
        # There is enough again, for new ones as well.
        Client(tree).login()
    finally:
        tree.close()


def test_handshakes_that_come_to_nothing_make_room(pem: Pem) -> None:
    tree = FakeTree(EdgeSettings(index=1), pem.joined)
    tree.start(before=lambda: setattr(main, "_MAX_HANDSHAKES", 3))
    source = ("127.0.0.2", 0)  # not from where it listens: nobody of ours
    try:
        for _ in range(8):
            tree.clients.append(socket.create_connection(tree.address, source_address=source))
            tree.clients[-1].sendall(b"\x16\x03\x01")
        Client(tree).login()  # one of ours does not wait
        other = socket.create_connection(tree.address, 10, source)
        tree.clients.append(other)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        tree.clients[-1] = context.wrap_socket(other)
        totals = tree.core.wait_for(channel.Totals)
        assert totals.refusals[list(channel.Refusal).index(channel.Refusal.MADE_ROOM)] >= 2
    finally:
        tree.close()


def test_so_many_strangers_ask_at_a_time_and_one_of_ours_does_not_wait(pem: Pem) -> None:
    tree = FakeTree(EdgeSettings(index=1), pem.joined)
    tree.start(before=lambda: setattr(main, "_MAX_ASKED", 3))
    try:
        strangers = [Client(tree, source="127.0.0.2") for _ in range(6)]
        for stranger in strangers[:3]:
            stranger.sock.sendall(REQUEST)
            assert tree.core.wait_for(channel.Request).conn == stranger.conn
        for stranger in strangers[3:]:
            stranger.sock.sendall(REQUEST)
        Client(tree).login()  # the next who is heard
        first, second, third = (stranger.conn for stranger in strangers[:3])
        waiting = {stranger.conn for stranger in strangers[3:]}
        tree.core.say(channel.State(first, 1, b"no", Mode.HTTP, "", 0.0, False, b""))
        tree.core.say(channel.State(second, 1, b"", Mode.CLOSING, "kicked", 0.0, False, b""))
        asked = {tree.core.wait_for(channel.Request).conn for _ in range(2)}
        assert asked < waiting
        # The next core is asked again what the last one had been asked, and no more.
        tree.core.say(channel.Hello(channel.VERSION, 2))
        again = {tree.core.wait_for(channel.Request).conn for _ in range(3)}
        assert again == asked | {third}
        tree.core.say(channel.State(third, 1, b"no", Mode.HTTP, "", 0.0, False, b""))
        assert {tree.core.wait_for(channel.Request).conn} == waiting - asked
    finally:
        tree.close()


def test_one_network_of_ipv6_counts_as_one_address() -> None:
    one, two = main._network("2001:db8::1"), main._network("2001:db8::2:0:0:1")
    assert one == two != main._network("2001:db8:0:1::1")
    assert main._network("fe80::1%eth0") == main._network("fe80::2%eth1")
    assert main._network("192.0.2.1") != main._network("192.0.2.2")
