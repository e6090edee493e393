"""Small trees of real processes that carry the instance lock, for tests of lock and sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pkvpn.watchdog import procfs
from tests.support import eventually, process_gone

# A watchdog with two children (the second in a session of its own) and a grandchild that has
# closed the lock.  It starts its first child anew whenever it dies, as the real one would, and
# sets no death signal, so that whatever is left is left until it is swept.  argv: runtime
# directory, then a word for what to leave out.
_TREE = """
import os, signal, sys
from pkvpn.watchdog import instance

directory, *without = sys.argv[1:]
lock = instance.InstanceLock.acquire(os.path.join(directory, instance.LOCK_NAME))

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one call: lines do not mix

if lock is None:
    say("taken")
    sys.exit(3)
if "pid-file" not in without:
    instance.write_pid_file(os.path.join(directory, instance.PID_NAME))

def child(own_session):
    pid = os.fork()
    if pid == 0:
        if own_session:
            os.setsid()
            if os.fork() == 0:
                os.close(lock.fd)
                say(os.getppid(), os.getpid())  # not before: it is told to hold no lock
        while True:
            signal.pause()
    return pid

second = child(True)
first = child(False)
say(os.getpid(), first)
while True:
    pid, _ = os.wait()
    if pid == first:
        first = child(False)
        say("again", first)
"""


class TreeOfProcesses:
    """``pids``: watchdog, its children, the grandchild without the lock."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        pids = {}
        for _ in range(2):
            left, right = map(int, process.stdout.readline().split())
            pids[left] = right
        self.watchdog = process.pid
        self.first = pids.pop(process.pid)
        ((self.second, self.grandchild),) = pids.items()

    @property
    def pids(self) -> list[int]:
        return [self.watchdog, self.first, self.second, self.grandchild]

    def gone(self) -> bool:
        return all(process_gone(pid) for pid in self.pids)


def start(runtime_dir: Path, *without: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _TREE, str(runtime_dir), *without],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def end(pids: list[int]) -> None:
    """Kill these, the watchdog first, so that nothing is started anew."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(process_gone(pid) for pid in pids))


@contextmanager
def a_tree(runtime_dir: Path, *without: str) -> Iterator[TreeOfProcesses]:
    """A tree that is up; killed afterwards whatever the test left of it."""
    process = start(runtime_dir, *without)
    try:
        tree = TreeOfProcesses(process)
    except BaseException:
        end([process.pid, *procfs.descendants(process.pid)])
        process.communicate()
        raise
    try:
        yield tree
    finally:
        end(tree.pids)
        process.wait()
        assert process.stdout is not None
        # What it had started anew keeps its standard output open until it is killed.
        for line in process.stdout:
            end([int(line.split()[1])])
        process.stdout.close()


def removed(group: Path) -> bool:
    """Remove a cgroup; it is busy until the last process of it has been reaped."""
    group.rmdir()
    return True
