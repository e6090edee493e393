"""Service Mode without systemd: the init script of a booted sysvinit, and supervisors beside it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.boot.machine import Machine
from tests.support import eventually

# The first of them may have to make the image.
pytestmark = [pytest.mark.boot, pytest.mark.slow, pytest.mark.timeout(500)]

CHILDREN = {"log", "core", "edge-1", "canary"}


class SysvMachine(Machine):
    """Debian with sysvinit; the others beside it."""

    image = "bookworm-sysv-2"
    packages = (
        "busybox", "initscripts", "insserv", "iproute2", "procps", "psmisc", "python3", "runit",
        "s6", "sysv-rc", "sysvinit-core",
    )  # fmt: skip
    unpacked = ("libeinfo1", "librc1", "openrc")
    init = "init"

    def is_up(self) -> bool:
        return self.do("runlevel", check=False).stdout.split()[1:] == ["2"]

    def script(self, *actions: str) -> int:
        return self.do("/etc/init.d/vpnserver", *actions, check=False).returncode


@pytest.fixture
def machine() -> Iterator[SysvMachine]:
    with contextlib.closing(SysvMachine()) as made:
        made.boot()
        yield made


def pids(machine: Machine) -> dict[str, int]:
    """Every process of the service that is up."""
    status = json.loads(machine.vpnserver("status", "--json", check=False).stdout)
    found = {one["name"]: one["pid"] for one in status["children"] if one["state"] == "up"}
    return {**found, "watchdog": status["watchdog"]["pid"]} if status["watchdog"] else {}


def wait_whole(machine: Machine) -> dict[str, int]:
    """Until everybody is up; by name."""

    def look() -> dict[str, int]:
        found = pids(machine)
        return found if set(found) >= CHILDREN else {}

    return eventually(look, within=30.0)


def wait_for_another(machine: Machine, name: str, pid: int) -> None:
    eventually(lambda: wait_whole(machine)[name] != pid, within=20.0)


def test_every_action_of_the_init_script_has_its_exit_code(machine: SysvMachine) -> None:
    machine.vpnserver("install", "--manual")
    script = machine.script
    assert [script("status"), script("reload"), script("force-reload")] == [3, 7, 7]
    assert [script("stop"), script("try-restart")] == [0, 0]  # nothing to do is no failure
    assert script("status") == 3
    assert [script(), script("explode"), script("start", "now")] == [2, 2, 2]

    assert [script("start"), script("status")] == [0, 0]
    first = wait_whole(machine)
    assert script("start") == 0
    assert [script("reload"), script("force-reload")] == [0, 0]
    assert pids(machine)["watchdog"] == first["watchdog"]
    assert script("restart") == 0
    second = wait_whole(machine)
    assert script("try-restart") == 0
    third = wait_whole(machine)
    assert len({first["watchdog"], second["watchdog"], third["watchdog"]}) == 3

    as_nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    refused = machine.do(*as_nobody, "/etc/init.d/vpnserver", "stop", check=False)
    assert refused.returncode == 4
    assert pids(machine) == third

    machine.do("kill", "-KILL", str(third["watchdog"]))
    eventually(lambda: script("status") == 1)  # dead, and its pid file is there
    assert script("restart") == 0
    wait_whole(machine)
    assert [script("stop"), script("status"), script("stop")] == [0, 3, 0]

    machine.do("sh", "-c", "echo '[service]\nlisten = 7' > /etc/pkvpn.toml")
    machine.vpnserver("uninstall")
    broken = machine.do(
        "env", "PKVPN_CONFIG=/etc/pkvpn.toml", sys.executable, "-m", "pkvpn", "start", check=False
    )
    assert broken.returncode == 6
    assert machine.do("test", "-e", "/etc/init.d/vpnserver", check=False).returncode == 1


def test_it_starts_with_the_machine_and_ends_with_it(machine: SysvMachine) -> None:
    said = machine.vpnserver("install").stdout
    assert "Installed: /etc/init.d/vpnserver." in said
    assert "Started." in said
    machine.do("reboot", check=False)
    machine.wait_off()
    assert "stop-asked" in machine.kept("var/lib/pkvpn/journal.jsonl")
    machine.boot()
    before = wait_whole(machine)
    assert machine.do("who").stdout == ""
    for name in sorted(CHILDREN):
        machine.do("kill", f"-{signal.SIGKILL}", str(before[name]))
        wait_for_another(machine, name, before[name])
    assert pids(machine)["watchdog"] == before["watchdog"]


_SCANNED = "until [ -e /run/service/.s6-svscan ]; do sleep 0.05; done"
# How each is made to run beside sysvinit, and how it shows what it is to do.
SUPERVISORS = {
    "openrc": (
        "mkdir -p /run/openrc; for one in sysinit boot default; do openrc $one; done",
        "rc-service vpnserver status",
    ),
    "runit": (
        "mkdir -p /run/runit /etc/service; setsid -f runsvdir -P /etc/service >/dev/null 2>&1",
        "sv status /etc/sv/vpnserver",
    ),
    "s6": (
        "mkdir -p /run/service; setsid -f s6-svscan /run/service >/dev/null 2>&1; " + _SCANNED,
        "s6-svstat /etc/s6/vpnserver",
    ),
}


@pytest.mark.parametrize("name", SUPERVISORS)
def test_a_supervisor_keeps_it_up_until_it_is_to_be_down(name: str, machine: SysvMachine) -> None:
    begin, show = SUPERVISORS[name]
    machine.do("sh", "-c", begin)

    def shown() -> str:
        return machine.do("sh", "-c", show, check=False).stdout

    assert "Started." in machine.vpnserver("install").stdout
    first = pids(machine)["watchdog"]
    machine.do("kill", "-KILL", str(first))
    wait_for_another(machine, "watchdog", first)
    assert re.search("started|^run|^up", shown())

    second = pids(machine)["watchdog"]
    machine.vpnserver("reload")
    machine.vpnserver("restart")
    assert pids(machine)["watchdog"] != second
    machine.vpnserver("kill")
    assert re.search("stopped|^down", shown())
    machine.vpnserver("start")
    assert re.search("started|^run|^up", shown())
    machine.vpnserver("stop")
    assert re.search("stopped|^down", shown())
    assert machine.vpnserver("status", check=False).returncode == 3

    machine.vpnserver("install", "--manual")
    assert machine.vpnserver("status", check=False).returncode == 3
    assert "Uninstalled." in machine.vpnserver("uninstall").stdout
    assert "not installed" in machine.vpnserver("uninstall").stdout
