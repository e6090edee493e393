"""Is a child that still runs still doing its work, and if not, is it its own fault?

Strategy: no clock, no pipe and no /proc in here.  The shell drains the lifeline first and asks
after, so a beat that already lay in the pipe always counts; of several beats read at once it
hands over the newest (counters are cumulative).  Silence accuses nobody by itself: at half of
``hang_timeout`` a first sample of `Facts` is asked for (`Look`), at ``hang_timeout`` a second,
and the difference between the two decides.  Only what is the child's own doing is condemned.

What silence means, by the difference of two samples:

    Z              dead       the main thread ended; the pidfd tells of the rest
    TracerPid      traced     a debugger's doing: judgement rests until it lets go
    CoreDumping    dumping    extended up to ``dump_timeout``
    freezer        frozen     an operator's doing: judgement rests until the thaw
    T              stopped    one SIGCONT; stopped again within ``stopped_timeout``: condemned
    S, D, I        blocked    asleep for most of the time: condemned
    ran            busy       had a ``hang_timeout``'s worth of CPU since its last beat: condemned
    waited         starved    runnable, but had less CPU than that: extended up to
                              ``starved_timeout`` of silence

Without any facts (no /proc, hidepid) silence for ``hang_timeout`` and a short while more is
*blocked*: there is nothing left to go by.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Self

__all__ = [
    "Action",
    "Beat",
    "Command",
    "Condemn",
    "Continue",
    "Facts",
    "Judge",
    "Limits",
    "Look",
    "Note",
    "Verdict",
    "Workload",
    "glance",
]


class Action(Enum):
    """What follows from a verdict."""

    KILL = "kill"
    EXTEND = "extend"
    SUSPEND = "suspend judgement"
    CONTINUE = "continue"


class Verdict(Enum):
    """What is wrong with a child; ``guilty``: by its own doing, so it is killed at once."""

    guilty: bool
    action: Action

    def __new__(cls, label: str, guilty: bool, action: Action) -> Self:
        member = object.__new__(cls)
        member._value_ = label
        member.guilty = guilty
        member.action = action
        return member

    DEAD = "dead", True, Action.KILL
    BLOCKED = "blocked", True, Action.KILL
    BUSY = "busy", True, Action.KILL
    DEAF = "deaf", True, Action.KILL
    MUTE = "mute", True, Action.KILL
    CORRUPT = "corrupt", True, Action.KILL
    STARVED = "starved", False, Action.EXTEND
    STOPPED = "stopped", False, Action.CONTINUE
    TRACED = "traced", False, Action.SUSPEND
    FROZEN = "frozen", False, Action.SUSPEND
    DUMPING = "dumping", False, Action.EXTEND


class Beat(NamedTuple):
    """One beat of a child.  ``lag``: seconds its loop was late.

    ``duties``: per duty of the spec, in its order, (how much is done, CLOCK_MONOTONIC seconds
    since when something waits; 0.0: nothing waits).
    """

    seq: int
    lag: float
    duties: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What /proc says of one process at one moment; None: not to be read.

    ``run_ns`` and ``wait_ns`` are of the main thread, the one that turns the loop; ``utime`` and
    ``stime`` (seconds) of all threads.  A task frozen by cgroup v1 is in state D, by v2 in S.
    """

    state: str | None = None
    run_ns: int | None = None
    wait_ns: int | None = None
    utime: float | None = None
    stime: float | None = None
    wchan: str | None = None
    tracer_pid: int | None = None
    core_dumping: bool | None = None
    frozen: bool | None = None
    threads: int | None = None
    rss_bytes: int | None = None
    fds: int | None = None
    start_time: int | None = None
    ppid: int | None = None
    session: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much patience a child gets, in seconds.

    ``deaf_timeouts``: per duty in the order of the spec; None or missing: ``deaf_timeout``.
    ``note_interval``: the same trouble is announced at most so often, so that a child that
    starves and recovers all day does not fill the journal.
    """

    beat_interval: float = 0.2
    hang_timeout: float = 1.0
    # Killing gives no CPU: the successor would starve as well, and its start costs more.  But
    # after half a minute the clients are gone anyway, and a child that was moved into a
    # throttled cgroup or to an idle priority is helped by a successor, which inherits the
    # watchdog's.
    starved_timeout: float = 30.0
    stopped_timeout: float = 10.0
    # A core of some GB on a slow disk; longer than this the disk itself hangs.
    dump_timeout: float = 60.0
    deaf_timeout: float = 5.0
    deaf_timeouts: tuple[float | None, ...] = ()
    duty_names: tuple[str, ...] = ()  # for texts only
    # False: an operator who stops a child keeps it so for ``stopped_timeout``.
    continue_stopped: bool = True
    note_interval: float = 10.0


@dataclass(frozen=True, slots=True)
class Look:
    """Read the facts of this process and give them to `Judge.facts`."""

    pid: int


@dataclass(frozen=True, slots=True)
class Continue:
    """Send SIGCONT to this process."""

    pid: int


@dataclass(frozen=True, slots=True)
class Condemn:
    """Gather the evidence, then kill.  The judge says nothing more of this incarnation."""

    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Announce a change without guilt; ``verdict`` None: it is well again."""

    verdict: Verdict | None
    text: str


Command = Look | Continue | Condemn | Note

# A spinning child gets 99 % of a processor, not 100 %: without this slack the judgement of
# every busy child would need one more look.
_WORTH = 0.9


class _Sample(NamedTuple):
    facts: Facts | None
    at: float


@dataclass(slots=True)
class _DutySeen:
    """``moved_at``: when ``done`` last moved, on our clock.  ``waits_at``: when we first saw
    something wait without a pause; None: nothing waits."""

    done: int
    moved_at: float
    waits_at: float | None = None


class Judge:
    """Judges one incarnation of a child.

    Knows when it was last heard and what it looked like since.  Times are CLOCK_MONOTONIC
    seconds, read by the shell.
    """

    def __init__(self, pid: int, limits: Limits | None = None) -> None:
        self._pid = pid
        self._limits = limits if limits is not None else Limits()
        # None: not armed.  A child that is not ready yet has a start deadline, not ours.
        self._silent_since: float | None = None
        # When this round of silence is judged.
        self._deadline = math.inf
        self._look_at: float | None = None
        # At the last beat or grace: None.  First and latest sample of this silence.
        self._first: _Sample | None = None
        self._last: _Sample | None = None
        self._continued_at: float | None = None
        # Since when the class that lies in `_last` has been seen without a pause.
        self._excused: Verdict | None = None
        self._excused_since = 0.0
        self._seq: int | None = None
        self._duties: list[_DutySeen] = []
        self._trouble: Verdict | None = None
        self._announced: Verdict | None = None
        self._announced_at: dict[Verdict, float] = {}
        self._condemned = False

    @property
    def verdict(self) -> str:
        """For ``status``: "ok" or the value of the `Verdict`."""
        return "ok" if self._trouble is None else self._trouble.value

    @property
    def silent_since(self) -> float | None:
        """When it was last heard, or was last given grace; None before `arm`."""
        return self._silent_since

    def next_deadline(self) -> float | None:
        return self._look_at

    def arm(self, now: float) -> None:
        """To be called when the child says that it is ready."""
        if self._silent_since is None and not self._condemned:
            self._grace(now)

    def beat(self, beat: Beat, now: float) -> list[Command]:
        """To be called for the newest beat of those read, with the time it was read."""
        if self._condemned or beat.seq == self._seq:
            return []  # a beat that repeats itself is no sign of life
        self._seq = beat.seq
        armed = self._silent_since is not None
        if armed:
            self._new_round(now)
        deaf = self._judge_duties(beat.duties, now)
        if not armed:
            return []
        if deaf is not None:
            return [self._condemn(Verdict.DEAF, deaf)]
        return self._well(now)

    def expire(self, now: float) -> list[Command]:
        if self._look_at is None or now < self._look_at:
            return []
        # If the shell cannot answer now, it is asked again.
        self._look_at = now + self._limits.hang_timeout / 4
        return [Look(self._pid)]

    def facts(self, facts: Facts | None, now: float) -> list[Command]:
        """The answer to `Look`; None if nothing could be read."""
        if self._silent_since is None or self._condemned:
            return []
        sample = _Sample(facts, now)
        before, self._last = self._last, sample
        if self._first is None:
            self._first = sample
        if now < self._deadline:
            self._remember_excuse(facts, now)
            self._look_at = self._deadline
            return []
        return self._judge(before, sample)

    def mute(self, now: float) -> list[Command]:
        """To be called when the lifeline ended although the process lives."""
        return self._at_once(Verdict.MUTE, "closed its lifeline and lives on")

    def corrupt(self, now: float, text: str = "") -> list[Command]:
        """To be called when something that is no frame came on the lifeline."""
        said = f": {text}" if text else ""
        return self._at_once(Verdict.CORRUPT, f"wrote garbage on its lifeline{said}")

    def woke_late(self, by: float, now: float) -> list[Command]:
        """To be called before anything else when our own wake-up was ``by`` seconds late.

        Beyond a beat interval nobody is accused for the time we missed: one more round.
        """
        if by > self._limits.beat_interval and self._silent_since is not None:
            self._grace(now)
        return []

    def suspended(self, by: float, now: float) -> list[Command]:
        """To be called when the machine slept for ``by`` seconds; the same grace."""
        return self.woke_late(by, now)

    # Rounds of silence

    def _new_round(self, now: float) -> None:
        self._silent_since = now
        self._first = self._last = None
        self._excused = None
        self._set_deadline(now + self._limits.hang_timeout)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline
        self._look_at = None
        if not self._condemned:
            self._look_at = deadline - self._limits.hang_timeout / 2

    def _grace(self, now: float) -> None:
        self._new_round(now)
        for seen in self._duties:
            seen.moved_at = now

    # Judgement of a silence

    def _remember_excuse(self, facts: Facts | None, now: float) -> Verdict | None:
        excuse = _excuse(facts)
        if excuse is not self._excused:
            self._excused, self._excused_since = excuse, now
        return excuse

    def _judge(self, before: _Sample | None, sample: _Sample) -> list[Command]:
        """The deadline of this silence has passed, and this is what the child looks like."""
        facts, now = sample
        limits = self._limits
        was_excused = self._excused
        excuse = self._remember_excuse(facts, now)
        if excuse is not None:
            return self._judge_excuse(excuse, now)
        if was_excused is not None:
            # It has just been let go: what it missed was not its fault.
            self._set_deadline(now + limits.hang_timeout)
            self._first = sample
            return []
        silence = f"no beat for {now - self._since():.2f} s"
        if facts is not None and facts.state in {"Z", "X", "x"}:
            return [self._condemn(Verdict.DEAD, f"{silence}: its main thread has ended")]
        if before is None or (facts is None and before.facts is not None):
            # We came too late for the first sample, or it vanished between the two: the look
            # that `expire` has asked for already is the second.
            return []
        if facts is None or before.facts is None:
            if facts is not None:
                self._first = sample  # readable after all: the difference starts here
                return []
            return [self._condemn(Verdict.BLOCKED, f"{silence}: nothing to be read in /proc")]

        span = max(now - before.at, 1e-9)
        ran = _ran(before.facts, facts)
        waited = _waited(before.facts, facts)
        doing = _describe(facts, ran, waited, span)
        used = self._cpu_since_beat(facts, now)
        if used is None:
            # Neither schedstat nor stat: the state letter alone.
            verdict = Verdict.BUSY if facts.state == "R" else Verdict.BLOCKED
            return [self._condemn(verdict, f"{silence}: {doing}")]
        if used >= _WORTH * limits.hang_timeout:
            return [self._condemn(Verdict.BUSY, f"{silence}: {doing}")]
        # The kernel adds a wait to schedstat when it ends, so what a runnable task neither ran
        # nor waited is a wait that still goes on.
        slept = 0.0 if facts.state == "R" else span - (ran or 0.0) - (waited or 0.0)
        if slept > span / 2:
            return [self._condemn(Verdict.BLOCKED, f"{silence}: {doing}")]
        if now - self._since() >= limits.starved_timeout:
            return [self._condemn(Verdict.STARVED, f"{silence}: {doing}")]
        # No sooner than it can have used up what it is still owed.
        owed = limits.hang_timeout - used
        end = self._since() + limits.starved_timeout
        self._look_at = max(
            now + limits.hang_timeout / 8, min(now + max(owed, limits.hang_timeout / 4), end)
        )
        return self._announce(Verdict.STARVED, f"{silence}: {doing}", now)

    def _judge_excuse(self, excuse: Verdict, now: float) -> list[Command]:
        limits = self._limits
        since = self._excused_since
        if excuse is Verdict.STOPPED:
            return self._judge_stopped(now)
        self._look_at = now + limits.hang_timeout
        if excuse is Verdict.DUMPING:
            if now - since >= limits.dump_timeout:
                text = f"has been dumping core for {now - since:.0f} s"
                return [self._condemn(excuse, text)]
            self._look_at = min(self._look_at, since + limits.dump_timeout)
        return self._announce(excuse, _EXCUSES[excuse], now)

    def _judge_stopped(self, now: float) -> list[Command]:
        limits = self._limits
        if not limits.continue_stopped:
            if now - self._excused_since >= limits.stopped_timeout:
                text = f"has been stopped for {now - self._excused_since:.1f} s"
                return [self._condemn(Verdict.STOPPED, text)]
            self._look_at = min(
                now + limits.hang_timeout, self._excused_since + limits.stopped_timeout
            )
            return self._announce(Verdict.STOPPED, _EXCUSES[Verdict.STOPPED], now)
        if self._continued_at is not None and now - self._continued_at <= limits.stopped_timeout:
            text = f"is stopped again, {now - self._continued_at:.1f} s after it was continued"
            return [self._condemn(Verdict.STOPPED, text)]
        self._continued_at = now
        # A whole new round: what it does after the SIGCONT is judged by itself.
        self._excused = None
        self._first = self._last = None
        self._set_deadline(now + limits.hang_timeout)
        text = _EXCUSES[Verdict.STOPPED] + "; continued"
        return [Continue(self._pid), *self._announce(Verdict.STOPPED, text, now)]

    def _since(self) -> float:
        assert self._silent_since is not None  # facts() is refused before
        return self._silent_since

    def _cpu_since_beat(self, facts: Facts, now: float) -> float | None:
        """CPU seconds since the last beat; None if unknown.

        Nobody looked between the beat and the first sample.  That part is taken to have been
        like the rest: a child that spins is judged at its deadline, one that got half a
        processor at twice its deadline.
        """
        first = self._first
        if first is None or first.facts is None:
            return None
        seen = _ran(first.facts, facts)
        if seen is None or now <= first.at:
            return seen
        unseen = max(0.0, first.at - max(self._since(), self._deadline - self._limits.hang_timeout))
        return seen * (1 + unseen / (now - first.at))

    # Duties

    def _judge_duties(self, duties: Sequence[tuple[int, float]], now: float) -> str | None:
        """Why it is deaf, or None.  Judged at beats only: between two of them what we know is
        old, and without them it is silence that counts."""
        why = None
        for number, (done, waiting_since) in enumerate(duties):
            if number == len(self._duties):
                self._duties.append(_DutySeen(done, now))
            seen = self._duties[number]
            if done != seen.done:
                seen.done, seen.moved_at = done, now
            if waiting_since == 0.0:
                seen.waits_at = None
                continue
            if 0.0 < waiting_since <= now:
                seen.waits_at = waiting_since
            elif seen.waits_at is None:
                seen.waits_at = now  # NaN, or in the future: our own clock counts
            waited = now - max(seen.waits_at, seen.moved_at)
            if why is None and waited >= self._deaf_timeout(number):
                names = self._limits.duty_names
                name = repr(names[number]) if number < len(names) else str(number + 1)
                why = f"something waits for duty {name} and nothing was done for {waited:.2f} s"
        return why

    def _deaf_timeout(self, number: int) -> float:
        own = self._limits.deaf_timeouts
        timeout = own[number] if number < len(own) else None
        return self._limits.deaf_timeout if timeout is None else timeout

    # What is said

    def _at_once(self, verdict: Verdict, text: str) -> list[Command]:
        return [] if self._condemned else [self._condemn(verdict, text)]

    def _condemn(self, verdict: Verdict, text: str) -> Condemn:
        self._condemned = True
        self._look_at = None
        self._trouble = verdict
        return Condemn(verdict, text)

    def _announce(self, verdict: Verdict, text: str, now: float) -> list[Command]:
        """A note once per change, and not oftener than ``note_interval`` for the same class."""
        if self._trouble is verdict:
            return []
        self._trouble = verdict
        if now - self._announced_at.get(verdict, -math.inf) < self._limits.note_interval:
            return []
        self._announced_at[verdict] = now
        self._announced = verdict
        return [Note(verdict, text)]

    def _well(self, now: float) -> list[Command]:
        announced, self._announced = self._announced, None
        self._trouble = None
        return [] if announced is None else [Note(None, f"beats again, was {announced.value}")]


_EXCUSES = {
    Verdict.TRACED: "a tracer holds it",
    Verdict.FROZEN: "its cgroup is frozen",
    Verdict.STOPPED: "somebody stopped it",
    Verdict.DUMPING: "its core is being dumped",
}


def glance(facts: Facts | None) -> Verdict:
    """What a child looks like at one moment: for a report about one that missed a deadline of
    its start or its stop, where nobody had compared two samples."""
    excuse = _excuse(facts)
    if excuse is not None:
        return excuse
    return Verdict.BUSY if facts is not None and facts.state == "R" else Verdict.BLOCKED


class Workload:
    """What somebody who is accused was seen to do while something waited for him.

    Overload is not failure: whoever has no time left and gets things done all the while would
    leave his successor the same work, and a start on top of it.
    """

    # Between two looks that are compared; the later one is at most so old.
    _SHORTEST, _LONGEST = 0.5, 5.0
    # Of the time, on a processor or waiting for one.
    _BUSY = 0.6

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Facts, tuple[int, ...]]] = deque()

    def look(self, facts: Facts | None, done: tuple[int, ...], now: float) -> None:
        """To be called from time to time while he is suspected; ``done``: of each of his duties."""
        if facts is not None:
            self._looks.append((now, facts, done))
        while self._looks and now - self._looks[0][0] > self._LONGEST:
            self._looks.popleft()

    def excuse(self, duties: Sequence[int]) -> str:
        """Why he is busy and not deaf; "": he is not.  ``duties``: of which one must get done."""
        if not self._looks:
            return ""
        (then, before, done_before), (now, after, done) = self._looks[0], self._looks[-1]
        got_done = sum(done[duty] - done_before[duty] for duty in duties)
        ran = _ran(before, after)
        if now - then < self._SHORTEST or got_done <= 0 or ran is None:
            return ""
        busy = (ran + (_waited(before, after) or 0.0)) / (now - then)
        if busy < self._BUSY:
            return ""
        return f"is busy for {min(busy, 1.0):.0%} of the time and has done {got_done} meanwhile"


def _excuse(facts: Facts | None) -> Verdict | None:
    """Why this process cannot beat although it would; None: nothing keeps it.

    Frozen before stopped: a SIGCONT does not thaw.  Dumping before all that is told by the
    state letter, which then is D.
    """
    if facts is None:
        return None
    if facts.tracer_pid or facts.state == "t":
        return Verdict.TRACED
    if facts.core_dumping:
        return Verdict.DUMPING
    if facts.frozen:
        return Verdict.FROZEN
    if facts.state == "T":
        return Verdict.STOPPED
    return None


def _ran(before: Facts, after: Facts) -> float | None:
    """Seconds on a processor between the two; coarse (all threads, 10 ms) without schedstat."""
    if before.run_ns is not None and after.run_ns is not None:
        return max(0.0, (after.run_ns - before.run_ns) / 1e9)
    if None in {before.utime, before.stime, after.utime, after.stime}:
        return None
    then = (before.utime or 0.0) + (before.stime or 0.0)
    return max(0.0, (after.utime or 0.0) + (after.stime or 0.0) - then)


def _waited(before: Facts, after: Facts) -> float | None:
    """Seconds runnable without a processor between the two."""
    if before.wait_ns is None or after.wait_ns is None:
        return None
    return max(0.0, (after.wait_ns - before.wait_ns) / 1e9)


def _describe(facts: Facts, ran: float | None, waited: float | None, span: float) -> str:
    state = _STATES.get(facts.state or "", f"in state {facts.state}")
    place = f" in {facts.wchan}" if facts.wchan and facts.state != "R" else ""
    parts = [f"{state}{place}"]
    if ran is not None:
        parts.append(f"ran {ran * 1000:.0f} ms")
    if waited is not None:
        # A wait that began before the first sample is counted whole when it ends.
        waited = min(waited, span - (ran or 0.0))
        parts.append(f"waited {max(waited, 0.0) * 1000:.0f} ms for a processor")
    return f"{', '.join(parts)} of the last {span * 1000:.0f} ms"


_STATES = {
    "R": "runnable",
    "S": "asleep",
    "D": "in uninterruptible sleep",
    "I": "idle",
}
