"""What must hold of a tree whenever it has healed, whatever was done to it.

Strategy: looks only, and from outside: at what the watchdog says of itself and at /proc.  A look
may fall into the middle of a respawn, so whoever asks looks again until nothing is wrong or the
time for that is over.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pkvpn.chaos.own_tree import OwnTree
from pkvpn.watchdog import procfs

# What a process may have more of than when the laboratory began: a core that has just answered
# has a connection open, an upgraded watchdog a copy of its code.
FILES_MORE = 12
MEMORY_MORE = 48 << 20


@dataclass(frozen=True)
class Footprint:
    """What one process takes."""

    files: int
    memory: int  # bytes, resident


def footprints(tree: OwnTree) -> dict[str, Footprint]:
    """Of the watchdog and of every child, by name."""
    found = {}
    for name, pid in tree.pids().items():
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            found[name] = Footprint(files, pages * 4096)
    return found


def broken(tree: OwnTree, before: dict[str, Footprint]) -> list[str]:
    """What does not hold now; ``before``: the footprints of a tree that was well."""
    status = tree.status()
    watchdog = int(status["watchdog"]["pid"])
    below = _descendants(watchdog)
    found = [f"the tree is {status['state']}"] if status["state"] != "up" else []
    # One tree, and nobody outside it.
    found += [f"{pid} carries the tree's lock and is not in the tree"
              for pid in tree.holders() if pid != watchdog and pid not in below]  # fmt: skip
    titles = Counter(_title(pid) for pid in procfs.children_of(watchdog))
    found += [f"{count} processes {title!r}" for title, count in titles.items()
              if title and count > 1]  # fmt: skip
    found += [f"{pid} of the tree is dead and not reaped" for pid in below if _is_zombie(pid)]
    for child in status["children"]:
        if not child["pid"] or child["pid"] not in below:
            found.append(f"{child['name']} is not in the tree")
        if child["undead"]:
            found.append(f"{child['name']} cannot be ended")
    # Nothing grows.
    for name, now in footprints(tree).items():
        was = before.get(name)
        if was is None:
            continue
        if now.files > was.files + FILES_MORE:
            found.append(f"{name} has {now.files} files open, and had {was.files}")
        if now.memory > was.memory + MEMORY_MORE:
            found.append(f"{name} takes {now.memory >> 20} MiB, and took {was.memory >> 20}")
    return found


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for one in new for child in procfs.children_of(one)} - found
        found |= new
    return found


def _title(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return words.rstrip(b"\0").decode(errors="replace").strip()


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
