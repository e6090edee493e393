"""Going over to new code with a real package: what stays, and how a bad one is undone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog import instance, procfs, sweep
from pkvpn.watchdog.control import ControlError, ask
from pkvpn.watchdog.journal import read_entries
from pkvpn.watchdog.upgrade import Trial, UpgradeError, read_table
from tests.support import eventually, process_gone

pytestmark = pytest.mark.slow

_CODE = '''
"""A daemon that tells everybody who asks which version and incarnation answers."""
import os, select, socket, sys, time
from pkvpn.watchdog import Child, ChildSpec, HeldSpec, RestartPolicy, TreeSpec, run_tree
from pkvpn.watchdog.spec import Upgrade

VERSION = 1

def door(child):
    IN_DOOR
    listener = socket.socket(fileno=child.held("door")[0])
    guests = {key: socket.socket(fileno=fd) for key, fd in child.given().items()}
    child.ready()
    while not child.stopping:
        waiting = [listener, *guests.values(), child.fileno()]
        ready, _, _ = select.select(waiting, [], [], child.turn(time.monotonic()))
        if listener in ready:
            guest, _ = listener.accept()
            key = b"%d-%d" % (child.incarnation, guest.fileno())
            guests[key] = guest
            child.give(key, guest.fileno())
        for key, guest in list(guests.items()):
            if guest in ready:
                if guest.recv(100):
                    guest.send(b"%d %d\\n" % (VERSION, child.incarnation))
                else:
                    child.drop(key)
                    guests.pop(key).close()
        child.receive()

def other(child):
    child.ready()
    while not child.stopping:
        child.wait()

def main(argv=None):
    directory, *rest = sys.argv[1:] if argv is None else argv
    IN_MAIN
    if "--check" in rest:
        return 0
    resume = int(rest[rest.index("--resume-fd") + 1]) if "--resume-fd" in rest else None
    policy = RestartPolicy(first=0.02, cap=0.1)
    spec = TreeSpec(
        "tiny",
        (ChildSpec("door", door, held=("door",), keep_limit=10, policy=policy),
         ChildSpec("other", other, policy=policy)),
        directory + "/run", directory + "/state",
        held=(HeldSpec("door", lambda: [socket.create_server(("127.0.0.1", 0)).detach()]),),
        beat_interval=0.1,
        upgrade=Upgrade(
            package="tinyd", main="tinyd.__main__:main", arguments=(directory,),
            trial=(sys.executable, "-m", "tinyd", directory, "--check"),
        ),
    )
    return run_tree(spec, resume_fd=resume)

if __name__ == "__main__":
    sys.exit(main())
'''


class Tiny:
    """The daemon, one client that is connected to it, and its code on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.package = directory / "code" / "tinyd"
        self.package.mkdir(parents=True)
        (self.package / "__init__.py").write_text("")
        self.write(1)
        self.start()
        self.client: socket.socket | None = None

    def start(self) -> None:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tinyd", str(self.directory)],
            env={**os.environ, "PYTHONPATH": f"{self.directory}/code:{root}",
                 "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
        )  # fmt: skip

    def write(self, version: int, *, in_main: str = "pass", in_door: str = "pass") -> None:
        code = textwrap.dedent(_CODE).replace("VERSION = 1", f"VERSION = {version}")
        code = code.replace("IN_MAIN", in_main).replace("IN_DOOR", in_door)
        (self.package / "__main__.py").write_text(code)

    def ask(self, verb: str) -> Any:
        return ask(str(self.directory / "run" / "control.sock"), verb)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("status")
        return found

    def pids(self) -> dict[str, int]:
        return {one["name"]: one["pid"] for one in self.status()["children"]}

    def connect(self) -> None:
        eventually(lambda: self.status()["state"] == "up")
        found = subprocess.run(
            ["ss", "-tlnpH"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        pid = self.pids()["door"]
        (line,) = (line for line in found if f"pid={pid}," in line)
        port = int(line.split()[3].rpartition(":")[2])
        self.client = socket.create_connection(("127.0.0.1", port), timeout=10.0)

    def says(self) -> tuple[int, int]:
        """Version and incarnation of whom the one client, connected all the while, talks to."""
        assert self.client is not None
        self.client.send(b"who?\n")
        version, incarnation = self.client.recv(100).split()
        return int(version), int(incarnation)

    def upgrade(self) -> dict[str, Any]:
        """Ask for one, and wait until it is through or refused; what status says of it."""
        self.ask("upgrade")

        def settled() -> dict[str, Any] | None:
            found: dict[str, Any] = self.status()["watchdog"]
            return None if found["upgrade"] in ("trying", "replacing children") else found

        found = eventually(settled, within=30.0)
        assert found is not None
        return found

    def events(self) -> list[str]:
        return [str(one["event"]) for one in read_entries(str(self.directory / "state"))]

    def close(self) -> None:
        if self.client is not None:
            self.client.close()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10.0)
        sweep.kill_tree(str(self.directory / "run"), lambda _line: None)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Tiny]:
    daemon = Tiny(tmp_path)
    try:
        daemon.connect()
        assert daemon.says() == (1, 1)
        yield daemon
    except BaseException:
        for entry in read_entries(str(tmp_path / "state")):
            print(entry)
        raise
    finally:
        daemon.close()


def test_a_good_upgrade_keeps_pid_and_connections_and_replaces_every_child(tiny: Tiny) -> None:
    before = tiny.pids()
    tiny.write(2)
    found = tiny.upgrade()
    assert (found["image"], found["upgrade"], found["pid"]) == (2, "none", tiny.process.pid)
    assert tiny.says() == (2, 2)
    after = tiny.pids()
    assert all(after[name] != before[name] for name in before)
    assert tiny.process.poll() is None


def test_an_upgrade_after_an_upgrade_and_a_stop(tiny: Tiny) -> None:
    def held() -> list[int]:
        processes = (tiny.process.pid, *tiny.pids().values())
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes]

    before = None
    for version in (2, 3):
        tiny.write(version)
        assert tiny.upgrade()["image"] == version
        assert tiny.says() == (version, version)
        before = before or held()
    eventually(lambda: held() == before)
    pids = tiny.pids()
    os.kill(pids["door"], signal.SIGKILL)
    eventually(lambda: tiny.says() == (3, 4))
    tiny.ask("stop")
    assert tiny.process.wait(10.0) == 0
    assert sorted(os.listdir(tiny.directory / "run")) == ["lock"]


def test_code_that_does_not_start_is_refused_and_nothing_happens(tiny: Tiny) -> None:
    before = tiny.pids()
    tiny.write(2, in_main='sys.exit("no such setting: colour")')
    found = tiny.upgrade()
    assert found["image"] == 1
    assert found["upgrade"] == "failed: the new code ended with 1: no such setting: colour"
    assert tiny.pids() == before
    assert tiny.says() == (1, 1)


def test_code_that_cannot_resume_is_left_for_the_old_one(tiny: Tiny) -> None:
    before = tiny.pids()
    tiny.write(2, in_main='1 / ("--check" in rest)')
    found = tiny.upgrade()
    assert found["upgrade"].startswith("failed: ")
    assert "ZeroDivisionError" in found["upgrade"]
    assert found["pid"] == tiny.process.pid
    assert tiny.pids() == before  # nobody was replaced: they run the old code already
    assert tiny.says() == (1, 1)
    tiny.write(3)
    assert tiny.upgrade()["upgrade"] == "none"
    assert tiny.says() == (3, 2)


def test_code_with_other_duties_or_children_is_left_for_the_old_one(tiny: Tiny) -> None:
    before = tiny.pids()
    tiny.write(2)
    code = (tiny.package / "__main__.py").read_text()
    (tiny.package / "__main__.py").write_text(code.replace('"other", other', '"another", other'))
    found = tiny.upgrade()
    assert "that takes a restart" in found["upgrade"]
    (tiny.package / "__main__.py").write_text(
        code.replace('"other", other', '"other", other, duties=("one", "two")')
    )
    found = tiny.upgrade()
    assert "other beats 0 duties, the new code expects 2" in found["upgrade"]
    assert tiny.pids() == before
    assert tiny.says() == (1, 1)


def test_code_whose_child_does_not_come_up_is_undone(tiny: Tiny) -> None:
    tiny.write(2, in_door='raise RuntimeError("no door")')
    found = tiny.upgrade()
    assert "door does not come up with the new code" in found["upgrade"]
    version, _incarnation = tiny.says()
    assert version == 1
    assert tiny.process.poll() is None
    assert "upgrade-undone" in tiny.events()
    # And the way to good code is open.
    tiny.write(4)
    assert tiny.upgrade()["upgrade"] == "none"
    assert tiny.says()[0] == 4


_FALLS = '''
"""Has the watchdog raise in its loop once for each file `fall`."""
import os
from pkvpn.watchdog.supervisor import Supervisor

def arm(directory):
    wait = Supervisor._next_deadline
    def fall(self, now):
        if os.path.exists(directory + "/fall"):
            os.unlink(directory + "/fall")
            raise RuntimeError("a bug of the watchdog")
        return wait(self, now)
    Supervisor._next_deadline = fall
'''
_ARM = "import tinyd.falls; tinyd.falls.arm(directory)"


def test_a_watchdog_that_fails_after_it_has_resumed_is_left_for_the_old_one(tiny: Tiny) -> None:
    pid = tiny.process.pid
    (tiny.package / "falls.py").write_text(_FALLS)
    tiny.write(2, in_main=_ARM)
    (tiny.directory / "fall").touch()
    found = tiny.upgrade()
    assert "a bug of the watchdog" in found["upgrade"]
    assert found["pid"] == pid
    eventually(lambda: tiny.status()["state"] == "up")
    assert tiny.says()[0] == 1
    assert "watchdog-failed" in tiny.events()


def test_a_watchdog_that_fails_goes_on_with_its_children_and_connections(tiny: Tiny) -> None:
    (tiny.package / "falls.py").write_text(_FALLS)
    tiny.write(2, in_main=_ARM)
    assert tiny.upgrade()["upgrade"] == "none"
    pids, image = tiny.pids(), tiny.status()["watchdog"]["image"]
    said = tiny.says()
    (tiny.directory / "fall").touch()
    eventually(lambda: tiny.status()["watchdog"]["image"] == image + 1)
    eventually(lambda: tiny.status()["state"] == "up")
    assert tiny.process.pid == tiny.status()["watchdog"]["pid"]
    assert tiny.says()[0] == said[0]
    assert set(tiny.pids()) == set(pids)


def in_trial(tiny: Tiny) -> bool:
    return bool(tiny.status()["watchdog"]["upgrade"] == "trying")


def in_exec(tiny: Tiny) -> bool:
    """The launcher runs, and the new image does not call itself by its name yet."""
    return "/proc/self/fd/" in procfs.title_of(tiny.process.pid)


def in_rollover(tiny: Tiny) -> bool:
    return bool(tiny.status()["watchdog"]["image"] == 2)


@pytest.mark.parametrize("window", [in_trial, in_exec, in_rollover])
def test_nobody_outlives_a_watchdog_that_is_killed_in_an_upgrade(
    tiny: Tiny, window: Callable[[Tiny], bool]
) -> None:
    tiny.write(2)
    tiny.ask("upgrade")
    eventually(lambda: window(tiny), every=0.0005)
    everybody = procfs.descendants(tiny.process.pid)
    tiny.process.kill()
    tiny.process.wait()
    eventually(lambda: all(process_gone(pid) for pid in everybody))
    lock = str(tiny.directory / "run" / instance.LOCK_NAME)
    eventually(lambda: instance.holders(lock) == [])
    tiny.start()
    eventually(lambda: tiny.status()["state"] == "up")


def test_two_upgrades_at_once_are_one(tiny: Tiny) -> None:
    tiny.write(2, in_main='time.sleep(0.5 * ("--check" in rest))')
    tiny.ask("upgrade")
    with pytest.raises(ControlError, match="an upgrade is under way"):
        tiny.ask("upgrade")
    eventually(lambda: tiny.says() == (2, 2))


def test_a_stop_during_the_trial_wins(tiny: Tiny) -> None:
    tiny.write(2, in_main='time.sleep(30 * ("--check" in rest))')
    tiny.ask("upgrade")
    tiny.ask("stop")
    assert tiny.process.wait(10.0) == 0


def test_a_trial_that_hangs_is_ended_and_says_so() -> None:
    trial = Trial((sys.executable, "-c", "import time; time.sleep(60)"))
    trial.kill("has not ended within 30 s")
    assert trial.end() == "the new code has not ended within 30 s"


def test_a_table_of_another_version_is_refused() -> None:
    fd = os.memfd_create("table")
    os.write(fd, json.dumps({"version": 99}).encode())
    with pytest.raises(UpgradeError, match="a table of version 99"):
        read_table(fd)
    os.close(fd)
