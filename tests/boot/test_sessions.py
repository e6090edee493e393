"""What a client notices of it when the service, or the watchdog itself, is started anew."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.boot.machine import Machine
from tests.boot.test_service_mode import CHILDREN, tree, wait_whole
from tests.support import eventually
from tests.system.bed import ROOT

# The first of them may have to make the image.
pytestmark = [pytest.mark.boot, pytest.mark.slow, pytest.mark.timeout(500)]


class Visit:
    """Two clients whose frames are on their way all the time."""

    def __init__(self, machine: Machine) -> None:
        self._process = subprocess.Popen(
            machine.beside(sys.executable, "-m", "tests.boot.visitor", "443"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def end(self) -> dict[str, Any]:
        out, _ = self._process.communicate(timeout=30.0)
        found: dict[str, Any] = json.loads(out)
        return found

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with contextlib.closing(Machine()) as made:
        made.boot()
        made.vpnserver("install")
        made.vpnserver("hub", "add", "T")
        for user in ("u1", "u2"):
            made.do(
                "sh", "-c", f'echo {user.replace("u", "pw")} | "$@"', "sh", sys.executable, "-m",
                "pkvpn", "user", "add", "T", user, "--password-stdin",
            )  # fmt: skip
        yield made


@pytest.fixture
def visit(machine: Machine) -> Iterator[Visit]:
    with contextlib.closing(Visit(machine)) as made:
        eventually(lambda: len(given(machine)) >= 2)
        yield made


def given(machine: Machine) -> list[str]:
    """The connections in the hands of systemd, as process 1 sees them."""
    text = machine.do("ss", "--tcp", "--processes", "--no-header", "state", "established").stdout
    return [line for line in text.splitlines() if '"systemd"' in line]


def kill(name: str) -> Callable[[Machine], object]:
    return lambda machine: machine.do("kill", "-KILL", str(tree(machine)[name]))


def freeze(machine: Machine) -> None:
    """For longer than a child may be silent."""
    machine.do("systemctl", "freeze", "vpnserver")
    machine.do("sleep", "1.5")
    machine.do("systemctl", "thaw", "vpnserver")


# The upgrade first: what follows finds the ledger of another image.
DEEDS: dict[str, Callable[[Machine], object]] = {
    "upgrade": lambda machine: machine.vpnserver("upgrade"),
    "freeze": freeze,
    "reload": lambda machine: machine.do("systemctl", "reload", "vpnserver"),
    "restart": lambda machine: machine.do("systemctl", "restart", "vpnserver"),
    "our restart": lambda machine: machine.vpnserver("restart"),
    **{f"kill -9 of {name}": kill(name) for name in sorted(CHILDREN)},
    "kill -9 of the watchdog": kill("watchdog"),
    "killall -9": lambda machine: machine.do("killall", "-KILL", "vpnserver"),
}


def test_a_client_keeps_its_session(machine: Machine, visit: Visit) -> None:
    for name, deed in DEEDS.items():
        before = machine.watchdog()
        deed(machine)
        again = "restart" in name or "watchdog" in name or "killall" in name
        wait_whole(machine, after=before if again else 0)
    told = visit.end()
    assert told["clients"] == [{"logins": 1, "resumptions": 0}] * 2, machine.journal()


def test_after_a_stop_nothing_is_kept(machine: Machine, visit: Visit) -> None:
    machine.do("systemctl", "stop", "vpnserver")
    assert machine.show("NFileDescriptorStore") == "0"
    machine.do("systemctl", "start", "vpnserver")
    wait_whole(machine)
    # They have come back by themselves, on other connections.
    assert all(sum(client.values()) == 2 for client in visit.end()["clients"])


def test_a_connection_that_has_ended_is_not_kept(machine: Machine, visit: Visit) -> None:
    visit.end()
    # The canary comes and goes.
    eventually(lambda: len(given(machine)) == 0, within=20.0)
