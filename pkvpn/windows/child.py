"""The child's end of the tree on Windows: what a target sees, with the names of the other one.

Strategy: one stream socket to the watchdog, on which beats go up and orders come down; who reads
its end of file is an orphan and ends at once, and who reads nothing any more ends with the job.
There are no signals: an end is asked for by an order, and the stacks of one that hangs are written
by a thread of faulthandler, which each beat puts off.
"""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO

from pkvpn.watchdog import lifeline
from pkvpn.watchdog.lifeline import Duty, Kind, Order, next_moment
from pkvpn.windows.handles import END_SIGNALS, Passed

_log = logging.getLogger(__name__)

# As on other systems: a child whose parent is gone.
EXIT_ORPHAN = 79

_LOG_BYTES, _LOG_KEEP = 1_000_000, 3
# Of ``hang_timeout``: early enough that the stacks are there before the kill.
_STACKS_AFTER = 0.75


@dataclass
class Birth:
    """What a child is born with.  Sockets are `Passed` before and numbers after."""

    name: str
    incarnation: int
    beat_interval: float
    hang_timeout: float
    target: Callable[..., None]
    settings: Any
    duties: tuple[str, ...]
    line: Passed | int
    stacks: str  # path: of this incarnation
    log: str  # path
    log_level: int
    held: dict[str, list[Passed | int]] = field(default_factory=dict)


class Child:
    """What a target holds of the tree it lives in."""

    def __init__(self, birth: Birth, stacks: TextIO) -> None:
        assert isinstance(birth.line, int)
        self.name = birth.name
        self.incarnation = birth.incarnation
        self.stopping = False
        self._birth = birth
        self._stacks = stacks
        self._line = socket.socket(fileno=birth.line)
        self._line.setblocking(False)
        self._orders = lifeline.OrderDecoder()
        self._duties = {name: Duty() for name in birth.duties}
        self._unsent = b""
        self._seq = 0
        self._lag = 0.0
        self._next_beat = time.monotonic()
        self._ready = False

    def held(self, name: str) -> list[int]:
        """The sockets held under ``name``, the same in every incarnation.

        Raises `KeyError` if the child's spec does not name it.
        """
        return [one for one in self._birth.held[name] if isinstance(one, int)]

    def fileno(self) -> int:
        """Readable when `receive` has something to do."""
        return self._line.fileno()

    def receive(self) -> list[str]:
        """Return what was ordered since the last call ("stop", "yield", "reload"); never blocks."""
        try:
            data = self._line.recv(4096)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        if not data:
            os._exit(EXIT_ORPHAN)
        orders = self._orders.feed(data)
        self.stopping |= not {Order.STOP, Order.YIELD}.isdisjoint(orders)
        return [order.name.lower() for order in orders]

    def turn(self, now: float) -> float:
        """To be called once in each turn of the loop; sends a beat when one is due.

        Returns the seconds after which it wants to be called again.
        """
        if self._next_beat > 0.0:
            self._lag = max(self._lag, now - self._next_beat)
        if now >= self._next_beat:
            self._seq += 1
            duties = [(duty.done, duty.waiting_since) for duty in self._duties.values()]
            if not self._unsent:  # else the watchdog does not read, and the next one says it all
                self._say(lifeline.encode_beat(self._seq, self._lag, duties))
            else:
                self._say(b"")
            self._lag = 0.0
            self._next_beat = next_moment(now, self._birth.beat_interval)
            if self._ready:
                after = self._birth.hang_timeout * _STACKS_AFTER
                faulthandler.dump_traceback_later(after, file=self._stacks)
        return max(0.0, self._next_beat - now)

    def wait(self, timeout: float | None = None) -> list[str]:
        """A whole turn for a loop that has nothing else to wait for: beat, wait, receive."""
        until_beat = self.turn(time.monotonic())
        select.select(
            [self._line], [], [], until_beat if timeout is None else min(timeout, until_beat)
        )
        return self.receive()

    def duty(self, name: str) -> Duty:
        """The counters of one duty that the spec names."""
        return self._duties[name]

    def hurry(self) -> None:
        """Have the next `turn` send a beat at once: a duty has news that cannot wait."""
        self._next_beat = 0.0

    def ready(self) -> None:
        """Say that we serve.  To be called once, when the first request could be answered."""
        self._say(lifeline.encode_said(Kind.READY, self._seq))
        self._ready = True
        self.hurry()

    def say(self, text: str) -> None:
        """Progress of the start, or why it fails; `start` shows the last one."""
        self._say(lifeline.encode_said(Kind.SAY, self._seq, text))

    def _say(self, frame: bytes) -> None:
        """A stream may take a part of a frame; the rest goes before the next one."""
        self._unsent += frame
        try:
            self._unsent = self._unsent[self._line.send(self._unsent) :]
        except BlockingIOError:
            pass
        except ConnectionError:
            os._exit(EXIT_ORPHAN)


def run_child(birth: Birth) -> NoReturn:
    """Be the child ``birth`` describes.  Called in the new process; never returns."""
    # A console tells all its processes of Ctrl-C: what follows from it is the watchdog's to say.
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with open(birth.stacks, "w", encoding="utf-8") as stacks:
        faulthandler.enable(stacks, all_threads=True)
        _open_log(birth)
        child = Child(birth, stacks)
        os._exit(_live(birth, child, stacks))


def _live(birth: Birth, child: Child, stacks: TextIO) -> int:
    try:
        if birth.settings is None:
            birth.target(child)
        else:
            birth.target(child, birth.settings)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        child.say(str(end.code))
        _log.error("%s ends: %s", child.name, end.code)
        return 1
    except BaseException as error:  # noqa: BLE001 - whatever it was, the report names it
        stacks.write(traceback.format_exc())
        stacks.flush()
        _log.critical("%s ends: %s", birth.name, error, exc_info=True)
        child.say(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _open_log(birth: Birth) -> None:
    """A file of its own: two processes cannot rotate one on Windows."""
    handler = logging.handlers.RotatingFileHandler(
        birth.log, maxBytes=_LOG_BYTES, backupCount=_LOG_KEEP, encoding="utf-8"
    )
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {birth.name} %(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(birth.log_level)
