"""The real tree with children that misbehave: each verdict once on the edge and on the core.

After each the same two clients go on over the same connections.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from pkvpn.chaos.injector import WAYS, order
from pkvpn.client.session import VpnClient
from pkvpn.watchdog.report import list_reports
from tests.support import eventually
from tests.system.bed import ChaoticService
from tests.system.test_own_clients import exchange

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CONFIG = """listen = ["127.0.0.1:0"]
[watchdog]
beat_interval = 0.1
hang_timeout = 0.5
deaf_timeout = 0.5
[canary]
interval = 0.2
timeout = 2.0
"""

# How each way is judged: class and why, and the signal or exit code it ends with.
KILLED = signal.SIGKILL
VERDICTS: dict[str, tuple[str, str, int | None]] = {
    "block": ("blocked", "hang", KILLED),
    "busy": ("busy", "hang", KILLED),
    "gil": ("busy", "hang", KILLED),
    "stop-reading": ("deaf", "hang", KILLED),
    "deaf": ("deaf", "hang", KILLED),
    "mute": ("mute", "hang", KILLED),
    "garbage": ("corrupt", "hang", KILLED),
    "stop": ("stopped", "hang", KILLED),
    "segv": ("dead", "crash", signal.SIGSEGV),
    "abort": ("dead", "crash", signal.SIGABRT),
    "kill": ("dead", "crash", KILLED),
    "raise": ("dead", "crash", None),
    "exit": ("dead", "clean", None),
}


class Visit:
    """A service, and two clients that have been connected to it since it began."""

    def __init__(self, service: ChaoticService, one: VpnClient, two: VpnClient) -> None:
        self.service = service
        self.clients = (one, two)

    def serves(self) -> None:
        """Frames pass both ways, over the connections of the beginning."""
        exchange(*self.clients, b"after")
        assert [(one.logins, one.resumptions) for one in self.clients] == [(1, 0), (1, 0)]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    service = ChaoticService(tmp_path_factory.mktemp("chaos"), CONFIG)
    with ExitStack() as stack:
        stack.callback(service.stop)
        service.start()
        service.add_hub("T", u1="pw1", u2="pw2")
        clients = []
        for user, password in (("u1", "pw1"), ("u2", "pw2")):
            client = VpnClient("127.0.0.1", service.port(), "T", user, password)
            stack.callback(client.close)
            client.connect()
            clients.append(client)
        made = Visit(service, *clients)
        made.serves()
        yield made


def test_the_ways_to_go_wrong_that_are_tried_here_are_those_of_the_laboratory() -> None:
    """It has more of them; those it makes in a run of its own (tests/chaos, the catalogue)."""
    assert set(VERDICTS) < set(WAYS)


@pytest.mark.parametrize("name", ["core", "edge-1"])
@pytest.mark.parametrize("way", list(VERDICTS))
def test_a_child_that_goes_wrong_is_judged_and_replaced_and_no_client_notices(
    visit: Visit, name: str, way: str
) -> None:
    service = visit.service
    before, others = service.restarts()[name], service.restarts()
    order(str(service.orders), name, way)
    eventually(lambda: service.restarts()[name] > before, within=20.0)
    eventually(service.is_whole, within=20.0)
    visit.serves()
    crashes = str(service.directory / "state" / "crashes")

    def report() -> dict[str, object] | None:
        newest = [one for one in list_reports(crashes) if one["child"] == name]
        return newest[0] if newest and newest[0]["incarnation"] == before + 1 else None

    found = eventually(report)
    assert found is not None
    verdict, why, number = VERDICTS[way]
    assert (found["class"], found["why"], found["signal"]) == (verdict, why, number)
    # Who stops all its threads again and again may be killed in the middle of its stacks.
    if way not in ("kill", "exit", "stop"):
        assert "injector.py" in str(found["stacks"])
    # Nobody else was held guilty of it.
    after = service.restarts()
    assert {**after, name: 0} == {**others, name: 0}, service.watchdog("status")


@pytest.mark.parametrize("name", ["core", "edge-1", "canary", "log"])
def test_a_child_that_somebody_stops_is_continued_and_nobody_is_replaced(
    visit: Visit, name: str
) -> None:
    service = visit.service
    eventually(service.is_whole, within=20.0)
    before = service.restarts()
    pid = service.pid(name)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: service.children()[name]["last_beat_age"] > 0.4, within=5.0)
    eventually(lambda: service.children()[name]["last_beat_age"] < 0.2, within=5.0)
    eventually(lambda: service.children()[name]["verdict"] == "ok", within=5.0)
    visit.serves()
    assert service.restarts() == before
