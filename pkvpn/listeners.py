"""The listening sockets of the service: opened once by the watchdog, held for every edge.

Strategy: each address for itself.  What the system refuses is remembered with its reason and
does not keep the others from being served; the service starts if at least one is left.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any

from pkvpn.config import Address

# As many connections may wait for an edge that is just being replaced.  The kernel cuts this to
# net.core.somaxconn.
BACKLOG = 4096


class Listeners:
    """Knows which addresses are served, and why the others are not."""

    def __init__(self) -> None:
        self._open: dict[Address, int] = {}
        self._bound: dict[Address, Address] = {}  # the same with the port the system chose
        self._refused: dict[Address, str] = {}

    def open(self, addresses: tuple[Address, ...]) -> list[int]:
        """Return new descriptors of listening sockets on ``addresses``, in their order.

        An address that was open before is the same socket: nobody who waits in its backlog
        is lost.  Raises `OSError` naming all reasons if not one address is left.
        """
        sockets: dict[Address, int] = {}
        refused: dict[Address, str] = {}
        for address in addresses:
            before = self._open.get(address)
            try:
                sockets[address] = os.dup(before) if before is not None else listen(address)
            except OSError as error:
                refused[address] = _reason(address, error)
        if not sockets:
            reasons = "; ".join(f"{address}: {why}" for address, why in refused.items())
            raise OSError(f"no address to listen on: {reasons}")
        self._open, self._refused = sockets, refused
        self._bound = {address: _bound_to(fd) for address, fd in sockets.items()}
        return list(sockets.values())

    def adopt(self, addresses: tuple[Address, ...], descriptors: list[int]) -> None:
        """Go on with sockets that came through an exec, or that the service manager opened."""
        found = {_bound_to(fd): fd for fd in descriptors}
        for address in addresses:
            # Port 0 stands for whatever the system chose then.
            bound = next(
                (one for one in found if one == address or (one.host, 0) == tuple(address)), None
            )
            if bound is not None:
                self._open[address] = found.pop(bound)
                _prepare(self._open[address])
                self._bound[address] = bound
            else:
                self._refused[address] = "refused before"

    def status(self) -> list[dict[str, Any]]:
        """One dict an address: address, port (the real one), state, error."""
        served = [
            {"address": one.host, "port": one.port, "state": "listening", "error": None}
            for one in self._bound.values()
        ]
        return served + [
            {"address": one.host, "port": one.port, "state": "refused", "error": why}
            for one, why in self._refused.items()
        ]

    def addresses(self) -> tuple[Address, ...]:
        """Where connections are really accepted; also known in a child that closed them."""
        return tuple(self._bound.values())


def listen(address: Address) -> int:
    """Return the descriptor of a new listening socket.  Raises `OSError`."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _prepare(sock.fileno())
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock.detach()


def _prepare(fd: int) -> None:
    """What an edge expects of it, whoever opened it."""
    os.set_blocking(fd, False)
    sock = socket.socket(fileno=fd)
    try:
        # Inherited by what is accepted: an urgent byte is then a byte like the others, and
        # does not shift the position by which a successor knows how far we had read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    finally:
        sock.detach()


def _bound_to(fd: int) -> Address:
    sock = socket.socket(fileno=os.dup(fd))
    try:
        host, port = sock.getsockname()[:2]
    finally:
        sock.close()
    return Address(host, port)


def _reason(address: Address, error: OSError) -> str:
    if error.errno == errno.EACCES:
        return f"no privilege for port {address.port}"
    if error.errno == errno.EADDRINUSE:
        owner = _owner(address)
        return f"in use by {owner}" if owner else "in use by another program"
    return error.strerror or str(error)


def _owner(address: Address) -> str:
    """The program that listens on the port, if the system shows it to us."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (address.port,):
                if connection.pid is None:
                    return ""
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError, struct.error):
        return ""
    return ""
