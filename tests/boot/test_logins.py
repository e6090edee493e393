"""User Mode by logins that are real: sshd, PAM, logind.

All tests of this file share one machine, and the last one switches it off.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.boot.machine import Machine
from tests.boot.test_service_mode import wait_up
from tests.support import eventually
from tests.system.bed import ROOT

# The first of them may have to make the image.
pytestmark = [pytest.mark.boot, pytest.mark.slow, pytest.mark.timeout(500)]

PROGRAM = f"PYTHONPATH={ROOT} {sys.executable} -m pkvpn"
STARTED = "PacketiX VPN Server Service Started.\n"


class Logins:
    """Users of the machine, each of whom logs in for one command."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        machine.do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/key")
        # Where the interpreter may lie.
        machine.do("chmod", "711", "/root")
        for user in ("ann", "bob"):
            # In /var, which outlives the machine.
            machine.do("useradd", "--create-home", "--home-dir", f"/var/{user}", user)
            machine.do("install", "-d", "-o", user, f"/var/{user}/.ssh")
            machine.do("install", "-o", user, "/root/key.pub", f"/var/{user}/.ssh/authorized_keys")

    def do(self, user: str, line: str) -> subprocess.CompletedProcess[str]:
        """What a command says; returns when the user has been logged out."""
        done = self.machine.do(
            *("ssh", "-i", "/root/key", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
            *("-o", "StrictHostKeyChecking=no", f"{user}@127.0.0.1", line),
            check=False,
        )
        eventually(
            lambda: self.machine.do("pgrep", "-f", f"^sshd: {user}", check=False).stdout == ""
        )
        return done

    def vpnserver(self, user: str, line: str) -> subprocess.CompletedProcess[str]:
        return self.do(user, f"{PROGRAM} {line}")

    def status(self, user: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.vpnserver(user, "status --json").stdout)
        return found

    def sessions(self) -> str:
        """Those who are logged in, or of whose logins processes are left."""
        return self.machine.do("loginctl", "list-sessions", "--no-legend").stdout


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with contextlib.closing(Machine()) as made:
        made.boot()
        yield made


@pytest.fixture(scope="module")
def logins(machine: Machine) -> Logins:
    return Logins(machine)


def test_what_is_refused_is_said_once_and_it_serves_after_the_logout(logins: Logins) -> None:
    started = logins.vpnserver("ann", "start")
    assert (started.returncode, started.stdout) == (0, STARTED)
    for address in ("0.0.0.0:443", "[::]:443", "0.0.0.0:992", "[::]:992"):
        refused = f"{address} is refused: no privilege for port {address.rpartition(':')[2]}"
        assert started.stderr.count(refused) == 1
    assert ":8888" not in started.stderr
    pid = logins.status("ann")["watchdog"]["pid"]
    state = ("loginctl", "show-user", "--property=State", "ann")
    eventually(lambda: logins.machine.do(*state).stdout == "State=closing\n")
    assert logins.machine.do("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8888").returncode == 0
    # Another user has another, at a port that is left.
    logins.do("bob", "echo '[service]' >vpn.toml; echo 'listen = [\"0.0.0.0:8889\"]' >>vpn.toml")
    assert logins.vpnserver("bob", "--config vpn.toml start").stdout == STARTED
    others = logins.vpnserver("bob", "--config vpn.toml status --json").stdout
    assert [one["port"] for one in json.loads(others)["listeners"]] == [8889]
    assert logins.status("ann")["watchdog"]["pid"] == pid
    assert "Stopped" in logins.vpnserver("bob", "--config vpn.toml stop").stdout
    assert "Stopped" in logins.vpnserver("ann", "stop").stdout


def test_where_logind_ends_what_is_left_lingering_lets_it_go_on(logins: Logins) -> None:
    machine = logins.machine
    machine.do("mkdir", "-p", "/etc/systemd/logind.conf.d")
    setting = "printf '[Login]\\nKillUserProcesses=yes\\n' >/etc/systemd/logind.conf.d/kill.conf"
    machine.do("sh", "-c", setting)
    machine.do("systemctl", "restart", "systemd-logind")
    started = logins.vpnserver("ann", "start")
    assert started.stdout == STARTED
    assert "`loginctl enable-linger` and then `vpnserver restart` lets" in started.stderr
    eventually(lambda: "ann" not in logins.sessions(), within=10.0)
    assert logins.status("ann")["state"] == "down"
    assert logins.do("ann", "loginctl enable-linger").returncode == 0
    started = logins.vpnserver("ann", "start")
    assert started.stdout == STARTED
    assert "linger" not in started.stderr
    eventually(lambda: "ann" not in logins.sessions(), within=10.0)
    assert logins.status("ann")["state"] == "up"
    logins.vpnserver("ann", "stop")


def test_a_unit_of_a_user_serves_without_that_user(logins: Logins) -> None:
    logins.do("bob", "loginctl enable-linger")
    installed = logins.vpnserver("bob", "--config vpn.toml install --user")
    assert installed.returncode == 0, installed.stderr
    assert logins.do("bob", "systemctl --user is-enabled vpnserver").stdout == "enabled\n"

    def watchdog() -> int:
        status = json.loads(logins.vpnserver("bob", "--config vpn.toml status --json").stdout)
        assert status["state"] == "up"
        return int(status["watchdog"]["pid"])

    pid = watchdog()
    logins.do("bob", f"kill -KILL {pid}")
    assert eventually(watchdog, within=20.0) != pid
    assert "Uninstalled" in logins.vpnserver("bob", "--config vpn.toml uninstall --user").stdout
    assert (
        "bob" not in logins.machine.do("ps", "-C", "vpnserver", "-o", "user=", check=False).stdout
    )


def test_who_logs_in_and_out_leaves_service_mode_as_it_was(logins: Logins) -> None:
    machine = logins.machine
    machine.vpnserver("install")
    pid = wait_up(machine)
    status = logins.vpnserver("ann", "status")
    assert "not running" in status.stdout
    assert machine.watchdog() == pid
    assert machine.show("NRestarts") == "0"
    machine.vpnserver("uninstall")


def test_a_poweroff_asks_it_to_end(logins: Logins) -> None:
    machine = logins.machine
    logins.vpnserver("ann", "start")
    machine.do("systemctl", "poweroff", check=False)
    machine.wait_off()
    last = machine.kept("var/ann/.local/state/pkvpn/journal.jsonl").rpartition('"stop-asked"')[2]
    assert last.startswith(',"by":"signal"'), last
    assert '"child":"core","state":"down"' in last
