"""What the kernel knows of a socket, for going on with somebody else's connection."""

import fcntl
import socket
import struct
import termios
import time

_SO_COOKIE = 57
_COOKIE = struct.Struct("=Q")

# struct tcp_info: u8 state at 0, u64 tcpi_bytes_acked at 120, u64 tcpi_bytes_received at 128
_TCP_INFO_SIZE = 192
_ACKED = struct.Struct("=Q")
_ACKED_AT, _RECEIVED_AT = 120, 128

# States of TCP (include/net/tcp_states.h), by whose FIN is among the counted bytes.
_FIN_WAIT1, _FIN_WAIT2, _TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 4, 5, 6, 7, 8, 9, 11
_PEERS_FIN = frozenset({_CLOSE_WAIT, _LAST_ACK, _CLOSING, _TIME_WAIT})
_OUR_FIN = frozenset({_FIN_WAIT1, _FIN_WAIT2, _LAST_ACK, _CLOSING, _TIME_WAIT})

_TRIES = 1000

_CHECK_TIMEOUT = 1.0


class PositionError(Exception):
    """The kernel does not say where this connection is."""


def cookie(sock: socket.socket) -> int:
    """A number that no other socket of this boot has."""
    (value,) = _COOKIE.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE.size))
    return int(value)


def unsent(fd: int) -> int:
    """How many bytes were written to a socket and not taken yet by the other side's kernel (TCP)
    or by the other process (UNIX)."""
    return _ioctl(fd, termios.TIOCOUTQ)


def unread(fd: int) -> int:
    """How many bytes lie in a socket for us."""
    return _ioctl(fd, termios.FIONREAD)


def positions(sock: socket.socket) -> tuple[int, int]:
    """How many bytes have been read from, and written to, this TCP socket by whomever.

    The counts and the queues come from different calls, so they are asked for until nothing
    has moved in between.  Raises PositionError, OSError.
    """
    info = _info(sock)
    for _ in range(_TRIES):
        waiting = unread(sock.fileno())
        queued = unsent(sock.fileno())
        before, info = info, _info(sock)
        if info == before:
            break
    else:
        raise PositionError("the connection never rests")
    state, acked, received = info
    if state == _CLOSE:
        raise PositionError("the connection is gone")
    return (
        received - waiting - (state in _PEERS_FIN),
        acked + queued - (state in _OUR_FIN),
    )


def check_positions() -> str:
    """Follow two connections of our own, whose course we know: "", or what does not hold here.

    Takes a millisecond.  Raises OSError where there is no loopback to try it on.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ends = []
        try:
            for _ in range(2):
                ends.append(socket.create_connection(listener.getsockname(), _CHECK_TIMEOUT))
                ends.append(listener.accept()[0])
            client, server, other, closing = ends
            client.sendall(bytes(1000))
            server.recv(300, socket.MSG_WAITALL)
            _expect(server, 300, 0, "received bytes")
            server.sendall(bytes(500))
            client.recv(100, socket.MSG_WAITALL)
            _expect(server, 300, 500, "sent bytes")
            client.shutdown(socket.SHUT_WR)
            server.recv(200, socket.MSG_WAITALL)
            _expect(server, 500, 500, "bytes before the end of the other side")
            closing.sendall(bytes(7))
            closing.shutdown(socket.SHUT_WR)
            other.sendall(bytes(3))
            _expect(closing, 0, 7, "bytes before our own end")
        except (PositionError, TimeoutError) as error:
            return str(error)
        finally:
            for end in ends:
                end.close()
    return ""


def _expect(sock: socket.socket, received: int, sent: int, what: str) -> None:
    """What is on its way over the loopback may take a moment.  Raises PositionError."""
    deadline = time.monotonic() + _CHECK_TIMEOUT
    while (found := positions(sock)) != (received, sent):
        if time.monotonic() > deadline:
            raise PositionError(f"{what}: {found}, not {(received, sent)}")
        time.sleep(0.001)


def _info(sock: socket.socket) -> tuple[int, int, int]:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    if len(info) < _RECEIVED_AT + 8:
        raise PositionError("this kernel does not count the bytes of a connection")
    (acked,) = _ACKED.unpack_from(info, _ACKED_AT)
    (received,) = _ACKED.unpack_from(info, _RECEIVED_AT)
    return info[0], acked, received


def _ioctl(fd: int, request: int) -> int:
    return int(struct.unpack("=i", fcntl.ioctl(fd, request, b"\0\0\0\0"))[0])
