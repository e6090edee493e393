"""Strangers misuse the real tree in every way at once; whoever has an account does not notice."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.abusers import WAYS, Abuser
from tests.support import eventually
from tests.system.bed import Service
from tests.system.test_own_clients import connections, exchange, logged_in, refusal, restarts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CONFIG = """listen = ["127.0.0.1:0"]
[edge]
login_timeout = 2.0
memory_max = 67108864
"""
SECONDS = 8.0


@pytest.fixture
def service_config() -> str:
    return CONFIG


def memory(service: Service) -> int:
    """Of all processes, in bytes; what they share counts once."""
    total = 0
    for child in service.children().values():
        text = Path(f"/proc/{child['pid']}/smaps_rollup").read_text(encoding="ascii")
        total += int(text.split("Pss:")[1].split()[0]) * 1024
    return total


def test_strangers_cost_no_session_no_login_and_little_memory(service: Service) -> None:
    idle, before, memory_before = connections(service), restarts(service), memory(service)
    abusers = [Abuser(way, ("127.0.0.1", service.port())) for way in WAYS]
    with ExitStack() as stack, logged_in(service, "u1", "u2") as (one, two):
        exchange(one, two, b"before")
        for abuser in abusers:
            abuser.start()
            stack.callback(abuser.stop)
        logins = 0
        until = time.monotonic() + SECONDS
        most = 0
        while time.monotonic() < until or not (logins and all(one.done for one in abusers)):
            exchange(one, two, b"meanwhile")
            logins += refusal(service, "T", "u1", "pw1") == 0
            most = max(most, memory(service))
        assert most - memory_before < 100 << 20
        assert [(one.logins, one.resumptions) for one in (one, two)] == [(1, 0), (1, 0)]
    # Those that were kept open are out in time, and what was turned away has been counted.
    eventually(lambda: connections(service) <= idle, within=20.0)
    assert restarts(service) == before, service.told()
    status = service.ask("status")
    counted = {"failed handshakes", "broken protocol", "logins that took too long"}
    assert counted <= set(status["refused"])
    assert status["refused_logins"]["3"]  # the packs: a protocol error
