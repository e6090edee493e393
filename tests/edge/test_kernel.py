"""The formulas for how far a connection has come, against a connection whose course is known."""

import select
import socket
import termios
from collections.abc import Iterator

import pytest

from pkvpn.config import Address
from pkvpn.edge import kernel
from pkvpn.listeners import listen
from tests.support import eventually


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's end and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        server.setblocking(False)
        yield server, client


def is_at(sock: socket.socket, received: int, sent: int) -> None:
    eventually(lambda: kernel.positions(sock) == (received, sent), within=2.0)


def test_positions_count_what_was_read_and_what_was_written(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    assert kernel.positions(server) == (0, 0)
    client.sendall(b"x" * 1000)
    is_at(server, 0, 0)
    eventually(lambda: server.recv(300))
    is_at(server, 300, 0)
    server.send(b"y" * 500)
    assert kernel.positions(server) == (300, 500)
    client.recv(100)
    is_at(server, 300, 500)


def test_what_the_other_side_does_not_read_counts_as_sent(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, _ = pair
    sent = 0
    try:
        while True:
            sent += server.send(bytes(100_000))
    except BlockingIOError:
        pass
    assert kernel.positions(server) == (0, sent)


def test_ends_of_either_side_do_not_count(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    client.sendall(b"x" * 10)
    client.shutdown(socket.SHUT_WR)
    is_at(server, 0, 0)  # CLOSE_WAIT, unread
    eventually(lambda: server.recv(4))
    is_at(server, 4, 0)
    eventually(lambda: server.recv(100))
    is_at(server, 10, 0)
    server.send(b"y" * 7)
    assert kernel.positions(server) == (10, 7)


def test_our_own_end_does_not_count(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    server.send(b"y" * 7)
    server.shutdown(socket.SHUT_WR)
    is_at(server, 0, 7)  # FIN_WAIT
    client.sendall(b"abc")
    is_at(server, 0, 7)
    eventually(lambda: server.recv(100))
    is_at(server, 3, 7)


def test_a_connection_that_is_gone_has_no_position(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()

    def gone() -> bool:
        try:
            kernel.positions(server)
        except kernel.PositionError as error:
            return "gone" in str(error)
        return False

    eventually(gone)


def test_cookies_tell_sockets_apart(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    assert kernel.cookie(server) == kernel.cookie(server) != kernel.cookie(client)
    with server.dup() as again:
        assert kernel.cookie(again) == kernel.cookie(server)


def test_unsent_bytes_of_a_channel_are_seen() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert kernel.unsent(ours.fileno()) == 0
        ours.send(b"x")
        assert kernel.unsent(ours.fileno()) > 0
        theirs.recv(1)
        assert kernel.unsent(ours.fileno()) == 0


def test_the_formulas_hold_here() -> None:
    assert kernel.check_positions() == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("_PEERS_FIN", frozenset()), ("_OUR_FIN", frozenset()), ("_ACKED_AT", 128)],
)
def test_formulas_that_do_not_hold_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(kernel, name, value)
    monkeypatch.setattr(kernel, "_CHECK_TIMEOUT", 0.05)
    assert ", not (" in kernel.check_positions()


def test_a_kernel_that_does_not_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_TCP_INFO_SIZE", 104)
    assert "does not count" in kernel.check_positions()


def test_a_race_between_the_calls_is_no_position(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packet comes after the counts were asked for, and before the queue is."""
    server, client = pair
    original = kernel._ioctl
    sizes = [100, 100, 0]

    def late(fd: int, request: int) -> int:
        if request == termios.FIONREAD and (size := sizes.pop(0)):
            before = original(fd, request)
            client.sendall(bytes(size))
            eventually(lambda: original(fd, request) == before + size)
        return original(fd, request)

    monkeypatch.setattr(kernel, "_ioctl", late)
    assert kernel.positions(server) == (0, 0)
    assert sizes == []


def test_an_urgent_byte_counts_like_any_other() -> None:
    """Sockets of ours are accepted from such listeners; without it the count is off for good."""
    listener = socket.socket(fileno=listen(Address("127.0.0.1", 0)))
    with listener, socket.create_connection(listener.getsockname()) as client:
        eventually(lambda: select.select([listener], [], [], 0)[0])
        server, _ = listener.accept()
        with server:
            server.setblocking(False)
            client.sendall(b"ab")
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b"cd")
            got = b""
            while len(got) < 5 and select.select([server], [], [], 5.0)[0]:
                got += server.recv(100)
            assert got == b"ab!cd"
            is_at(server, 5, 0)
