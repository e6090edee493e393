"""What a thousand kills leave in the watchdog, and what a kill of child and parent leaves at all.

    python -m benchmarks.endurance [--kills N] [--pairs N] [--seed N] [--quick]

The real tree.  First its children are killed a thousand times in a row, each time one that
has served long enough to be replaced at once; the watchdog's descriptors, threads, memory and
unreaped children are counted on the way, when the tree is whole.  Then, in a new tree each time, a
child and, up to 5 ms later, the watchdog are killed, so that its last act may be a fork; a second
later nobody of the tree is to be left, grown-up or just born.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.servers import Ours, kill_quietly

# Up for so long, a child that dies is replaced at once (`healthy_after`), and with it its standby.
_LIVED = 1.0
# What is left of a tree ends by itself within this.
_ENDS = 1.0
_SAMPLES = 40


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--kills", type=int, default=1000, help="of children in a row (1000)")
    made.add_argument("--pairs", type=int, default=200, help="of child and watchdog (200)")
    args = common.parse(made, {"kills": 12, "pairs": 3})
    common.lab()
    result = common.Result("endurance", args)
    result.columns = ["what", "before", "after the first tenth", "at the end", "most"]
    with common.work_directory() as directory:
        kills(result, args, directory)
        pairs(result, args, directory)
    result.note(
        f"Growth is what the watchdog has at the end more than before, after {args.kills} kills of "
        "its children; each child was killed when it had served for a second. Memory is counted "
        "from the first tenth on as well: what is made once, at the first death, is no growth."
    )
    result.save(plot)


# --- a thousand kills in a row -------------------------------------------------------------------


def kills(result: common.Result, args: argparse.Namespace, directory: Path) -> None:
    """Kill children of one tree; what the watchdog has, on the way."""
    ours = Ours(directory / "kills")
    ours.start()
    try:
        samples = [sample(ours, 0)]
        victims: dict[str, int] = {}
        began = time.monotonic()
        for number in range(1, args.kills + 1):
            name = kill_one(ours)
            victims[name] = victims.get(name, 0) + 1
            if number % max(1, args.kills // _SAMPLES) == 0:
                samples.append(sample(ours, number))
        seconds = time.monotonic() - began
        if samples[-1]["kills"] != args.kills:
            samples.append(sample(ours, args.kills))
        restarts = sum(ours.restarts().values())
    finally:
        ours.stop()
    result.raw["samples"] = samples
    result.raw["victims"] = victims
    warm = next(one for one in samples if one["kills"] >= args.kills / 10)
    for what in ("descriptors", "threads", "zombies", "uss_mib", "rss_mib"):
        values = [one[what] for one in samples]
        result.row(f"watchdog: {what}", samples[0][what], warm[what], values[-1], max(values))
    told = ", ".join(f"{name} {count}" for name, count in sorted(victims.items()))
    result.note(f"{args.kills} kills in {seconds:.0f} s ({told}), {restarts} restarts.")


def kill_one(ours: Ours) -> str:
    """Kill a child that has served for long enough; returns its name when another is up."""

    def pick() -> dict[str, Any] | None:
        grown = [
            child
            for child in ours.service.children().values()
            if child["state"] == "up" and child["uptime"] >= _LIVED
        ]
        return random.choice(grown) if grown else None

    victim: dict[str, Any] = common.wait_until(pick, 30.0, "a child that has served")
    os.kill(victim["pid"], signal.SIGKILL)

    def is_replaced() -> bool:
        child = ours.service.children()[victim["name"]]
        return bool(child["state"] == "up" and child["pid"] != victim["pid"])

    common.wait_until(is_replaced, 30.0, f"{victim['name']} is replaced")
    return str(victim["name"])


def sample(ours: Ours, killed: int) -> dict[str, Any]:
    """What the watchdog has when all are up, and a standby has been forked."""
    common.wait_until(ours.settled, 30.0, "the tree is whole")
    time.sleep(0.5)
    pid = ours.named_pids()["watchdog"]
    memory = common.memory(pid)
    below = common.children(pid)
    return {
        "kills": killed,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "zombies": sum(not common.alive(one) for one in below),
        "children": len(below),
        "uss_mib": round(memory["uss"], 3),
        "rss_mib": round(memory["rss"], 3),
    }


# --- child, then parent --------------------------------------------------------------------------


def pairs(result: common.Result, args: argparse.Namespace, directory: Path) -> None:
    """Kill a child and then the watchdog of a new tree, again and again."""
    ours = Ours(directory / "pairs")
    left_of: list[dict[str, Any]] = []
    for _ in range(args.pairs):
        ours.start()
        named = ours.named_pids()
        watchdog = named.pop("watchdog")
        everybody = {watchdog, *common.descendants(watchdog)}
        name = random.choice(sorted(named))
        apart = random.uniform(0.0, 0.005)
        os.kill(named[name], signal.SIGKILL)
        at = time.monotonic()
        while time.monotonic() - at < apart:
            pass
        os.kill(watchdog, signal.SIGKILL)
        time.sleep(_ENDS)
        left = {pid for pid in everybody if common.alive(pid)} | set(titled())
        left_of.append({"child": name, "apart_ms": round(1e3 * apart, 3), "left": len(left)})
        for pid in left:
            kill_quietly(pid, signal.SIGKILL)
    ours.start()  # nothing is in its way
    ours.stop()
    orphans = sum(bool(one["left"]) for one in left_of)
    result.raw["pairs"] = left_of
    result.row(f"orphans after {args.pairs} kills of child, then watchdog", 0, None, orphans, None)


def titled() -> list[int]:
    """Every process of a tree, by its title: also one that was born while we killed."""
    return [pid for pid in common.all_pids() if "vpnserver execsvc" in common.command_line(pid)]


def plot(figure: Any, result: dict[str, Any]) -> None:
    """The watchdog over its kills."""
    samples = result["raw"]["samples"]
    at = [one["kills"] for one in samples]
    above, below = figure.subplots(2, 1, sharex=True)
    for what in ("uss_mib", "rss_mib"):
        above.plot(at, [one[what] for one in samples], label=what.replace("_mib", ", MiB"))
    for what in ("descriptors", "threads", "zombies"):
        below.plot(at, [one[what] for one in samples], label=what)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.legend(loc="center right")
        axes.grid(alpha=0.3)
    below.set_xlabel("kills of children")


if __name__ == "__main__":
    main()
