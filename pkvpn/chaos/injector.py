"""Wraps the children of a tree so that any of them can be made to misbehave from outside.

Strategy: the product has no back doors; this wraps the targets of a `TreeSpec` before it is run.
A wrapped child looks, once in each turn of its own loop, for a file with its name in a directory;
the file says in which way it is to go wrong, and is removed first, so that only one incarnation
meets it.  What goes wrong does so in the working loop itself, as a bug of ours would.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from pkvpn.watchdog.child import Child
from pkvpn.watchdog.spec import TreeSpec


def inject(spec: TreeSpec, directory: str) -> TreeSpec:
    """The same tree; its children obey what `order` puts into ``directory``."""
    children = tuple(
        replace(child, target=Injected(child.target, directory)) for child in spec.children
    )
    return replace(spec, children=children)


def order(directory: str, child: str, way: str) -> None:
    """Have a child misbehave in one of `WAYS`, in the next turn of its loop."""
    if way not in WAYS:
        raise ValueError(f"there is no way {way!r}; there are {', '.join(WAYS)}")
    half = os.path.join(directory, f".{child}")
    with open(half, "w", encoding="ascii") as file:
        file.write(way)
    os.replace(half, os.path.join(directory, child))


@dataclass(frozen=True)
class Injected:
    """A target that runs another one, with a child that misbehaves on request."""

    target: Callable[..., None]
    directory: str

    def __call__(self, child: Child, *settings: Any) -> None:
        path = os.path.join(self.directory, child.name)
        self.target(cast(Child, _Obedient(child, path)), *settings)


class _Obedient:
    """A `Child` that looks for orders of another kind in each turn."""

    def __init__(self, child: Child, path: str) -> None:
        self._child = child
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)

    def turn(self, now: float) -> float:
        try:
            with open(self._path, encoding="ascii") as file:
                way = file.read()
            os.unlink(self._path)
        except FileNotFoundError:
            return self._child.turn(now)
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


def _segv(_child: Child) -> None:
    ctypes.string_at(0)


def _abort(_child: Child) -> None:
    os.abort()


def _exit(_child: Child) -> None:
    os._exit(0)


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
    "segv": _segv,
    "abort": _abort,
    "exit": _exit,
    "raise": _raise,
    "kill": _kill,
}
