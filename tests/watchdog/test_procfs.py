"""What /proc says, about real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pkvpn.watchdog import procfs
from tests.support import eventually, process_gone
from tests.watchdog.trees import removed

NOBODY = 2**22 + 1  # above any pid_max


@contextmanager
def program(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A Python that runs ``code`` and is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in [*procfs.descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


SLEEPER = "import sys; print('up', flush=True); sys.stdin.read()"


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_facts_of_ourselves() -> None:
    facts = procfs.read_facts(os.getpid())

    assert facts is not None
    assert facts.state == "R"
    assert facts.ppid == os.getppid()
    assert facts.session == os.getsid(0)
    assert facts.tracer_pid == 0
    assert facts.core_dumping is False
    assert facts.threads is not None
    assert facts.threads >= 1
    assert facts.rss_bytes is not None
    assert facts.rss_bytes > 1 << 20
    assert facts.fds is not None
    assert abs(facts.fds - len(os.listdir("/proc/self/fd"))) <= 1
    assert facts.run_ns is not None
    assert facts.wait_ns is not None
    assert facts.utime is not None
    used = os.times()
    assert facts.utime == pytest.approx(used.user, abs=0.5)
    assert facts.start_time == procfs.read_identity(os.getpid())[0]  # type: ignore[index]


def test_running_makes_run_grow_and_sleeping_does_not() -> None:
    with program(SLEEPER) as process:
        assert line_of(process) == "up"
        eventually(lambda: (f := procfs.read_facts(process.pid)) and f.state == "S" and f.wchan)
        first = procfs.read_facts(process.pid)
        assert first is not None
        second = procfs.read_facts(process.pid)
        assert second is not None
        assert second.run_ns == first.run_ns
    with program("print('up', flush=True)\nwhile True: pass") as process:
        assert line_of(process) == "up"
        start = procfs.read_facts(process.pid)
        assert start is not None
        assert start.run_ns is not None
        grown = start.run_ns + 20_000_000
        eventually(lambda: (((f := procfs.read_facts(process.pid)) and f.run_ns) or 0) > grown)


def test_a_stopped_process_shows_t_and_a_dead_one_z() -> None:
    with program(SLEEPER) as process:
        line_of(process)
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: (f := procfs.read_facts(process.pid)) and f.state == "T")
        assert not procfs.is_zombie(process.pid)
        process.kill()
        eventually(lambda: procfs.is_zombie(process.pid))
        assert procfs.title_of(process.pid) == ""
    assert procfs.read_facts(process.pid) is None


def test_nobody_has_no_facts() -> None:
    assert procfs.read_facts(NOBODY) is None
    assert procfs.read_identity(NOBODY) is None
    assert procfs.children_of(NOBODY) == []
    assert procfs.descendants(NOBODY) == []
    assert procfs.open_inodes(NOBODY) is None
    assert procfs.parent_of(NOBODY) is None
    assert procfs.title_of(NOBODY) == ""
    assert not procfs.is_zombie(NOBODY)
    assert procfs.snapshot_text(NOBODY)["status"] == f"({os.strerror(2)})"
    assert procfs.snapshot_text(NOBODY)["fds"] == f"({os.strerror(2)})"


def test_a_name_with_brackets_and_blanks_does_not_shift_the_fields() -> None:
    code = "open('/proc/self/comm','w').write(') R 1 (x');" + SLEEPER
    with program(code) as process:
        line_of(process)
        facts = procfs.read_facts(process.pid)
        assert facts is not None
        assert facts.ppid == os.getpid()


def test_identity_is_start_time_and_boot() -> None:
    identity = procfs.read_identity(os.getpid())
    assert identity is not None
    assert identity[1] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with program(SLEEPER) as process:
        line_of(process)
        other = procfs.read_identity(process.pid)
        assert other is not None
        assert other[0] >= identity[0]


def test_the_time_in_suspend_does_not_move_while_awake() -> None:
    before = procfs.clocks()
    assert before >= 0.0
    assert procfs.clocks() - before < 0.1


def test_the_tree_below_a_process() -> None:
    code = (
        "import os, sys\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    inner = os.fork()\n"
        "    if inner: print(os.getpid(), inner, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with program(code) as process:
        child, inner = map(int, line_of(process).split())
        assert procfs.children_of(process.pid) == [child]
        assert procfs.descendants(process.pid) == [child, inner]
        assert process.pid in procfs.children_of(os.getpid())
        assert process.pid in procfs.pids()
        assert procfs.parent_of(inner) == child
        assert procfs.title_of(child).endswith(code.strip().replace("\n", " ")[-5:])
    eventually(lambda: process_gone(inner))


def test_open_pipes_are_known_by_their_inodes() -> None:
    read, write = os.pipe()
    try:
        inode = os.fstat(write).st_ino
        own = procfs.open_inodes(os.getpid())
        assert own is not None
        assert inode in own
        with program(SLEEPER) as process:  # close_fds
            line_of(process)
            other = procfs.open_inodes(process.pid)
            assert other is not None
            assert inode not in other
    finally:
        os.close(read)
        os.close(write)


def test_a_snapshot_is_bounded_and_has_no_addresses() -> None:
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    try:
        snapshot = procfs.snapshot_text(os.getpid())
    finally:
        for fd in files:
            os.close(fd)
    assert {"stat", "status", "schedstat", "wchan", "stack", "limits", "fds"} <= set(snapshot)
    assert "maps" not in snapshot
    assert "VmRSS" in snapshot["status"]
    assert snapshot["fds"].splitlines()[-1] == "... and more"
    assert all(len(text) <= 8192 for text in snapshot.values())


def test_facts_are_read_within_a_fraction_of_a_millisecond() -> None:
    def median(times: list[float]) -> float:
        return sorted(times)[len(times) // 2]

    pid = os.getpid()
    times = []
    for _ in range(51):
        before = time.thread_time()
        procfs.read_facts(pid)
        times.append(time.thread_time() - before)
    # 90 us here; the bound only keeps a scan of all processes or descriptors out.
    assert median(times) < 1e-3


# The freezer, on files of its own


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool | None]:
    """`procfs._frozen` of a process with this text in /proc/PID/cgroup."""
    mounts = (
        ("freezer", "/", str(tmp_path / "v1")),
        ("", "/", str(tmp_path / "v2")),
        ("freezer", "/docker/x", str(tmp_path / "inner")),
    )
    monkeypatch.setattr(procfs, "_cgroup_mounts", lambda: mounts)
    read = procfs._read

    def frozen(text: str) -> bool | None:
        monkeypatch.setattr(
            procfs,
            "_read",
            lambda path, limit=8192: text if path == "/proc/5/cgroup" else read(path, limit),
        )
        return procfs._frozen(5)

    for name, value in {
        "v1/hot/freezer.state": "THAWED\n",
        "v1/cold/freezer.state": "FROZEN\n",
        "v1/cooling/freezer.state": "FREEZING\n",
        "inner/deep/freezer.state": "FROZEN\n",
        "v2/hot/cgroup.events": "populated 1\nfrozen 0\n",
        "v2/hot/cgroup.freeze": "0\n",
        "v2/cold/cgroup.events": "populated 1\nfrozen 1\n",
        "v2/cold/cgroup.freeze": "0\n",  # frozen from above
        "v2/cooling/cgroup.events": "populated 1\nfrozen 0\n",
        "v2/cooling/cgroup.freeze": "1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value)
    return frozen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("0::/\n", False),
        ("6:freezer:/\n0::/\n", False),
        ("6:freezer:/hot\n0::/hot\n", False),
        ("6:freezer:/cold\n0::/hot\n", True),
        ("6:cpu,freezer:/cooling\n", True),
        ("6:freezer:/hot\n0::/cold\n", True),
        ("0::/cooling\n", True),
        ("0::/unseen\n", None),
        ("6:freezer:/unseen\n0::/hot\n", False),
        ("6:freezer:/docker/x/deep\n", True),
        ("4:memory:/cold\n1:name=systemd:/cold\n", None),
    ],
)
def test_both_freezers_are_looked_at(
    groups: Callable[[str], bool | None], text: str, expected: bool | None
) -> None:
    assert groups(text) is expected


def freezer_v1() -> str:
    return next((where for kind, _, where in procfs._cgroup_mounts() if kind == "freezer"), "")


def freezer_v2() -> str:
    return next((where for kind, _, where in procfs._cgroup_mounts() if kind == ""), "")


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.parametrize(
    ("find", "switch", "on", "off"),
    [
        (freezer_v1, "freezer.state", "FROZEN", "THAWED"),
        (freezer_v2, "cgroup.freeze", "1", "0"),
    ],
)
def test_a_really_frozen_process_shows_it(
    find: Callable[[], str], switch: str, on: str, off: str
) -> None:
    if not find():
        pytest.skip(f"no cgroup mount with {switch}")
    group = Path(find()) / f"pkvpn-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"{group}: {error.strerror}")
    try:
        if not (group / switch).exists():
            pytest.skip(f"no {switch} here")
        with program(SLEEPER) as process:
            line_of(process)
            (group / "cgroup.procs").write_text(str(process.pid))
            facts = procfs.read_facts(process.pid)
            assert facts is not None
            assert facts.frozen is False
            (group / switch).write_text(on)
            try:
                frozen = procfs.read_facts(process.pid)
                assert frozen is not None
                assert frozen.frozen is True
            finally:
                (group / switch).write_text(off)
    finally:
        eventually(lambda: removed(group))
