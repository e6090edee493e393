"""Two clients that send each other numbered frames, in a process of their own.

Strategy: one loop and nothing else in it, so that a silence is the server's and not that of
whoever draws or kills; how long the loop itself was away is told with every answer.  Asked by
lines on standard input, it answers each with one line of JSON.  A TCP connection is opened and
left again every `KNOCK_EVERY` seconds beside it, to see whether anybody is turned away.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Any, Self

from pkvpn.chaos.ledger import Ledger, decode, encode
from pkvpn.client.session import VpnClient
from pkvpn.watchdog.child import set_death_signal

HUB, USERS, PASSWORD = "CHAOS", ("left", "right"), "chaos"

EVERY = 0.001
KNOCK_EVERY = 0.02
# A connection that was taken is looked at for so long: a reset comes at once or not at all.
_KNOCK_HELD = 0.05
# After a pause of this process not all that was due meanwhile is sent in one heap.
_HEAP = 20
# So long is what is on the way waited for, when an account is asked for.
_SETTLE = 0.25
# Nothing comes for so long although there are sessions: it will never come.
_GIVE_UP = 5.0

_MACS = (b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b")


class _Knocker:
    """Opens TCP connections and counts what became of them."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._open: deque[tuple[float, socket.socket]] = deque()
        self.next_at = 0.0
        self.counts = {"knocks": 0, "refused": 0, "reset": 0}

    def turn(self, now: float) -> None:
        if now < self.next_at:
            return
        self.next_at = now + KNOCK_EVERY
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.connect_ex(self._address)
        self.counts["knocks"] += 1
        self._open.append((now, sock))
        while self._open[0][0] < now - _KNOCK_HELD:
            _, sock = self._open.popleft()
            fate = _fate(sock)
            sock.close()
            if fate:
                self.counts[fate] += 1


def _fate(sock: socket.socket) -> str:
    """What became of a connection: "refused", "reset", or "" if it was taken or still waits."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return "refused" if code == errno.ECONNREFUSED else "reset"
    try:
        # Nobody says anything before we do, so an end of file is the end of who took it.
        return "" if sock.recv(1) else "reset"
    except BlockingIOError:
        return ""
    except OSError as error:
        return "" if error.errno == errno.ENOTCONN else "reset"


class _Exchange:
    """The two clients with the accounts of both directions."""

    def __init__(self, host: str, port: int) -> None:
        self.clients = [VpnClient(host, port, HUB, user, PASSWORD) for user in USERS]
        # What the client of that number receives.
        self.ledgers = [Ledger(), Ledger()]
        self.knocker = _Knocker((host, port))
        self._send_at = 0.0
        self._turned_at = 0.0
        self._away = 0.0

    def connect(self) -> None:
        for client in self.clients:
            client.connect()
        self._learn()
        self._send_at = self._turned_at = time.monotonic()

    def _learn(self) -> None:
        """Until each has heard of the other: the first frames make the addresses known."""
        heard: set[int] = set()
        until = time.monotonic() + 10.0
        while heard != {0, 1}:
            if time.monotonic() > until:
                raise TimeoutError("the two clients do not hear each other")
            for number, client in enumerate(self.clients):
                client.send([encode(_MACS[1 - number], _MACS[number], 0)])
                if client.receive(0.01):
                    heard.add(number)
        until = time.monotonic() + 0.3  # the copies that are still on their way
        while time.monotonic() < until:
            for client in self.clients:
                client.receive(0.01)

    def turn(self, wake: int) -> bool:
        """Wait for what comes first and do it; True: there is something to read at ``wake``."""
        deadlines = [client.next_deadline() for client in self.clients]
        until = min([self._send_at, *(one for one in deadlines if one is not None)])
        watched = [wake, *(client.fileno() for client in self.clients)]
        # Not epoll: that one waits in whole milliseconds.
        ready, _, _ = select.select(watched, [], [], max(0.0, until - time.monotonic()))
        now = time.monotonic()
        self._away = max(self._away, now - self._turned_at)
        self._turned_at = now
        for client, ledger in zip(self.clients, self.ledgers, strict=True):
            for frame in client.handle():
                number = decode(frame)
                if number is not None:
                    ledger.arrive(number, now)
        self._send(now)
        self.knocker.turn(now)
        return wake in ready

    def _send(self, now: float) -> None:
        due = 0
        while self._send_at <= now and due < _HEAP:
            due += 1
            self._send_at += EVERY
        if due == _HEAP:
            self._send_at = now + EVERY
        for number, client in enumerate(self.clients):
            ledger = self.ledgers[1 - number]
            client.send(
                encode(_MACS[1 - number], _MACS[number], ledger.next_number()) for _ in range(due)
            )

    def begin(self) -> None:
        now = time.monotonic()
        self._away = 0.0
        for ledger in self.ledgers:
            ledger.begin(now)

    def account(self) -> dict[str, Any]:
        now = time.monotonic()
        accounts = [ledger.account(now) for ledger in self.ledgers]
        return {
            "sent": sum(one.sent for one in accounts),
            "arrived": sum(one.arrived for one in accounts),
            "lost": sum(one.lost for one in accounts),
            "twice": sum(one.twice for one in accounts),
            "reordered": sum(one.reordered for one in accounts),
            "silence": max(one.silence for one in accounts),
            "own_silence": self._away,
            "established": sum(client.established for client in self.clients),
            "logins": sum(client.logins for client in self.clients),
            "resumptions": sum(client.resumptions for client in self.clients),
            **self.knocker.counts,
        }

    def marks(self) -> list[int]:
        """How far both directions have been sent; for `behind`."""
        return [ledger.sent for ledger in self.ledgers]

    def behind(self, marks: list[int]) -> bool:
        """Is anything still on its way that was sent before the marks?"""
        return any(
            ledger.sent - ledger.on_the_way < mark
            for ledger, mark in zip(self.ledgers, marks, strict=True)
        )

    def give_up(self) -> None:
        for ledger in self.ledgers:
            ledger.give_up()

    def close(self) -> None:
        for client in self.clients:
            client.close()


def serve(host: str, port: int) -> None:
    """Answer "begin", "look" and "finish" on standard input, until its end."""
    exchange = _Exchange(host, port)
    try:
        exchange.connect()
        gc.freeze()  # no pause of ours is to look like one of the server's
        _say(exchange.account())
        asked_at, marks = 0.0, None
        while True:
            if exchange.turn(0):
                word = os.read(0, 64)
                if not word:
                    return
                if word == b"finish\n":
                    asked_at, marks = time.monotonic(), exchange.marks()
                    continue
                if word == b"begin\n":
                    exchange.begin()
                _say(exchange.account())
            if marks is not None:
                behind, waited = exchange.behind(marks), time.monotonic() - asked_at
                if waited > (_GIVE_UP if behind else _SETTLE):
                    if behind:
                        exchange.give_up()
                    _say(exchange.account())
                    marks = None
    finally:
        exchange.close()


def _say(account: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(account) + "\n")
    sys.stdout.flush()


class TrafficError(Exception):
    """The two clients could not begin, or have ended; the text says why."""


class Traffic:
    """The process with the two clients, as its starter sees it.  Times are seconds."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        """Start it and wait until frames travel.  Raises `TrafficError`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pkvpn.chaos.traffic", host, str(port), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # ^C is its starter's
        )
        try:
            self.first = self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self) -> dict[str, Any]:
        """Begin a window for silences; the account at this moment."""
        return self._ask(b"begin\n")

    def look(self) -> dict[str, Any]:
        """The account at this moment."""
        return self._ask(b"look\n")

    def finish(self) -> dict[str, Any]:
        """The account when what has been sent by now has come, or is lost."""
        return self._ask(b"finish\n")

    def close(self) -> None:
        """End it."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _ask(self, word: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise TrafficError(self._last_words()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise TrafficError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return f"the two clients have ended: {said[-1] if said else 'without a word'}"


if __name__ == "__main__":
    set_death_signal(int(sys.argv[3]))
    serve(sys.argv[1], int(sys.argv[2]))
