"""One TLS connection through a proxy and back, a line every millisecond: is it cut, is it silent?

    python -m benchmarks.streams answer PORT      the echo behind the proxy, without TLS
    python -m benchmarks.streams ask PORT         what stands before it

`ask` does a round for each line of its input, the round's seconds, and answers with a line of JSON,
as `echo` does for datagrams.  A connection that is cut is dialled again at once and every
millisecond; what was on its way then is lost.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import ssl
import sys
import time
from typing import Any

from pkvpn.client.session import client_context

EVERY = 0.001
# What has not come back so long after the last one was sent is lost.
GRACE = 0.3
LINE = 16
_DIAL_TIMEOUT = 1.0
_GIVE_UP = 20.0


def answer(port: int) -> None:
    """Send back whatever comes, on every connection."""
    with socket.create_server(("127.0.0.1", port), backlog=100) as listener:
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    made, _ = listener.accept()
                    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(made, selectors.EVENT_READ)
                    continue
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                data = b""
                with contextlib.suppress(OSError):
                    data = sock.recv(65536)
                    sock.sendall(data)
                if not data:
                    selector.unregister(sock)
                    sock.close()


def dial(port: int) -> ssl.SSLSocket:
    """A connection that has its answer: the proxy and what is behind it serve."""
    plain = socket.create_connection(("127.0.0.1", port), _DIAL_TIMEOUT)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = client_context().wrap_socket(plain, server_hostname="localhost")
        tls.sendall(b"".ljust(LINE))
        if len(tls.recv(LINE)) != LINE:
            raise ConnectionResetError("closed before the answer")
    except BaseException:
        plain.close()
        raise
    tls.setblocking(False)
    return tls


class Line:
    """The connection, and what became of it in this round."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sock = dial(port)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._sock, selectors.EVENT_READ)

    def round(self, seconds: float) -> dict[str, Any]:
        """Longest silence in ms, lines due, sent and lost, how often it was cut, and after how
        many ms a new one served (None: it was not cut)."""
        began = last = due = time.monotonic()
        silence, sent, came, cut = 0.0, 0, 0, 0
        back_ms: float | None = None
        while (now := time.monotonic()) < began + seconds + GRACE:
            sending = now < began + seconds
            silence = max(silence, now - last) if sending else silence
            try:
                if sending and now >= due:
                    due += EVERY
                    sent += 1
                    self._sock.send(b"%d" % sent + b" " * (LINE - len(b"%d" % sent)))
                self._selector.select(max(0.0, (due if sending else now + EVERY) - now))
                arrived = self._read()
            except ssl.SSLWantWriteError:
                continue  # the way is full: lost
            except OSError:
                if not cut:
                    cut_at = time.monotonic()
                cut += 1
                self._again()
                back_ms = round(1e3 * (time.monotonic() - cut_at), 3)
                continue
            if arrived:
                came += arrived // LINE
                now = time.monotonic()
                silence, last = max(silence, now - last), now
        return {
            "silence_ms": round(1e3 * silence, 3),
            "due": int(seconds / EVERY),
            "sent": sent,
            "lost": max(0, sent - came),
            "connections_cut": cut,
            "back_ms": back_ms,
        }

    def close(self) -> None:
        self._selector.close()
        self._sock.close()

    def _read(self) -> int:
        try:
            data = self._sock.recv(65536)
        except ssl.SSLWantReadError:
            return 0
        if not data:
            raise ConnectionResetError("closed")
        return len(data)

    def _again(self) -> None:
        """Dial until somebody answers, also beyond the end of the round."""
        self._selector.unregister(self._sock)
        self._sock.close()
        until = time.monotonic() + _GIVE_UP
        while True:
            try:
                self._sock = dial(self._port)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise TimeoutError(f"port {self._port} serves nobody any more") from error
            time.sleep(EVERY)
        self._selector.register(self._sock, selectors.EVENT_READ)


def ask(port: int) -> None:
    """A round for each line on the standard input."""
    line = Line(port)
    for words in sys.stdin:
        print(json.dumps(line.round(float(words))), flush=True)


if __name__ == "__main__":
    {"answer": answer, "ask": ask}[sys.argv[1]](int(sys.argv[2]))
