"""Ways to misuse a VPN server from outside, without any account: what strangers send.

    python -m benchmarks.abusers HOST PORT WAY SECONDS

Strategy: each way is a generator of single attempts, so whoever drives it decides for how long
and how many beside each other; what the server does to an attempt is never an error.  All
connections come from the address given, or from 127.0.0.2 on the loopback: those of the server's
own address are taken for its canary's.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from pkvpn.protocol import http
from pkvpn.protocol.hashes import secure_password, user_key
from pkvpn.protocol.messages import AuthType, Login

# How long an attempt waits for the server to end it.
PATIENCE = 2.0
# Connections that are kept open at a time.
SLOW = 500
SLOW_EVERY = 0.2  # seconds from one byte of each of them to the next

Address = tuple[str, int]
# One attempt after the other, each done when the generator yields.
Attempts = Iterator[None]


def connect(address: Address) -> socket.socket:
    """A TCP connection from somebody who is not the server itself."""
    source = ("127.0.0.2", 0) if address[0].startswith("127.") else None
    return socket.create_connection(address, PATIENCE, source)


def over_tls(address: Address) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = connect(address)
    try:
        return context.wrap_socket(plain, server_hostname="vpn.example")
    except BaseException:
        plain.close()
        raise


def send_and_see(sock: socket.socket, *parts: bytes) -> None:
    """Send all of it, then read until the server ends it or patience does."""
    with sock:
        for part in parts:
            sock.sendall(part)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and sock.recv(65536):
            pass


def _post(target: str, body: bytes, kind: str = http.PACK_TYPE) -> bytes:
    return http.build_request("POST", target, host="vpn.example", content_type=kind, body=body)


def _greeted(address: Address) -> tuple[ssl.SSLSocket, bytes]:
    """A connection that the server expects a login on; and the login of a user it has not."""
    sock = over_tls(address)
    try:
        sock.sendall(_post(http.CONNECT_TARGET, http.SIGNATURE, http.IMAGE_TYPE))
        sock.recv(65536)
    except BaseException:
        sock.close()
        raise
    proof = secure_password(user_key("pw", "nobody"), bytes(20))
    pack = Login("T", "nobody", AuthType.PASSWORD, secure_password=proof).to_pack().encode()
    return sock, pack


# --- the ways -----------------------------------------------------------------------------------


def random_bytes(address: Address) -> Attempts:
    """Bytes that are no TLS."""
    while True:
        with contextlib.suppress(OSError):
            send_and_see(connect(address), os.urandom(random.randrange(1, 20000)))
        yield


def random_bytes_in_tls(address: Address) -> Attempts:
    """Bytes that are no HTTP."""
    while True:
        with contextlib.suppress(OSError):
            send_and_see(over_tls(address), os.urandom(random.randrange(1, 20000)))
        yield


def endless_headers(address: Address) -> Attempts:
    """A request whose head does not end."""
    while True:
        with contextlib.suppress(OSError):
            headers = [b"x-%d: %s\r\n" % (number, b"y" * 200) for number in range(1000)]
            send_and_see(over_tls(address), b"GET / HTTP/1.1\r\n", *headers)
        yield


def promised_bodies(address: Address) -> Attempts:
    """An announced size of which nothing is sent."""
    while True:
        held = []
        for size in (1, 1000, 40000, 65536, 10**9, 10**18):
            with contextlib.suppress(OSError):
                held.append(over_tls(address))
                head = f"POST {http.CONNECT_TARGET} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n"
                held[-1].sendall(head.encode())
        for sock in held:
            with contextlib.suppress(OSError):
                send_and_see(sock)
        yield


def truncated_packs(address: Address) -> Attempts:
    """A login that ends too soon, whole as a request."""
    while True:
        with contextlib.suppress(OSError):
            sock, pack = _greeted(address)
            cut = pack[: random.randrange(len(pack))]
            send_and_see(sock, *[_post(http.VPN_TARGET, cut)] * 4)
        yield


def giant_packs(address: Address) -> Attempts:
    """A login that is too large, or says that it has millions of elements."""
    while True:
        for body in (
            struct.pack("!I", 0x7FFFFFFF) + bytes(40000),
            struct.pack("!III", 1, 5, 0x61626364) + struct.pack("!III", 2, 0xFFFFFFFF, 1) * 1000,
            bytes(60000),
        ):
            with contextlib.suppress(OSError):
                sock, _ = _greeted(address)
                send_and_see(sock, _post(http.VPN_TARGET, body))
        with contextlib.suppress(OSError):
            sock, _ = _greeted(address)
            head = f"POST {http.VPN_TARGET} HTTP/1.1\r\nContent-Length: {10**8}\r\n\r\n"
            send_and_see(sock, head.encode(), *[bytes(65536)] * 100)
        yield


def slow_connections(address: Address) -> Attempts:
    """Hundreds at a time, a byte each now and then; half of them over TLS.

    An attempt is a byte to each; whom the server has ended is replaced.
    """
    sockets: list[socket.socket] = []
    try:
        while True:
            until = time.monotonic() + SLOW_EVERY
            kept = []
            for sock in sockets:
                try:
                    sock.send(b"a")
                    kept.append(sock)
                except (BlockingIOError, ssl.SSLWantWriteError):
                    kept.append(sock)
                except OSError:
                    sock.close()
            sockets = kept
            while len(sockets) < SLOW and time.monotonic() < until:
                with contextlib.suppress(OSError):
                    made = over_tls(address) if len(sockets) % 2 else connect(address)
                    made.setblocking(False)
                    sockets.append(made)
                    made.send(b"GET / HTTP/1.1\r\n" if len(sockets) % 2 else b"\x16\x03\x01")
            time.sleep(max(0.0, until - time.monotonic()))
            yield
    finally:
        for sock in sockets:
            sock.close()


def handshakes(address: Address) -> Attempts:
    """As many as can be begun, of which none goes on: the server's part is the dear one.

    An attempt is fifty connections; five hundred are kept open.
    """
    hello = _client_hello()
    held: deque[socket.socket] = deque()
    try:
        while True:
            for _ in range(50):
                with contextlib.suppress(OSError):
                    held.append(connect(address))
                    held[-1].sendall(hello)
                if len(held) > SLOW:
                    held.popleft().close()
            yield
    finally:
        for sock in held:
            sock.close()


def _client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


WAYS: dict[str, Callable[[Address], Attempts]] = {
    way.__name__.replace("_", "-"): way
    for way in (
        random_bytes,
        random_bytes_in_tls,
        endless_headers,
        promised_bodies,
        truncated_packs,
        giant_packs,
        slow_connections,
        handshakes,
    )
}


class Abuser(threading.Thread):
    """Goes one of the ways until `stop`."""

    def __init__(self, way: str, address: Address) -> None:
        super().__init__(name=way, daemon=True)
        self._attempts = WAYS[way](address)
        self._stop_it = threading.Event()
        self.done = 0

    def run(self) -> None:
        try:
            while not self._stop_it.is_set():
                next(self._attempts)
                self.done += 1
        finally:
            self._attempts.close()  # type: ignore[attr-defined]

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


def main() -> None:
    host, port, way, seconds = sys.argv[1:]
    abuser = Abuser(way, (host, int(port)))
    abuser.start()
    time.sleep(float(seconds))
    print(abuser.done, flush=True)
    os._exit(0)  # what it holds open ends with it


if __name__ == "__main__":
    main()
