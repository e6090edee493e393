"""One visit of the canary: log in like a user, send a frame to oneself, say how far it came.

Strategy: the whole way of a user, the probe page of stock clients included, in as short a
time as it takes; what fails, fails at a named stage.  `CanaryCheck` never blocks, so the
loop that drives it can go on beating.
"""

from __future__ import annotations

import functools
import os
import select
import time
from dataclasses import dataclass

from pkvpn.client.machine import Credentials
from pkvpn.client.session import VpnClient

HUB = ".canary"
USER = "canary"
SECRET_SIZE = 32

# The last stage: the session is there, the frame has not come back yet.
_ECHO = "echo"
# For experiments on one's own network (IEEE 802): no program looks at it.
_ETHERTYPE = b"\x88\xb5"


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """How far a visit came.

    ``stage`` is where it ended: one of those of `VpnClient`, or "echo" for a session in
    which the frame did not come back.  "data" means that all is well.
    """

    stage: str
    ok: bool
    seconds: float
    error: str = ""


class CanaryCheck:
    """One visit, in steps.

    Call `step` when `fileno` is readable or `next_deadline` has come, until it returns a
    result; then `close`.
    """

    def __init__(self, host: str, port: int, secret: bytes, timeout: float) -> None:
        self._started_at = time.monotonic()
        self._until = self._started_at + timeout
        self._timeout = timeout
        self._client = VpnClient(
            host, port, HUB, USER, credentials=_credentials(secret), probe=True, reconnect=False
        )
        # A new pair each time: two locally administered addresses, both ours.  The first
        # frame makes the hub learn one, the second goes from the other to it: the hub would
        # take a frame whose source is its destination for broken.
        tail = os.urandom(5)
        mine, other = b"\x02" + tail, b"\x06" + tail
        self._first = other + mine + _ETHERTYPE + os.urandom(46)
        self._second = mine + other + _ETHERTYPE + os.urandom(46)
        self._sent = False

    def fileno(self) -> int:
        """Readable when `step` has something to do."""
        return self._client.fileno()

    def next_deadline(self) -> float:
        """When `step` wants to be called at the latest (seconds, monotonic)."""
        deadline = self._client.next_deadline()
        return self._until if deadline is None else min(deadline, self._until)

    def step(self) -> CanaryResult | None:
        """Do what can be done without waiting; the result when it is over."""
        client = self._client
        frames = client.handle()
        now = time.monotonic()
        seconds = now - self._started_at
        if self._second in frames:
            return CanaryResult("data", True, seconds)
        if client.ended:
            return CanaryResult(self._stage(), False, seconds, str(client.error))
        if now >= self._until:
            error = f"no answer within {self._timeout:g} s"
            return CanaryResult(self._stage(), False, seconds, error)
        if client.established and not self._sent:
            self._sent = True
            client.send([self._first, self._second])
        return None

    def close(self) -> None:
        """End the visit; ``fileno`` is no longer valid after it."""
        self._client.close()

    def _stage(self) -> str:
        return _ECHO if self._sent else self._client.stage


@functools.lru_cache(maxsize=1)
def _credentials(secret: bytes) -> Credentials:
    """The same for each visit: the hash is a tenth of what one costs us."""
    return Credentials.with_password(HUB, USER, secret.hex())


def check(host: str, port: int, secret: bytes, timeout: float) -> CanaryResult:
    """Visit once; waits for at most ``timeout`` seconds and raises nothing for a server
    that is unwell."""
    visit = CanaryCheck(host, port, secret, timeout)
    poll = select.poll()
    poll.register(visit.fileno(), select.POLLIN)
    try:
        while (result := visit.step()) is None:
            poll.poll(max(0.0, visit.next_deadline() - time.monotonic()) * 1000)
        return result
    finally:
        visit.close()
