"""What is needed to run a test is found out by trying; nothing may be left behind."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.support import eventually, open_descriptors

_STOCK_PROGRAMS = (
    "/usr/libexec/softether/vpnclient/vpnclient",
    "/usr/libexec/softether/vpnserver/vpnserver",
)


@functools.cache
def _missing(mark: str) -> str:
    """What a mark's tests lack here, or nothing."""
    if mark == "root":
        return "" if os.geteuid() == 0 else "not root"
    if mark == "netns":
        made = subprocess.run(
            ["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True
        )
        return "" if made.returncode == 0 else f"no network namespace: {made.stderr.strip()}"
    if mark == "softether":
        absent = [path for path in _STOCK_PROGRAMS if not os.path.exists(path)]
        absent += [name for name in ("vpncmd", "iperf3") if shutil.which(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""
    if mark == "boot":
        from tests.boot.machine import why_not

        return why_not()
    if mark == "windows":
        from tests.windows.wine import why_not as why_no_windows

        return why_no_windows()
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in ("root", "netns", "softether", "boot", "windows"):
        if item.get_closest_marker(mark) is not None and (why := _missing(mark)):
            # Wine is not part of the whole check: `scripts/windows` is one of its own.
            if os.environ.get("PKVPN_REQUIRE_ALL") == "1" and mark != "windows":
                pytest.fail(f"{mark}: {why}, and nothing may be skipped here", pytrace=False)
            pytest.skip(f"{mark}: {why}")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No child process, thread or descriptor more than before."""
    descriptors = open_descriptors()
    threads = threading.active_count()
    children = len(_children())  # of a fixture that serves several tests
    yield
    eventually(lambda: len(_children()) <= children, within=5.0)
    eventually(lambda: threading.active_count() <= threads, within=5.0)
    more = {fd: what for fd, what in open_descriptors().items() if fd not in descriptors}
    assert not more, f"descriptors left open: {more}"


def _children() -> list[int]:
    children: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            children += [int(pid) for pid in file.read().split()]
    return children
