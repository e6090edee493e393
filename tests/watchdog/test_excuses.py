"""Children that are held by somebody else: traced, frozen, dead and not to be reaped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import eventually
from tests.watchdog.running import Running, child, running, spec_in
from tests.watchdog.trees import removed

pytestmark = pytest.mark.slow

needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="no gdb to hold a process with")


@contextmanager
def held_by_gdb(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """A debugger that has stopped the process, and lets go of it in the end."""
    debugger = subprocess.Popen(
        ["gdb", "-q", "-nx", "-p", str(pid)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(lambda: f"TracerPid:\t{debugger.pid}\n" in _status(pid))
        yield debugger
    finally:
        debugger.communicate(b"detach\nquit\n")


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@needs_gdb
def test_one_in_a_debugger_is_left_alone_and_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pid = tree.pid_of("one")
        with held_by_gdb(pid):
            eventually(lambda: tree.journal("verdict", child="one", verdict="traced"))
            time.sleep(1.0)  # three hang deadlines
            assert tree.child("one")["verdict"] == "traced"
        eventually(lambda: tree.journal("verdict", child="one", verdict="ok"))
        assert (tree.pid_of("one"), tree.child("one")["restarts"]) == (pid, 0)


@needs_gdb
def test_one_that_dies_in_a_debugger_is_replaced_at_once(tmp_path: Path) -> None:
    """The debugger keeps the exit status to itself; nobody waits for it."""
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pid = tree.pid_of("one")
        with held_by_gdb(pid):
            os.kill(pid, signal.SIGKILL)
            tree.up("one", after=0)
            report = tree.report("one")
            assert (report["class"], report["exit_code"]) == ("dead", None)
            assert tree.status()["state"] == "up"
        eventually(lambda: not Path(f"/proc/{pid}").exists())  # reaped after all


@contextmanager
def frozen(tree: Running, name: str) -> Iterator[int]:
    """A child in a cgroup that is frozen, until the end of the block."""
    group = Path(f"/sys/fs/cgroup/freezer/pkvpn-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer: {error}")
    pid = tree.pid_of(name)
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        eventually(lambda: (group / "freezer.state").read_text() == "FROZEN\n")
        yield pid
    finally:
        (group / "freezer.state").write_text("THAWED")
        members = (group / "cgroup.procs").read_text().split()
        for member in members:
            (group.parent / "cgroup.procs").write_text(member)
        eventually(lambda: removed(group))


@pytest.mark.root
def test_one_that_is_frozen_is_left_alone_and_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        with frozen(tree, "one") as pid:
            eventually(lambda: tree.journal("verdict", child="one", verdict="frozen"))
            time.sleep(1.0)
        eventually(lambda: tree.journal("verdict", child="one", verdict="ok"))
        assert (tree.pid_of("one"), tree.child("one")["restarts"]) == (pid, 0)


@pytest.mark.root
def test_one_that_cannot_die_has_no_successor_until_it_can(tmp_path: Path) -> None:
    """SIGKILL does not reach the frozen: two of them at once must never be."""
    spec = spec_in(tmp_path, child("one", stop_timeout=0.2), child("two"))
    with running(tmp_path, spec) as tree:
        two = tree.pid_of("two")
        with frozen(tree, "one") as pid:
            tree.ask("restart", name="one")
            eventually(lambda: tree.child("one")["undead"])
            assert tree.child("one")["pid"] == pid
            assert (tree.child("one")["state"], tree.pid_of("two")) == ("stopping", two)
        after = tree.up("one", after=0)
        assert not after["undead"]
        assert after["pid"] != pid


@pytest.mark.root
def test_one_that_cannot_die_keeps_the_others_from_nothing_at_a_stop(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one"), child("two", stop_timeout=0.2))
    with running(tmp_path, spec) as tree:
        with frozen(tree, "two"):
            tree.ask("stop")
            eventually(lambda: tree.child("one")["state"] == "down")
            assert tree.child("two")["undead"]
            assert tree.status()["state"] == "stopping"
        assert tree.wait_end() == 0
        assert tree.holders() == []
