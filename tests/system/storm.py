"""Thousands of clients of ours that log in at the same moment, beside those who are there already.

    python -m tests.system.storm HOST PORT CLIENTS

Each is a whole client that tries again by itself, as when a network comes back.  The program says
in one line of JSON what became of them; `ride_out` runs it against a service.
"""

from __future__ import annotations

import json
import resource
import select
import subprocess
import sys
import time
from typing import Any

from pkvpn.chaos.traffic import Traffic
from pkvpn.client.session import VpnClient
from tests.support import eventually
from tests.system.bed import ROOT, Service

# The canary is there all the time.  All addresses: see HOST.
CONFIG = 'listen = ["0.0.0.0:0"]\n[canary]\ninterval = 0.5\n'
HUB, USER, PASSWORD = "STORM", "many", "storm"
# Another address than that of who connects: nobody here is to be taken for the canary.
HOST = "127.0.0.2"

# After so long it says who has got in by then.
TIMEOUT = 150.0
# How often it looks which of its clients wants to be called.
_LOOK_EVERY = 0.05


def storm(host: str, port: int, count: int) -> dict[str, Any]:
    """All of them at once; seconds are from the first packet to a client's welcome."""
    clients = [VpnClient(host, port, HUB, USER, PASSWORD) for _ in range(count)]
    try:
        with select.epoll() as epoll:
            by_fd = {client.fileno(): client for client in clients}
            for fd in by_fd:
                epoll.register(fd, select.EPOLLIN)
            took: dict[int, float] = {}
            began = time.monotonic()
            due = set(by_fd)
            while len(took) < count and time.monotonic() < began + TIMEOUT:
                for fd in due:
                    by_fd[fd].handle()
                    if fd not in took and by_fd[fd].established:
                        took[fd] = time.monotonic() - began
                due = {fd for fd, _ in epoll.poll(_LOOK_EVERY)}
                now = time.monotonic()
                for fd, client in by_fd.items():
                    deadline = client.next_deadline()
                    if deadline is not None and deadline <= now:
                        due.add(fd)
        seconds = sorted(took.values())
        return {
            "logged_in": sum(client.established and client.logins == 1 for client in clients),
            "tried_again": sum(client.error is not None for client in clients),
            "seconds": seconds,
        }
    finally:
        for client in clients:
            client.close()


def ride_out(service: Service, traffic: Traffic, count: int) -> dict[str, Any]:
    """What the storm's clients and those who were there have seen, and what became of the tree."""
    if HUB not in [hub["name"] for hub in service.ask("hub.list")]:
        service.add_hub(HUB, **{USER: PASSWORD})
    before = service.children()
    log = service.directory / "state/pkvpn.log"
    complaints = log.read_text().count("does not serve")
    first = traffic.begin()
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.storm", HOST, str(service.port()), str(count)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=2 * TIMEOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the storm has ended: {done.stderr[-1000:]}")
    last = traffic.finish()
    # Whoever was judged by what happened until now has been replaced when the canary is through.
    visits = _visits(service)
    eventually(lambda: _visits(service) > visits, within=30.0)
    after = service.children()
    return {
        **json.loads(done.stdout),
        "sent": last["sent"] - first["sent"],
        "lost": last["lost"] - first["lost"],
        "logins": last["logins"] - first["logins"],
        "cut": last["resumptions"] - first["resumptions"],
        "refused": last["refused"] - first["refused"],
        "silence": last["silence"],
        "own_silence": last["own_silence"],
        "visits": visits - int(before["canary"]["duties"]["reach-core"]["done"]),
        "visits_failed": log.read_text().count("does not serve") - complaints,
        "restarts": sum(after[name]["restarts"] - before[name]["restarts"] for name in before),
    }


def _visits(service: Service) -> int:
    """Of the canary that went well."""
    return int(service.children()["canary"]["duties"]["reach-core"]["done"])


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(storm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
