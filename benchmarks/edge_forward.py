"""How fast one edge forwards a known flow, what it costs, and in which of its functions.

Two OpenSSL clients of 127.0.0.1 in processes of their own; the first sends batches of frames, the
second throws away what comes.  They share the processors with the edge, so the wall clock says
less than the edge's CPU time.

    python -m benchmarks.edge_forward [seconds] [frame size] [frames in a batch]

A timer of the edge's CPU time interrupts it; what then runs in Python gets the sample.  So a
function has its own time here, with all that C code and the kernel do on its call.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import socket
import ssl
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import common
from pkvpn import channel
from pkvpn.edge import certificate
from pkvpn.edge.main import EdgeSettings
from tests.edge.fake_child import FakeTree

A, B = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"
REQUEST = b"GET / HTTP/1.1\r\n\r\n"

# Seconds of CPU time between two samples; the kernel rounds it up to a tick.
SAMPLE = 0.001


def client(tree: FakeTree) -> tuple[ssl.SSLSocket, int]:
    """A client in the data phase, and its connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock = context.wrap_socket(socket.create_connection(tree.address))
    conn: int = tree.core.wait_for(channel.Opened).conn
    sock.sendall(REQUEST)
    tree.core.wait_for(channel.Request)
    tree.core.say(channel.State(conn, 1, b"ok", channel.Mode.BLOCKS, "", 60.0, True, b""))
    sock.recv(2)
    return sock, conn


def cpu(pid: int) -> tuple[float, float]:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def sampled(path: Path) -> Callable[[], None]:
    """What the edge is to do first: at a USR1 begin to count samples, at the next write them."""

    def begin() -> None:
        counts: Counter[str] = Counter()

        def sample(_number: int, frame: FrameType | None) -> None:
            if frame is not None:
                code = frame.f_code
                counts[f"{Path(code.co_filename).name}: {code.co_qualname}"] += 1

        def begin_or_end(_number: int, _frame: FrameType | None) -> None:
            if signal.getitimer(signal.ITIMER_PROF)[1]:
                signal.setitimer(signal.ITIMER_PROF, 0.0)
                path.with_suffix(".new").write_text(json.dumps(counts))
                path.with_suffix(".new").rename(path)
            else:
                signal.setitimer(signal.ITIMER_PROF, SAMPLE, SAMPLE)

        signal.signal(signal.SIGPROF, sample)
        signal.signal(signal.SIGUSR1, begin_or_end)

    return begin


def measure(seconds: float, size: int = 1514, count: int = 32) -> dict[str, Any]:
    """Rates, CPU seconds, and samples by function."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "cert.pem"), Path(folder, "key.pem")
        certificate.ensure(*files, "localhost", dt.datetime.now(dt.UTC))
        settings = EdgeSettings(index=1, max_connections=50)
        tree = FakeTree(settings, certificate.joined(*files))
        samples = Path(folder) / "samples.json"
        tree.start(sampled(samples))
        tree.core.say(channel.Hello(channel.VERSION, 1))
        (a, a_conn), (b, b_conn) = client(tree), client(tree)
        tree.core.say(channel.Flow(a_conn, B + A, b_conn))
        frame = B + A + b"\x08\0" + os.urandom(size - 14)
        block = struct.pack("!I", size) + frame
        batch = (struct.pack("!I", count) + block * count) * max(1, 200_000 // (count * len(block)))

        def send() -> None:
            while True:
                a.sendall(batch)

        def receive() -> None:
            buffer = bytearray(1 << 18)
            while b.recv_into(buffer):
                pass

        time.sleep(0.1)
        pids = [common.fork(receive), common.fork(send)]
        tree.core.control.settimeout(10)
        time.sleep(0.5)

        def counts(conn: int) -> channel.Counts:
            while True:
                seen: channel.Counts = tree.core.wait_for(channel.Counts)
                if seen.conn == conn:
                    return seen

        os.kill(tree.pid, signal.SIGUSR1)
        first, cpu_first, at_first = counts(b_conn), cpu(tree.pid), time.monotonic()
        last, cpu_last, at_last = first, cpu_first, at_first
        while at_last - at_first < seconds:
            last = counts(b_conn)
            cpu_last, at_last = cpu(tree.pid), time.monotonic()
        os.kill(tree.pid, signal.SIGUSR1)
        common.wait_until(samples.exists, 10.0, "the edge's samples")
        found: dict[str, int] = json.loads(samples.read_text())
        common.end(pids)
        a.close()
        b.close()
        tree.close()
    octets = last.bytes_out - first.bytes_out
    return {
        "octets": octets,
        "frames": last.frames_out - first.frames_out,
        "dropped": sum(last.drops) - sum(first.drops),
        "wall": at_last - at_first,
        "user": cpu_last[0] - cpu_first[0],
        "system": cpu_last[1] - cpu_first[1],
        "samples": dict(Counter(found).most_common()),
    }


def main(seconds: float = 6.0, size: int = 1514, count: int = 32) -> None:
    found = measure(seconds, size, count)
    octets, frames, wall = found["octets"], found["frames"], found["wall"]
    user, system, dropped = found["user"], found["system"], found["dropped"]
    print(
        f"{size}-byte frames, {count} in a batch: {octets * 8 / wall / 1e6:.0f} Mbit/s, "
        f"{frames / wall:.0f} frames/s, {dropped / max(1, frames + dropped):.1%} dropped; "
        f"CPU {(user + system) / wall:.0%}, s per GB {(user + system) / octets * 1e9:.2f} "
        f"(user {user / octets * 1e9:.2f}, system {system / octets * 1e9:.2f})"
    )
    total = sum(found["samples"].values())
    for name, samples in list(found["samples"].items())[:15]:
        print(f"{samples / total:6.1%}  {name}")


if __name__ == "__main__":
    words = sys.argv[1:]
    main(float(words[0]) if words else 6.0, *map(int, words[1:]))
