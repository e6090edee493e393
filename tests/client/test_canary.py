"""The canary: how far it comes, when it sings, and that it never waits for one thing alone."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

import pytest

from pkvpn.client import canary, canary_main
from pkvpn.client.canary import CanaryCheck, CanaryResult, check
from pkvpn.client.canary_main import REACH_CORE, REACH_EDGE, CanarySettings, Round
from pkvpn.protocol import http
from tests.client.fake_server import FakeServer

SECRET = bytes(range(32))


@pytest.fixture
def hub(server: FakeServer) -> FakeServer:
    server.user, server.password, server.reflect = canary.USER, SECRET.hex(), True
    return server


def test_a_visit_that_goes_well(hub: FakeServer) -> None:
    result = check("127.0.0.1", hub.port, SECRET, 5.0)
    assert (result.stage, result.ok, result.error) == ("data", True, "")
    assert 0 < result.seconds < 5
    assert hub.logins[0].hub == ".canary"
    # The second goes to the address that the first has made known, and neither to itself.
    first, second = hub.frames
    assert first[6:12] == second[:6]
    assert all(frame[:6] != frame[6:12] for frame in hub.frames)
    assert not (first[0] | second[0]) & 1


def no_mark(server: FakeServer) -> None:
    server.page = http.build_error_page(404, "GET", "/")


def refused(server: FakeServer) -> None:
    server.refuse_login = 8


def silent(stage: str) -> Callable[[FakeServer], None]:
    def change(server: FakeServer) -> None:
        server.silent_at = stage

    return change


@pytest.mark.parametrize(
    ("change", "stage", "why"),
    [
        (silent("tls"), "tls", "no answer within 0.2 s"),
        (silent("signature"), "signature", "no answer within 0.2 s"),
        (silent("login"), "login", "no answer within 0.2 s"),
        (silent("data"), "echo", "no answer within 0.2 s"),
        (no_mark, "signature", "lacks the mark"),
        (refused, "login", "no such hub"),
    ],
)
def test_how_far_a_visit_came(
    hub: FakeServer, change: Callable[[FakeServer], None], stage: str, why: str
) -> None:
    change(hub)
    result = check("127.0.0.1", hub.port, SECRET, 0.2)
    assert (result.stage, result.ok) == (stage, False)
    assert why in result.error
    hub.silent_at = ""


def test_nobody_listens() -> None:
    result = check("127.0.0.1", 1, SECRET, 1.0)
    assert (result.stage, result.ok) == ("tcp", False)
    assert "refused" in result.error


def test_no_step_of_a_visit_waits(hub: FakeServer) -> None:
    hub.silent_at = "login"
    visit = CanaryCheck("127.0.0.1", hub.port, SECRET, 0.3)
    poll = select.poll()
    poll.register(visit.fileno(), select.POLLIN)
    slowest = 0.0
    while True:
        started = time.monotonic()
        result = visit.step()
        slowest = max(slowest, time.monotonic() - started)
        if result is not None:
            break
        poll.poll(max(0.0, visit.next_deadline() - time.monotonic()) * 1000)
    visit.close()
    hub.silent_at = ""
    assert slowest < 0.25


# When it visits whom


HERE = (("127.0.0.1", 443), ("::1", 443))
WELL = CanaryResult("data", True, 0.1)


def failed(stage: str) -> CanaryResult:
    return CanaryResult(stage, False, 2.0, "no answer")


def test_addresses_are_visited_in_turn_and_any_means_here() -> None:
    addresses = (("0.0.0.0", 1), ("::", 2), ("[::]", 3), ("10.0.0.1", 4))
    it = Round(addresses, 5.0, 2.0, now=0.0)
    seen = [it.start(0.0) for _ in range(5)]
    here = [("127.0.0.1", 1), ("::1", 2), ("::1", 3), ("10.0.0.1", 4), ("127.0.0.1", 1)]
    assert seen == here


def test_no_address_is_an_error() -> None:
    with pytest.raises(ValueError, match="no address"):
        Round((), 5.0, 2.0, now=0.0)


def test_at_the_start_it_tries_every_50_ms_for_10_seconds() -> None:
    it = Round(HERE, 5.0, 2.0, now=0.0)
    assert it.visit_at == 0.0
    assert it.start(0.0) == HERE[0]
    it.finish(failed("tcp"), 0.01)
    assert it.visit_at == pytest.approx(0.06)
    assert it.start(9.9) == HERE[1]
    it.finish(failed("tcp"), 10.0)
    assert it.visit_at == pytest.approx(10.9)


def test_a_visit_that_fails_is_tried_again_there_and_both_within_the_timeout() -> None:
    it = Round(HERE, 5.0, 2.0, now=0.0)
    it.start(0.0)
    it.finish(WELL, 0.1)
    assert it.start(5.0) == HERE[1]
    it.finish(failed("tls"), 5.2)  # at once: the other try has its own half of the time
    assert (it.waiting_since(REACH_EDGE), it.visit_at, it.try_timeout) == (5.0, 6.0, 1.0)
    assert it.start(6.0) == HERE[1]
    it.finish(failed("tls"), 7.0)
    # Two troubles in a row, which is what it takes to accuse somebody; then the next address.
    assert (it.waiting_since(REACH_EDGE), it.visit_at) == (6.0, 10.0)
    assert it.start(10.0) == HERE[0]
    it.finish(failed("tls"), 11.0)
    assert it.start(11.0) == HERE[0]
    it.finish(WELL, 11.1)
    assert (it.visit_at, it.start(15.0)) == (15.0, HERE[1])


@pytest.mark.parametrize(
    ("stage", "accused"),
    [
        ("tcp", REACH_EDGE),
        ("tls", REACH_EDGE),
        ("signature", REACH_CORE),
        ("login", REACH_CORE),
        ("echo", REACH_CORE),
    ],
)
def test_how_far_it_came_tells_who_is_accused(stage: str, accused: str) -> None:
    it = Round(HERE, 5.0, 2.0, now=0.0)
    it.start(1.0)
    it.finish(failed(stage), 3.0)
    (other,) = {REACH_EDGE, REACH_CORE} - {accused}
    assert (it.waiting_since(accused), it.waiting_since(other)) == (1.0, 0.0)


def test_a_trouble_lasts_until_that_address_serves_and_is_as_new_as_its_last_try() -> None:
    it = Round(HERE, 5.0, 2.0, now=0.0)
    it.start(0.0)
    it.finish(WELL, 0.1)
    assert (it.well, it.done, it.visit_at) == (True, 1, 5.0)
    for at in (5.0, 6.0):
        it.start(at)
        it.finish(failed("tcp"), at + 1.0)
        assert (it.done, it.waiting_since(REACH_EDGE)) == (1, at)
    it.start(10.0)
    it.finish(WELL, 10.1)  # the other address
    assert it.waiting_since(REACH_EDGE) == 6.0
    it.start(15.0)
    it.finish(failed("tls"), 16.0)
    assert it.waiting_since(REACH_EDGE) == 15.0
    it.start(16.0)
    it.finish(WELL, 16.1)
    assert (it.done, it.waiting_since(REACH_EDGE)) == (3, 0.0)


class FakeDuty:
    done = 0
    waiting_since = 0.0


class FakeChild:
    """The end of the tree that the canary holds; stops when ``until`` says so."""

    def __init__(self, until: Callable[[FakeChild], bool]) -> None:
        self._until = until
        self._memory = os.memfd_create("canary")
        os.write(self._memory, SECRET)
        self._pipe = os.pipe()
        self.duties = {REACH_EDGE: FakeDuty(), REACH_CORE: FakeDuty()}
        self.hurried = 0
        self.ready_at_done: list[int] = []
        self.said: list[str] = []
        self.turns: list[float] = []
        self.stopping = False

    def held(self, name: str) -> list[int]:
        assert name == "canary"
        return [self._memory]

    def duty(self, name: str) -> FakeDuty:
        return self.duties[name]

    def hurry(self) -> None:
        self.hurried += 1

    def fileno(self) -> int:
        return self._pipe[0]

    def receive(self) -> list[str]:
        self.stopping = self._until(self)
        return []

    def turn(self, now: float) -> float:
        self.turns.append(now)
        return 0.1

    def ready(self) -> None:
        self.ready_at_done.append(self.duties[REACH_CORE].done)

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        for fd in (self._memory, *self._pipe):
            os.close(fd)


def run_canary(server: FakeServer, until: Callable[[FakeChild], bool]) -> FakeChild:
    child = FakeChild(until)
    end = time.monotonic() + 10
    child._until = lambda child: until(child) or time.monotonic() > end
    settings = CanarySettings(lambda: (("127.0.0.1", server.port),), interval=0.05, timeout=0.3)
    try:
        canary_main.main(child, settings)  # type: ignore[arg-type]  # a fake
    finally:
        child.close()
    assert time.monotonic() < end
    return child


def test_the_child_is_ready_after_its_first_success_and_counts(hub: FakeServer) -> None:
    child = run_canary(hub, lambda child: child.duties[REACH_CORE].done >= 3)
    assert child.ready_at_done == [1]
    assert child.duties[REACH_CORE].waiting_since == 0.0


def test_the_child_says_why_it_is_not_ready_and_beats_all_the_time(hub: FakeServer) -> None:
    hub.refuse_login = 8
    seen = 0

    def until(child: FakeChild) -> bool:
        nonlocal seen
        if hub.connections >= 3 and hub.refuse_login:
            assert child.ready_at_done == []
            assert child.duties[REACH_CORE].waiting_since > 0
            hub.refuse_login = 0
        return bool(child.ready_at_done)

    child = run_canary(hub, until)
    # Once, not at every attempt.
    assert len(child.said) == 1
    assert "stage login: no such hub" in child.said[0]
    assert child.duties[REACH_CORE].waiting_since == 0.0
    gaps = [b - a for a, b in zip(child.turns, child.turns[1:], strict=False)]
    assert max(gaps) < 1.0
