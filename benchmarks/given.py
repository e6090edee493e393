"""What ten thousand given descriptors cost: a respawn, and the beats of everybody.

    python -m benchmarks.given [--rounds N] [--descriptors N] [--quick]

A child gives so many descriptors to its watchdog and is killed again and again; another child,
which has given nothing, as well.  Once their successors are forked when they are needed, once they
stand by.  Beside the times from the signal to `ready`: how late the beats of the other child are
read meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import common
from pkvpn.watchdog import Child, ChildSpec, RestartPolicy, TreeSpec, ask, procfs, run_tree
from pkvpn.watchdog.journal import read_entries

INTERVAL = 0.05


def hoarder(child: Child, descriptors: int) -> None:
    """Gives what is missing, then beats."""
    child.stand_by()
    number = len(child.given())
    fd = os.open(os.devnull, os.O_RDONLY)
    child.ready()
    while not child.stopping:
        if number < descriptors:
            number += child.give(b"%d" % number, fd)
            child.turn(time.monotonic())
            child.receive()
        else:
            child.wait()


def good(child: Child) -> None:
    child.stand_by()
    child.ready()
    while not child.stopping:
        child.wait()


@contextmanager
def tree(descriptors: int, standby: bool) -> Iterator[str]:
    """A tree in a directory of its own; its control socket."""
    with tempfile.TemporaryDirectory() as directory:
        more: dict[str, Any] = {"policy": RestartPolicy(healthy_after=0.0), "standby": standby}
        spec = TreeSpec(
            "given",
            (
                ChildSpec("hoarder", hoarder, descriptors, keep_limit=descriptors, **more),
                ChildSpec("good", good, **more),
            ),
            f"{directory}/run",
            f"{directory}/state",
            beat_interval=INTERVAL,
        )
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                code = run_tree(spec, tell=lambda line: _write(told, line))
            finally:
                os._exit(code)
        os.close(told)
        try:
            if b"ready" not in os.read(ready, 65536):
                sys.exit("the tree does not start")
            yield directory
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            os.close(ready)


def _write(fd: int, line: dict[str, object]) -> None:
    os.write(fd, json.dumps(line).encode())


def respawn(directory: str, name: str) -> float:
    """Seconds from the signal to `ready`, by the journal's clock."""
    pid = next(int(str(one["pid"])) for one in _children(directory) if one["name"] == name)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while True:
        time.sleep(0.05)
        for entry in read_entries(f"{directory}/state"):
            if (
                entry.get("child") == name
                and entry.get("state") == "up"
                and entry["mono"] > killed_at
            ):
                return float(entry["mono"]) - killed_at


def _children(directory: str) -> list[dict[str, Any]]:
    children: list[dict[str, Any]] = ask(f"{directory}/run/control.sock", "status")["children"]
    return children


def _settled(directory: str, descriptors: int, standby: bool) -> bool:
    """Everything is given, and who is to stand by does."""
    hoarder, good = (c for c in _children(directory) if c["name"] in ("hoarder", "good"))
    if standby and not good["standby"]:
        return False
    asleep = all(
        procfs.state_of(one["standby"]) == "S" for one in (hoarder, good) if one["standby"]
    )
    return bool(hoarder["kept"] == descriptors and asleep)


def measure(descriptors: int, rounds: int, *, standby: bool) -> dict[str, list[float]]:
    """Times in ms, by what was done."""
    with tree(descriptors, standby) as directory:
        times: dict[str, list[float]] = {"hoarder": [], "good": [], "late": []}
        for _ in range(rounds):
            for name in ("hoarder", "good"):
                common.wait_until(
                    lambda: _settled(directory, descriptors, standby),
                    60.0,
                    "a tree that is settled",
                )
                times[name].append(1000 * respawn(directory, name))
            for child in _children(directory):
                late = max(0.0, float(child["last_beat_age"]) - INTERVAL)
                times["late"].append(1000 * late)
        return times


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=20, help="kills of each child (20)")
    made.add_argument("--descriptors", type=int, default=10_000, help="how many (10,000)")
    args = common.parse(made, {"rounds": 2, "descriptors": 1000})
    result = common.Result("given", args)
    result.columns = [
        "successor", "given", "kills", "respawn, median ms", "of one that gave nothing",
        "beats late by, median ms", "max",
    ]  # fmt: skip
    for standby in (False, True):
        medians = []
        for descriptors in (0, args.descriptors):
            found = measure(descriptors, args.rounds, standby=standby)
            way = "stands by" if standby else "is forked"
            result.raw[f"{way}, {descriptors} given"] = found
            medians.append(common.median(found["hoarder"]))
            result.row(
                way, descriptors, args.rounds, medians[-1], common.median(found["good"]),
                common.median(found["late"]), max(found["late"]),
            )  # fmt: skip
        result.note(
            f"A successor that {way}: {args.descriptors} descriptors lengthen the respawn by "
            f"{medians[1] - medians[0]:.1f} ms."
        )
    result.save()


if __name__ == "__main__":
    main()
