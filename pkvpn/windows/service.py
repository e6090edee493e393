"""The service `vpnserver` of Windows: installed, removed, started, stopped, and being it.

Strategy: the process of the service is the watchdog, hosted by our own program; it says that it
runs when its children serve, and ends by the same stop as everywhere when the system asks for it,
also when the machine is shut down.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pkvpn.windows.supervisor import Supervisor

NAME = "vpnserver"
DISPLAY_NAME = "PacketiX VPN Server"

# Of winerror.h.
_ACCESS_DENIED, _ALREADY_RUNNING, _NOT_INSTALLED, _NOT_ACTIVE, _MARKED = 5, 1056, 1060, 1062, 1072

_WAIT = 40.0
# What the system is told that the next step of a start or stop may take, ms.
_HINT = 30_000

Run = Callable[[Callable[[dict[str, Any]], None], Callable[[Supervisor], None]], int]


class ServiceError(Exception):
    """What could not be done with the service, and why."""


def install(arguments: list[str], *, automatic: bool) -> None:
    """Register the service, or what is registered anew; ``arguments`` lead to `be_service`.

    ``automatic``: it starts with the machine.  Raises ServiceError.
    """
    import win32service  # type: ignore[import-untyped,unused-ignore]

    line = subprocess.list2cmdline([sys.executable, *arguments])
    start = win32service.SERVICE_AUTO_START if automatic else win32service.SERVICE_DEMAND_START
    kind, errors = win32service.SERVICE_WIN32_OWN_PROCESS, win32service.SERVICE_ERROR_NORMAL
    every = win32service.SERVICE_ALL_ACCESS
    with _manager("install") as manager:
        if _is_installed(manager):
            with _opened(manager) as service:
                win32service.ChangeServiceConfig(
                    service, kind, start, errors, line, None, 0, None, None, None, DISPLAY_NAME
                )
            return
        made = win32service.CreateService(
            manager, NAME, DISPLAY_NAME, every, kind, start, errors, line, None, 0, None, None, None
        )
        win32service.CloseServiceHandle(made)


def uninstall() -> None:
    """End the service and forget it; its directory stays.  Raises ServiceError."""
    import win32service  # type: ignore[import-untyped,unused-ignore]

    stop()
    with _manager("uninstall") as manager, _opened(manager) as service:
        win32service.DeleteService(service)


def start() -> None:
    """Start it and wait until it serves.  Raises ServiceError."""
    import pywintypes  # type: ignore[import-untyped,unused-ignore]
    import win32service  # type: ignore[import-untyped,unused-ignore]

    with _manager("start") as manager, _opened(manager) as service:
        try:
            win32service.StartService(service, None)
        except pywintypes.error as error:
            if error.winerror != _ALREADY_RUNNING:
                raise
        _wait(service, win32service.SERVICE_RUNNING, "start")


def stop() -> None:
    """Stop it, if it runs, and wait until it has ended.  Raises ServiceError."""
    import pywintypes  # type: ignore[import-untyped,unused-ignore]
    import win32service  # type: ignore[import-untyped,unused-ignore]

    with _manager("stop") as manager, _opened(manager) as service:
        try:
            win32service.ControlService(service, win32service.SERVICE_CONTROL_STOP)
        except pywintypes.error as error:
            if error.winerror != _NOT_ACTIVE:
                raise
        _wait(service, win32service.SERVICE_STOPPED, "stop")


def _wait(service: Any, wanted: int, what: str) -> None:
    import win32service  # type: ignore[import-untyped,unused-ignore]

    deadline = time.monotonic() + _WAIT
    while (state := win32service.QueryServiceStatus(service)[1]) != wanted:
        if state == win32service.SERVICE_STOPPED:
            raise ServiceError(f"{NAME} has ended; its journal says why")
        if time.monotonic() > deadline:
            raise ServiceError(f"{NAME} does not {what} within {_WAIT:g} s")
        time.sleep(0.1)


@contextmanager
def _manager(what: str) -> Iterator[Any]:
    """The service manager; what it refuses is told in words."""
    import pywintypes  # type: ignore[import-untyped,unused-ignore]
    import win32service  # type: ignore[import-untyped,unused-ignore]

    rights = win32service.SC_MANAGER_CONNECT
    if what == "install":
        rights |= win32service.SC_MANAGER_CREATE_SERVICE
    try:
        manager = win32service.OpenSCManager(None, None, rights)
        try:
            yield manager
        finally:
            win32service.CloseServiceHandle(manager)
    except pywintypes.error as error:
        known = {
            _ACCESS_DENIED: "it takes the rights of an administrator",
            _NOT_INSTALLED: "it is not installed",
            _MARKED: "it was removed, and somebody still has it open: try again in a moment",
        }
        why = known.get(error.winerror, error.strerror)
        raise ServiceError(f"{what} of the service {NAME}: {why}") from None


@contextmanager
def _opened(manager: Any) -> Iterator[Any]:
    import win32service  # type: ignore[import-untyped,unused-ignore]

    service = win32service.OpenService(manager, NAME, win32service.SERVICE_ALL_ACCESS)
    try:
        yield service
    finally:
        win32service.CloseServiceHandle(service)


def _is_installed(manager: Any) -> bool:
    import pywintypes  # type: ignore[import-untyped,unused-ignore]

    try:
        with _opened(manager):
            return True
    except pywintypes.error as error:
        if error.winerror != _NOT_INSTALLED:
            raise
        return False


def be_service(run: Run) -> None:
    """Be the service, in the process that the system has started for it; returns at its end.

    ``run(tell, begun)``: the tree, with what `pkvpn.windows.supervisor.run_tree` takes.
    """
    import servicemanager  # type: ignore[import-untyped,unused-ignore]
    import win32service  # type: ignore[import-untyped,unused-ignore]
    import win32serviceutil  # type: ignore[import-untyped,unused-ignore]

    class Service(win32serviceutil.ServiceFramework):  # type: ignore[misc,unused-ignore]
        """Its methods have the names that pywin32 calls."""

        _svc_name_ = NAME
        _svc_display_name_ = DISPLAY_NAME
        _supervisor: Supervisor | None = None

        def SvcRun(self) -> None:  # noqa: N802
            """Not the base's: that one says at once that it runs."""
            self.ReportServiceStatus(win32service.SERVICE_START_PENDING, waitHint=_HINT)
            run(self._tell, self._begun)
            self.ReportServiceStatus(win32service.SERVICE_STOP_PENDING)

        def SvcStop(self) -> None:  # noqa: N802
            self.ReportServiceStatus(win32service.SERVICE_STOP_PENDING, waitHint=_HINT)
            if self._supervisor is not None:
                self._supervisor.ask_to_stop()

        SvcShutdown = SvcStop

        def _begun(self, supervisor: Supervisor) -> None:
            self._supervisor = supervisor

        def _tell(self, line: dict[str, Any]) -> None:
            if line.get("ready"):
                self.ReportServiceStatus(win32service.SERVICE_RUNNING)

    servicemanager.Initialize()
    servicemanager.PrepareToHostSingle(Service)
    servicemanager.StartServiceCtrlDispatcher()
