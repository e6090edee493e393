"""What do strangers cost who misuse the server: its memory, its time, and everybody else's logins?

    python -m benchmarks.abuse [--seconds N] [--slow-seconds N] [--ways WAY ...] [--servers ...]

Each way of `benchmarks.abusers` goes on for a while from a host of its own, against our server and
SoftEther's (TCP transport only), while two stock clients are logged in.  Meanwhile the second one
disconnects and logs in again, over and over, and the first one's session must stay.  Memory is the
PSS of all processes at its highest and a while after the end, as more than before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time

from benchmarks import beds, common
from benchmarks.abusers import WAYS
from benchmarks.servers import Server
from tests.system.bed import ROOT, Bed

SETTLE = 5.0
SERVERS = ("pkvpn", "softether-tcp")


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--seconds", type=float, default=30.0, help="of each way (30)")
    made.add_argument("--slow-seconds", type=float, default=180.0, help="of slow-connections (180)")
    made.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    made.add_argument("--servers", nargs="*", default=list(SERVERS), choices=SERVERS)
    args = common.parse(made, {"seconds": 4.0, "slow_seconds": 6.0})
    common.lab()
    result = common.Result("abuse", args)
    result.columns = [
        "way", "server", "attempts", "server CPU, % of one core", "memory, MiB more at most",
        "MiB more afterwards", "stock logins meanwhile", "slowest login s", "lost sessions",
        "processes replaced",
    ]  # fmt: skip
    for kind in args.servers:
        try:
            against(result, kind, args)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            # A server that does not even stop any more, or lets nobody in: that is a result.
            result.note(f"{kind}: not to the end: {str(error)[-200:]}")
    result.note(
        "Our server lets nobody take more than 30 s from accept to login. SoftEther's has no such "
        "limit for whoever keeps sending; its memory after the end is what it has not given back."
    )
    result.save()


def against(result: common.Result, kind: str, args: argparse.Namespace) -> None:
    """All ways, one after the other, against one server."""
    limit = "[edge]\nlogin_timeout = 30\n"
    with (
        common.work_directory() as directory,
        beds.stock_bed(directory, kind, extra=limit) as (bed, server),
    ):
        for way in args.ways:
            seconds = args.slow_seconds if way == "slow-connections" else args.seconds
            measure(result, way, seconds, bed, server)


def measure(result: common.Result, way: str, seconds: float, bed: Bed, server: Server) -> None:
    before_sessions = beds.established(bed.clients[0])
    before_pids = set(server.pids())
    before = memory(server)
    meter = Meter(server)
    cpu, began = server.cpu(), time.monotonic()
    words = (sys.executable, "-m", "benchmarks.abusers", beds.SERVER, "443", way, f"{seconds:g}")
    abuser = subprocess.Popen(
        bed.clients[0].beside(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        text=True, cwd=ROOT,
    )  # fmt: skip
    logins: list[float] = []
    try:
        while abuser.poll() is None:
            logins.append(log_in_again(bed))
        attempts = int(abuser.communicate()[0].split()[-1])
    finally:
        abuser.kill()
        abuser.wait()
        most = meter.stop()
    spent = 100 * (server.cpu() - cpu) / (time.monotonic() - began)
    time.sleep(SETTLE)
    lost = beds.established(bed.clients[0]) - before_sessions
    replaced = len(before_pids - set(server.pids()))
    result.raw.setdefault(way, {})[server.name] = {"logins": logins, "attempts": attempts}
    result.row(
        way, server.name, attempts, spent, most - before, memory(server) - before, len(logins),
        max(logins), lost, replaced,
    )  # fmt: skip


def log_in_again(bed: Bed) -> float:
    """Seconds from the second client's order to connect to its established session."""
    client = bed.clients[1]
    client.command(f"AccountDisconnect {client.account}")
    began = time.monotonic()
    client.command(f"AccountConnect {client.account}")
    client.wait_established(within=60.0)
    return time.monotonic() - began


def memory(server: Server) -> float:
    """Of all its processes, MiB."""
    total = 0.0
    for pid in server.pids():
        try:
            total += common.memory(pid)["pss"]
        except OSError:
            continue  # it has just been replaced
    return total


class Meter(threading.Thread):
    """Looks again and again at how much memory a server has."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self._most = 0.0
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.5):
            self._most = max(self._most, memory(self._server))

    def stop(self) -> float:
        self._over.set()
        self.join()
        return self._most


if __name__ == "__main__":
    main()
