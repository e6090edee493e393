"""What a client notices of it when the service, or the watchdog itself, is started anew.

All tests of this file share one machine; each leaves the service running.
"""

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
from tests.system.bed import PASSWORDS, ROOT, StockClient, lay_cables, run

# The first of them may have to make the image.
pytestmark = [pytest.mark.boot, pytest.mark.slow, pytest.mark.timeout(500)]

ECHO_PORT = 7000


class Visit:
    """Clients whose frames are on their way all the time."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def silence(self) -> float:
        """The longest since this was asked the last time, in seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self.said()["silence"])

    def end(self) -> dict[str, Any]:
        """What has become of all frames."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = self.said()
        self._process.wait(10.0)
        return found

    def said(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._process.args!r}: ended with {self._process.wait(5)}"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with contextlib.closing(Machine()) as made:
        made.boot()
        made.vpnserver("install")
        add_users(made)
        yield made


def add_users(machine: Machine) -> None:
    machine.vpnserver("hub", "add", "T")
    for user, password in PASSWORDS.items():
        machine.vpnserver("user", "add", "T", user, "--password-stdin", stdin=f"{password}\n")


@contextlib.contextmanager
def visiting(machine: Machine) -> Iterator[Visit]:
    """Two clients of ours, on the machine itself."""
    before = len(given(machine))
    line = machine.beside(sys.executable, "-m", "tests.boot.visitor", "443")
    with contextlib.closing(Visit(line)) as made:
        assert made.said() == {"ready": True}
        eventually(lambda: len(given(machine)) >= before + 2)
        yield made


@contextlib.contextmanager
def stock_visiting(machine: Machine) -> Iterator[tuple[Visit, list[StockClient]]]:
    """Two stock clients on a network of theirs, and an echo each millisecond between them."""
    with contextlib.ExitStack() as stack:
        clients = []
        for number in (1, 2):
            clients.append(StockClient(number))
            stack.callback(clients[-1].close)
        lay_cables(lambda *line: run(*machine.beside(*line)), clients)
        stack.callback(run, *machine.beside("ip", "link", "del", "lan"))
        for client in clients:
            client.begin("10.99.0.1:443", "T")
        for client in clients:
            client.wait_established()
        one, two = clients
        eventually(lambda: one.run("ping", "-c", "1", "-W", "1", two.address), within=15.0)
        program = [sys.executable, "-m", "tests.system.peer"]
        line = two.beside(*program, "udp-echo", two.address, str(ECHO_PORT))
        echo = stack.enter_context(contextlib.closing(Visit(line)))
        assert echo.said() == {"listening": True}
        line = one.beside(*program, "udp-pace", two.address, str(ECHO_PORT))
        yield stack.enter_context(contextlib.closing(Visit(line))), clients


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


DEEDS: dict[str, Callable[[Machine], object]] = {
    "freeze": freeze,
    # Early: what follows finds the ledger of another image.
    "upgrade": lambda machine: machine.vpnserver("upgrade"),
    "restart": lambda machine: machine.do("systemctl", "restart", "vpnserver"),
    "our restart": lambda machine: machine.vpnserver("restart"),
    # Children that come up after a reload must find all that is theirs.
    "reload": lambda machine: machine.do("systemctl", "reload", "vpnserver"),
    **{f"kill -9 of {name}": kill(name) for name in sorted(CHILDREN)},
    "kill -9 of the watchdog": kill("watchdog"),
    "killall -9": lambda machine: machine.do("killall", "-KILL", "vpnserver"),
    "systemctl kill -9": lambda machine: machine.do(
        "systemctl", "kill", "--signal=KILL", "vpnserver"
    ),
}


def do(machine: Machine, deed: str) -> None:
    """Until everything is as it was before."""
    before = machine.watchdog()
    DEEDS[deed](machine)
    again = any(word in deed for word in ("restart", "watchdog", "killall", "systemctl kill"))
    wait_whole(machine, after=before if again else 0)


def interface(machine: Machine, name: str) -> int:
    (found,) = json.loads(machine.do("ip", "-json", "link", "show", "dev", name).stdout)
    return int(found["ifindex"])


# What more than about a thousand frames come at once a stock client drops: of a silence this long
# at a frame each millisecond it keeps all.
STOCK_HOLDS = 0.9


@pytest.mark.root
@pytest.mark.netns
@pytest.mark.softether
def test_clients_keep_their_sessions_and_no_frame_is_lost(machine: Machine) -> None:
    machine.vpnserver("bridge", "add", "T", "tap0")
    tap = interface(machine, "tap0")
    machine.do("ip", "addr", "add", "10.77.0.9/24", "dev", "tap0")
    with stock_visiting(machine) as (stock, clients), visiting(machine) as ours:
        too_many = 0.0
        stock.silence(), ours.silence()
        for deed in DEEDS:
            do(machine, deed)
            silences = stock.silence(), ours.silence()
            print("{:24} longest silence: stock {:.3f} s, ours {:.3f} s".format(deed, *silences))
            too_many += max(0.0, silences[0] - STOCK_HOLDS) * 1000
            assert interface(machine, "tap0") == tap, f"{deed}: the TAP is another one"
        clients[0].run("ping", "-c", "1", "-W", "5", "10.77.0.9")
        told = ours.end()
        assert told["clients"] == [{"logins": 1, "resumptions": 0}] * 2, machine.journal()
        assert told["lost"] == 0, machine.journal()
        assert stock.end()["lost"] <= too_many, machine.journal()
        assert [client.established_sessions() for client in clients] == [1, 1]


@pytest.mark.parametrize("verb", ["stop", "kill"])
def test_after_an_end_nothing_is_kept(machine: Machine, verb: str) -> None:
    """Asked for by systemd's own stop, or by a TERM of its to everybody at once."""
    with visiting(machine) as visit:
        machine.do("systemctl", verb, "vpnserver")
        eventually(lambda: machine.show("ActiveState") == "inactive", within=10.0)
        assert machine.show("NFileDescriptorStore") == "0"
        machine.do("systemctl", "start", "vpnserver")
        wait_whole(machine)
        # They have come back by themselves, on other connections.
        assert all(sum(client.values()) == 2 for client in visit.end()["clients"])


def test_a_connection_that_has_ended_is_not_kept(machine: Machine) -> None:
    with visiting(machine) as visit:
        visit.end()
        # The canary comes and goes.
        eventually(lambda: len(given(machine)) == 0, within=20.0)


def test_the_journal_has_priorities(machine: Machine) -> None:
    def errors() -> str:
        return machine.do("journalctl", "--unit=vpnserver", "--priority=err", "--output=cat").stdout

    machine.vpnserver("bridge", "add", "T", "tap1")
    machine.do("ip", "link", "del", "tap1")
    eventually(lambda: "bridge tap1" in errors())
    assert "made a certificate" in machine.journal()
    assert "made a certificate" not in errors()
