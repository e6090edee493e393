"""The running service, as its runtime directory shows it."""

import os
from pathlib import Path

from pkvpn.watchdog.instance import read_pid_file
from pkvpn.watchdog.procfs import read_identity


def open_watchdog(pid_file: Path) -> int | None:
    """Return a pidfd of the watchdog that the pid file names; None if that one is gone.

    A pid alone may be another program's by now, so start time and boot id are compared, after the
    descriptor was opened: what is the same process then, stays it.
    """
    found = read_pid_file(pid_file)
    if found is None:
        return None
    try:
        watchdog = os.pidfd_open(found.pid)
    except (ProcessLookupError, ValueError):
        return None
    if read_identity(found.pid) == (found.start_time, found.boot_id):
        return watchdog
    os.close(watchdog)
    return None
