"""The control socket: one JSON object per line, asked and answered over a unix socket.

Strategy: the server never waits.  A connection is read when it is readable, each whole
line is answered at once, and what does not fit into the socket waits in a buffer that is
bounded by the size of one answer.  Whoever connects is asked of the kernel (SO_PEERCRED):
the same user or root, nobody else.

    request  {"do": VERB, "args": {...}}
    answer   {"ok": true, "result": ...}  or  {"ok": false, "error": "..."}
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

# One line, request or answer.  A larger request ends its connection; a larger answer is
# replaced by an error that says so.
MAX_LINE = 65536

# Operators and their tools, not users: more at once is a bug or an attack from the inside.
MAX_CONNECTIONS = 32

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid

Answer = Callable[[str, dict[str, Any]], Any]


class ControlError(Exception):
    """A refusal in words: what was asked, and why it is not done."""


def listen(path: str, *, mode: int = 0o600) -> int:
    """Return the descriptor of a listening control socket at ``path``.

    A socket file that nobody listens on any more is replaced: whoever calls this holds the
    instance lock.  Raises `OSError` naming the path.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        os.chmod(path, mode)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"control socket {path}: {error.strerror}") from error
    return listener.detach()


def ask(
    path: str, verb: str, args: dict[str, Any] | None = None, timeout: float = 5.0
) -> Any:  # JSON
    """Ask ``verb`` of the server at ``path`` and return its result.

    Raises `ControlError` if it refuses, `TimeoutError` if the whole exchange takes longer than
    ``timeout`` seconds, `OSError` if nobody listens or the connection ends early.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(path)
        return exchange(connection, path, verb, args or {}, timeout)


def exchange(
    connection: socket.socket, who: str, verb: str, args: dict[str, Any], timeout: float
) -> Any:  # JSON
    """`ask` on a connection that is there; ``who`` is called so in errors."""
    deadline = time.monotonic() + timeout
    # Who refuses us may have said so and closed before we have asked.
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(json.dumps({"do": verb, "args": args}).encode() + b"\n")
    received = bytearray()
    while not received.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = connection.recv(MAX_LINE)
        if not chunk:
            raise ConnectionError(f"{who} closed the connection before it answered {verb}")
        received += chunk
        if deadline <= time.monotonic() and not received.endswith(b"\n"):
            raise TimeoutError(f"{who} did not answer {verb} within {timeout} s")
    answer = json.loads(received)
    if not answer.get("ok"):
        raise ControlError(str(answer.get("error", "refused without a reason")))
    return answer.get("result")


class _Connection:
    """One operator's connection: what came and is not a whole line, what waits to be sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.waiting = bytearray()
        self.ending = False


class ControlServer:
    """Answers control lines from within somebody else's selector loop."""

    def __init__(self, listener_fd: int, selector: selectors.BaseSelector, answer: Answer) -> None:
        self._listener = socket.socket(fileno=listener_fd)
        self._listener.setblocking(False)
        self._selector = selector
        self._answer = answer
        # In the order in which they were last heard.
        self._connections: dict[_Connection, None] = {}
        # Given up for a moment where no other is to be had, so that whoever waits is sent away
        # and does not keep the loop awake.
        self._reserve = self._open_reserve()
        selector.register(self._listener, selectors.EVENT_READ, self)

    def handle(self, key: selectors.SelectorKey, mask: int) -> bool:
        """Do what there is to do for one selector event; False if it is not ours."""
        if key.data is self:
            self._accept()
        elif isinstance(key.data, _Connection) and key.data in self._connections:
            if mask & selectors.EVENT_READ and not self._read(key.data):
                return True
            self._flush(key.data)
        else:
            return False
        return True

    def close(self) -> None:
        """End every connection; what was answered has been sent if the peer reads."""
        for connection in list(self._connections):
            self._end(connection)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._close_reserve()

    def _open_reserve(self) -> int:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close_reserve(self) -> None:
        reserve, self._reserve = self._reserve, -1
        if reserve >= 0:
            os.close(reserve)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._send_away()
            return  # else it is gone again
        sock.setblocking(False)
        why = self._why_not(sock)
        if why:
            with contextlib.suppress(OSError):
                sock.send(_line({"ok": False, "error": why}))
            sock.close()
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            # Whoever asks now counts more than a script that forgot to hang up.
            self._end(next(iter(self._connections)))
        connection = _Connection(sock)
        self._connections[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _why_not(self, sock: socket.socket) -> str:
        """Why who has connected may not ask; "": he may."""
        _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid in (0, os.geteuid()):
            return ""
        return f"user {uid} may not control a service of user {os.geteuid()}"

    def _send_away(self) -> None:
        self._close_reserve()
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):  # somebody was quicker: the next one waits
            self._reserve = self._open_reserve()

    def _read(self, connection: _Connection) -> bool:
        try:
            data = connection.sock.recv(MAX_LINE)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self._end(connection)
            return False
        self._connections[connection] = self._connections.pop(connection)
        connection.received += data
        while (end := connection.received.find(b"\n")) >= 0:
            line = bytes(connection.received[:end])
            del connection.received[: end + 1]
            connection.waiting += self._answer_line(line)
        if len(connection.received) > MAX_LINE:
            connection.received.clear()
            connection.waiting += _line(
                {"ok": False, "error": f"a line is at most {MAX_LINE} bytes"}
            )
            connection.ending = True
        return True

    def _answer_line(self, line: bytes) -> bytes:
        try:
            request = json.loads(line)
            verb, args = request["do"], request.get("args") or {}
            if not isinstance(verb, str) or not isinstance(args, dict):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return _line({"ok": False, "error": 'a request is {"do": VERB, "args": {...}}'})
        try:
            answer = _line({"ok": True, "result": self._answer(verb, args)})
        except ControlError as error:
            return _line({"ok": False, "error": str(error)})
        except Exception as error:
            import logging  # who only asks does not pay for it

            logging.getLogger(__name__).exception("%s failed", verb)
            return _line({"ok": False, "error": f"{verb} failed: {type(error).__name__}: {error}"})
        if len(answer) > MAX_LINE:
            return _line({"ok": False, "error": f"the answer to {verb} is over {MAX_LINE} bytes"})
        return answer

    def _flush(self, connection: _Connection) -> None:
        try:
            while connection.waiting:
                del connection.waiting[: connection.sock.send(connection.waiting)]
        except BlockingIOError:
            if len(connection.waiting) > 4 * MAX_LINE:  # asks and asks and never reads
                self._end(connection)
                return
        except OSError:
            self._end(connection)
            return
        if connection.ending and not connection.waiting:
            self._end(connection)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.waiting else 0)
        self._selector.modify(connection.sock, wanted, connection)

    def _end(self, connection: _Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection.sock)
        connection.sock.close()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
