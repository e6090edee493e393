"""The thread that waits for the disk, so that the loop of the core does not.

Strategy: it answers the operators' verbs and owns the database; one thing at a time, so its queue
is the listener's backlog and the few connections of the control server.  What concerns the loop it
has done there (`Calls`) and waits for, with a limit.  The loop never waits for this thread.
"""

import logging
import queue
import selectors
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, cast

from pkvpn.core.bell import Bell
from pkvpn.core.control import Control, Live
from pkvpn.core.store import Store, StoreError

_log = logging.getLogger("pkvpn.core")

T = TypeVar("T")

# Longer than any turn of the loop that the watchdog would let pass.
_CALL_TIMEOUT = 4.0
# How often the database is asked whether somebody else has changed it.
_REFRESH_INTERVAL = 1.0


class Calls:
    """Lets another thread have something done in the loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._bell = Bell()

    def fileno(self) -> int:
        """Readable when `run` has something to do."""
        return self._bell.fileno()

    def close(self) -> None:
        """To be called when nobody calls any more."""
        self._bell.close()

    def run(self) -> None:
        """Do what was asked for.  To be called by the loop."""
        self._bell.clear()
        while True:
            try:
                call, future = self._queue.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001  it is raised again where it was asked for
                future.set_exception(error)

    def ask(self, call: Callable[[], T]) -> T:
        """Have it done and return its result.  To be called by the other thread.

        Raises TimeoutError; it is done later then, unless the process ends before.
        """
        future: Future[T] = Future()
        self._queue.put((call, future))
        self._bell.ring()
        return future.result(_CALL_TIMEOUT)


class _InLoop:
    """Another `Live`, each method of which is called in the loop."""

    def __init__(self, live: Live, calls: Calls) -> None:
        self._live = live
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._live, name)
        return lambda *args: self._calls.ask(lambda: method(*args))


def live_in_loop(live: Live, calls: Calls) -> Live:
    """What another thread may use of ``live``: each method waits until the loop has run it."""
    return cast(Live, _InLoop(live, calls))


class Server(Protocol):
    """What answers operators from within a selector loop (the watchdog's `ControlServer`)."""

    def handle(self, key: selectors.SelectorKey, mask: int) -> bool:
        """Do what there is to do for one event."""

    def close(self) -> None:
        """End every connection."""


class StoreThread(threading.Thread):
    """Owns ``store``, which ``control`` uses, from `start` on, and closes it.

    ``serve`` makes the server that answers by ``control``, in this thread.
    """

    def __init__(
        self, store: Store, control: Control, serve: Callable[[selectors.BaseSelector], Server]
    ) -> None:
        super().__init__(name="store", daemon=True)
        self._store = store
        self._control = control
        self._serve = serve
        self._end = Bell()
        self._failing = ""
        # What it died of: the core without it lets nobody change anything, and is to die as well.
        self.failure: Exception | None = None

    def ask_to_end(self) -> None:
        """It ends when it has answered what it is at."""
        self._end.ring()

    def run(self) -> None:
        """Until the end is asked for."""
        try:
            self._answer()
        except Exception as error:  # noqa: BLE001  the loop raises it, with our stack
            self.failure = error

    def _answer(self) -> None:
        with selectors.DefaultSelector() as selector:
            server = self._serve(selector)
            selector.register(self._end, selectors.EVENT_READ)
            refresh_at = time.monotonic() + _REFRESH_INTERVAL
            stopping = False
            while not stopping:
                for key, mask in selector.select(max(0.0, refresh_at - time.monotonic())):
                    stopping |= key.fileobj is self._end
                    server.handle(key, mask)
                if time.monotonic() >= refresh_at:
                    self._refresh()
                    refresh_at = time.monotonic() + _REFRESH_INTERVAL
            server.close()
        self._end.close()
        self._store.close()

    def _refresh(self) -> None:
        try:
            self._control.refresh()
            self._failing = ""
        except (StoreError, TimeoutError) as error:
            if str(error) != self._failing:
                self._failing = str(error)
                _log.error("the database cannot be looked at: %s", error)
