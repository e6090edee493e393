"""Ending by force, with real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkvpn.watchdog import instance, procfs, sweep
from tests.support import eventually, process_gone
from tests.watchdog.trees import TreeOfProcesses, a_tree, removed

pytestmark = pytest.mark.slow


def lock_of(directory: Path) -> str:
    return str(directory / "lock")


def nothing_remains(directory: Path, tree: TreeOfProcesses) -> None:
    assert tree.gone()
    assert not instance.lock_is_held(lock_of(directory))


def test_the_watchdog_goes_first_so_that_nothing_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    with a_tree(tmp_path / "run") as tree:
        result = sweep.kill_tree(str(tmp_path / "run"), said.append)

        nothing_remains(tmp_path / "run", tree)
        assert result.ok
        assert result.killed[0] == tree.watchdog
        assert sorted(result.killed) == sorted(tree.pids)
        assert said[0] == f"{tree.watchdog} (watchdog): killed"
        assert len(said) == 4


def test_stopped_processes_are_killed_too(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run") as tree:
        for pid in tree.pids:
            os.kill(pid, signal.SIGSTOP)
        assert sweep.kill_tree(str(tmp_path / "run"), lambda _line: None).ok
        nothing_remains(tmp_path / "run", tree)


def test_what_a_dead_watchdog_left_is_killed(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run") as tree:
        os.kill(tree.watchdog, signal.SIGKILL)
        eventually(lambda: process_gone(tree.watchdog))
        result = sweep.kill_tree(str(tmp_path / "run"), lambda _line: None)
        assert sorted(result.killed) == sorted([tree.first, tree.second, tree.grandchild])
        nothing_remains(tmp_path / "run", tree)


def test_the_pid_file_is_not_needed(tmp_path: Path) -> None:
    said: list[str] = []
    with a_tree(tmp_path / "run", "pid-file") as tree:
        assert sweep.kill_tree(str(tmp_path / "run"), said.append).killed[0] == tree.watchdog
        nothing_remains(tmp_path / "run", tree)


def test_a_tree_whose_runtime_directory_was_removed_is_killed(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run") as tree:
        shutil.rmtree(tmp_path / "run")
        result = sweep.kill_tree(str(tmp_path / "run"), lambda _line: None)
        assert result.killed[0] == tree.watchdog
        eventually(tree.gone)


def test_another_instance_is_left_alone(tmp_path: Path) -> None:
    with a_tree(tmp_path / "one") as one, a_tree(tmp_path / "two") as two:
        assert sweep.kill_tree(str(tmp_path / "one"), lambda _line: None).ok
        assert one.gone()
        assert not any(process_gone(pid) for pid in two.pids)


def test_a_stale_pid_file_kills_nobody(tmp_path: Path) -> None:
    """The pid in it is that of a process that has nothing to do with us."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as other:
        identity = procfs.read_identity(other.pid)
        assert identity is not None
        run = tmp_path / "run"
        run.mkdir(mode=0o700)
        (run / "pid").write_text(f"{other.pid}\n{identity[0] - 1} {identity[1]}\n")
        said: list[str] = []
        result = sweep.kill_tree(str(run), said.append)
        assert result.ok
        assert said == [f"No such process: nothing of the instance in {run} is left"]
        assert other.poll() is None


def test_what_may_not_be_looked_into_is_said(tmp_path: Path) -> None:
    """A process that has written the pid file but shows no lock: not ours to kill."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as other:
        identity = procfs.read_identity(other.pid)
        assert identity is not None
        run = tmp_path / "run"
        run.mkdir(mode=0o700)
        (run / "pid").write_text(f"{other.pid}\n{identity[0]} {identity[1]}\n")
        said: list[str] = []
        result = sweep.kill_tree(str(run), said.append)
        assert not result.ok
        assert list(result.survived) == [other.pid]
        assert other.poll() is None


@pytest.mark.root
@pytest.mark.parametrize("who", ["watchdog", "first"])
def test_a_frozen_process_is_named_as_still_there(tmp_path: Path, who: str) -> None:
    mount = next((w for kind, _, w in procfs._cgroup_mounts() if kind == "freezer"), "")
    if not mount:
        pytest.skip("no cgroup v1 freezer")
    group = Path(mount) / f"pkvpn-sweep-{os.getpid()}"
    group.mkdir()
    try:
        with a_tree(tmp_path / "run") as tree:
            frozen = getattr(tree, who)
            (group / "cgroup.procs").write_text(str(frozen))
            (group / "freezer.state").write_text("FROZEN")
            try:
                result = sweep.kill_tree(str(tmp_path / "run"), lambda _line: None, budget=0.5)
                assert not result.ok
                assert list(result.survived) == [frozen]
                assert "frozen" in result.survived[frozen]
                assert sorted([*result.killed, frozen]) == sorted(tree.pids)
            finally:
                (group / "freezer.state").write_text("THAWED")
            eventually(tree.gone)
    finally:
        eventually(lambda: removed(group))


# What a dead watchdog left, swept by the next start


def test_a_living_tree_is_never_swept(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run", "pid-file") as tree:
        result = sweep.sweep_leftovers(str(tmp_path / "run"))
        assert result.refused == f"the watchdog lives (pid {tree.watchdog})"
        assert not any(process_gone(pid) for pid in tree.pids)
        assert sweep.take_over(str(tmp_path / "run")) is None


def test_a_stopped_watchdog_is_a_living_one(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run") as tree:
        os.kill(tree.watchdog, signal.SIGSTOP)
        assert sweep.sweep_leftovers(str(tmp_path / "run")).refused
        assert not process_gone(tree.first)


def test_the_next_start_sweeps_and_takes_over(tmp_path: Path) -> None:
    said: list[str] = []
    with a_tree(tmp_path / "run") as tree:
        os.kill(tree.watchdog, signal.SIGKILL)
        eventually(lambda: process_gone(tree.watchdog))
        lock = sweep.take_over(str(tmp_path / "run"), said.append)
        assert lock is not None
        lock.release()
        assert tree.gone()
        assert len(said) == 3


def test_an_empty_place_needs_no_sweep(tmp_path: Path) -> None:
    assert sweep.sweep_leftovers(str(tmp_path)) == sweep.KillResult()
    lock = sweep.take_over(str(tmp_path / "run"))
    assert lock is not None
    lock.release()


# Orphans of a dead child, ended by a subreaper

# Becomes a subreaper, makes one child of the table, one orphan that holds a lifeline and one
# that holds nothing, the latter with a family of its own; then ends orphans.
_REAPER = """
import ctypes, json, os, signal, sys, time
from pkvpn.watchdog import procfs, sweep
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
read, write = os.pipe()
spare = sys.argv[1] == "spare"

def pause():
    while True:
        signal.pause()

def orphan(keep, family):
    middle = os.fork()
    if middle == 0:
        pid = os.fork()
        if pid:
            os._exit(0)
        os.setsid()
        os.close(read)  # both ends have one inode
        if not keep:
            os.close(write)
        for _ in range(family):
            if os.fork() == 0:
                os.setsid()
        pause()
    os.waitpid(middle, 0)

table = os.fork()
if table == 0:
    os.close(read)
    os.close(write)
    pause()
orphan(True, 0)
orphan(False, 2)
me = os.getpid()
while len(procfs.descendants(me)) < 6:
    time.sleep(0.002)
everything = procfs.descendants(me)
holding = [pid for pid in everything if os.fstat(write).st_ino in (procfs.open_inodes(pid) or ())]
killed = sweep.kill_orphans({table}, {os.fstat(write).st_ino} if spare else set(), 1.0)
alive = [pid for pid in everything if not procfs.is_zombie(pid) and procfs.read_facts(pid)]
print(json.dumps([table, holding, everything, killed, alive]), flush=True)
for pid in alive:
    os.kill(pid, signal.SIGKILL)
"""


def reap(how: str) -> tuple[int, list[int], list[int], list[int], list[int]]:
    """(the table's child, who holds a lifeline, all, killed, alive after)."""
    process = subprocess.run(
        [sys.executable, "-c", _REAPER, how],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    table, holding, everything, killed, alive = json.loads(process.stdout)
    eventually(lambda: all(process_gone(pid) for pid in everything))
    return table, holding, everything, killed, alive


def test_orphans_end_and_their_families_and_the_living_are_spared() -> None:
    table, holding, everything, killed, alive = reap("spare")
    assert len(everything) == 6
    assert len(holding) == 1
    assert sorted(alive) == sorted([table, *holding])
    assert sorted(killed) == sorted(set(everything) - set(alive))


def test_with_no_living_child_all_orphans_end() -> None:
    table, holding, everything, killed, alive = reap("all")
    assert alive == [table]
    assert sorted(killed) == sorted(set(everything) - {table})
    assert holding[0] in killed


def test_no_orphans_is_no_work() -> None:
    assert sweep.kill_orphans(set(procfs.children_of(os.getpid())), set()) == []
