"""Children that are held by somebody else: traced, frozen, dumping, starved, dead."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
def frozen(tree: Running, name: str, version: int = 1) -> Iterator[int]:
    """A child in a cgroup that is frozen, until the end of the block."""
    root = Path("/sys/fs/cgroup/freezer") if version == 1 else cgroup2()
    group = root / f"pkvpn-test-{os.getpid()}"
    switch, on, off = group / "cgroup.freeze", "1", "0"
    if version == 1:
        switch, on, off = group / "freezer.state", "FROZEN", "THAWED"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer of version {version}: {error}")
    pid = tree.pid_of(name)
    try:
        (group / "cgroup.procs").write_text(str(pid))
        switch.write_text(on)
        done = group / "cgroup.events" if version == 2 else switch
        eventually(lambda: {"frozen 1", "FROZEN"}.intersection(done.read_text().splitlines()))
        yield pid
    finally:
        switch.write_text(off)
        members = (group / "cgroup.procs").read_text().split()
        for member in members:
            (group.parent / "cgroup.procs").write_text(member)
        eventually(lambda: removed(group))


def cgroup2() -> Path:
    """Where version 2 is mounted; skips the test if it is not."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    pytest.skip("no cgroup of version 2 is mounted")


@pytest.mark.root
@pytest.mark.parametrize("version", [1, 2])
def test_one_that_is_frozen_is_left_alone_and_goes_on(tmp_path: Path, version: int) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        with frozen(tree, "one", version) as pid:
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


# --- a core that is written slowly

# A disk of its own, in a mount namespace that nobody else sees; it stands still from the first line
# of the input to the second, to the end of the input, or for twenty seconds.
_DISK = """
truncate -s 16M disk && mkfs.ext4 -q -F disk && mkdir mount && mount -o loop disk mount || exit
echo there
read line && fsfreeze -f mount && echo still
timeout 20 head -n 1 >/dev/null
fsfreeze -u mount
read line
"""


@contextmanager
def disk(directory: Path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A disk: where it is, what stops it, and what has it go on."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if "/" in pattern or pattern.startswith("|"):
        # It is one for the whole machine, so it is not ours to change.
        pytest.skip(f"cores do not fall where a process stands: core_pattern is {pattern}")
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", _DISK], cwd=directory,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    keys, words = holder.stdin, holder.stdout

    def press() -> None:
        keys.write("\n")
        keys.flush()

    def stop() -> None:
        press()
        assert words.readline() == "still\n"

    there = words.readline()
    try:
        if there:
            yield Path(f"/proc/{holder.pid}/root{directory}/mount"), stop, press
    finally:
        _, said = holder.communicate()
    if not there:
        pytest.skip(f"no disk of one's own: {said}")


@pytest.mark.root
def test_one_whose_core_is_being_dumped_is_waited_for(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with disk(place) as (mount, stop, go_on):

        def before() -> None:
            os.chdir(mount)
            resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)

        spec = spec_in(tmp_path, child("bad", "segfaults", tmp_path), child("two"))
        with running(tmp_path, spec, before=before) as tree:
            pid, two = tree.pid_of("bad"), tree.pid_of("two")
            stop()
            tree.trigger.touch()
            eventually(lambda: tree.journal("verdict", child="bad", verdict="dumping"))
            assert "CoreDumping:\t1\n" in _status(pid)
            time.sleep(1.0)  # three hang deadlines
            assert (tree.pid_of("bad"), tree.child("bad")["verdict"]) == (pid, "dumping")
            go_on()
            tree.up("bad", after=0)
            report = tree.report("bad")
            assert (report["class"], report["signal"]) == ("dead", signal.SIGSEGV)
            assert "naughty.py" in report["stacks"]
            assert "in segfaults" in report["stacks"]
            assert [path for path in mount.iterdir() if path.name.startswith("core")]
            assert tree.pid_of("two") == two
            tree.ask("stop")
            assert tree.wait_end() == 0


# --- processors that are wanted by others


@contextmanager
def hogs(number: int, processor: int) -> Iterator[None]:
    """So many programs that want one processor, and get it in turns."""
    line = f"import os; os.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    # Each in a session of its own, as a child is: where the kernel shares by sessions, all of one
    # session get no more than one child.
    programs = [
        subprocess.Popen([sys.executable, "-c", line], start_new_session=True)
        for _ in range(number)
    ]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def test_one_that_gets_no_processor_is_not_blamed_for_it(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("bad", "works_for_what_is_left", tmp_path), child("two"))
    with running(tmp_path, spec) as tree:
        pid = tree.pid_of("bad")
        with hogs(8, min(os.sched_getaffinity(0))):
            tree.trigger.touch()
            eventually(lambda: tree.journal("verdict", child="bad", verdict="starved"), within=30.0)
            time.sleep(1.0)  # three hang deadlines
            assert (tree.pid_of("bad"), tree.child("bad")["restarts"]) == (pid, 0)
        eventually(lambda: tree.journal("verdict", child="bad", verdict="ok"), within=30.0)
        assert (tree.pid_of("bad"), tree.child("bad")["restarts"]) == (pid, 0)
        assert tree.reports("bad") == []
