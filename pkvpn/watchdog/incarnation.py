"""One living process of a child, from the fork to the reaping, and what lies between us and it.

Strategy: everything a process needs is opened before the fork and owned by one object, so that
an attempt that fails half way (no descriptors, no memory, no process) leaves nothing behind.
Signals go through the pidfd, never through a number; the end of the process is asked of the
kernel without waiting, even where a tracer keeps the status to itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import multiprocess.connection  # noqa: F401 - else by the first join, when it may open no file
from multiprocess import context as multiprocess_context

from pkvpn.watchdog import machine, procfs, upgrade
from pkvpn.watchdog.child import ALL_SIGNALS, END_SIGNALS, Birth, exec_child, run_child
from pkvpn.watchdog.held import Kept
from pkvpn.watchdog.lifeline import LifelineDecoder, Order, encode_order
from pkvpn.watchdog.spec import ChildSpec
from pkvpn.watchdog.verdict import Beat, Judge, Limits, Workload
from pkvpn.watchdog.witness import Witness

_fork = multiprocess_context.ForkContext()

# After these the memory of the child is not to be trusted: the next one starts by exec.
WILD_SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGSYS}

_MAX_STACKS = 64 * 1024
# Of /proc: running, or asleep and to be woken.
_CAN_RUN = {"R", "S"}


class ChildEnds(NamedTuple):
    """What of the things between the two belongs to the child."""

    up: int
    down: int
    gifts: int
    stacks: int
    wake: tuple[int, int]


class Incarnation:
    """Knows one process of a child: what it said, what it is accused of, how to reach it."""

    def __init__(self, spec: ChildSpec, number: int, now: float, beat_interval: float) -> None:
        self.number = number
        self.spec = spec
        self.pid = 0
        self.pidfd = -1
        self.process: Any = None  # multiprocess' handle; None if adopted after an upgrade
        self.started_at = now
        self.beats: deque[tuple[float, Beat]] = deque(maxlen=10)
        self.said = ""
        self.orders = 0
        self.prepared = False  # of one that stands by: its turn may come
        self.condemned = ""
        self.diagnosis = ""  # why, in words
        self.quiet_until = now  # when it beat again after a silence, or was born
        self.mute_at = math.inf  # when the end of its lifeline is held against it
        self.dumped_at = -math.inf
        self.snapshot: dict[str, str] = {}
        self._usage_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._usage: dict[str, float] = {}
        self._reaped = False
        self.decoder = LifelineDecoder(len(spec.duties))
        self.witness = Witness(spec.duties, spec.accuses)
        self._limits = Limits(
            beat_interval=beat_interval,
            hang_timeout=spec.hang_timeout,
            stopped_timeout=spec.stopped_timeout,
            deaf_timeout=spec.deaf_timeout,
            duty_names=spec.duties,
        )
        self.judge = Judge(0, self._limits)
        self.workload = Workload()
        self.excused_at = -math.inf  # when that was last said
        # Our ends.  ``wake`` is the child's own: what its signal handlers wrote and its loop
        # has not read yet, for us to read when it cannot any more.
        self.up = self.down = self.stacks = self.wake = self.gifts = -1
        self._signals: set[int] = set()
        self._gifts: socket.socket | None = None

    def spawn(self, birth: Callable[[ChildEnds], Birth], *, fresh: bool) -> None:
        """Make the process; ``fresh``: by exec.  Raises `OSError`; then nothing is left of it."""
        theirs: list[int] = []
        try:
            self.up, up = _pipe(theirs, keep=0)
            self.down, down = _pipe(theirs, keep=1)
            self.wake, wake_write = _pipe(theirs, keep=0)
            gifts, our_gifts = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
            theirs.append(gifts.detach())
            self.gifts = our_gifts.detach()
            self.stacks = os.memfd_create(f"stacks-{self.spec.name}", os.MFD_CLOEXEC)
            ends = ChildEnds(up, down, theirs[-1], self.stacks, (self.wake, wake_write))
            self._fork(birth(ends), fresh)
        except BaseException:
            self.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self.judge = Judge(self.pid, self._limits)

    def _fork(self, birth: Birth, fresh: bool) -> None:
        """Signals wait until the child has forgotten our handlers: one that came in between
        would be written into our own wake-up pipe by the child."""
        run = exec_child if fresh else run_child
        process = _fork.Process(target=run, args=(birth,), name=birth.name, daemon=False)
        signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
        try:
            try:
                process.start()
            except OSError as error:
                _close_pipes(error)
                raise
            self.pid = process.pid or 0
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except OSError:
                process.kill()  # not reaped yet, so the number is still its own
                process.join()
                process.close()
                raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.process = process

    def serve(self, number: int, kept: Kept, now: float) -> bool:
        """The turn of one that stands by has come; False: it cannot take over."""
        if not self.prepared or procfs.state_of(self.pid) not in _CAN_RUN:
            return False  # it hangs, or was stopped: nobody would notice before its start is late
        self.number, self.started_at, self.quiet_until = number, now, now
        return kept.hand_over(self._gift_socket(), number)

    def follow(self, kept: Kept) -> None:
        """Tell one that stands by what has been given and dropped since it was told last."""
        with contextlib.suppress(OSError):  # it does not read now: with the next beat, then
            kept.tell(self._gift_socket())

    def beat(self, beat: Beat, now: float) -> None:
        """To be called for each beat."""
        if self.is_silent(now):
            self.quiet_until = now
        self.beats.append((now, beat))

    def is_silent(self, now: float) -> bool:
        """Whether it beats so late that what it does not do may be due to that."""
        return bool(self.beats) and now - self.beats[-1][0] > self.spec.hang_timeout / 2

    def neglects(self, now: float) -> bool:
        """Whether something has waited for it for longer than a moment, by its last beat."""
        if not self.beats:
            return False
        own = self.witness.own_duties(self.beats[-1][1].duties)
        return any(since and now - since > self.spec.hang_timeout / 2 for _, since in own)

    def look(self, now: float) -> None:
        """See how much it has to do; to be called while it is suspected."""
        if self.beats:
            done = tuple(done for done, _ in self.beats[-1][1].duties)
            self.workload.look(procfs.read_facts(self.pid), done, now)

    def excuse(self, duties: tuple[str, ...]) -> str:
        """Why what waits for these duties of it waits by no fault of its own, or nothing."""
        return self.workload.excuse(
            [place for place, name in enumerate(self.spec.duties) if name in duties]
        )

    def order(self, order: Order) -> None:
        """Tell the child; it has room for thousands of orders, or it is gone."""
        self.orders += 1
        with contextlib.suppress(OSError):
            os.write(self.down, encode_order(order, self.orders))

    def signal(self, number: signal.Signals) -> None:
        """By identity: a pid that is another process by now is never hit."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def drain_gifts(self, kept: Kept, *, dead: bool = False) -> None:
        """Take what it gave and dropped: with each beat, and once more after its death."""
        kept.drain(self._gift_socket(), dead=dead)

    def _gift_socket(self) -> socket.socket:
        if self._gifts is None:
            # Not before it is needed: an image that fails to resume must not close it.
            self._gifts = socket.socket(fileno=self.gifts)
        return self._gifts

    def read_stacks(self) -> str:
        return os.pread(self.stacks, _MAX_STACKS, 0).decode(errors="replace")

    def forget_stacks(self) -> None:
        """Make room for the next: both ends share one position."""
        os.ftruncate(self.stacks, 0)
        os.lseek(self.stacks, 0, os.SEEK_SET)

    def read_signals(self) -> set[int]:
        """Those that it got and has not read of itself.

        To be called when it is condemned or dead: before, it reads for itself.
        """
        with contextlib.suppress(OSError):
            self._signals.update(os.read(self.wake, 4096))
        return self._signals

    def was_asked_to_end(self) -> bool:
        """Whether it got a TERM that it could not pass on any more; see `read_signals`."""
        return bool(END_SIGNALS & self.read_signals())

    def how_it_ended(self) -> machine.Gone:
        """To be called when the pidfd says that it has ended; it is reaped later, by `reap`.

        Never waits: a tracer may keep the status for as long as it likes, and then it is not
        known.
        """
        self._usage_before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # multiprocess takes whoever has ended when it makes another process, and knows how.
            code = self.process.exitcode if self.process is not None else None
        else:
            if found is None:
                return machine.Gone(None, None)
            code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if code is None:
            return machine.Gone(None, None)
        if code >= 0:
            return machine.Gone(code, None)
        return machine.Gone(None, -code, wild=-code in WILD_SIGNALS)

    def reap(self) -> dict[str, float]:
        """Let the kernel forget it, once; returns what it used.

        (Two that die in one turn may be reaped by one call of multiprocess' own; then what one of
        them has used stands in the report of the other.)
        """
        if self._reaped:
            return self._usage
        self._reaped = True
        before = self._usage_before
        if self.process is not None:
            self.process.join(timeout=0)
            if self.process.exitcode is not None:
                self.process.close()
            self.process = None
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._usage = {
            "user_s": round(after.ru_utime - before.ru_utime, 6),
            "system_s": round(after.ru_stime - before.ru_stime, 6),
            "minor_faults": after.ru_minflt - before.ru_minflt,
            "major_faults": after.ru_majflt - before.ru_majflt,
            "voluntary_switches": after.ru_nvcsw - before.ru_nvcsw,
            "involuntary_switches": after.ru_nivcsw - before.ru_nivcsw,
        }
        return self._usage

    # -- going over to the next image

    def descriptors(self) -> set[int]:
        return {self.up, self.down, self.wake, self.stacks, self.pidfd, self.gifts}

    def as_table(self) -> dict[str, Any]:
        """What the next image needs to go on with this process."""
        return {
            "number": self.number,
            "pid": self.pid,
            "pidfd": self.pidfd,
            "up": self.up,
            "down": self.down,
            "wake": self.wake,
            "stacks": self.stacks,
            "gifts": self.gifts,
            "started_at": self.started_at,
            "duties": len(self.spec.duties),
            "orders": self.orders,
        }

    @classmethod
    def from_table(cls, spec: ChildSpec, old: dict[str, Any], beat_interval: float) -> Incarnation:
        """Go on with a process that an image before us started.

        Raises `UpgradeError` if its beats cannot be read by the new spec.
        """
        if old["duties"] != len(spec.duties):
            raise upgrade.UpgradeError(
                f"{spec.name} beats {old['duties']} duties, the new code expects {len(spec.duties)}"
            )
        incarnation = cls(spec, old["number"], old["started_at"], beat_interval)
        incarnation.pid, incarnation.pidfd = old["pid"], old["pidfd"]
        incarnation.up, incarnation.down = old["up"], old["down"]
        incarnation.wake, incarnation.stacks = old["wake"], old["stacks"]
        incarnation.gifts, incarnation.orders = old["gifts"], old["orders"]
        incarnation.judge = Judge(incarnation.pid, incarnation._limits)
        return incarnation

    def close(self) -> None:
        if self._gifts is not None:
            self._gifts.detach()
        for fd in self.descriptors() - {-1}:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.up = self.down = self.wake = self.stacks = self.pidfd = self.gifts = -1


def _close_pipes(error: OSError) -> None:
    """Close the two pipes that multiprocess leaves open where its fork fails.

    Nobody but the frame that failed knows them; and each try of a machine without room for a
    process would cost four descriptors more.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_launch":
            for name in ("parent_r", "parent_w", "child_r", "child_w"):
                if name in frame.f_locals:
                    os.close(frame.f_locals[name])


def _pipe(theirs: list[int], *, keep: int) -> tuple[int, int]:
    """A pipe as (the end we keep, the other); the other is noted in ``theirs``.

    ``keep``: 0 the end to read from, 1 the end to write to.
    """
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    theirs.append(ends[1 - keep])
    return ends[keep], ends[1 - keep]
