"""Datagrams through the VPN and back, one every millisecond: how long was the longest silence?

    python -m benchmarks.echo answer ADDRESS PORT
    python -m benchmarks.echo ask ADDRESS PORT

`ask` does a round for each line of its input, the round's seconds, and answers with a line of JSON.
A process of its own on each side: what measures must not wait for what kills.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

EVERY = 0.001
# What has not come back so long after the last one was sent is lost.
GRACE = 0.3


def answer(address: str, port: int) -> None:
    """Send back whatever comes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        enlarge(sock)
        sock.bind((address, port))
        while True:
            data, sender = sock.recvfrom(2048)
            sock.sendto(data, sender)


def enlarge(sock: socket.socket) -> None:
    """Room for what comes at once after a second of silence: the default holds 270 datagrams."""
    sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE


def ask(address: str, port: int) -> None:
    """A round for each line on the standard input."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        enlarge(sock)
        sock.setblocking(False)
        sock.connect((address, port))
        for number, line in enumerate(sys.stdin):
            print(json.dumps(a_round(sock, number, float(line))), flush=True)


def a_round(sock: socket.socket, number: int, seconds: float) -> dict[str, Any]:
    """Longest silence in ms, datagrams due, sent, back, and the median of their ways in ms."""
    began = last = due = time.monotonic()
    silence, sent, way = 0.0, 0, []
    back: set[int] = set()
    twice = 0
    while True:
        now = time.monotonic()
        if now >= began + seconds + GRACE:
            break
        sending = now < began + seconds
        if sending and now >= due:
            try:
                sock.send(b"%d %d %.6f" % (number, sent, now))
            except OSError:
                pass  # one that cannot be sent is lost as well
            sent += 1
            due += EVERY
            continue
        if sending:
            silence = max(silence, now - last)
        until = due if sending else began + seconds + GRACE
        if not select.select([sock], [], [], max(0.0, until - now))[0]:
            continue
        try:
            of, which, at = sock.recv(2048).split()
        except OSError:
            continue
        now = time.monotonic()
        if int(of) == number:  # else a late one of the last round, which counted as lost there
            twice += int(which) in back
            back.add(int(which))
            way.append(now - float(at))
            silence, last = max(silence, now - last), now
    way.sort()
    return {
        "silence_ms": round(silence * 1e3, 3),
        "due": int(seconds / EVERY),
        "sent": sent,
        "lost": sent - len(back),
        "twice": twice,
        "p50_ms": round(way[len(way) // 2] * 1e3, 4) if way else None,
    }


class Asker:
    """`ask` on a host, driven by another process."""

    def __init__(self, command: list[str]) -> None:
        """``command`` runs this program where it shall ask."""
        self._program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def begin(self, seconds: float) -> None:
        """Start a round, to be followed by `finish`."""
        assert self._program.stdin is not None
        self._program.stdin.write(f"{seconds:g}\n")
        self._program.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """Wait for the round's end."""
        assert self._program.stdout is not None
        found: dict[str, Any] = json.loads(self._program.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        self._program.kill()
        self._program.communicate()


if __name__ == "__main__":
    {"answer": answer, "ask": ask}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
