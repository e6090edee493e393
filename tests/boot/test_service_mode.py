"""Service Mode on a machine that really boots."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator

import pytest

from tests.boot.machine import Machine
from tests.support import eventually
from tests.system.bed import ROOT

# The first of them may have to make the image.
pytestmark = [pytest.mark.boot, pytest.mark.slow, pytest.mark.timeout(500)]

CHILDREN = {"log", "core", "edge-1", "canary"}


@pytest.fixture
def machine() -> Iterator[Machine]:
    with contextlib.closing(Machine()) as made:
        made.boot()
        yield made


@pytest.fixture
def served(machine: Machine) -> Machine:
    """A machine on which the service is installed and runs."""
    machine.vpnserver("install")
    return machine


def wait_up(machine: Machine, after: int = 0) -> int:
    """Until it serves under another watchdog than ``after``; the pid of that one."""

    def look() -> int:
        pid = machine.watchdog()
        return pid if pid not in (0, after) and machine.show("ActiveState") == "active" else 0

    return eventually(look, within=30.0)


def tree(machine: Machine) -> dict[str, int]:
    """Every process of the unit by what it is, as `systemctl status` shows them."""
    text = machine.do("systemctl", "status", "--no-pager", "vpnserver", check=False).stdout
    found = re.findall(r"[├└]─ *(\d+) \"?vpnserver execsvc(?:: ([^\"\n]+))?", text)
    return {name or "watchdog": int(pid) for pid, name in found}


def wait_whole(machine: Machine, after: int = 0, restarted: str = "") -> int:
    """Until everybody is up; the pid of the watchdog."""
    pid = wait_up(machine, after)

    def look() -> bool:
        status = json.loads(machine.vpnserver("status", "--json").stdout)
        up = {one["name"]: one for one in status["children"] if one["state"] == "up"}
        assert set(up) == CHILDREN, (status, tree(machine))
        assert set(tree(machine)) >= {"watchdog", *CHILDREN}, (status, tree(machine))
        return not restarted or bool(up[restarted]["restarts"])

    eventually(look, within=20.0)
    return pid


def test_it_is_up_after_a_boot_before_anybody_logs_in(served: Machine) -> None:
    assert served.do("systemctl", "is-enabled", "vpnserver").stdout == "enabled\n"
    status = served.vpnserver("status").stdout
    assert all(f":{port} " in status for port in (443, 992, 8888))
    served.do("systemctl", "reboot", check=False)
    served.wait_off()
    served.boot()
    assert served.show("ActiveState") == "active"
    assert served.show("Description") == "PacketiX VPN Server"
    assert "Service: up (service mode)" in served.vpnserver("status").stdout
    assert served.do("who").stdout == ""


def test_systemctl_shows_the_tree_and_that_it_is_guarded(served: Machine) -> None:
    wait_whole(served)
    assert served.show("StatusText") == "up"
    exposed = served.do("systemd-analyze", "security", "--no-pager", "vpnserver", check=False)
    found = re.search(r"exposure level for vpnserver.service: ([0-9.]+)", exposed.stdout)
    assert found is not None
    text = (ROOT / "docs/modes.md").read_text(encoding="utf-8")
    documented = re.search(
        r"`systemd-analyze security vpnserver` gives ([0-9.]+) .*?; ([0-9.]+) where", text
    )
    assert documented is not None
    assert found[1] == documented[1 if served.show("PrivateTmp") == "yes" else 2]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_every_process_comes_back(served: Machine, number: signal.Signals) -> None:
    watchdog = wait_whole(served)
    for name in sorted(CHILDREN):
        served.do("kill", f"-{number.name[3:]}", str(tree(served)[name]))
        assert wait_whole(served, restarted=name) == watchdog
    served.do("kill", f"-{number.name[3:]}", str(watchdog))
    assert wait_whole(served, after=watchdog) != watchdog


def test_it_comes_back_however_often_the_watchdog_is_killed(served: Machine) -> None:
    pid = 0
    for _ in range(7):
        pid = wait_up(served, after=pid)
        served.do("kill", "-KILL", str(pid))
    served.do("killall", "-KILL", "vpnserver", check=False)
    wait_up(served, after=pid)


def test_a_watchdog_that_is_stopped_is_replaced(served: Machine) -> None:
    pid = wait_up(served)
    served.do("mkdir", "-p", "/run/systemd/system/vpnserver.service.d")
    served.do(
        "sh", "-c", "printf '[Service]\\nWatchdogSec=2\\n' >"
        " /run/systemd/system/vpnserver.service.d/x.conf",
    )  # fmt: skip
    served.do("systemctl", "daemon-reload")
    served.do("systemctl", "restart", "vpnserver")
    pid = wait_up(served, after=pid)
    served.do("kill", "-STOP", str(pid))
    wait_up(served, after=pid)
    assert "Watchdog timeout" in served.journal()


def test_an_operators_verbs_go_through_systemd(served: Machine) -> None:
    first = wait_up(served)
    assert "already running" in served.vpnserver("start").stdout
    served.vpnserver("restart")
    second = wait_up(served, after=first)
    served.vpnserver("reload")
    assert served.watchdog() == second
    assert "Reloaded vpnserver.service" in served.journal()
    served.vpnserver("stop")
    assert served.show("ActiveState") == "inactive"
    assert "not running" in served.vpnserver("stop").stdout
    served.vpnserver("start")
    wait_up(served)


def test_core_and_edges_run_as_users_that_install_has_made(served: Machine) -> None:
    wait_whole(served)
    users = {"core": "pkvpn-core", "edge-1": "pkvpn-edge", "canary": "pkvpn-edge", "log": "root"}

    pids = [tree(served)[name] for name in users]
    shown = served.do("ps", "-o", "pid=,user:16=", "-p", ",".join(map(str, pids))).stdout.split()
    found = dict(zip(map(int, shown[::2]), shown[1::2], strict=True))
    assert dict(zip(users, map(found.get, pids), strict=True)) == users
    # Also where root has made files while it did not run, and systemd its directory anew.
    served.vpnserver("stop")
    served.vpnserver("hub", "add", "made-by-root")
    served.vpnserver("start")
    wait_whole(served)
    assert "made-by-root" in served.vpnserver("hub", "list").stdout
    status = json.loads(served.vpnserver("status", "--json").stdout)
    confined = {child["name"]: child["confinement"] for child in status["children"]}
    assert confined["edge-1"]["seccomp"] == "on"
    assert confined["core"]["capabilities"] == "none"


def test_kill_is_final(served: Machine) -> None:
    wait_up(served)
    assert "(watchdog): killed" in served.vpnserver("kill").stdout
    eventually(lambda: served.show("SubState") in ("dead", "failed"))
    assert served.show("NRestarts") == "0"
    assert "not running" in served.vpnserver("stop").stdout


def test_kill_is_final_also_for_the_watchdog_if_so_installed(machine: Machine) -> None:
    machine.vpnserver("install", "--kill-is-final")
    machine.do("kill", "-KILL", str(wait_up(machine)))
    eventually(lambda: machine.show("SubState") == "failed")
    assert tree(machine) == {}


def test_install_can_be_repeated_and_undone(machine: Machine) -> None:
    machine.vpnserver("install", "--manual")
    assert machine.show("ActiveState") == "inactive"
    assert machine.do("systemctl", "is-enabled", "vpnserver", check=False).stdout == "disabled\n"
    machine.vpnserver("install")
    pid = wait_up(machine)
    machine.vpnserver("hub", "add", "T")
    machine.vpnserver("install")
    assert machine.watchdog() == pid
    assert (
        "goes over to what is installed" in machine.vpnserver("install", "--kill-is-final").stdout
    )
    machine.vpnserver("uninstall")
    assert machine.show("LoadState") == "not-found"
    assert "not installed" in machine.vpnserver("uninstall").stdout
    machine.vpnserver("install")
    assert "T" in machine.vpnserver("hub", "list").stdout


def test_what_runs_without_systemd_is_not_taken_over(machine: Machine) -> None:
    machine.vpnserver("start")
    refused = machine.vpnserver("install", check=False)
    assert refused.returncode == 1
    assert "runs already, without systemd" in refused.stderr
    machine.vpnserver("install", check=False)
    machine.vpnserver("stop")


def test_systemd_may_listen_in_its_place(machine: Machine) -> None:
    machine.vpnserver("install", "--socket-activation")
    wait_up(machine)
    assert ":443 " in machine.vpnserver("status").stdout
    machine.do("systemctl", "stop", "vpnserver")
    # Whoever comes starts it.
    machine.do("sh", "-c", "exec 3<>/dev/tcp/127.0.0.1/443 || true", check=False)
    machine.do("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/443")
    wait_up(machine)
    machine.vpnserver("stop")
    assert machine.do("bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/443", check=False).returncode == 1


def test_a_poweroff_ends_it_properly(served: Machine) -> None:
    wait_up(served)
    served.do("systemctl", "poweroff", check=False)
    served.wait_off()
    journal = served.kept("var/lib/pkvpn/journal.jsonl")
    assert "stop-asked" in journal
