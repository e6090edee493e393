"""A bed of two stock clients in which one server after the other is put.

Strategy: the bed of the system tests, so that what is measured is what is tested.  The clients
are new for each server, since one of them remembers what it learnt of a server.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT
from benchmarks.echo import Asker
from benchmarks.servers import HUB, Ours, Server, SoftEther, Wrapped
from tests.system.bed import Bed, Host, StockClient

SERVER = "10.99.0.1"
PEER = "10.77.0.2"
ECHO_PORT = 7777


@contextmanager
def stock_bed(
    directory: Path, kind: str, *, extra: str = "", suffix: str = ""
) -> Iterator[tuple[Bed, Any]]:
    """A server of that kind with two stock clients that have logged in and reach each other.

    The server is `Ours` for "pkvpn", `Wrapped` for "pkvpn-wrapped", `SoftEther` for "softether" and
    "softether-tcp" (without its UDP acceleration).  ``extra``: configuration of ours.  ``suffix``:
    of the server's name in the clients' accounts; with "/tcp" a stock client comes back that
    otherwise never does.
    """
    place = directory / kind
    place.mkdir()
    bed = Bed(place / "unused", "listen = []\n")
    try:
        server: Server
        if kind.startswith("pkvpn"):
            ours = Wrapped if kind == "pkvpn-wrapped" else Ours
            server = ours(place, host=bed.server, listen=(f"{SERVER}:443",), extra=extra)
        else:
            server = SoftEther(place, host=bed.server, udp_acceleration=kind == "softether")
        server.start()
        try:
            for client in bed.clients:
                client.begin(f"{SERVER}{suffix}:443", HUB)
            for client in bed.clients:
                client.wait_established()
            common.wait_until(lambda: reaches(bed.clients[0]), 20.0, f"a ping through {kind}")
            yield bed, server
        finally:
            server.stop()
    finally:
        bed.close()


def reaches(client: StockClient) -> bool:
    """Does client 1 get an answer from client 2?"""
    try:
        client.run("ping", "-c", "1", "-W", "1", "10.77.0.2")
    except AssertionError:
        return False
    return True


def established(client: StockClient) -> int:
    """How often the client had to log in; 0 while it has no session."""
    try:
        return client.established_sessions()
    except KeyError:
        return 0


def connections(bed: Bed) -> set[str]:
    """The stock clients' TCP connections to the server, by address and port at their end.

    A session goes on when its connection is cut and made again, and the client does not count
    that; another port tells.
    """
    ends = set()
    for line in Path(f"/proc/{bed.server.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, *_ = line.split()
        host = ".".join(str(byte) for byte in reversed(bytes.fromhex(remote[:8])))
        if state == "01" and local.endswith(":01BB") and host in ("10.99.0.11", "10.99.0.12"):
            ends.add(f"{host}:{int(remote[9:], 16)}")
    return ends


def clients_cpu(bed: Bed) -> float:
    """CPU seconds of both stock clients."""
    return sum(common.cpu_seconds(pid) for client in bed.clients for pid in client.pids())


@contextmanager
def serving(host: Host, *command: str) -> Iterator[int]:
    """A program on a host, for as long as this lasts; its pid."""
    program = subprocess.Popen(
        host.beside(*command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        time.sleep(0.5)  # it binds its port
        yield program.pid
    finally:
        program.kill()
        program.wait()


@contextmanager
def echoes(bed: Bed) -> Iterator[Asker]:
    """Client 2 answers datagrams; what asks stands on client 1."""
    words = (sys.executable, "-m", "benchmarks.echo")
    with serving(bed.clients[1], *words, "answer", PEER, str(ECHO_PORT)):
        asker = Asker(bed.clients[0].beside(*words, "ask", PEER, str(ECHO_PORT)))
        try:
            yield asker
        finally:
            asker.close()
