import selectors
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pkvpn.channel import ALL_FLOWS, VERSION, Hello, Unflow, decode_from_core, join_blocks
from pkvpn.core import link as link_module
from pkvpn.core.link import Link


class Ends(NamedTuple):
    link: Link
    control: socket.socket
    frames: socket.socket


@pytest.fixture
def ends() -> Iterator[Ends]:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    link = Link(1, pairs[0][1].detach(), pairs[1][1].detach())
    control, frames = pairs[0][0], pairs[1][0]
    control.setblocking(False)
    frames.setblocking(False)
    yield Ends(link, control, frames)
    link.close()
    control.close()
    frames.close()


def drain(sock: socket.socket) -> list[object]:
    messages: list[object] = []
    while True:
        try:
            messages.append(decode_from_core(sock.recv(70000)))
        except BlockingIOError:
            return messages


READ, BOTH = selectors.EVENT_READ, selectors.EVENT_READ | selectors.EVENT_WRITE


def test_a_full_channel_of_frames_does_not_delay_control(ends: Ends) -> None:
    link = ends.link
    for _ in range(100):
        link.outbox.put((1,), join_blocks([bytes(1000)] * 10))
        link.flush(1)
    assert link.wanted() == (READ, BOTH)
    link.send(Unflow(1, ALL_FLOWS))
    link.flush(1)
    assert drain(ends.control) == [Unflow(1, ALL_FLOWS)]
    got = 0
    while link.outbox:
        got += len(drain(ends.frames))
        link.flush(1)
    assert got + len(drain(ends.frames)) > 10
    assert link.wanted() == (READ, READ)


def test_control_messages_wait_in_order(ends: Ends) -> None:
    link = ends.link
    wanted = [Unflow(i, ALL_FLOWS) for i in range(1, 2000)]
    for message in wanted:
        link.send(message)
    got: list[object] = []
    while len(got) < len(wanted):
        link.flush(1)
        got += drain(ends.control)
    assert got == wanted
    assert link.may_teach()


def test_an_edge_that_never_reads_is_greeted_anew_when_it_does(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link_module, "MAX_BACKLOG", 20000)
    link = ends.link
    link.replayed = True
    link.present.add(5)
    count = 0
    while not link.lost:
        link.send(Unflow(1, ALL_FLOWS))
        link.flush(9)
        count += 1
    assert "edge-1 has not read for so long" in caplog.text
    assert not link.may_teach()
    assert not link.replayed
    link.send(Unflow(2, ALL_FLOWS))
    link.flush(9)
    assert link.wanted() == (BOTH, READ)
    before = drain(ends.control)
    assert 0 < len(before) < count
    link.flush(9)
    assert drain(ends.control) == [Hello(VERSION, 9)]
    assert (link.lost, link.present) == (False, set())


def test_a_message_of_no_bytes_is_not_the_end(ends: Ends) -> None:
    for sock, read in (
        (ends.control, ends.link.read_control),
        (ends.frames, ends.link.read_frames),
    ):
        for message in (b"one", b"", b"two"):
            sock.send(message)
        assert list(read()) == [b"one", b"", b"two"]
        sock.close()
        with pytest.raises(SystemExit, match="closed"):
            list(read())
