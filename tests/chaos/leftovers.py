"""What a laboratory leaves, if it leaves anything."""

from __future__ import annotations

import os
from pathlib import Path


def directories(pid: int) -> set[str]:
    """Those of the trees that the process of this number has made."""
    return {str(path) for path in Path("/tmp").glob(f"pkvpn-chaos-{pid}-*")}


def processes(pid: int) -> set[str]:
    """Those of its trees, by the files they hold, and its clients, by their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            files = [os.readlink(path) for path in (entry / "fd").iterdir()]
        except OSError:
            continue
        if any(f"/pkvpn-chaos-{pid}-" in one for one in (*files, *words)) or (
            "pkvpn.chaos.traffic" in words and str(pid) in words
        ):
            found.add(f"{entry.name} {' '.join(words)}")
    return found


def leftovers(pid: int) -> set[str]:
    """Both."""
    return directories(pid) | processes(pid)
