"""The canary child: visits the service's own addresses in turn, as a user would.

Strategy: the loop waits for the visit in progress, for the next one and for the watchdog,
never for one thing alone, so its beats come whatever the service does.  What is reported are
two duties in which others are accused: a visit that came no farther than TLS says that the
edges do not serve, one that came farther that the core does not.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - the first connect would import it, in each incarnation
import logging
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass

from pkvpn.client.canary import SECRET_SIZE, CanaryCheck, CanaryResult
from pkvpn.watchdog.child import Child

_log = logging.getLogger("pkvpn.canary")

# The canary's duties: visits that went well, and since when one of the addresses does not serve.
REACH_EDGE = "reach-edge"
REACH_CORE = "reach-core"
# Stages of a visit at which the connection itself was what did not come about.
_EDGE_STAGES = ("tcp", "tls")

# A visit that fails is tried again within the time-out: one request that was lost on a busy
# machine is no proof.
TRIES = 2

# Until the first visit goes well: the operator waits for `start` to return.
_EAGER_INTERVAL = 0.05
# But not for ever: a service that is broken should not be busy with its canary.
_EAGER_PERIOD = 10.0

# What a listener on any address is visited as.
_ANY = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "*": "127.0.0.1", "::": "::1", "[::]": "::1"}


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """``addresses()``: where the service really listens, asked when the child starts.
    ``interval``: seconds between the starts of two visits.  ``timeout``: of one visit, all its
    `TRIES` together."""

    addresses: Callable[[], tuple[tuple[str, int], ...]]
    interval: float = 5.0
    timeout: float = 2.0


class Round:
    """Decides which address is visited when, and what to report (pure).

    ``addresses``: host and port each, any-addresses as they are configured.  ``interval`` and
    ``timeout`` as in `CanarySettings`.
    """

    def __init__(
        self,
        addresses: tuple[tuple[str, int], ...],
        interval: float,
        timeout: float,
        *,
        now: float,
    ) -> None:
        if not addresses:
            raise ValueError("the canary has no address to visit")
        self._addresses = addresses
        self._interval = interval
        self.try_timeout = timeout / TRIES
        self._failed = 0  # tries of this visit
        self._visit_began = now
        self._visit = -1  # index of the address that is visited now
        self._eager_until = now + _EAGER_PERIOD
        self._started_at = now
        # Address -> the duty that is in trouble there, and when the visit that found it began.
        self._troubles: dict[int, tuple[str, float]] = {}
        self.visit_at = now
        self.well = False  # has any visit gone well?
        self.done = 0

    def start(self, now: float) -> tuple[str, int]:
        """To be called when a try begins; the address to visit."""
        self._started_at = now
        if not self._failed:
            self._visit = (self._visit + 1) % len(self._addresses)
            self._visit_began = now
        host, port = self._addresses[self._visit]
        return _ANY.get(host, host.strip("[]")), port

    def finish(self, result: CanaryResult, now: float) -> None:
        """To be called when it is over."""
        if result.ok:
            self.well = True
            self.done += 1
            self._troubles.pop(self._visit, None)
        else:
            duty = REACH_EDGE if result.stage in _EDGE_STAGES else REACH_CORE
            self._troubles[self._visit] = (duty, self._started_at)
        self._failed = 0 if result.ok else (self._failed + 1) % TRIES
        if not self.well and now < self._eager_until:
            self._failed = 0
            self.visit_at = now + _EAGER_INTERVAL
        elif self._failed:
            self.visit_at = max(now, self._started_at + self.try_timeout)
        else:
            self.visit_at = max(now, self._visit_began + self._interval)

    def waiting_since(self, duty: str) -> float:
        """Since when an address does not serve by the fault of those whom ``duty`` accuses: the
        latest try that found it so; 0.0: all serve."""
        return max((since for one, since in self._troubles.values() if one == duty), default=0.0)


def main(child: Child, settings: CanarySettings) -> None:
    """The canary's life; to be run by the watchdog, which holds "canary" for it."""
    secret = os.pread(child.held("canary")[0], SECRET_SIZE, 0)
    rounds = Round(settings.addresses(), settings.interval, settings.timeout, now=time.monotonic())
    news = _News()
    visit: CanaryCheck | None = None
    address = ("", 0)
    epoll = select.epoll()
    epoll.register(child.fileno(), select.EPOLLIN)
    try:
        while not child.stopping:
            now = time.monotonic()
            due_at = rounds.visit_at if visit is None else visit.next_deadline()
            # The tree's call sends the beat, so it comes first whatever else is due.
            wait = min(child.turn(now), due_at - now)
            epoll.poll(max(0.0, wait))
            child.receive()
            if visit is None:
                if time.monotonic() < rounds.visit_at:
                    continue
                address = rounds.start(time.monotonic())
                visit = CanaryCheck(*address, secret, rounds.try_timeout)
                epoll.register(visit.fileno(), select.EPOLLIN)
            result = visit.step()
            if result is None:
                continue
            epoll.unregister(visit.fileno())
            visit.close()
            visit = None
            first = result.ok and not rounds.well
            rounds.finish(result, time.monotonic())
            for name in (REACH_EDGE, REACH_CORE):
                duty = child.duty(name)
                duty.done, duty.waiting_since = rounds.done, rounds.waiting_since(name)
            if not result.ok and rounds.well:
                child.hurry()
            changed = news.tell(address, result)
            if first:
                child.ready()
            elif changed and not rounds.well:
                child.say(_describe(address, result))
    finally:
        if visit is not None:
            visit.close()
        epoll.close()


class _News:
    """Logs what changed at an address, not every visit."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[bool, str, str]] = {}

    def tell(self, address: tuple[str, int], result: CanaryResult) -> bool:
        """Log the result if it differs from the last one there; True if it did."""
        new = (result.ok, result.stage, result.error)
        old = self._known.get(address)
        self._known[address] = new
        if new == old:
            return False
        if not result.ok:
            _log.warning("%s", _describe(address, result))
        elif old is not None:
            _log.info("%s", _describe(address, result))
        return True


def _describe(address: tuple[str, int], result: CanaryResult) -> str:
    host, port = address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if result.ok:
        return f"{where} serves ({result.seconds * 1000:.0f} ms)"
    return f"{where} does not serve: came to stage {result.stage}: {result.error}"
