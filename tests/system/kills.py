"""kill -9 at random moments, under frames that are numbered."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

from pkvpn.chaos.traffic import HUB, PASSWORD, USERS, Traffic
from tests.support import eventually
from tests.system.bed import Service

# Whoever dies again at once comes back at once here: else most of the time is backoff.
CONFIG = 'listen = ["127.0.0.1:0"]\n[watchdog]\nhealthy_after = 0.0\n'

VICTIMS = (("core",), ("edge-1",), ("core", "edge-1"))
# From the moment at which all are up; young deaths are as likely as others.
LONGEST_WAIT = 0.15


def begin(service: Service) -> Traffic:
    """Two clients that send each other a frame every millisecond, by known flows from here on."""
    service.add_hub(HUB, **dict.fromkeys(USERS, PASSWORD))
    traffic = Traffic(service.port())
    try:
        eventually(lambda: service.ask("hub.show", name=HUB)["flows"] == 2, within=15.0)
    except BaseException:
        traffic.close()
        raise
    return traffic


def kill(service: Service, traffic: Traffic, dice: random.Random) -> dict[str, Any]:
    """Once, whoever it hits, wherever it is; what the clients saw until all was up again."""
    victims = dice.choice(VICTIMS)
    before = {name: service.pid(name) for name in victims}
    traffic.begin()
    time.sleep(dice.uniform(0.0, LONGEST_WAIT))
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(service.pid(name) != pid for name, pid in before.items()), within=20.0)
    found = traffic.look()
    return {"killed": "+".join(victims), "silence_ms": round(found["silence"] * 1e3, 3)}


def losses(traffic: Traffic) -> dict[str, int]:
    """What must all be 0 now that nothing is on its way any more."""
    last, first = traffic.finish(), traffic.first
    return {
        "frames lost": last["lost"],
        "frames out of order": last["reordered"],
        "logins": last["logins"] - first["logins"],
        "connections cut": last["resumptions"] - first["resumptions"],
        # Who shakes hands with an edge that dies is reset and tries again; nobody is refused.
        "refused": last["refused"] - first["refused"],
    }
