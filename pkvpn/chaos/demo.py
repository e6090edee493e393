"""A minute of a VPN server whose processes are killed before the reader's eyes.

Strategy: the tree is one of our own and the product as it is, with its default configuration but
for the place; the frames travel in a third process, which does nothing else.  This one kills,
looks and draws.  Whatever ends it (^C, TERM, its own end), the tree is ended first.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

from pkvpn.chaos.own_tree import OwnTree, TreeError, wait_until
from pkvpn.chaos.traffic import EVERY, Traffic, TrafficError

VICTIMS = ("core", "edge-1", "canary", "log")
KILL_EVERY = 2.0
# So long after a kill its silence is known: whatever comes back has come back.
_KNOWN_AFTER = 1.5
_DRAW_EVERY = 0.1
_BACK_TIMEOUT = 15.0


@dataclass
class Kill:
    """One kill, as far as it is known."""

    at: float  # seconds since the beginning
    child: str
    pid: int
    successor: int = 0
    back_ms: float = 0.0
    silence_ms: float = 0.0
    own_silence_ms: float = 0.0  # of the process with the two clients

    def told(self) -> str:
        text = f"{self.at:5.1f} s  kill -9 {self.pid:<7} {self.child:<7}"
        if self.successor:
            text += f" back in {self.back_ms:4.0f} ms as {self.successor:<7}"
        if self.silence_ms:
            text += f" silence {self.silence_ms:5.1f} ms"
        return text


@dataclass
class Show:
    """What was shown; `summary` is what `--json` prints."""

    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0
    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        frames = {
            name: self.last[name] - self.first[name]
            for name in ("sent", "arrived", "twice", "reordered", "knocks", "refused", "reset")
        }
        return {
            "seconds": round(self.seconds, 1),
            "kills": dict(Counter(kill.child for kill in self.kills)),
            **frames,
            "lost": self.last["lost"],
            "longest_silence_ms": round(1e3 * self.last["silence"], 2),
            "own_silence_ms": round(1e3 * self.last["own_silence"], 2),
            "sessions": self.last["established"],
            "logged_in_again": self.last["logins"] - self.first["logins"],
            "connections_cut": self.last["resumptions"] - self.first["resumptions"],
            "each": [vars(kill) for kill in self.kills],
        }

    def is_whole(self) -> bool:
        """Was nothing lost and nobody cut off?"""
        found = self.summary()
        broken = ("lost", "logged_in_again", "connections_cut", "refused")
        return found["sessions"] == 2 and not any(found[name] for name in broken)


class _Screen:
    """Lines that stay, and two at the bottom that change."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._moves = out.isatty()
        self._kill = self._live = ""

    def say(self, text: str = "") -> None:
        self._out.write(f"{self._clean()}{text}\n")
        self._out.flush()

    def draw(self, kill: str, live: str) -> None:
        """The line of the kill in progress, and the one of all that has been."""
        if not self._moves:
            return
        self._kill, self._live = self._cut(kill), self._cut(live)
        self._out.write(
            f"\r\x1b[K\x1b[33m{self._kill}\x1b[0m\n\x1b[K\x1b[1m{self._live}\x1b[0m\x1b[F"
        )
        self._out.flush()

    def _cut(self, text: str) -> str:
        return text[: shutil.get_terminal_size().columns - 1]

    def _clean(self) -> str:
        return "\r\x1b[J" if self._moves else ""


def run(seconds: float, *, as_json: bool) -> int:
    """Show it for so long; 0: nothing was lost."""
    screen = _Screen(io.StringIO() if as_json else sys.stdout)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    show = Show()
    try:
        _show(show, seconds, screen)
    except KeyboardInterrupt:
        if not show.last:
            raise
    except (TreeError, TrafficError, OSError) as error:
        screen.say()
        sys.stderr.write(f"demo: {error}\n")
        if not show.last:
            return 1
    if as_json:
        print(json.dumps(show.summary(), indent=1))
    else:
        _tell_summary(show, screen)
    return 0 if show.is_whole() else 1


def _show(show: Show, seconds: float, screen: _Screen) -> None:
    tree = OwnTree()
    try:
        with tree, Traffic(tree.port) as traffic:
            _introduce(tree, screen)
            _kill_in_turn(show, tree, traffic, seconds, screen)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is a second of cleaning up
        tree.close()


def _introduce(tree: OwnTree, screen: _Screen) -> None:
    pids = tree.pids()
    screen.say(f"A VPN server on 127.0.0.1:{tree.port}, and two clients of it that send each other")
    screen.say(f"a frame every {1e3 * EVERY:.0f} ms:")
    screen.say()
    screen.say(f"{pids.pop('watchdog'):>9}  vpnserver execsvc")
    for name in sorted(pids, key=pids.__getitem__):
        screen.say(f"{pids[name]:>9}   \\_ vpnserver execsvc: {name}")
    screen.say()


def _kill_in_turn(
    show: Show, tree: OwnTree, traffic: Traffic, seconds: float, screen: _Screen
) -> None:
    show.first = show.last = traffic.begin()
    began = time.monotonic()
    victims = itertools.cycle(VICTIMS)
    kill: Kill | None = None
    known_at = 0.0
    kill_at = began + KILL_EVERY / 2
    worst = 0.0
    try:
        while (now := time.monotonic()) < began + seconds:
            if kill is not None and now >= known_at:
                worst = max(worst, _close(kill, traffic))
                screen.say(kill.told())
                kill = None
            if now >= kill_at and kill is None:
                traffic.begin()
                kill = _kill(tree, next(victims), began)
                show.kills.append(kill)
                known_at, kill_at = now + _KNOWN_AFTER, now + KILL_EVERY
            show.last = traffic.look()
            worst = max(worst, show.last["silence"])
            show.seconds = now - began
            screen.draw(kill.told() if kill else "", _live(show, worst))
            time.sleep(_DRAW_EVERY)
    finally:
        # Also when it is interrupted: what has been counted is told.
        if kill is not None and not kill.silence_ms:
            _close(kill, traffic)
            screen.say(kill.told())
        show.last = traffic.finish()
        show.seconds = time.monotonic() - began
        show.last["silence"] = max(worst, *(1e-3 * kill.silence_ms for kill in show.kills), 0.0)
        show.last["own_silence"] = max(
            [show.last["own_silence"], *(1e-3 * kill.own_silence_ms for kill in show.kills)]
        )


def _kill(tree: OwnTree, child: str, began: float) -> Kill:
    """Kill it, and wait until its successor serves."""
    pid = tree.pids()[child]
    at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    kill = Kill(at - began, child, pid)

    def back() -> bool:
        found = tree.children()[child]
        kill.successor = int(found["pid"] or 0)
        return found["state"] == "up" and kill.successor != pid

    wait_until(back, _BACK_TIMEOUT, f"a successor of {child}", every=0.001)
    kill.back_ms = 1e3 * (time.monotonic() - at)
    return kill


def _close(kill: Kill, traffic: Traffic) -> float:
    """Note down what the clients heard of it; the silence in seconds."""
    account = traffic.look()
    kill.silence_ms = round(1e3 * account["silence"], 2)
    kill.own_silence_ms = round(1e3 * account["own_silence"], 2)
    kill.back_ms = round(kill.back_ms, 2)
    kill.at = round(kill.at, 2)
    return float(account["silence"])


def _live(show: Show, worst: float) -> str:
    last = show.last
    silence = f"longest silence {1e3 * worst:.1f} ms"
    return (
        f"{show.seconds:5.1f} s  {last['arrived']:,} frames   {silence}   lost {last['lost']}   "
        f"twice {last['twice']}   out of order {last['reordered']}"
    )


def _tell_summary(show: Show, screen: _Screen) -> None:
    found = show.summary()
    kills = ", ".join(f"{name} {count}" for name, count in found["kills"].items()) or "nobody"
    lines = {
        "killed": f"{kills}, in {found['seconds']:.0f} s",
        "frames": f"{found['arrived']:,} came, {found['lost']} lost, {found['twice']} came twice, "
        f"{found['reordered']} out of order",
        "silence": f"{found['longest_silence_ms']:.1f} ms at the longest (the clients themselves "
        f"were away for up to {found['own_silence_ms']:.1f} ms)",
        "sessions": f"{found['sessions']} of 2; logged in again {found['logged_in_again']}, "
        f"connections cut {found['connections_cut']}",
        "newcomers": f"{found['knocks']:,} connections opened meanwhile, {found['refused']} "
        f"refused, {found['reset']} reset",
    }
    screen.say()
    for name, text in lines.items():
        screen.say(f"{name:>9}  {text}")
