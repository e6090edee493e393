"""Programs for both ends of a transfer: what came is what was sent, or the hash tells.

    python -m tests.system.peer tcp-receive ADDRESS PORT
    python -m tests.system.peer tcp-send ADDRESS PORT BYTES SECONDS     (0: as fast as it goes)
    python -m tests.system.peer udp-echo ADDRESS PORT
    python -m tests.system.peer udp-send ADDRESS PORT DATAGRAMS
    python -m tests.system.peer udp-pace ADDRESS PORT                   (for each line: its silence)
    python -m tests.system.peer broadcast ADDRESS PORT                  (waits for an answer)

Each prints one line of JSON when it listens ({"listening": true}), and one at its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import socket
import sys
import time
from typing import Any

TIMEOUT = 60.0
CHUNK = 1 << 18
PACE = 0.001
PATIENCE = 2.0  # for what is on its way at the end
SO_RCVBUFFORCE = 33


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def tcp_receive(address: str, port: int) -> None:
    with socket.create_server((address, port)) as listener:
        listener.settimeout(TIMEOUT)
        say(listening=True)
        stream, _ = listener.accept()
    digest, got, last, silence = hashlib.sha256(), 0, time.monotonic(), 0.0
    with stream:
        stream.settimeout(TIMEOUT)
        while data := stream.recv(CHUNK):
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            digest.update(data)
            got += len(data)
    say(bytes=got, sha256=digest.hexdigest(), silence=round(silence, 3))


def tcp_send(address: str, port: int, size: int, seconds: float) -> None:
    source, digest, sent = random.Random(size), hashlib.sha256(), 0
    with socket.create_connection((address, port), TIMEOUT) as stream:
        began = time.monotonic()
        while sent < size:
            data = source.randbytes(min(CHUNK, size - sent))
            digest.update(data)
            stream.sendall(data)
            sent += len(data)
            ahead = seconds * sent / size - (time.monotonic() - began)
            if ahead > 0:
                time.sleep(ahead)
    say(bytes=sent, sha256=digest.hexdigest(), seconds=round(time.monotonic() - began, 3))


def udp_socket() -> socket.socket:
    """With room for what comes at once after seconds of silence, if this is root: the default
    holds 270 datagrams."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    return sock


def udp_echo(address: str, port: int) -> None:
    """Until it is told to end by an empty datagram."""
    with udp_socket() as sock:
        sock.settimeout(TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        say(listening=True)
        while True:
            data, sender = sock.recvfrom(65536)
            if not data:
                break
            sock.sendto(data, sender)
    say(ended=True)


def udp_send(address: str, port: int, datagrams: int) -> None:
    """One after the other, of all sizes up to what a frame holds; counts what came back."""
    source, same, other, lost = random.Random(datagrams), 0, 0, 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2.0)
        sock.connect((address, port))
        for number in range(datagrams):
            data = number.to_bytes(4, "big") + source.randbytes(number % 1469)
            sock.send(data)
            try:
                answer = sock.recv(65536)
            except TimeoutError:
                lost += 1
            else:
                same += answer == data
                other += answer != data
        sock.send(b"")
    say(same=same, other=other, lost=lost)


def udp_pace(address: str, port: int) -> None:
    """A numbered datagram every millisecond, until the end of the standard input; for each line
    of it the longest silence since the last line, at the end how many have not come back."""
    sent, back, silence, ending = 0, set[int](), 0.0, 0.0
    with udp_socket() as sock:
        sock.connect((address, port))
        due = last = time.monotonic()
        while not ending or (len(back) < sent and last < ending):
            waited_for = [sock] if ending else [sock, sys.stdin]
            until = ending or due
            readable, _, _ = select.select(waited_for, [], [], max(0.0, until - time.monotonic()))
            now = time.monotonic()
            silence = max(silence, now - last)
            if sock in readable:
                back.add(int(sock.recv(65536)))
                last = now
            elif ending:
                break
            if sys.stdin in readable:
                asked = os.read(sys.stdin.fileno(), 1 << 16)
                for _ in asked.splitlines():
                    say(silence=round(silence, 3), missing=sent - len(back))
                    silence = 0.0
                ending = 0.0 if asked else now + PATIENCE
            if now >= due and not ending:
                with contextlib.suppress(OSError):  # what cannot be sent is lost as well
                    sock.send(b"%d" % sent)
                sent, due = sent + 1, due + PACE
        sock.send(b"")
    say(sent=sent, lost=sent - len(back))


def broadcast(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10.0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(b"who is there?", (address, port))
        data, sender = sock.recvfrom(65536)
        sock.sendto(b"", sender)
    say(answer=data.decode(), sender=sender[0])


if __name__ == "__main__":
    what, address, port, *numbers = sys.argv[1:]
    match what:
        case "tcp-receive":
            tcp_receive(address, int(port))
        case "tcp-send":
            tcp_send(address, int(port), int(numbers[0]), float(numbers[1]))
        case "udp-echo":
            udp_echo(address, int(port))
        case "udp-send":
            udp_send(address, int(port), int(numbers[0]))
        case "udp-pace":
            udp_pace(address, int(port))
        case "broadcast":
            broadcast(address, int(port))
