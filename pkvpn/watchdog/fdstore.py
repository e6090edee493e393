"""Descriptors that the service manager hands over at the start (sd_listen_fds(3)): sockets on
which it listened in our place.

Strategy: a name may stand for several descriptors, and says under which held name they belong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import MutableMapping

# SD_LISTEN_FDS_START
FIRST = 3

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def take_inherited(environ: MutableMapping[str, str], pid: int) -> dict[str, list[int]]:
    """What the manager handed to this very process, by name.

    The variables are removed: neither a child nor the next image is meant by them.
    """
    meant, count, names, _ = (environ.pop(name, "") for name in _VARIABLES)
    if meant != str(pid) or not count.isdigit():
        return {}
    words = names.split(":") if names else []
    found: dict[str, list[int]] = {}
    for number in range(int(count)):
        fd = FIRST + number
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            name = words[number] if number < len(words) else "unknown"
            found.setdefault(name, []).append(fd)
    return found
