"""The TAP devices of local bridges: opened once by the watchdog, held for every core.

Strategy: each device for itself.  What the system refuses is remembered with its reason and tried
again at the next reload, and so is what somebody has deleted; neither keeps the service or the
other bridges from running.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from pkvpn.core.accounts import BridgeRecord
from pkvpn.core.bridge import BridgeError, is_deleted, open_tap
from pkvpn.watchdog.spec import HeldSpec


class Taps:
    """Knows which devices are open, and why the others are not."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}  # the descriptor that is held; not ours to close
        self._refused: dict[str, str] = {}
        self._attempts: dict[str, int] = {}

    def held(self, bridges: Iterable[BridgeRecord]) -> list[HeldSpec]:
        """What is to be held for these bridges, "tap:NAME" each; nothing is opened yet.

        What is held for one that is refused is no descriptor at all.
        """
        wanted = {bridge.device: bridge.linux_bridge for bridge in bridges}
        for device in set(self._open) - set(wanted):
            del self._open[device]
        gone = [device for device, fd in self._open.items() if is_deleted(fd)]
        for device in gone:
            del self._open[device]
        for device in (*self._refused, *gone):
            self._attempts[device] = self._attempts.get(device, 0) + 1  # it is tried again
        return [
            HeldSpec(
                f"tap:{device}",
                functools.partial(self._hold, device, linux_bridge),
                key=(linux_bridge, self._attempts.get(device, 0)),
                adopt=functools.partial(self._adopt, device),
                stored=True,
            )
            for device, linux_bridge in wanted.items()
        ]

    def refused(self) -> dict[str, str]:
        """Why devices are not open; also known in a child."""
        return dict(self._refused)

    def _hold(self, device: str, linux_bridge: str) -> list[int]:
        self._refused.pop(device, None)
        try:
            fd = open_tap(device, linux_bridge or None, self._open.get(device))
        except BridgeError as error:
            self._refused[device] = str(error)
            self._open.pop(device, None)
            return []
        self._open[device] = fd
        return [fd]

    def _adopt(self, device: str, descriptors: list[int]) -> None:
        if descriptors:
            (self._open[device],) = descriptors
        else:
            self._refused[device] = f"bridge {device}: refused before the upgrade"
