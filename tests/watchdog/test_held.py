"""What a child that was taken over may try with the descriptors it gives."""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from pkvpn.watchdog.child import DROP, GIVE, REFUSED
from pkvpn.watchdog.held import Kept
from tests.support import open_descriptors


@pytest.fixture
def gifts() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The watchdog's end and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("how", ["drop", "replace", "close"])
def test_closing_what_was_given_never_waits(
    gifts: tuple[socket.socket, socket.socket], how: str
) -> None:
    ours, theirs = gifts
    kept = Kept(10)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(listener.getsockname())
        sock, _ = listener.accept()
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sock.send(bytes(65536)):
                pass
        # The last one to close it waits until all is taken, or for so many seconds.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        socket.send_fds(theirs, [GIVE + b"key"], [sock.fileno()])
        sock.close()
        kept.drain(ours)
        before = time.monotonic()
        if how == "drop":
            theirs.send(DROP + b"key")
        elif how == "replace":
            socket.send_fds(theirs, [GIVE + b"key"], [listener.fileno()])
        kept.drain(ours)
        if how != "replace":
            kept.close()
        assert time.monotonic() - before < 30
        kept.close()


@pytest.mark.parametrize("count", [0, 2, 4, 5, 20])
def test_exactly_one_descriptor_goes_with_a_message(
    gifts: tuple[socket.socket, socket.socket], count: int
) -> None:
    """With more than there is room for, the kernel cuts them: those that came are closed."""
    ours, theirs = gifts
    kept = Kept(10)
    before = open_descriptors()
    socket.send_fds(theirs, [GIVE + b"key"], [theirs.fileno()] * count)
    kept.drain(ours)
    assert (kept.descriptors, kept.refused) == ({}, 1)
    assert open_descriptors() == before
    said = theirs.recv(1000)
    assert said == REFUSED + b"key\0exactly one descriptor goes with a message"
