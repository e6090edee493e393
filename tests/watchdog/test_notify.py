"""What a service manager is told, and when."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvpn.watchdog.notify import Notify
from pkvpn.watchdog.policy import RestartPolicy
from tests.support import eventually
from tests.watchdog.running import child, running, spec_in


class Manager:
    """Listens as systemd does."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(self.path)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """All lines so far."""
        try:
            while True:
                self.heard += self._sock.recv(4096).decode().split("\n")
        except BlockingIOError:
            return self.heard

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_it_is_fed_three_times_in_each_period(manager: Manager) -> None:
    notify = Notify(manager.path, period=3.0)
    for tenths in range(40):
        notify.feed(100.0 + tenths / 10)
    assert manager.listen() == ["WATCHDOG=1"] * 4


def test_who_has_no_manager_tells_nobody(manager: Manager) -> None:
    nobody = Notify.from_environment({}, pid=1)
    nobody.ready("up")
    nobody.feed(1.0)
    gone = Notify(manager.path + " that is gone", period=1.0)
    gone.ready("up")
    gone.feed(1.0)
    assert manager.listen() == []


def test_a_period_meant_for_another_process_is_not_ours(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}
    Notify.from_environment(environ, pid=8).feed(1.0)
    assert manager.listen() == []
    Notify.from_environment(environ, pid=7).feed(1.0)
    assert manager.listen() == ["WATCHDOG=1"]


@pytest.mark.slow
def test_a_tree_tells_its_life(tmp_path: Path, manager: Manager) -> None:
    def started_by_it() -> None:
        os.environ.update(NOTIFY_SOCKET=manager.path, WATCHDOG_USEC="900000")
        os.environ.pop("WATCHDOG_PID", None)

    spec = spec_in(tmp_path, child("one"), child("two"))
    with running(tmp_path, spec, before=started_by_it, on_reload=lambda: spec) as tree:
        assert eventually(manager.listen)[0] == "READY=1"
        eventually(lambda: "WATCHDOG=1" in manager.listen())
        tree.signal(signal.SIGKILL, "two")
        eventually(lambda: "STATUS=up: two up (crash)" in manager.listen())
        told = len(manager.heard)
        tree.ask("reload")
        reloading, *_ = [line for line in manager.listen()[told:] if line != "WATCHDOG=1"]
        assert reloading == "RELOADING=1"
        assert "READY=1" in manager.heard[told:]
        tree.ask("stop")
        assert tree.wait_end() == 0
        assert "STOPPING=1" in manager.listen()


@pytest.mark.slow
def test_it_is_fed_while_what_is_vital_is_well(tmp_path: Path, manager: Manager) -> None:
    def started_by_it() -> None:
        os.environ.update(NOTIFY_SOCKET=manager.path, WATCHDOG_USEC="300000")
        os.environ.pop("WATCHDOG_PID", None)

    def is_fed() -> bool:
        told = len(manager.listen())
        eventually(lambda: tree.status()["watchdog"]["uptime"] > since + 1.0)
        return "WATCHDOG=1" in manager.listen()[told + 1 :]

    spec = spec_in(
        tmp_path,
        child("one", policy=RestartPolicy(first=60.0, cap=60.0)),
        child("two", vital=False, policy=RestartPolicy(first=60.0, cap=60.0)),
    )
    with running(tmp_path, spec, before=started_by_it) as tree:
        # After a wild death the first restart waits for its time.
        tree.signal(signal.SIGABRT, "two")
        eventually(lambda: tree.child("two")["state"] == "backoff")
        since = tree.status()["watchdog"]["uptime"]
        assert is_fed()
        tree.signal(signal.SIGABRT, "one")
        eventually(lambda: tree.child("one")["state"] == "backoff")
        since = tree.status()["watchdog"]["uptime"]
        assert not is_fed()
