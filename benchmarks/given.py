"""What ten thousand given descriptors cost: a respawn, and the beats of everybody.

    python -m benchmarks.given [--rounds N] [--descriptors N]

A child gives so many descriptors to its watchdog and is killed again and again; another child,
which has given nothing, as well.  Beside the times from the signal to `ready`: how late the beats
of the other child are read meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pkvpn.watchdog import Child, ChildSpec, RestartPolicy, TreeSpec, ask, run_tree
from pkvpn.watchdog.journal import read_entries


def hoarder(child: Child, descriptors: int) -> None:
    """Gives what is missing, then beats."""
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
    child.ready()
    while not child.stopping:
        child.wait()


@contextmanager
def tree(descriptors: int) -> Iterator[str]:
    """A tree in a directory of its own; its control socket."""
    with tempfile.TemporaryDirectory() as directory:
        policy = RestartPolicy(healthy_after=0.0)
        spec = TreeSpec(
            "given",
            (
                ChildSpec("hoarder", hoarder, descriptors, policy=policy, keep_limit=descriptors),
                ChildSpec("good", good, policy=policy),
            ),
            f"{directory}/run",
            f"{directory}/state",
            beat_interval=0.05,
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


def _children(directory: str) -> list[dict[str, object]]:
    children: list[dict[str, object]] = ask(f"{directory}/run/control.sock", "status")["children"]
    return children


def measure(descriptors: int, rounds: int) -> dict[str, float]:
    """Medians in ms."""
    with tree(descriptors) as directory:
        while next(iter(c["kept"] for c in _children(directory) if c["name"] == "hoarder")) != (
            descriptors
        ):
            time.sleep(0.05)
        times: dict[str, list[float]] = {"hoarder": [], "good": [], "late": []}
        for _ in range(rounds):
            for name in ("hoarder", "good"):
                times[name].append(respawn(directory, name))
            for child in _children(directory):
                times["late"].append(max(0.0, float(str(child["last_beat_age"])) - 0.05))
        return {name: statistics.median(values) * 1000 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--descriptors", type=int, default=10_000)
    options = parser.parse_args()
    print(
        f"{'given':>8} {'its respawn':>12} {'another one':>12} {'beats late by':>14}   median, ms"
    )
    for descriptors in (0, options.descriptors):
        found = measure(descriptors, options.rounds)
        print(
            f"{descriptors:>8} {found['hoarder']:>12.1f} {found['good']:>12.1f} "
            f"{found['late']:>14.1f}"
        )


if __name__ == "__main__":
    if not Path("/proc/self/fd").exists():
        sys.exit("this reads /proc")
    main()
