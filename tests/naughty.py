"""Children that misbehave, one way each, for trees of real processes.

Each target serves until its watchdog's test makes ``trigger`` exist (a path in its settings;
no settings: from the first turn), then does its worst.  A successor behaves: it finds the
trigger consumed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pkvpn.watchdog.child import Child


@dataclass(frozen=True)
class Naughty:
    """``how``: a name of `WAYS`.  ``trigger``: exists when the time has come.  ``again``: do
    it in each incarnation, and not only in the one that meets the trigger."""

    how: str
    trigger: str
    again: bool = False


def target(child: Child, settings: Naughty) -> None:
    """Serve, and go wrong once the trigger is there."""
    trigger = Path(settings.trigger)
    if settings.how in BEFORE_READY and _pull(trigger, settings.again):
        WAYS[settings.how](child)
    child.ready()
    while not child.stopping:
        child.wait(0.01)
        if _pull(trigger, settings.again):
            WAYS[settings.how](child)


def good(child: Child) -> None:
    """Beats until it is told to stop."""
    child.ready()
    while not child.stopping:
        child.wait()


def _pull(trigger: Path, again: bool) -> bool:
    if again:
        return trigger.exists()
    try:
        trigger.unlink()
    except FileNotFoundError:
        return False
    return True


# --- silence


def never_ready(child: Child) -> None:
    while not child.stopping:
        child.wait()


def silent_with_a_live_thread(child: Child) -> None:
    threading.Thread(target=_work_for_ever, daemon=True).start()
    threading.Event().wait()


def _work_for_ever() -> None:
    while True:
        time.sleep(0.01)


def blocked_on_a_lock(child: Child) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def busy_in_python(child: Child) -> None:
    while True:
        pass


def busy_in_c(child: Child) -> None:
    sum(range(10**11))


def deaf(child: Child) -> None:
    """Beats go on, but what waits is never done."""
    child.duty("work").waiting_since = time.monotonic()
    while not child.stopping:
        child.wait(0.01)


def overloaded(child: Child) -> None:
    """Never a moment to spare, and work gets done all the while."""
    spin(child, 1)


def lost_in_work(child: Child) -> None:
    """Never a moment to spare, and nothing comes of it."""
    spin(child, 0)


def spin(child: Child, done: int) -> None:
    while not child.stopping:
        until = time.monotonic() + 0.02
        while time.monotonic() < until:
            pass
        child.duty("work").done += done
        child.turn(time.monotonic())
        child.receive()


def idle_and_counts(child: Child) -> None:
    """Something gets done, though not what is waited for: there is time enough."""
    while not child.stopping:
        child.duty("work").done += 1
        child.wait(0.02)


def accuses(child: Child) -> None:
    """Asks again and again, and gets no answer."""
    while not child.stopping:
        now = time.monotonic()
        if now - child.duty("work").waiting_since > 1.5:
            child.duty("work").waiting_since = now
        child.wait(0.05)


def stops_itself(child: Child) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stops_itself_always(child: Child) -> None:
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def ignores_the_stop(child: Child) -> None:
    while True:
        child.turn(time.monotonic())
        time.sleep(0.01)


def works_for_what_is_left(child: Child) -> None:
    """Needs a processor in each turn, and has one only where nobody else wants it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while not child.stopping:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        child.wait(0.01)


# --- the lifeline


def mute(child: Child) -> None:
    os.close(child._birth.up)
    while True:
        time.sleep(0.1)


def corrupt(child: Child) -> None:
    os.write(child._birth.up, os.urandom(1024))
    while True:
        time.sleep(0.1)


def corrupt_flood(child: Child) -> None:
    while True:
        try:
            os.write(child._birth.up, b"\xff" * 4096)
        except BlockingIOError:
            pass


def partial_frame(child: Child) -> None:
    os.write(child._birth.up, b"pk\x01")
    while True:
        child.turn(time.monotonic())
        time.sleep(0.01)


def beats_without_end(child: Child) -> None:
    """As many beats as the pipe takes, for as long as it lives; no crime, only a burden."""
    while not child.stopping:
        for _ in range(1000):
            child.hurry()
            child.turn(time.monotonic())
        child.receive()


def asks_without_end(child: Child) -> None:
    """QUIT after QUIT: each is answered with a report, but not more than the limit allows."""
    while not child.stopping:
        child._dumped = True
        child.wait(0.001)


def gives_without_end(child: Child) -> None:
    while not child.stopping:
        for number in range(1000):
            child.give(b"flood %d" % number, 0)
        child.wait(0.0)


# --- ends


def exits_0(child: Child) -> None:
    os._exit(0)


def exits_1_with_a_reason(child: Child) -> None:
    raise SystemExit("the certificate /nowhere/server.crt cannot be read")


def raises(child: Child) -> None:
    raise ZeroDivisionError("the answer is not a number")


def segfaults(child: Child) -> None:
    ctypes.string_at(0)


def aborts(child: Child) -> None:
    os.abort()


def kills_itself(child: Child) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- families


def leaves_a_grandchild(child: Child) -> None:
    _grandchild(child)
    os._exit(1)


def leaves_a_grandchild_in_a_session(child: Child) -> None:
    _grandchild(child, os.setsid)
    os._exit(1)


def leaves_a_daemon(child: Child) -> None:
    def again() -> None:
        os.setsid()
        if os.fork():
            os._exit(0)

    _grandchild(child, again)
    time.sleep(0.05)
    os._exit(1)


def leaves_one_that_forks(child: Child) -> None:
    """The grandchild forks when it gets a USR1."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    def once_told() -> None:
        signal.sigwait([signal.SIGUSR1])
        os.fork()

    _grandchild(child, once_told)
    os._exit(1)


def keeps_a_grandchild(child: Child) -> None:
    """It goes on; the grandchild holds the tree's lock and all else that was inherited."""
    _grandchild(child, os.setsid)


def _grandchild(child: Child, first: Callable[[], None] = lambda: None) -> None:
    if os.fork() == 0:
        first()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(60)


# --- descriptors


def gives_ten(child: Child) -> None:
    for number in range(10):
        left, right = socket.socketpair()
        child.give(b"%d" % number, left.fileno())
        left.close()
        right.close()
    os._exit(1)


BEFORE_READY = {"never_ready", "exits_1_with_a_reason"}
WAYS: dict[str, Callable[[Child], None]] = {
    way.__name__: way
    for way in (
        never_ready, silent_with_a_live_thread, blocked_on_a_lock, busy_in_python, busy_in_c, deaf,
        overloaded, lost_in_work, idle_and_counts, accuses, stops_itself, stops_itself_always,
        ignores_the_stop, works_for_what_is_left, mute, corrupt, corrupt_flood,
        partial_frame, beats_without_end, asks_without_end, gives_without_end, exits_0,
        exits_1_with_a_reason, raises, segfaults, aborts, kills_itself, leaves_a_grandchild,
        leaves_a_grandchild_in_a_session, leaves_a_daemon, leaves_one_that_forks,
        keeps_a_grandchild, gives_ten,
    )
}  # fmt: skip
