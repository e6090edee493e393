"""The life of one child: where it is, and what happens next.

Strategy: three fields, never one.  ``wanted`` is what the operator asked, ``state`` where the
child is, ``why`` how it got there.  The table below is total: each event has an answer in
each state, or is impossible there and says so loudly.  Nothing in here knows a clock, a
process or dice; the shell (`pkvpn.watchdog.supervisor`) tells what happened and carries out
what comes back.

    DOWN ----start----> STARTING --ready--> UP
      ^                   |  ^               |
      |            death, |  | time          | death, verdict, stop
      |           verdict v  |               v
      |                 BACKOFF, FAILING <- STOPPING
      +---- stop wins in every state ---------+         FAILED: has given up

A kill for cause takes its time in STOPPING: first the evidence, then the kill, then the wait
until the process is really gone (one in D state is not, and gets no successor until it is).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pkvpn.watchdog.policy import OnLimit, RestartCounter
from pkvpn.watchdog.spec import ChildSpec, Restart


class State(Enum):
    """Where a child is."""

    DOWN = "down"
    STARTING = "starting"
    UP = "up"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILING = "failing"  # the limit is reached; goes on at the cap
    FAILED = "failed"  # the limit is reached; has given up


class Why(Enum):
    """How it got there."""

    NONE = ""
    CLEAN = "clean"
    CRASH = "crash"
    HANG = "hang"
    START_TIMEOUT = "start-timeout"
    SPAWN_FAILED = "spawn-failed"
    STOPPED = "stopped"
    TOO_MANY_RESTARTS = "too-many-restarts"


# --- events -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The operator, or the tree in its order, wants it up."""


@dataclass(frozen=True)
class Dismiss:
    """It may go on for now, but is not to come back: its turn to stop will come."""


@dataclass(frozen=True)
class Stop:
    """It is to end now."""


@dataclass(frozen=True)
class Replace:
    """The operator wants a new incarnation of it."""


@dataclass(frozen=True)
class Spawned:
    """A process exists.  To be said at once after a `Spawn` was carried out; its deadline runs
    since the decision."""

    pid: int


@dataclass(frozen=True)
class SpawnFailed:
    """No process could be made: too many, no memory."""

    error: str


@dataclass(frozen=True)
class Ready:
    """The child says that it serves."""


@dataclass(frozen=True)
class Gone:
    """The process has ended and is reaped.  ``code`` and ``signal``: how, None if unknown."""

    code: int | None
    signal: int | None
    wild: bool = False  # ended by a signal that smells of broken memory

    @property
    def clean(self) -> bool:
        return self.code == 0


@dataclass(frozen=True)
class Condemned:
    """The judge found it guilty.  ``evidence``: it may still be able to write its stacks."""

    verdict: str
    evidence: bool = True


@dataclass(frozen=True)
class Gathered:
    """It has written its stacks: there is nothing left to wait for."""


@dataclass(frozen=True)
class Due:
    """The machine's own deadline has come."""


Event = (
    Start | Dismiss | Stop | Replace | Spawned | SpawnFailed | Ready | Gone | Condemned | Gathered
    | Due
)  # fmt: skip


# --- commands -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spawn:
    """Make a process.  ``fresh``: by exec, with a new address layout."""

    fresh: bool = False


@dataclass(frozen=True)
class Ask:
    """Tell the child to stop.  ``yielding``: a successor comes, so it leaves all as it is."""

    yielding: bool = False


@dataclass(frozen=True)
class Gather:
    """Have the child write its stacks, and look at it from outside."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL, by identity; what it had started is swept after it."""


@dataclass(frozen=True)
class Announce:
    """The state has changed, or what is said in ``note`` is worth an entry."""

    note: str = ""


@dataclass(frozen=True)
class ReportDeath:
    """Write the crash report of the incarnation that has just ended."""


@dataclass(frozen=True)
class GiveUp:
    """The tree cannot go on without this child."""


Command = Spawn | Ask | Gather | Kill | Announce | ReportDeath | GiveUp

# How long a child gets at most to write its stacks before it is killed.  It says when it is done,
# which faulthandler is within 5 ms for 100 threads; the rest is for one that waits for a processor.
EVIDENCE_TIMEOUT = 0.25
# A killed process that is still there after this is in the kernel's hands (D state, frozen):
# said, and looked at again after the same time.
UNDEAD_TIMEOUT = 1.0


class Phase(Enum):
    """How far STOPPING has come."""

    ASKED = "asked"
    EVIDENCE = "evidence"
    KILLED = "killed"


class ImpossibleEvent(Exception):
    """An event came in a state where it cannot: a bug of the shell."""


class ChildMachine:
    """Knows where one child is and decides what happens to it."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.state = State.DOWN
        self.why = Why.NONE
        self.wanted_up = False
        self.phase: Phase | None = None  # not None exactly while STOPPING
        self.restarts = 0  # incarnations after the first
        self.undead = False  # killed, and still there
        self.counter = RestartCounter(spec.policy)
        self._deadline: float | None = None
        self._up_at: float | None = None
        self._spawns = 0
        self._fresh = False  # the next incarnation starts by exec
        self._yielding = False  # asked to make way for a successor

    def take_spec(self, spec: ChildSpec) -> None:
        """To be called when the daemon's author wants it otherwise from now on."""
        self.spec = spec
        self.counter.policy = spec.policy

    # -- the three calls (style.md): what happened, when to wake, the time has come

    def receive(self, event: Event, now: float, lot: float = 0.5) -> list[Command]:
        """Take one event.  ``lot``: random in [0, 1), used when a delay is drawn."""
        return TABLE[self.state][type(event)](self, event, now, lot)

    def next_deadline(self) -> float | None:
        return self._deadline

    def expire(self, now: float, lot: float = 0.5) -> list[Command]:
        if self._deadline is None or now < self._deadline:
            return []
        return self.receive(Due(), now, lot)

    def postpone(self, by: float) -> None:
        """To be called when the watchdog itself was away: nobody is accused of that time."""
        if self._deadline is not None:
            self._deadline += by

    def adopt(self, *, restarts: int, up: bool, now: float) -> None:
        """Go on with a process that was there before us (after an upgrade of the watchdog)."""
        self.wanted_up = True
        self._spawns = restarts + 1
        self.restarts = restarts
        self.state = State.UP if up else State.STARTING
        self._up_at = now if up else None
        self._deadline = None if up else now + self.spec.start_timeout

    def recover(self, *, alive: bool, now: float) -> list[Command]:
        """To be called after a bug of ours: what is there decides, not what we believed."""
        self.why = Why.CRASH
        if alive:
            return self._put_to_death(Why.CRASH, False, now)
        self.phase, self.undead = None, False
        if not self.wanted_up:
            return self._go_down([])
        self.state, self._deadline = State.BACKOFF, now + self.spec.policy.cap
        return [Announce()]

    # -- cells of the table, in the order of a life

    def _ignore(self, event: Event, now: float, lot: float) -> list[Command]:
        return []

    def _impossible(self, event: Event, now: float, lot: float) -> list[Command]:
        raise ImpossibleEvent(f"{self.spec.name}: {event} while {self.state.value}")

    def _spawn(self, event: Event, now: float, lot: float) -> list[Command]:
        """Somebody wants it to live, and may have done something for that: the deaths before
        are forgotten."""
        self.wanted_up = True
        self.counter.reset()
        return self._go_starting(now)

    def _spawn_failed(self, event: Event, now: float, lot: float) -> list[Command]:
        self.why = Why.SPAWN_FAILED
        return self._come_back(now, lot, up_for=0.0, wild=False)

    def _ready(self, event: Event, now: float, lot: float) -> list[Command]:
        self.state = State.UP
        self._up_at = now
        self._deadline = None
        return [Announce()]

    def _want_up(self, event: Event, now: float, lot: float) -> list[Command]:
        self.wanted_up = True
        return []

    def _want_down(self, event: Event, now: float, lot: float) -> list[Command]:
        self.wanted_up = False
        return []

    def _ask(self, event: Event, now: float, lot: float) -> list[Command]:
        self.wanted_up = False
        return self._go_stopping(Why.STOPPED, Phase.ASKED, now + self.spec.stop_timeout, Ask())

    def _replace(self, event: Event, now: float, lot: float) -> list[Command]:
        self.wanted_up = True
        self._yielding = True
        deadline = now + self.spec.stop_timeout
        return self._go_stopping(Why.STOPPED, Phase.ASKED, deadline, Ask(yielding=True))

    def _ask_again(self, event: Event, now: float, lot: float) -> list[Command]:
        """No successor comes after all: one that is making way is to end everything."""
        self.wanted_up = False
        if not self._yielding:
            return []
        self._yielding = False
        return [Ask()]

    def _condemn(self, event: Event, now: float, lot: float) -> list[Command]:
        assert isinstance(event, Condemned)
        return self._put_to_death(Why.HANG, event.evidence, now)

    def _start_timeout(self, event: Event, now: float, lot: float) -> list[Command]:
        return self._put_to_death(Why.START_TIMEOUT, True, now)

    def _next_phase(self, event: Event, now: float, lot: float) -> list[Command]:
        if self.phase is Phase.ASKED:  # it did not end when asked
            self.phase = Phase.EVIDENCE
            self._deadline = now + EVIDENCE_TIMEOUT
            return [Gather()]
        if self.phase is Phase.EVIDENCE:
            return self._kill(now)
        self._deadline = now + UNDEAD_TIMEOUT
        self.undead = True
        return [Kill(), Announce("killed, and still there: no successor until it is gone")]

    def _gathered(self, event: Event, now: float, lot: float) -> list[Command]:
        return self._kill(now) if self.phase is Phase.EVIDENCE else []

    def _died(self, event: Event, now: float, lot: float) -> list[Command]:
        assert isinstance(event, Gone)
        restart = self.spec.restart
        up_for = now - self._up_at if self._up_at is not None else 0.0
        self.why = Why.CLEAN if event.clean else Why.CRASH
        ended = restart is Restart.TEMPORARY or (restart is Restart.TRANSIENT and event.clean)
        if ended:
            self.wanted_up = False
        if not self.wanted_up:
            return self._go_down([] if event.clean else [ReportDeath()])
        return self._come_back(now, lot, up_for=up_for, wild=event.wild, died=True)

    def _gone(self, event: Event, now: float, lot: float) -> list[Command]:
        assert isinstance(event, Gone)
        up_for = now - self._up_at if self._up_at is not None else 0.0
        asked = self.phase is Phase.ASKED
        for_cause = self.why is not Why.STOPPED
        self.phase, self.undead, self._yielding = None, False, False
        report: list[Command] = [] if asked and event.clean else [ReportDeath()]
        if not self.wanted_up:
            return self._go_down(report)
        if for_cause:
            return self._come_back(now, lot, up_for=up_for, wild=event.wild, died=True)
        self.counter.reset()
        return [*self._go_starting(now), *report]

    def _cancel(self, event: Event, now: float, lot: float) -> list[Command]:
        self.wanted_up = False
        self.why = Why.STOPPED
        return self._go_down([])

    # -- what several cells share

    def _go_starting(self, now: float) -> list[Command]:
        fresh, self._fresh = self._fresh, False
        self.state = State.STARTING
        self._spawns += 1
        self.restarts = self._spawns - 1
        self._up_at = None
        self._deadline = now + self.spec.start_timeout
        return [Spawn(fresh), Announce()]

    def _go_stopping(self, why: Why, phase: Phase, deadline: float, *do: Command) -> list[Command]:
        self.state, self.why, self.phase = State.STOPPING, why, phase
        self._deadline = deadline
        return [*do, Announce()]

    def _put_to_death(self, why: Why, evidence: bool, now: float) -> list[Command]:
        if evidence:
            return self._go_stopping(why, Phase.EVIDENCE, now + EVIDENCE_TIMEOUT, Gather())
        return self._go_stopping(why, Phase.KILLED, now + UNDEAD_TIMEOUT, Gather(), Kill())

    def _kill(self, now: float) -> list[Command]:
        self.phase, self._deadline = Phase.KILLED, now + UNDEAD_TIMEOUT
        return [Kill()]

    def _go_down(self, report: list[Command]) -> list[Command]:
        self.state = State.DOWN
        self._deadline = None
        self._up_at = None
        return [*report, Announce()]

    def _come_back(
        self, now: float, lot: float, *, up_for: float, wild: bool, died: bool = False
    ) -> list[Command]:
        """The fork comes first, the report after it."""
        report: list[Command] = [ReportDeath()] if died else []
        self._fresh = wild
        decision = self.counter.died(up_for=up_for, wild=wild, now=now, lot=lot)
        if decision.limit and self.spec.policy.on_limit is OnLimit.GIVE_UP:
            self.why = Why.TOO_MANY_RESTARTS
            self.state, self._deadline, self.wanted_up = State.FAILED, None, False
            return [*report, Announce(), GiveUp()]
        if decision.limit:
            self.state, self._deadline = State.FAILING, now + decision.delay
            return [*report, Announce()]
        if decision.delay == 0.0:
            return [*self._go_starting(now), *report]
        self.state, self._deadline = State.BACKOFF, now + decision.delay
        return [*report, Announce()]

    def _respawn(self, event: Event, now: float, lot: float) -> list[Command]:
        return self._go_starting(now)


_M = ChildMachine
Cell = Callable[[ChildMachine, Event, float, float], list[Command]]
_fine, _no = _M._ignore, _M._impossible
_new, _ready, _died = _M._spawn, _M._ready, _M._died
_up, _down, _off = _M._want_up, _M._want_down, _M._cancel
_late, _give, _kill = _M._start_timeout, _M._condemn, _M._next_phase
_ask, _over, _swap = _M._ask, _M._ask_again, _M._replace
_none, _back, _gone = _M._spawn_failed, _M._respawn, _M._gone
_seen = _M._gathered

# One row a state, one column an event.
# fmt: off
_COLUMNS: tuple[type[Event], ...] = (
                    Start, Dismiss, Stop,  Replace, Spawned, SpawnFailed, Ready,  Gone,  Condemned, Gathered, Due)  # noqa: E501
_ROWS: dict[State, tuple[Cell, ...]] = {
    State.DOWN:     (_new, _fine,   _fine, _new,    _no,     _no,         _no,    _no,   _no,       _no,      _no),  # noqa: E501
    State.STARTING: (_up,  _down,   _ask,  _swap,   _fine,   _none,       _ready, _died, _give,     _no,      _late),  # noqa: E501
    State.UP:       (_up,  _down,   _ask,  _swap,   _no,     _no,         _fine,  _died, _give,     _no,      _no),  # noqa: E501
    State.STOPPING: (_up,  _down,   _over, _up,     _no,     _no,         _fine,  _gone, _fine,     _seen,    _kill),  # noqa: E501
    State.BACKOFF:  (_new, _off,    _off,  _new,    _no,     _no,         _no,    _no,   _no,       _no,      _back),  # noqa: E501
    State.FAILING:  (_new, _off,    _off,  _new,    _no,     _no,         _no,    _no,   _no,       _no,      _back),  # noqa: E501
    State.FAILED:   (_new, _off,    _off,  _new,    _no,     _no,         _no,    _no,   _no,       _no,      _no),  # noqa: E501
}
# fmt: on
TABLE: dict[State, dict[type[Event], Cell]] = {
    state: dict(zip(_COLUMNS, row, strict=True)) for state, row in _ROWS.items()
}
