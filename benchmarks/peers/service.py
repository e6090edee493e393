"""What every supervisor supervises here: answers its pid to whoever asks, and can be made to hang.

    python service.py PORT                    binds the port itself
    python service.py PORT --fd N             serves on a listening socket that it inherited
    python service.py PORT --notify N         writes a line to that descriptor when it serves (s6)
    python service.py PORT --beat UDP         "pid;time" to that port 20 times a second (circus)
    python service.py PORT --fork-loop        a parent that only forks it again (the floor)
    python service.py PORT --tree DIRECTORY   the same under pkvpn.watchdog

SIGUSR1 makes it spin in Python for ever, SIGUSR2 in C code that keeps the GIL.  The imports are
those of a service of some size.
"""

from __future__ import annotations

import argparse
import asyncio  # noqa: F401
import json  # noqa: F401
import logging  # noqa: F401
import os
import select
import signal
import socket
import ssl  # noqa: F401
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkvpn.watchdog import Child

BEAT_EVERY = 0.05


def spin(*_: object) -> None:
    """Busy in Python, for ever."""
    while True:
        pass


def spin_in_c(*_: object) -> None:
    """Busy in C code that keeps the GIL, for ever."""
    sum(range(10**15))


def hang_on_request() -> None:
    signal.signal(signal.SIGUSR1, spin)
    signal.signal(signal.SIGUSR2, spin_in_c)


def open_listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=1024)


def serve(
    listener: socket.socket,
    turn: Callable[[], float | None] = lambda: None,
    wake: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Answer until ``stopping``; ``turn`` is called each turn and says how long to wait."""
    hang_on_request()
    listener.setblocking(False)
    answer = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n%d" % os.getpid()
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    if wake is not None:
        poller.register(wake, select.POLLIN)
    while not stopping():
        wait = turn()
        ready = dict(poller.poll(None if wait is None else wait * 1000))
        if listener.fileno() in ready:
            try:
                guest, _ = listener.accept()
            except OSError:
                continue
            with guest:
                guest.settimeout(1.0)
                try:
                    guest.recv(4096)
                    guest.sendall(answer)
                except OSError:
                    continue


def beats(port: int) -> Callable[[], float]:
    """What circus's WatchDog listens for, from the loop that does the work."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    due = time.monotonic()

    def turn() -> float:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            sock.sendto(b"%d;%f" % (os.getpid(), time.time()), ("127.0.0.1", port))
            due = now + BEAT_EVERY
        return due - now

    return turn


def fork_loop(listener: socket.socket) -> None:
    """No supervision: fork, wait, again."""
    while True:
        pid = os.fork()
        if not pid:
            serve(listener)
        os.waitpid(pid, 0)


def child_main(child: Child) -> None:
    """The service as a child of a tree."""
    listener = socket.socket(fileno=child.held("door")[0])
    child.ready()

    def turn() -> float:
        child.receive()
        return child.turn(time.monotonic())

    serve(listener, turn, child.fileno(), lambda: child.stopping)


def tree(port: int, directory: str) -> int:
    """The same under the watchdog of this project, with its defaults."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from pkvpn.watchdog import ChildSpec, HeldSpec, TreeSpec, run_tree

    return run_tree(
        TreeSpec(
            name="service",
            children=(ChildSpec("service", child_main, held=("door",)),),
            runtime_dir=f"{directory}/run",
            state_dir=f"{directory}/state",
            held=(HeldSpec("door", lambda: [open_listener(port).detach()]),),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--fd", type=int)
    parser.add_argument("--notify", type=int)
    parser.add_argument("--beat", type=int)
    parser.add_argument("--fork-loop", action="store_true")
    parser.add_argument("--tree")
    args = parser.parse_args()
    if args.tree:
        return tree(args.port, args.tree)
    listener = open_listener(args.port) if args.fd is None else socket.socket(fileno=args.fd)
    if args.notify is not None:
        os.write(args.notify, b"\n")
        os.close(args.notify)
    if args.fork_loop:
        fork_loop(listener)
    if args.beat is not None:
        serve(listener, beats(args.beat))
    else:
        serve(listener)
    return 0


# gunicorn's workers run their own loop around this.
def application(_environ: object, start_response: Callable[..., object]) -> list[bytes]:
    hang_on_request()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
    return [b"%d" % os.getpid()]


if __name__ == "__main__":
    sys.exit(main())
