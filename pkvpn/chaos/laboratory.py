"""Makes faults on a tree of our own, one after the other or on top of each other, and sees.

Strategy: before each fault the tree is well; after it the same is waited for, with a limit.  What
the clients saw comes from the process that is the clients, what the watchdog saw from its journal,
when it happened from the one clock that all of them share.  A fault whose promise was not held is
a finding and not the end: the tree is made anew if it does not recover.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from pkvpn.chaos import injector, invariants
from pkvpn.chaos.deeds import DEEDS, NEEDS
from pkvpn.chaos.faults import CHILDREN, Fault, Promise, class_of, harmless
from pkvpn.chaos.own_tree import OwnTree, TreeError, wait_until
from pkvpn.chaos.traffic import HUB, USERS, Traffic, TrafficError
from pkvpn.watchdog.control import ControlError

# As the product has it, with shorter deadlines where waiting teaches nothing.
SETTINGS = """
[watchdog]
stop_timeout = 2
stopped_timeout = 3
deaf_timeout = 2
backoff_cap = 1
journal_max_bytes = 100000
[canary]
interval = 0.5
"""
SEE_TIMEOUT = 20.0
HEAL_TIMEOUT = 30.0
_STEADY_TIMEOUT = 5.0
# A client that was cut off dials at once, and then every second.
_BACK_TIMEOUT = 5.0
# Accounts that were acknowledged and are looked for; older ones are deleted, and stay so.
_ACCOUNTS = 40


@dataclass
class Finding:
    """What came of one fault, or of several at once.  Times in milliseconds since the strike."""

    id: str
    promise: str
    seen: list[str] = field(default_factory=list)
    notice_ms: float | None = None
    heal_ms: float | None = None
    refused: int = 0
    reset: int = 0
    frames: int = 0
    lost: int = 0
    twice: int = 0
    reordered: int = 0
    sessions_lost: int = 0
    connections_cut: int = 0
    silence_ms: float | None = None
    own_silence_ms: float | None = None
    violations: list[str] = field(default_factory=list)
    skipped: str = ""


class Laboratory:
    """A tree, two clients that talk through it, and what is known of both."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - moments and mixtures
        self.tree = OwnTree(SETTINGS, orders=True)
        self.tree.copy_code()
        self._traffic: Traffic | None = None
        self._footprints: dict[str, invariants.Footprint] = {}
        self._accounts: set[str] = set()
        self._doubtful: set[str] = set()  # asked for, and no answer came
        self._deleted: set[str] = set()
        self._made = 0
        self._struck_at = 0.0
        self._finding = Finding("", "")

    def __enter__(self) -> Self:
        self.tree.__enter__()
        try:
            self._begin_traffic()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._end_traffic()
        self.tree.close()

    # -- what deeds use

    def strike(self) -> None:
        if not self._struck_at:
            self._struck_at = time.monotonic()

    def violate(self, text: str) -> None:
        self._finding.violations.append(text)

    def make_account(self) -> bool:
        self._made += 1
        name = f"a{self._made}"
        try:
            self.tree.ask("user.add", hub=HUB, name=name, password=name)
        except (OSError, ControlError):
            self._doubtful.add(name)
            return False
        self._accounts.add(name)
        return True

    # -- one fault

    def make(self, faults: Sequence[Fault]) -> Finding:
        """Make them, the later ones on top of the earlier, and wait until all is well again."""
        promise = min(fault.promise for fault in faults)
        if len(faults) > 1:
            # Who is hit twice may lose what was inside: only one at a time loses nothing.
            promise = min(promise, Promise.KEPT)
        finding = self._finding = Finding("+".join(fault.id for fault in faults), promise.name)
        self._struck_at = 0.0
        self.make_account()
        traffic = self._traffic
        assert traffic is not None
        before = traffic.begin()
        began = time.monotonic()
        try:
            restarts = self._restarts()
            with ExitStack() as stack:
                for number, fault in enumerate(faults):
                    if number:
                        time.sleep(self.dice.uniform(0.0, 0.3))
                    stack.enter_context(DEEDS[fault.deed](self, *fault.args))
                self._wait(max(fault.hold for fault in faults))
            self._see(faults, began)
            self._heal()
        except Exception as error:  # noqa: BLE001 - also a bug of a deed is a finding, not the end
            finding.violations.append(f"{type(error).__name__}: {error}")
        if self.tree.orders is not None:
            injector.take_back(str(self.tree.orders))
        self._judge_traffic(before, promise)
        if promise is not Promise.ENDED:
            with contextlib.suppress(OSError, ControlError):
                self._judge_journal(faults, began, restarts)
        self._judge_tree()
        try:
            wait_until(self._all_well, _STEADY_TIMEOUT, "the tree is well")
        except TreeError:
            self._begin_anew()
        return finding

    @staticmethod
    def _wait(seconds: float) -> None:
        time.sleep(seconds)

    def _restarts(self) -> dict[str, int]:
        return {name: int(child["restarts"]) for name, child in self.tree.children().items()}

    def _see(self, faults: Sequence[Fault], began: float) -> None:
        """Wait until the journal names what it must; of several faults one may end the child
        that another one was to make ill."""
        expected = {word for fault in faults for word in fault.expects}

        def seen() -> bool:
            said = self._words(began)
            ended = {word.partition(" ")[0] for word in said if not harmless(word)}
            return all(
                word in said or (len(faults) > 1 and word.partition(" ")[0] in ended)
                for word in expected
            )

        try:
            wait_until(seen, SEE_TIMEOUT, "the cause", every=0.02)
        except TreeError:
            missing = sorted(expected - self._words(began).keys())
            self.violate(f"the journal does not say {', '.join(missing)}")

    def _words(self, began: float) -> dict[str, float]:
        """What the journal says of causes, and when it did first."""
        found: dict[str, float] = {}
        for entry in self.tree.journal(began):
            word = class_of(entry)
            if word:
                found.setdefault(word, float(entry["mono"]))
        return found

    @staticmethod
    def _concerns(word: str, expected: set[str]) -> bool:
        return any(word.partition(" ")[0] == one.partition(" ")[0] for one in expected)

    def _heal(self) -> None:
        wait_until(self._all_well, HEAL_TIMEOUT, "the tree is up again")
        self._finding.heal_ms = round(1e3 * (time.monotonic() - self._struck_at), 2)

    def _all_well(self) -> bool:
        """Does every child serve, and is none of them suspected of anything?"""
        status = self.tree.status()
        suspected = any(child["verdict"] != "ok" for child in status["children"])
        return status["state"] == "up" and not suspected

    # -- what came of it

    def _judge_journal(
        self, faults: Sequence[Fault], began: float, restarts: dict[str, int]
    ) -> None:
        finding = self._finding
        said = self._words(began)
        finding.seen = list(said)
        expected = {word for fault in faults for word in fault.expects}
        allowed = expected | {word for fault in faults for word in fault.may}
        times = [at for word, at in said.items() if self._concerns(word, expected)]
        if times:
            finding.notice_ms = round(1e3 * (min(times) - self._struck_at), 2)
        for word in said:
            known = self._concerns(word, allowed) if len(faults) > 1 else word in allowed
            if not known and not harmless(word):
                self.violate(f"nobody asked for {word!r}")
        named = {word.partition(" ")[0] for word in said}
        for name, count in self._restarts().items():
            asked = any(name in fault.args or fault.alone for fault in faults)
            if count > restarts.get(name, 0) and name not in named and not asked:
                self.violate(f"{name} was started again, and the journal does not say why")

    def _judge_traffic(self, before: dict[str, Any], promise: Promise) -> None:
        finding, traffic = self._finding, self._traffic
        assert traffic is not None
        try:
            # A session that is being resumed has a second for each try.
            wait_until(
                lambda: traffic.look()["established"] == len(USERS), _BACK_TIMEOUT, "both sessions"
            )
            self._take(finding, before, traffic.finish())
        except (TreeError, TrafficError) as error:
            if promise is not Promise.ENDED:
                self.violate(str(error))
            self._renew_traffic(before)
            return
        for count, least, what in (
            (finding.sessions_lost, Promise.RESUMED, "sessions were lost"),
            (finding.refused, Promise.RESUMED, "connections were refused"),
            (finding.connections_cut, Promise.KEPT, "connections were cut"),
            (finding.lost, Promise.WHOLE, "frames were lost"),
        ):
            if count and promise >= least:
                self.violate(f"{count} {what}")

    @staticmethod
    def _take(finding: Finding, before: dict[str, Any], after: dict[str, Any]) -> None:
        finding.frames = after["sent"] - before["sent"]
        for name in ("lost", "twice", "reordered", "refused", "reset"):
            setattr(finding, name, after[name] - before[name])
        finding.sessions_lost = after["logins"] - before["logins"]
        finding.connections_cut = after["resumptions"] - before["resumptions"]
        finding.silence_ms = round(1e3 * after["silence"], 2)
        finding.own_silence_ms = round(1e3 * after["own_silence"], 2)

    def _judge_tree(self) -> None:
        """The invariants, and the accounts."""
        found: list[str] = ["nothing was looked at"]

        def well() -> bool:
            found[:] = invariants.broken(self.tree, self._footprints)
            return not found

        with contextlib.suppress(TreeError):
            wait_until(well, _STEADY_TIMEOUT, "the invariants", every=0.1)
        self._finding.violations += found
        try:
            wait_until(self._judge_accounts, _STEADY_TIMEOUT, "the core answers")
        except TreeError as error:
            self.violate(str(error))

    def _judge_accounts(self) -> bool:
        there = {user["name"] for user in self.tree.ask("user.list", hub=HUB)} - set(USERS)
        if gone := self._accounts - there:
            self.violate(f"acknowledged and gone: {', '.join(sorted(gone))}")
        if back := there & self._deleted:
            self.violate(f"deleted and back: {', '.join(sorted(back))}")
        self._accounts, self._doubtful = there, set()
        while len(self._accounts) > _ACCOUNTS:
            name = min(self._accounts, key=lambda one: int(one[1:]))
            self.tree.ask("user.delete", hub=HUB, name=name)
            self._accounts.remove(name)
            self._deleted.add(name)
        return True

    # -- the bed

    def _begin_traffic(self) -> None:
        self._traffic = Traffic(self.tree.port)
        time.sleep(0.2)
        self._footprints = self._footprints or invariants.footprints(self.tree)

    def _end_traffic(self) -> None:
        traffic, self._traffic = self._traffic, None
        if traffic is not None:
            traffic.close()

    def _renew_traffic(self, before: dict[str, Any]) -> None:
        assert self._traffic is not None
        with contextlib.suppress(TrafficError):
            after = self._traffic.look()
            self._take(self._finding, before, after)
            # Who is not there has lost his as well.
            self._finding.sessions_lost += len(USERS) - after["established"]
        self._end_traffic()
        try:
            self._begin_traffic()
        except (TrafficError, OSError) as error:
            self.violate(f"nobody can log in: {error}")
            self._begin_anew()

    def _begin_anew(self) -> None:
        """The tree does not recover: end it by force, so that the next fault finds one."""
        self.violate("the tree had to be made anew")
        self._end_traffic()
        self.tree.end_by_force()
        self.tree.start()
        self._begin_traffic()


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is asked for.  ``minutes``: no further fault is begun after it; 0: no limit."""

    faults: Sequence[Fault]
    seed: int
    minutes: float = 0.0
    soak: bool = False


def missing_needs(faults: Sequence[Fault]) -> dict[str, str]:
    """Fault -> why it cannot be made here."""
    why = {need: NEEDS[need]() for need in sorted({n for fault in faults for n in fault.needs})}
    return {
        fault.id: "; ".join(why[need] for need in fault.needs if why[need])
        for fault in faults
        if any(why[need] for need in fault.needs)
    }


def run(plan: Plan, tell: Callable[[int, Finding], None]) -> list[Finding]:
    """Do it; ``tell`` hears of each finding when it is there.  An interruption ends it early."""
    findings: list[Finding] = []
    skipped = missing_needs(plan.faults)
    with (
        _interruptible() as interrupted,
        contextlib.suppress(KeyboardInterrupt),
        Laboratory(plan.seed) as laboratory,
    ):
        for faults in _sequence(plan, laboratory.dice, skipped):
            first = faults[0]
            if first.id in skipped:
                found = Finding(first.id, first.promise.name, skipped=skipped[first.id])
            else:
                found = laboratory.make(faults)
            findings.append(found)
            tell(len(findings), found)
            if interrupted():
                break
    return findings


def _sequence(
    plan: Plan, dice: random.Random, skipped: dict[str, str]
) -> Iterator[Sequence[Fault]]:
    end = time.monotonic() + 60 * plan.minutes if plan.minutes else float("inf")
    if not plan.soak:
        for fault in plan.faults:
            if time.monotonic() >= end:
                return
            yield [fault]
        return
    possible = [fault for fault in plan.faults if fault.id not in skipped and not fault.alone]
    while time.monotonic() < end:
        yield mixture(possible, dice)


# Deeds that may hit the same child in one round; of others nobody could say what came of which.
_PLAIN = ("killed", "killed_again", "killed_with_standby", "asked", "port_contended")
# Deeds that keep the watchdog from answering: one at a time, and after all that ask it.
_SILENCING = ("watchdog_paused", "starved", "frozen", "limited", "no_processes", "watchdog_bug")


def mixture(possible: Sequence[Fault], dice: random.Random) -> list[Fault]:
    """One to four faults that can be made on top of each other."""
    chosen: list[Fault] = []
    for fault in dice.sample(possible, min(len(possible), dice.choice((1, 2, 3, 4, 4)))):
        # What ends the service does so alone, and not often: each takes seconds.
        if fault.promise is Promise.ENDED:
            if not chosen and dice.random() < 0.1:
                return [fault]
            continue
        if fault.deed in _SILENCING and any(one.deed in _SILENCING for one in chosen):
            continue
        if any(_meet(fault, one) for one in chosen):
            continue
        chosen.append(fault)
    return sorted(chosen, key=lambda fault: fault.deed in _SILENCING) or mixture(possible, dice)


def _meet(one: Fault, other: Fault) -> bool:
    """Whether both hit the same child, and it would not be known which of them did what."""
    if one.deed in _PLAIN and other.deed in _PLAIN:
        return False
    return bool(_targets(one) & _targets(other))


def _targets(fault: Fault) -> set[str]:
    words = (*fault.args, *fault.expects, *fault.may)
    return {str(word).partition(" ")[0] for word in words} & set(CHILDREN)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first ^C, TERM or HUP lets the fault in progress end; the second one does not."""
    asked: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        sys.stderr.write("\nending after this fault\n")

    before = {
        number: signal.signal(number, on_signal)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Finding", "Laboratory", "Plan", "missing_needs", "mixture", "run"]
