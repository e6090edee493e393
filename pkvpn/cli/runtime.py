"""The running service, as its runtime directory shows it.

Strategy: whether anything of a service is left, and which process is its watchdog, is asked of the
locks in the kernel; the pid file only tells a service that died from one that was stopped.
"""

import os

from pkvpn.cli import NO_PRIVILEGE, Refusal
from pkvpn.config import Settings, check_runtime_dir, load
from pkvpn.watchdog import instance


def load_settings(path: str | None) -> Settings:
    """Read the configuration and make sure that what its runtime directory says can be believed."""
    settings = load(path)
    check_runtime_dir(settings)
    return settings


def is_running(settings: Settings) -> bool:
    """Whether any process of the service lives."""
    try:
        return instance.lock_is_held(str(settings.lock_file))
    except instance.InstanceError as error:
        raise Refusal(
            f"it cannot be seen whether the service runs: {error}", NO_PRIVILEGE
        ) from None


def holders(settings: Settings) -> list[int]:
    """The processes of the service, as far as they can be seen."""
    return instance.holders(str(settings.lock_file))


def watchdog_pid(settings: Settings) -> int | None:
    """The pid of a watchdog that lives; 0 if it cannot be seen from here."""
    return instance.watchdog_pid(str(settings.lock_file))


def pid_file_names(settings: Settings) -> int | None:
    """The pid of the watchdog that was not stopped, alive or dead; None: no pid file."""
    found = instance.read_pid_file(str(settings.pid_file))
    return None if found is None else found.pid


def open_watchdog(settings: Settings) -> int | None:
    """Return a pidfd of the watchdog; None if there is none, or none that we can see."""
    pid = watchdog_pid(settings)
    if not pid:
        return None
    try:
        watchdog = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Asked again: if it still has the lock, the descriptor is of that very process.
    if watchdog_pid(settings) == pid:
        return watchdog
    os.close(watchdog)
    return None
