"""How long nobody serves after a kill -9, and who is turned away meanwhile.

    python -m benchmarks.respawn [--rounds N] [--seed N] [--quick]

A process is killed at a random moment while another program opens a TCP connection every
millisecond.  From the signal on, a prober dials, shakes hands (TLS), sends `GET /` and waits for
the answer, again at the next millisecond if it is refused or reset; what counts is the time from
the signal to the whole answer.  The answer comes from the core, so it also shows that the core
serves.  The same prober without a kill gives the healthy time, which is inside every figure.

Each is done again without the other program: the connections that it opens and leaves keep every
server busy, SoftEther so much that a healthy answer takes it seconds.

Beside pkvpn's edge and core: the same without successors that stand by, SoftEther's execsvc, and
two floors in 80 lines without any watching: a preloaded fork and a warm standby.  All answer over
TLS on 127.0.0.1.
"""

from __future__ import annotations

import datetime as dt
import errno
import functools
import json
import os
import random
import select
import signal
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.servers import Ours, SoftEther
from pkvpn.edge import certificate

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
EVERY = 0.001
# A connection that was taken is looked at for so long: a reset comes at once or not at all.
HELD = 0.005
GIVE_UP = 5.0
ALONE = ", prober alone"


# --- the two clients -----------------------------------------------------------------------------


def context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


def probe(port: int, tls_context: ssl.SSLContext, within: float) -> tuple[float, int, int]:
    """(when the answer was whole, refused attempts, reset ones); dials each millisecond.

    nan for the time if no answer came: a server may have more to do than to answer.
    """
    deadline = time.monotonic() + within
    refused = reset = 0
    while True:
        began = time.monotonic()
        try:
            ask(port, tls_context)
            return time.monotonic(), refused, reset
        except ConnectionRefusedError:
            refused += 1
        except OSError:
            reset += 1
        if time.monotonic() > deadline:
            return float("nan"), refused, reset
        time.sleep(max(0.0, began + EVERY - time.monotonic()))


def ask(port: int, tls_context: ssl.SSLContext) -> None:
    """One request with its answer; OSError if there is none."""
    with socket.create_connection(("127.0.0.1", port), GIVE_UP) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with tls_context.wrap_socket(plain) as tls:
            tls.sendall(REQUEST)
            if not tls.recv(65536).startswith(b"HTTP/1.1 "):
                raise ConnectionResetError(errno.ECONNRESET, "closed before the answer")


class Knocker:
    """Opens a TCP connection every millisecond in a process of its own, and counts their fates."""

    def __init__(self, port: int) -> None:
        self._stop, stop = os.pipe()
        self._said, said = os.pipe()
        self._stop, stop = stop, self._stop
        own = (self._stop, self._said)
        self._pid = common.fork(lambda: self._child(port, stop, said, own))
        os.close(stop)
        os.close(said)

    def _child(self, port: int, stop: int, said: int, not_ours: tuple[int, int]) -> None:
        for fd in not_ours:
            os.close(fd)
        os.write(said, json.dumps(knock(port, stop)).encode())

    def stop(self) -> dict[str, int]:
        """End it; opened, served (taken), refused, reset, timed out."""
        os.close(self._stop)
        said = os.read(self._said, 4096)
        os.close(self._said)
        os.waitpid(self._pid, 0)
        counts: dict[str, int] = json.loads(said)
        return counts


def knock(port: int, stop: int) -> dict[str, int]:
    """Until ``stop`` is closed at its other end."""
    counts = {"opened": 0, "taken": 0, "refused": 0, "reset": 0, "timed out": 0}
    waiting: deque[tuple[float, socket.socket]] = deque()
    due = time.monotonic()
    while not select.select([stop], [], [], max(0.0, due - time.monotonic()))[0]:
        now = time.monotonic()
        # After a pause of this process the missed ones are not made up for in one heap.
        due = max(due + EVERY, now - 10 * EVERY)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.connect_ex(("127.0.0.1", port))
        counts["opened"] += 1
        waiting.append((now, sock))
        while waiting and now - waiting[0][0] > HELD:
            at, sock = waiting[0]
            fate = look(sock)
            if fate == "waiting":
                if now - at < 1.0:
                    break
                fate = "timed out"
            waiting.popleft()
            sock.close()
            counts[fate] += 1
    for _, sock in waiting:
        fate = look(sock)
        counts["taken" if fate == "waiting" else fate] += 1
        sock.close()
    return counts


def look(sock: socket.socket) -> str:
    """What became of a connection attempt."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return "refused" if code == errno.ECONNREFUSED else "reset"
    try:
        sock.getpeername()
    except OSError:
        return "waiting"
    try:
        # Nobody says anything before we do, so an end of file is the end of who took it.
        return "taken" if sock.recv(1) else "reset"
    except BlockingIOError:
        return "taken"
    except OSError:
        return "reset"


# --- what is killed ------------------------------------------------------------------------------


class Target:
    """A process that can be looked up and killed, and the port where its successor answers."""

    def __init__(
        self, name: str, port: int, pid: Callable[[], int], settled: Callable[[], bool], rounds: int
    ) -> None:
        self.name = name
        self.port = port
        self.pid = pid
        self.settled = settled
        self.rounds = rounds


@contextmanager
def ours(directory: Path, rounds: int, *, standby: bool = True) -> Iterator[list[Target]]:
    server = Ours(directory, extra="" if standby else "[watchdog]\nstandby = false\n")
    server.start()
    try:
        yield [
            Target(
                f"pkvpn: {name}" + ("" if standby else ", no standby"), 443,
                functools.partial(lambda child: server.named_pids()[child], name),
                server.settled, rounds,
            )
            for name in ("edge-1", "core")
        ]  # fmt: skip
    finally:
        server.stop()


@contextmanager
def softether(directory: Path, rounds: int) -> Iterator[list[Target]]:
    server = SoftEther(directory)
    server.start()
    try:
        yield [
            Target(
                "SoftEther execsvc", 443, server.core, lambda: bool(server.core()),
                max(2, rounds // 5),
            )
        ]  # fmt: skip
    finally:
        server.stop()


@contextmanager
def floor(directory: Path, kind: str, rounds: int) -> Iterator[list[Target]]:
    cert, key, pid_file = (directory / f"{kind}.{end}" for end in ("crt", "key", "pid"))
    certificate.ensure(cert, key, "localhost", dt.datetime.now(dt.UTC))
    words = ["-m", "benchmarks.peers.floors", kind, "4433", str(cert), str(key), str(pid_file)]

    def program() -> None:
        os.setpgid(0, 0)
        os.chdir(common.ROOT)
        os.execv(sys.executable, [sys.executable, *words])

    pid = common.fork(program)

    def serving() -> int:
        return int(pid_file.read_text() or 0) if pid_file.exists() else 0

    name = {"fork": "floor: preloaded fork", "standby": "floor: warm standby"}[kind]
    try:
        common.wait_until(serving, 10.0, name)
        yield [Target(name, 4433, serving, lambda: True, max(2, rounds // 4))]
    finally:
        # The parent first, so that nothing new is forked; then the rest of its group.
        os.kill(pid, signal.SIGKILL)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- rounds --------------------------------------------------------------------------------------


def measure(target: Target, rounds: int, pause: tuple[float, float], *, knocks: bool) -> Any:
    """Kill it again and again; ``knocks``: under a client that dials every millisecond."""
    tls_context = context()
    took: list[float] = []
    healthy: list[float] = []
    refused = reset = 0
    knocker = Knocker(target.port) if knocks else None
    counts = dict.fromkeys(("opened", "taken", "refused", "reset", "timed out"), 0)
    try:
        for _ in range(rounds):
            time.sleep(random.uniform(*pause))
            common.wait_until(target.settled, GIVE_UP, f"{target.name} is up again")
            began = time.monotonic()
            healthy.append(1e3 * (probe(target.port, tls_context, GIVE_UP)[0] - began))
            pid = target.pid()
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            answered, new_refused, new_reset = probe(target.port, tls_context, GIVE_UP)
            took.append(1e3 * (answered - began))
            refused += new_refused
            reset += new_reset
            common.wait_until(functools.partial(replaced, target, pid), GIVE_UP, "a successor")
    finally:
        if knocker is not None:
            counts = knocker.stop()
    return {
        "took_ms": [round(t, 3) for t in took if t == t],  # noqa: PLR0124 - without nan
        "unanswered": sum(t != t for t in took),  # noqa: PLR0124
        "healthy_ms": [round(t, 3) for t in healthy if t == t],  # noqa: PLR0124
        "healthy_unanswered": sum(t != t for t in healthy),  # noqa: PLR0124
        "prober_refused": refused,
        "prober_reset": reset,
        "knocks": counts,
    }


def replaced(target: Target, pid: int) -> bool:
    return target.pid() not in (0, pid)


def add(result: common.Result, target: Target, rounds: int, *, knocks: bool) -> None:
    """Measure a target and put it into the table."""
    # SoftEther too has to have served for some time before it is replaced at once.
    found = measure(target, rounds, (0.7, 1.2), knocks=knocks)
    name = target.name + ("" if knocks else ALONE)
    result.raw[name] = found
    took, counts = found["took_ms"], found["knocks"]
    result.row(
        name, rounds, common.median(took), common.quantile(took, 0.95), common.quantile(took, 1.0),
        found["unanswered"], common.median(found["healthy_ms"]), counts["opened"],
        counts["refused"] + found["prober_refused"], counts["reset"] + found["prober_reset"],
        counts["timed out"],
    )  # fmt: skip


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=200, help="kills of edge and of core (200)")
    args = common.parse(made, {"rounds": 4})
    common.lab()
    result = common.Result("respawn", args)
    result.columns = [
        "killed", "kills", "median ms", "p95 ms", "max ms", "no answer in 5 s",
        "healthy answer ms",
        "dialled", "refused", "reset", "timed out",
    ]  # fmt: skip
    with common.work_directory() as directory:
        for group in (
            ours(directory, args.rounds),
            ours(directory, max(2, args.rounds // 4), standby=False),
            softether(directory, args.rounds),
            floor(directory, "fork", args.rounds),
            floor(directory, "standby", args.rounds),
        ):
            with group as targets:
                for target in targets:
                    for knocks in (True, False):
                        # Fewer of what only explains the first figure.
                        rounds = target.rounds if knocks else max(2, target.rounds // 2)
                        add(result, target, rounds, knocks=knocks)
    for knocked in ("", ALONE):
        slow = common.median(result.raw["SoftEther execsvc" + knocked]["took_ms"])
        for name in ("pkvpn: edge-1", "pkvpn: core"):
            ratio = slow / common.median(result.raw[name + knocked]["took_ms"])
            result.note(f"{name}{knocked}: {ratio:.1f} times as fast as SoftEther's execsvc.")
    result.note(
        "Killed 0.7 to 1.2 s after the last one served; `dialled` counts the plain TCP connections "
        "of the other program, one a millisecond; `refused` and `reset` are of both."
    )
    result.save(plot)


def plot(figure: Any, result: dict[str, Any]) -> None:
    """Each recovery a dot, on a logarithmic scale."""
    axes = figure.subplots()
    spread = random.Random(1)
    names = list(result["raw"])
    for place, name in enumerate(names):
        times = result["raw"][name]["took_ms"]
        axes.scatter(times, [place + spread.uniform(-0.25, 0.25) for _ in times], s=6, alpha=0.6)
        axes.plot([common.median(times)] * 2, [place - 0.35, place + 0.35], color="black")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms from kill -9 to the first served answer (TLS); bar: median")
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
