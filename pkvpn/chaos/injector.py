"""Wraps the children of a tree so that any of them can be made to misbehave from outside.

Strategy: the product has no back doors; this wraps the targets of a `TreeSpec` before it is run.
A wrapped child looks, once in each turn of its own loop, for a file with its name in a directory;
the file says in which way it is to go wrong, and in how many turns: it is counted down first, so
that a successor does not meet an order that has been obeyed.  What goes wrong does so in the
working loop itself, as a bug of ours would.  The watchdog's own bugs are in what a spec brings
along: the policy, and the times that its loop reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from pkvpn.watchdog.child import Child
from pkvpn.watchdog.lifeline import FRAME_SIZE
from pkvpn.watchdog.policy import RestartPolicy
from pkvpn.watchdog.spec import TreeSpec

# An order for the next incarnation, before it has begun; and the two for the watchdog itself.
BIRTH = ".birth"
POLICY, LOOP = "watchdog.policy", "watchdog.loop"


def inject(spec: TreeSpec, directory: str) -> TreeSpec:
    """The same tree; its children obey what `order` puts into ``directory``.

    They are not confined: half of what goes wrong on request the kernel would not let go wrong.
    """
    children = tuple(
        replace(
            child,
            target=Injected(child.target, directory),
            confinement=None,
            policy=_Policy(**vars(child.policy), orders=directory),
        )
        for child in spec.children
    )
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return _Spec(**{**fields, "children": children, "orders": directory})


def order(directory: str, child: str, way: str, times: int = 1) -> None:
    """Have a child misbehave in one of `WAYS`, in the next turns of its loop, once in each.

    ``child`` with `BIRTH`: its next incarnations, instead of serving.
    """
    if way not in WAYS:
        raise ValueError(f"there is no way {way!r}; there are {', '.join(WAYS)}")
    _write(os.path.join(directory, child), f"{way} {times}")


def order_bug(directory: str, where: str) -> None:
    """Have the watchdog meet a bug: `POLICY` or `LOOP`."""
    _write(os.path.join(directory, where), "raise 1")


def take_back(directory: str) -> None:
    """Withdraw all orders that nobody has obeyed yet."""
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


def _write(path: str, text: str) -> None:
    half = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}")
    with open(half, "w", encoding="ascii") as file:
        file.write(text)
    os.replace(half, path)


def _take(path: str) -> str:
    """The order that lies there, counted down, or nothing."""
    try:
        with open(path, encoding="ascii") as file:
            way, _, times = file.read().partition(" ")
        if int(times or 1) > 1:
            _write(path, f"{way} {int(times) - 1}")
        else:
            os.unlink(path)
    except OSError:  # it is not there, or we may open no files
        return ""
    return way.strip()


@dataclass(frozen=True)
class _Policy(RestartPolicy):
    """A policy that can be made to raise while it decides."""

    orders: str = ""

    def __getattribute__(self, name: str) -> Any:
        if name == "healthy_after" and _take(os.path.join(self.orders, POLICY)):
            raise RuntimeError("chaos")
        return super().__getattribute__(name)


@dataclass(frozen=True)
class _Spec(TreeSpec):
    """A spec that can be made to raise in the watchdog's own loop, which asks it for a time."""

    orders: str = ""

    def __getattribute__(self, name: str) -> Any:
        if name == "beat_interval" and _take(os.path.join(self.orders, LOOP)):
            raise RuntimeError("chaos")
        return super().__getattribute__(name)


@dataclass(frozen=True)
class Injected:
    """A target that runs another one, with a child that misbehaves on request."""

    target: Callable[..., None]
    directory: str

    def __call__(self, child: Child, *settings: Any) -> None:
        path = os.path.join(self.directory, child.name)
        way = _take(path + BIRTH)
        if way:
            WAYS[way](child)
        self.target(cast(Child, _Obedient(child, path)), *settings)


class _Obedient:
    """A `Child` that looks for orders of another kind in each turn."""

    def __init__(self, child: Child, path: str) -> None:
        self._child = child
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)

    def turn(self, now: float) -> float:
        way = _take(self._path)
        if way:
            WAYS[way](self._child)
        return self._child.turn(now)


def _block(_child: Child) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _busy(_child: Child) -> None:
    while True:
        pass


def _keep_gil(_child: Child) -> None:
    sum(range(10**12))


def _beat_only(child: Child) -> None:
    """Beats go on; nothing else is read or done, and no duty says so."""
    while not child.stopping:
        time.sleep(max(0.0, child.turn(time.monotonic())))
        child.receive()


def _deaf(child: Child) -> None:
    """The same, but its own duties tell that something waits."""
    for name in child._birth.duties:  # noqa: SLF001 - a child need not know all its duties' names
        child.duty(name).waiting_since = time.monotonic()
    _beat_only(child)


def _mute(child: Child) -> None:
    os.close(child._birth.up)  # noqa: SLF001 - what a wild child would hit by accident
    while True:
        time.sleep(1.0)


def _garbage(child: Child) -> None:
    os.write(child._birth.up, os.urandom(1024))  # noqa: SLF001 - the same
    while True:
        time.sleep(1.0)


def _stop(_child: Child) -> None:
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def _pause(_child: Child) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _partial(child: Child) -> None:
    os.write(child._birth.up, b"pk\x01")  # noqa: SLF001 - as a write that was cut


def _slow(child: Child) -> None:
    """Every turn takes long, for some seconds; all of them bring it forward."""
    until, turn = time.monotonic() + _SLOW_FOR, child.turn

    def slow_turn(_now: float) -> float:
        if time.monotonic() < until:
            time.sleep(_SLOW_TURN)
        else:
            vars(child).pop("turn")
        return turn(time.monotonic())

    vars(child)["turn"] = slow_turn


_SLOW_FOR, _SLOW_TURN = 3.0, 0.1


def _flood(child: Child) -> None:
    """Beats until the pipe is full; none of them is a lie."""
    for _ in range(4 * 65536 // FRAME_SIZE):
        child.hurry()
        child.turn(time.monotonic())


def _close_listener(child: Child) -> None:
    """Nobody looks any more whether somebody knocks."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                with select.epoll.fromfd(os.dup(int(name))) as epoll:
                    for fd in child.held("listen"):
                        epoll.unregister(fd)


def _leak(_child: Child) -> None:
    """Take every descriptor that is to be had, and go on."""
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


def _live_thread(child: Child) -> None:
    threading.Thread(target=_work_for_ever, daemon=True).start()
    _block(child)


def _work_for_ever() -> None:
    while True:
        time.sleep(0.01)


def _logging_lock(child: Child) -> None:
    """Somebody else has the lock of a handler, and never lets go of it."""
    for handler in logging.getLogger().handlers:
        if handler.lock is not None:
            threading.Thread(target=handler.lock.acquire, daemon=True).start()
    time.sleep(0.05)
    logging.getLogger("pkvpn").error("this line is never written")
    _block(child)  # only if no handler has a lock


def _log_flood(_child: Child) -> None:
    logger = logging.getLogger("pkvpn")
    for number in range(20_000):
        logger.warning("flood %d", number)


def _ignore_stop(child: Child) -> None:
    """Beats, and hears of nothing, until it is killed."""
    while True:
        time.sleep(max(0.0, child.turn(time.monotonic())))


def _grow(_child: Child) -> None:
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1) * (8 << 20)))


def _scribble(child: Child) -> None:
    """A wild write through all that its successor is to find."""
    memory, at = child.held(f"checkpoint:{child.name}")[0], 0
    with contextlib.suppress(OSError):  # ENXIO: no more data, the rest is a hole
        while True:
            at = os.lseek(memory, at, os.SEEK_DATA)
            at += os.pwrite(memory, os.urandom(1 << 12), at)
    _kill(child)


def _fork_and(first: Callable[[], object]) -> None:
    if os.fork() == 0:
        first()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(60.0)


def _sibling(_child: Child) -> None:
    """What it leaves holds everything open that it had, so no end of file comes."""
    _fork_and(lambda: None)
    os._exit(1)


def _daemon(_child: Child) -> None:
    def again() -> None:
        os.setsid()
        if os.fork():
            os._exit(0)

    _fork_and(again)
    time.sleep(0.05)
    os._exit(1)


def _vfork(_child: Child) -> None:
    """Waits in the kernel, in state D, with all signals blocked, for a helper that does not come
    to its exec; and that one has everything open that we have, also what an exec would close."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "never")
        os.mkfifo(path)
        never = os.open(path, os.O_PATH)  # whoever is killed here leaves no file
    opens = (os.POSIX_SPAWN_OPEN, 0, f"/proc/self/fd/{never}", os.O_RDONLY, 0)
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=[opens])


def _double_fork(_child: Child) -> None:
    """Grandchildren that end at once, and whose parents do not wait for them."""
    for _ in range(20):
        if os.fork() == 0:
            if os.fork() == 0:
                time.sleep(0.05)
            os._exit(0)
    for _ in range(20):
        os.wait()


def _segv(_child: Child) -> None:
    ctypes.string_at(0)


def _abort(_child: Child) -> None:
    os.abort()


def _exit(_child: Child) -> None:
    os._exit(0)


def _exit_1(_child: Child) -> None:
    os._exit(1)


def _raise(_child: Child) -> None:
    raise RuntimeError("chaos")


def _kill(_child: Child) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


WAYS: dict[str, Callable[[Child], None]] = {
    "block": _block,
    "busy": _busy,
    "gil": _keep_gil,
    "stop-reading": _beat_only,
    "deaf": _deaf,
    "mute": _mute,
    "garbage": _garbage,
    "stop": _stop,
    "pause": _pause,
    "partial": _partial,
    "slow": _slow,
    "flood": _flood,
    "close-listener": _close_listener,
    "leak": _leak,
    "live-thread": _live_thread,
    "logging-lock": _logging_lock,
    "log-flood": _log_flood,
    "ignore-stop": _ignore_stop,
    "grow": _grow,
    "scribble": _scribble,
    "sibling": _sibling,
    "daemon": _daemon,
    "double-fork": _double_fork,
    "vfork": _vfork,
    "segv": _segv,
    "abort": _abort,
    "exit": _exit,
    "exit-1": _exit_1,
    "raise": _raise,
    "kill": _kill,
}
