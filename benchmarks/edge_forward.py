"""How fast one edge forwards a known flow, and what it costs.

Two OpenSSL clients of 127.0.0.1 in processes of their own; the first sends batches of frames, the
second throws away what comes.  They share the processors with the edge, so the wall clock says
less than the edge's CPU time.

    python benchmarks/edge_forward.py [seconds] [frame size] [frames in a batch]
"""

import os
import signal
import socket
import ssl
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pkvpn import channel
from pkvpn.edge.main import EdgeSettings
from tests.edge.fake_child import FakeTree

A, B = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"
REQUEST = b"GET / HTTP/1.1\r\n\r\n"


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


def fork(work: "object") -> int:
    pid = os.fork()
    if not pid:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(0)
    return pid


def main(seconds: float, size: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = EdgeSettings(
            index=1, certificate=f"{folder}/cert.pem", key=f"{folder}/key.pem", max_connections=50
        )
        tree = FakeTree(settings)
        tree.start()
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
        pids = [fork(receive), fork(send)]
        tree.core.control.settimeout(10)
        time.sleep(0.5)

        def counts(conn: int) -> channel.Counts:
            while True:
                seen: channel.Counts = tree.core.wait_for(channel.Counts)
                if seen.conn == conn:
                    return seen

        first, cpu_first, at_first = counts(b_conn), cpu(tree.pid), time.monotonic()
        last, cpu_last, at_last = first, cpu_first, at_first
        while at_last - at_first < seconds:
            last = counts(b_conn)
            cpu_last, at_last = cpu(tree.pid), time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        octets = last.bytes_out - first.bytes_out
        frames = last.frames_out - first.frames_out
        drops = sum(last.drops) - sum(first.drops)
        wall = at_last - at_first
        user, system = (after - before for after, before in zip(cpu_last, cpu_first, strict=True))
        print(
            f"{size}-byte frames, {count} in a batch: {octets * 8 / wall / 1e6:.0f} Mbit/s, "
            f"{frames / wall:.0f} frames/s, {drops / max(1, frames + drops):.1%} dropped; "
            f"CPU {(user + system) / wall:.0%}, s per GB {(user + system) / octets * 1e9:.2f} "
            f"(user {user / octets * 1e9:.2f}, system {system / octets * 1e9:.2f})"
        )
        a.close()
        b.close()
        tree.close()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        float(arguments[0]) if arguments else 6.0,
        int(arguments[1]) if len(arguments) > 1 else 1514,
        int(arguments[2]) if len(arguments) > 2 else 32,
    )
