"""One child of the tree over all its incarnations, and what an operator is shown of it."""

from __future__ import annotations

import math
from typing import Any

import psutil

from pkvpn.watchdog import machine, procfs, sandbox
from pkvpn.watchdog.held import GIVEN_FLOOR, Kept
from pkvpn.watchdog.incarnation import Incarnation
from pkvpn.watchdog.machine import ChildMachine, State
from pkvpn.watchdog.spec import ChildSpec


class Slot:
    """One child of the tree over all its incarnations."""

    def __init__(self, spec: ChildSpec, given_floor: int) -> None:
        self.machine = ChildMachine(spec)
        self.kept = Kept(spec.keep_limit, given_floor)
        self.alive: Incarnation | None = None
        self.remains: Incarnation | None = None  # of the one that has just ended
        self.standby: Incarnation | None = None  # forked ahead, to be the next one
        self.standby_at = math.inf  # when one is to be forked
        self.ended: machine.Gone | None = None
        self.number = 0
        self.reason = ""  # why the one before could not start, in its own words
        self.facts: psutil.Process | None = None

    @property
    def spec(self) -> ChildSpec:
        return self.machine.spec

    @property
    def name(self) -> str:
        return self.spec.name

    def last_end(self) -> str:
        """How the last incarnation ended, for somebody who waits for the start."""
        ended = self.ended
        if ended is None or self.machine.why is not machine.Why.CRASH:
            return self.machine.why.value
        if ended.signal is not None:
            return f"killed by signal {ended.signal}"
        return f"ended with exit code {ended.code}"

    def status(self, now: float) -> dict[str, Any]:
        alive = self.alive
        status: dict[str, Any] = {
            "name": self.name,
            "pid": None,
            "state": self.machine.state.value,
            "why": self.machine.why.value,
            "verdict": "ok",
            "restarts": self.machine.restarts,
            "uptime": None,
            "last_beat_age": None,
            "loop_lag": None,
            "cpu": None,
            "rss": None,
            "fds": None,
            "kept": len(self.kept.descriptors),
            "kept_limit": self.kept.limit,
            "kept_refused": self.kept.refused,
            "undead": self.machine.undead,
            "standby": self.standby.pid if self.standby is not None else None,
            "confinement": sandbox.describe(self.spec.confinement, sandbox.abilities()),
        }
        if alive is None:
            return status
        status["pid"] = alive.pid
        status["verdict"] = alive.condemned or alive.judge.verdict
        status["uptime"] = round(now - alive.started_at, 3)
        if alive.beats:
            at, beat = alive.beats[-1]
            status["last_beat_age"] = round(now - at, 3)
            status["loop_lag"] = round(beat.lag, 4)
            status["duties"] = {
                name: {"done": done, "waiting": round(now - since, 3) if since else 0.0}
                for name, (done, since) in zip(self.spec.duties, beat.duties, strict=True)
            }
        try:
            if self.facts is None:
                self.facts = psutil.Process(alive.pid)
            with self.facts.oneshot():
                status["cpu"] = self.facts.cpu_percent(None)
                status["rss"] = self.facts.memory_info().rss
            # Not psutil's: a listing leaves an entry of each descriptor in the kernel's cache,
            # which costs 16 ms at the death of a process that had ten thousand.
            status["fds"] = procfs.fd_count(alive.pid)
        except psutil.Error:
            pass  # ended just now, or /proc does not show it: the rest still counts
        return status


def make_slots(children: list[ChildSpec]) -> dict[str, Slot]:
    """Each child with a band of numbers for what it gives, so that the others close it at once."""
    slots, floor = {}, GIVEN_FLOOR
    for child in children:
        slots[child.name] = Slot(child, floor)
        floor += child.keep_limit
    return slots


def is_over(child: ChildMachine) -> bool:
    """Down as its spec has it: it is not to come back."""
    return child.state is State.DOWN and not child.wanted_up
