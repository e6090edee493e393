"""Is anybody killed who is well, when the processors or the watchdog itself are not?

    python -m benchmarks.false_kills [--children N] [--seconds S] [--rounds N] [--quick]

A tree of 20 healthy children with all defaults and no priority, which do a little work 50 times a
second, is put through what makes beats late without anybody's fault: 8 and 32 programs that spin, a
watchdog that is stopped for 5 s, and a whole tree that is stopped for 3 s and continued, the
watchdog first, so that it finds its children silent.  A false kill is an incarnation after the
first.  How long the most silent child was silent, where the watchdog can be asked, says how near it
was: a child is judged after a second.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from pkvpn.watchdog import Child, ChildSpec, ControlError, TreeSpec, ask, run_tree

HOGS = (8, 32)
WATCHDOG_STOPPED = 5.0
TREE_STOPPED = 3.0
# After what is done, who is silent by then is judged within this.
SETTLES = 4.0
_WORK = bytes(16384)


def work(child: Child) -> None:
    """A healthy child: beats, and does a little."""
    child.ready()
    while not child.stopping:
        child.wait(0.02)
        hashlib.sha256(_WORK).digest()


@contextmanager
def tree(directory: Path, children: int) -> Iterator[Tree]:
    """A tree of that many children, up, until the end of the block."""
    spec = TreeSpec(
        "false-kills",
        tuple(ChildSpec(f"worker-{i + 1}", work) for i in range(children)),
        runtime_dir=str(directory / "run"),
        state_dir=str(directory / "state"),
    )
    pid = common.fork(lambda: sys.exit(run_tree(spec)))
    found = Tree(pid, directory / "run/control.sock")
    try:
        common.wait_until(lambda: found.status()["state"] == "up", 60.0, "the tree is up")
        yield found
    finally:
        common.end([pid])


class Tree:
    """What can be asked of it."""

    def __init__(self, pid: int, socket: Path) -> None:
        self.pid = pid
        self._socket = str(socket)

    def status(self, timeout: float = 30.0) -> dict[str, Any]:
        try:
            found: dict[str, Any] = ask(self._socket, "status", timeout=timeout)
        except ControlError as error:
            raise OSError(str(error)) from error
        return found

    def replaced(self) -> int:
        """Incarnations after the first, of all children."""
        return sum(child["restarts"] for child in self.status()["children"])

    def pids(self) -> list[int]:
        """The watchdog first."""
        return [self.pid, *common.children(self.pid)]

    def longest_silence(self, seconds: float) -> float:
        """Of any child, asked ten times a second for so long."""
        longest, until = 0.0, time.monotonic() + seconds
        while time.monotonic() < until:
            ages = [child["last_beat_age"] for child in self.status()["children"]]
            longest = max(longest, *(age for age in ages if age is not None))
            time.sleep(0.1)
        return longest


# --- what is done to it --------------------------------------------------------------------------


def spin() -> None:
    """One hog, of the same priority as the tree, in a session of its own as each child is: where
    the kernel shares by sessions, all of one session get no more than one child."""
    os.setsid()
    while True:
        pass


def under_hogs(number: int, seconds: float) -> Callable[[Tree], float]:
    def do(found: Tree) -> float:
        hogs = [common.fork(spin) for _ in range(number)]
        try:
            return found.longest_silence(seconds)
        finally:
            common.end(hogs)

    return do


def stopped(seconds: float, *, whole: bool) -> Callable[[Tree], float]:
    def do(found: Tree) -> float:
        pids = found.pids() if whole else [found.pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        return found.longest_silence(SETTLES)

    return do


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--children", type=int, default=20, help="in the tree (20)")
    made.add_argument("--seconds", type=float, default=60.0, help="under hogs (60)")
    made.add_argument("--rounds", type=int, default=5, help="of each stop (5)")
    args = common.parse(made, {"seconds": 3.0, "rounds": 1})
    common.lab()
    result = common.Result("false-kills", args)
    result.columns = [
        "what is done", "times", "healthy children", "false kills", "longest silence, s",
    ]  # fmt: skip
    situations: list[tuple[str, int, Callable[[Tree], float]]] = [
        ("nothing", 1, under_hogs(0, min(10.0, args.seconds)))
    ]
    for number in HOGS:
        name = f"{number} CPU hogs for {args.seconds:g} s"
        situations.append((name, 1, under_hogs(number, args.seconds)))
    situations += [
        (f"watchdog stopped for {WATCHDOG_STOPPED:g} s", args.rounds,
         stopped(WATCHDOG_STOPPED, whole=False)),
        (f"whole tree stopped for {TREE_STOPPED:g} s", args.rounds,
         stopped(TREE_STOPPED, whole=True)),
    ]  # fmt: skip
    with common.work_directory() as directory, tree(directory, args.children) as found:
        for name, times, do in situations:
            before = found.replaced()
            silences = [do(found) for _ in range(times)]
            killed = found.replaced() - before
            result.raw[name] = {"times": times, "killed": killed, "silences_s": silences}
            result.row(name, times, args.children, killed, max(silences))
    result.note(
        "The log child is watched like the others. Silence is asked ten times a second of the "
        "watchdog, not while it is stopped itself, so for the stops it is what came after them."
    )
    result.save(plot)


def plot(figure: Any, result: dict[str, Any]) -> None:
    """How near anybody was to being looked at."""
    axes = figure.subplots()
    names = list(result["raw"])
    values = [max(result["raw"][name]["silences_s"]) for name in names]
    axes.barh(range(len(names)), values)
    for place, name in enumerate(names):
        killed = result["raw"][name]["killed"]
        axes.text(values[place], place, f"  false kills: {killed}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.5 * max(values))
    axes.set_xlabel("longest silence of any child, s")


if __name__ == "__main__":
    main()
