"""What every test may use: waiting for a condition, and knowing what was left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(condition: Callable[[], T], within: float = 10.0, every: float = 0.005) -> T:
    """Return the first true value of ``condition``; `AssertionError` after ``within`` seconds.

    An `AssertionError` or `OSError` of the condition counts as not yet, and is named at the end.
    """
    deadline = time.monotonic() + within
    last: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            last = value
        except (AssertionError, OSError) as error:
            last = error
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {within} s; last seen: {last!r}")
        time.sleep(every)


def open_descriptors() -> dict[int, str]:
    """Descriptor -> what it is, of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed the directory
    return found


def process_gone(pid: int) -> bool:
    """Absent, or a zombie that only waits for its parent."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
