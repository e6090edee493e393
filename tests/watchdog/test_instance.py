"""One instance: the lock of the tree, the claim of the watchdog, the pid file."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkvpn.watchdog import instance, procfs
from pkvpn.watchdog.instance import InstanceError, InstanceLock, PidFile
from tests.support import eventually, process_gone
from tests.watchdog.trees import a_tree, end, start


@pytest.fixture
def lock_path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "lock")


def test_the_lock_makes_its_directory_for_us_alone(lock_path: str) -> None:
    lock = InstanceLock.acquire(lock_path)
    assert lock is not None
    try:
        assert os.stat(os.path.dirname(lock_path)).st_mode & 0o777 == 0o700
        assert os.stat(lock_path).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(lock.fd)
        assert instance.lock_is_held(lock_path)
        assert instance.watchdog_pid(lock_path) == os.getpid()
        assert instance.holders(lock_path) == []  # ourselves excepted
    finally:
        lock.release()
    assert not instance.lock_is_held(lock_path)
    assert instance.watchdog_pid(lock_path) is None


def test_looking_does_not_cost_the_owner_its_claim(lock_path: str) -> None:
    lock = InstanceLock.acquire(lock_path)
    assert lock is not None
    try:
        instance.lock_is_held(lock_path)
        instance.watchdog_pid(lock_path)
        assert instance.Claim.take(lock_path) is None
        with subprocess.Popen(
            ["python3", "-c", _ASK, lock_path], stdout=subprocess.PIPE, text=True
        ) as asked:
            assert asked.communicate()[0].strip() == "taken"
    finally:
        lock.release()


_ASK = """
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("free")
except OSError:
    print("taken")
"""


def test_nothing_is_held_where_there_is_nothing(lock_path: str) -> None:
    assert not instance.lock_is_held(lock_path)
    assert instance.watchdog_pid(lock_path) is None
    assert instance.holders(lock_path) == []


def test_a_directory_that_others_may_write_is_refused(lock_path: str) -> None:
    directory = os.path.dirname(lock_path)
    os.makedirs(directory)
    os.chmod(directory, 0o777)
    with pytest.raises(InstanceError, match=rf"{directory} can be written by others \(mode 0777"):
        InstanceLock.acquire(lock_path)


@pytest.mark.root
def test_a_directory_of_somebody_else_is_refused(lock_path: str) -> None:
    directory = os.path.dirname(lock_path)
    os.makedirs(directory, mode=0o700)
    os.chown(directory, 12345, -1)
    with pytest.raises(InstanceError, match="belongs to uid 12345, not to us"):
        InstanceLock.acquire(lock_path)


def test_a_lock_that_is_no_file_is_named(lock_path: str, tmp_path: Path) -> None:
    os.makedirs(os.path.dirname(lock_path), mode=0o700)
    os.symlink(tmp_path / "elsewhere", lock_path)
    with pytest.raises(InstanceError, match=lock_path):
        InstanceLock.acquire(lock_path)
    with pytest.raises(InstanceError, match=lock_path):
        instance.lock_is_held(lock_path)
    (tmp_path / "file").touch()
    with pytest.raises(InstanceError, match="file"):
        InstanceLock.acquire(str(tmp_path / "file" / "lock"))


def test_one_who_looks_does_not_make_a_start_fail(lock_path: str) -> None:
    os.makedirs(os.path.dirname(lock_path), mode=0o700)
    looking = os.open(lock_path, os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(looking, fcntl.LOCK_SH)
    try:
        assert instance.InstanceLock.acquire(lock_path) is None  # it looks for too long
        assert not instance.lock_is_held(lock_path)  # two who look do not see each other
    finally:
        os.close(looking)
    lock = InstanceLock.acquire(lock_path)
    assert lock is not None
    lock.release()


def test_a_lock_that_came_through_an_exec_is_gone_on_with(lock_path: str) -> None:
    lock = InstanceLock.acquire(lock_path)
    assert lock is not None
    again = InstanceLock.adopt(lock.fd, lock_path)
    assert instance.watchdog_pid(lock_path) == os.getpid()
    again.release()


@pytest.mark.slow
def test_the_tree_carries_the_lock_and_the_watchdog_the_claim(tmp_path: Path) -> None:
    lock_path = str(tmp_path / "run" / "lock")
    with a_tree(tmp_path / "run") as tree:
        assert InstanceLock.acquire(lock_path) is None
        assert instance.lock_is_held(lock_path)
        assert instance.watchdog_pid(lock_path) == tree.watchdog
        assert sorted(instance.holders(lock_path)) == sorted(
            [tree.watchdog, tree.first, tree.second]
        )

        os.kill(tree.watchdog, signal.SIGKILL)
        eventually(lambda: process_gone(tree.watchdog))
        assert instance.lock_is_held(lock_path)
        assert instance.watchdog_pid(lock_path) is None
        assert InstanceLock.acquire(lock_path) is None
        assert sorted(instance.holders(lock_path)) == sorted([tree.first, tree.second])


@pytest.mark.slow
def test_who_merely_has_the_file_open_is_no_holder(tmp_path: Path) -> None:
    lock_path = str(tmp_path / "run" / "lock")
    code = "import sys; f = open(sys.argv[1]); print('up', flush=True); sys.stdin.read()"
    with a_tree(tmp_path / "run") as tree, subprocess.Popen(
        ["python3", "-c", code, lock_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        assert other.pid not in instance.holders(lock_path)
        assert tree.first in instance.holders(lock_path)


@pytest.mark.slow
def test_a_tree_whose_lock_file_was_removed_is_still_found(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run") as tree:
        shutil.rmtree(tmp_path / "run")
        found = instance.holders(str(tmp_path / "run" / "lock"))
        assert sorted(found) == sorted([tree.watchdog, tree.first, tree.second])


@pytest.mark.slow
def test_many_starts_at_once_give_one_tree(tmp_path: Path) -> None:
    starts = [start(tmp_path / "run") for _ in range(12)]
    try:
        lines = {}
        for process in starts:
            assert process.stdout is not None
            lines[process.pid] = process.stdout.readline()
        winners = [pid for pid, line in lines.items() if line != "taken\n"]
        assert len(winners) == 1
        assert instance.watchdog_pid(str(tmp_path / "run" / "lock")) == winners[0]
    finally:
        for process in starts:
            end([process.pid, *procfs.descendants(process.pid)])
            process.communicate()


_EXECS = """
import fcntl, os, sys
from pkvpn.watchdog.instance import InstanceLock
if len(sys.argv) == 2:
    lock = InstanceLock.acquire(sys.argv[1])
    os.set_inheritable(lock.fd, True)
    again = [sys.executable, "-c", sys.orig_argv[2], sys.argv[1], str(lock.fd)]
    os.execv(sys.executable, again)
lock = InstanceLock.adopt(int(sys.argv[2]), sys.argv[1])
print("again", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_lock_and_claim_survive_an_exec_of_the_watchdog(tmp_path: Path) -> None:
    lock_path = str(tmp_path / "run" / "lock")
    with subprocess.Popen(
        [sys.executable, "-c", _EXECS, lock_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as watchdog:
        assert watchdog.stdout is not None
        assert watchdog.stdout.readline() == b"again\n"
        assert instance.watchdog_pid(lock_path) == watchdog.pid
        assert InstanceLock.acquire(lock_path) is None
    assert not instance.lock_is_held(lock_path)


# The pid file


def test_the_pid_file_names_us_and_this_start_of_the_machine(tmp_path: Path) -> None:
    path = str(tmp_path / "pid")
    instance.write_pid_file(path)

    written = instance.read_pid_file(path)
    assert written is not None
    assert Path(path).read_text().splitlines()[0] == str(os.getpid())
    assert (written.pid, written.boot_id) == (os.getpid(), procfs.boot_id())
    assert instance.pid_file_is_alive(written)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pid"]


def test_a_pid_file_of_another_process_or_another_boot_is_dead(tmp_path: Path) -> None:
    instance.write_pid_file(str(tmp_path / "pid"))
    own = instance.read_pid_file(str(tmp_path / "pid"))
    assert own is not None
    assert not instance.pid_file_is_alive(PidFile(own.pid, own.start_time + 1, own.boot_id))
    assert not instance.pid_file_is_alive(PidFile(own.pid, own.start_time, "another"))
    assert not instance.pid_file_is_alive(PidFile(2**22 + 1, own.start_time, own.boot_id))
    assert not instance.pid_file_is_alive(None)


@pytest.mark.parametrize("text", ["", "abc\n", "12\n", "12 x y\n", "-5 1 b\n", "0 1 b\n"])
def test_a_damaged_pid_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text)
    assert instance.read_pid_file(str(tmp_path / "pid")) is None


def test_no_pid_file_is_none(tmp_path: Path) -> None:
    assert instance.read_pid_file(str(tmp_path / "pid")) is None


@pytest.mark.slow
def test_a_zombie_watchdog_is_dead(tmp_path: Path) -> None:
    with a_tree(tmp_path / "run") as tree:
        pid_file = instance.read_pid_file(str(tmp_path / "run" / "pid"))
        assert instance.pid_file_is_alive(pid_file)
        os.kill(tree.watchdog, signal.SIGKILL)
        eventually(lambda: not instance.pid_file_is_alive(pid_file))
