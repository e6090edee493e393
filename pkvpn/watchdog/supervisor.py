"""The shell of the watchdog: one thread, one selector, and nothing it waits for without a limit.

Strategy: everything is decided by the pure parts (`machine`, `tree`, `verdict`); this file
turns what the kernel says into their events and carries out their commands, in one place.
Within a turn the lifelines are read first and judged last, so a beat that already lay in a
pipe always counts; a death is followed by the fork at once and by its report after it.

The process that runs this parses nothing a network peer sent, touches no disk while it judges
(the `log` child does), and stays single-threaded, so that a fork is always safe.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import random
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from pkvpn.watchdog import control, fdstore, instance, machine, procfs, report, sweep, upgrade
from pkvpn.watchdog.child import ALL_SIGNALS, Birth
from pkvpn.watchdog.fdstore import FdStore
from pkvpn.watchdog.held import HeldDescriptors, close_all
from pkvpn.watchdog.home import Home
from pkvpn.watchdog.incarnation import ChildEnds, Incarnation
from pkvpn.watchdog.lifeline import FRAME_SIZE, CorruptLifeline, Kind, Order, Said, next_moment
from pkvpn.watchdog.logchild import WATCHDOG, LogPipe, LogSettings
from pkvpn.watchdog.logchild import main as log_main
from pkvpn.watchdog.machine import State
from pkvpn.watchdog.notify import Notify
from pkvpn.watchdog.slot import Slot, is_over, make_slots
from pkvpn.watchdog.spec import LOG_CHILD, ChildSpec, HeldSpec, TreeSpec, Upgrade
from pkvpn.watchdog.tree import Rollover, Tree
from pkvpn.watchdog.upgrade import Trial
from pkvpn.watchdog.verdict import Beat, Condemn, Continue, Look, Note, Verdict, glance
from pkvpn.watchdog.verdict import Command as JudgeCommand
from pkvpn.watchdog.witness import Accusation

_log = logging.getLogger(__name__)

# How the tree ended, as the exit code of the watchdog.
EXIT_OK = 0
EXIT_START_FAILED = 1
EXIT_INTERNAL = 70  # a bug of ours (EX_SOFTWARE)
EXIT_GAVE_UP = 75  # a child could not be kept alive, and the policy says so (EX_TEMPFAIL)

# A process closes its lifeline some milliseconds before its pidfd says that it has ended: only
# one that lives on for longer is mute.
MUTE_TIMEOUT = 0.2

# What the last look of all may take; nobody is waited for any more.
_LAST_SWEEP = 1.0
# Reads of one lifeline in one turn: a whole pipe, and not more, however fast a child writes.
_READS = 16
# A standby is forked so long after its child has come up (and not while that gets under way), and
# after another has ended by itself.
_STANDBY_AFTER = 0.25
_STANDBY_AGAIN = 5.0
# A standby hears with each beat what was given and dropped; more than this that it has not heard of
# reaches a successor sooner by a fork.
_HAND_OVER_MOST = 2000
# What of ours lies in the runtime directory; where it cannot be made again, the next try is later.
_CONTROL_NAME = "control.sock"
_OWN_NAMES = (instance.LOCK_NAME, instance.PID_NAME, _CONTROL_NAME)
_HOME_AGAIN = 5.0
# Reports that operators asked for (QUIT), per child: a child cannot fill the disk with them.
_DUMP_INTERVAL = 1.0
# The same excuse is written down at most so often.
_EXCUSE_INTERVAL = 10.0
_WITH_PROCESS = (State.STARTING, State.UP, State.STOPPING)
# A service manager that has no room for more of what it is to keep is asked again after so long.
_BUSY_MANAGER = 0.05
# How long the new program may take to say that it would start.
_TRIAL_TIMEOUT = 30.0

_PR_SET_CHILD_SUBREAPER = 36
_LOG_BUFFER = 1 << 20
# In which order the events of one turn are handled.
_SIGNALS, _LIFELINES, _DEATHS, _EVIDENCE, _TRIAL, _CONTROL, _HOME = range(7)

Report = Callable[[dict[str, Any]], None]


class Supervisor:
    """Runs one tree from the first child to the last."""

    def __init__(
        self,
        spec: TreeSpec,
        *,
        lock: instance.InstanceLock,
        tell: Report,
        on_reload: Callable[[], TreeSpec] | None = None,
        status: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._spec = spec
        self._lock = lock
        self._tell = tell
        self._on_reload = on_reload
        self._more_status = status
        self._manager = Notify.from_environment(os.environ, os.getpid())
        self._started_at = time.monotonic()
        self._away = procfs.clocks()
        self._selector = selectors.DefaultSelector()
        self._told_ready = False
        self._exit = EXIT_OK
        self._held = HeldDescriptors()
        self._store = FdStore(self._manager, enabled=fdstore.ENABLED in os.environ)
        self._yielding = False  # stopping, and the next process of the service goes on
        self._lot = random.Random()  # noqa: S311 - jitter
        self._image = 1  # how many upgrades ago this watchdog was started
        self._archive = -1  # what an upgrade that fails goes back to
        self._previous = -1  # the copy of the code before this one, until the children are over
        self._trial: Trial | None = None
        self._upgrade_failed = ""
        self._rollover = Rollover([])
        self._trial_deadline = math.inf
        self._strangers = False  # somebody below us has ended
        self._orphans: set[int] = set()  # killed at the last look
        self._back_at = 0.0  # when we were last away
        self._dismissed: set[Incarnation] = set()  # standbys that are being killed
        self._home_at = math.inf  # when what is missing in the runtime directory is made again
        self._slots = make_slots(self._all_children(spec))
        self._tree = Tree([slot.machine for slot in self._slots.values()])
        self._by_machine = {id(slot.machine): slot for slot in self._slots.values()}

    # -- the life of the tree

    def run(self) -> int:
        """Bring the tree up, keep it up until a stop, and return the exit code."""
        if self._spec.upgrade is not None:
            self._archive = upgrade.copy_package(self._spec.upgrade.package)
        self._open_log({name: _log_channel() for name in self._senders(self._spec)})
        try:
            self._open_held(fdstore.take_inherited(os.environ, os.getpid()))
            self._listen(control.listen(os.path.join(self._spec.runtime_dir, _CONTROL_NAME)))
        except Exception as error:  # noqa: BLE001 - an opener is the daemon author's
            # Nobody is there yet who could write it down.
            self._tell({"error": str(error), "code": EXIT_START_FAILED})
            self._give_back()
            return EXIT_START_FAILED
        self._entry("starting", pid=os.getpid())
        return self._live()

    def _open_held(self, everything: dict[str, list[int]]) -> None:
        """``everything``: what the service manager has kept, or opened, for us."""
        inherited, gifts, ledgers = fdstore.sort_inherited(everything)
        for held in self._spec.held:
            self._held.open(held, inherited.pop(fdstore.written_name(held.name), ()))
        for name, descriptors in inherited.items():
            close_all(descriptors)  # nobody here knows what they are
            self._manager.unstore(name)
        adopted: dict[int, fdstore.Gift] = {}
        for fd, (child, key) in gifts.items():
            slot = self._slots.get(child)
            if (
                slot is not None
                and key not in slot.kept.descriptors
                and len(slot.kept.descriptors) < slot.kept.limit
            ):
                adopted[slot.kept.adopt(key, fd)] = (child, key)
            else:
                self._store.discard(fd)
        self._begin_store(adopted, ledgers)
        if adopted:
            self._entry("adopted", kept=len(adopted))

    def _begin_store(self, gifts: dict[int, fdstore.Gift], ledgers: list[str]) -> None:
        self._store.begin(gifts, ledgers)
        for held in self._spec.held:
            if held.stored:
                self._store.hold(held.name, self._held.descriptors(held.name))
        for slot in self._slots.values():
            slot.kept.on_keep = functools.partial(self._store.keep, slot.name)
            slot.kept.on_drop = self._store.drop

    def resume(self, table: dict[str, Any], table_fd: int) -> int:
        """Go on with what the image before an upgrade left; returns the exit code.

        Nothing is changed before `upgrade.commit`: if anything is raised until then, the old
        image goes on with the same table.
        """
        names = [slot["name"] for slot in table["slots"]]
        if names != list(self._slots):
            raise upgrade.UpgradeError(
                f"the new code has the children {', '.join(self._slots)}, the old one "
                f"{', '.join(names)}: that takes a restart"
            )
        now = time.monotonic()
        self._started_at = table["started_at"]
        self._archive = table["archive"]
        self._image = table["image"] + 1
        self._told_ready = True
        for held in self._spec.held:
            if held.name in table["held"]:
                held.adopt(table["held"][held.name])
                self._held.adopt(held, table["held"][held.name])
            else:
                self._held.open(held)
        self._open_log(table["log"])
        self._tree.adopt()
        for old in table["slots"]:
            self._adopt(self._slots[old["name"]], old, now)
        self._control_fd = table["control"]
        for fd in self._descriptors():
            os.set_inheritable(fd, False)
        replace_all, ledgers = bool(table["replace"]), list(table["ledgers"])
        upgrade.commit()
        os.close(table_fd)
        return self._live(lambda: self._begin_again(replace_all, ledgers, now))

    def _begin_again(self, replace_all: bool, ledgers: list[str], now: float) -> None:
        """The first thing after the commit."""
        gifts = {
            fd: (slot.name, key)
            for slot in self._slots.values()
            for key, fd in slot.kept.descriptors.items()
        }
        self._begin_store(gifts, ledgers)
        self._listen(self._control_fd)
        if self._spec.upgrade is not None and not upgrade.is_copy(self._spec.upgrade.package):
            # From here on, a failure of the next upgrade comes back to this code.
            self._previous, self._archive = (
                self._archive, upgrade.copy_package(self._spec.upgrade.package),
            )  # fmt: skip
        self._upgrade_failed = upgrade.failure()
        self._entry("resumed", image=self._image, failed=self._upgrade_failed)
        for slot in self._slots.values():
            slot.standby_at = now + _STANDBY_AFTER
            if slot.alive is None:
                self._tell_machine(slot, machine.Start(), now)
        self._strangers = True  # standbys of the image before have ended unseen
        if replace_all or not self._upgrade_failed:
            # Else all children are of this code already, which has never been left.
            self._rollover = Rollover([slot.machine for slot in self._slots.values()])

    def _open_log(self, channels: dict[str, tuple[int, int]]) -> None:
        """``channels``: of each sender, the end to read from and the one to write to."""
        self._log_channels = channels
        self._log_pipe = LogPipe(channels[WATCHDOG][1])
        self._held.adopt(HeldSpec(LOG_CHILD, list), [read for read, _ in channels.values()])
        logging.getLogger().addHandler(self._log_pipe.handler())

    def _listen(self, listener: int) -> None:
        self._control_fd = listener
        self._control = control.ControlServer(listener, self._selector, self._answer)

    def _live(self, begin: Callable[[], None] = lambda: None) -> int:
        self._take_signals()
        self._home = Home(self._spec.runtime_dir)
        if self._home.fileno() >= 0:
            self._selector.register(self._home, selectors.EVENT_READ, (_HOME, None, None))
        _adopt_orphans()
        gc.collect()
        gc.freeze()  # what exists now is shared with every child and never looked at again
        try:
            begin()
            self._advance(time.monotonic())
            self._loop()
        except Exception as error:
            self._survive(error)
            raise
        finally:
            self._finish()
        return self._exit

    def _survive(self, error: Exception) -> None:
        """A bug of ours that nobody contained: go on as a new image, with all children.

        From the copy of the code before this one if there was one, else of this very code; what
        went wrong in one moment need not in the next.  Returns if that cannot be, or has been
        tried too often.
        """
        told = "".join(traceback.format_exception(error, limit=-5))
        self._entry("watchdog-failed", reason=told[-2000:])
        plan = self._spec.upgrade
        if plan is None or self._tree.stopping or not upgrade.may_fall(time.monotonic()):
            return
        os.environ["PKVPN_UPGRADE_FAILED"] = told[-2000:]
        self._exec(plan, self._previous if self._previous >= 0 else self._archive, old=True)

    def _loop(self) -> None:
        asleep_at, timeout, due = time.monotonic(), 0.0, 0.0
        while not self._tree.over:
            events = self._selector.select(timeout)
            now = time.monotonic()
            if now - asleep_at > timeout + self._spec.beat_interval:
                self._was_away(now - asleep_at - timeout, now)
            events.sort(key=lambda event: _priority(event[0]))
            for key, mask in events:
                self._handle(key, mask, now)
            asleep_at = time.monotonic()
            if asleep_at - now > self._spec.beat_interval:
                # Stopped or starved in the middle of a turn: first read what came meanwhile.
                self._was_away(asleep_at - now, asleep_at)
                timeout = 0.0
                continue
            if asleep_at >= due or any(_priority(key) != _LIFELINES for key, _ in events):
                # Beats alone only move deadlines away: nothing to look after.
                self._expire(asleep_at)
            due = self._next_deadline(asleep_at)
            timeout = max(0.0, due - asleep_at)

    def _handle(self, key: selectors.SelectorKey, mask: int, now: float) -> None:
        if not isinstance(key.data, tuple):
            self._contain(None, lambda: self._control.handle(key, mask), now)
            return
        priority, slot, incarnation = key.data
        if priority == _SIGNALS:
            self._contain(None, lambda: self._on_signals(now), now)
        elif priority == _TRIAL:
            self._contain(None, self._end_trial, now)
        elif priority == _HOME:
            self._contain(None, lambda: self._look_home(now), now)
        elif incarnation is slot.standby:
            self._contain(slot, lambda: self._hear_standby(slot, priority, now), now)
        elif incarnation in self._dismissed:
            if priority == _DEATHS:
                self._contain(slot, lambda: self._on_dismissed(slot, incarnation, now), now)
            else:
                self._selector.unregister(key.fd)
        elif incarnation is not slot.alive:
            return  # gone earlier in this very turn
        elif priority == _LIFELINES:
            self._contain(slot, lambda: self._read_lifeline(slot, now), now)
        elif priority == _EVIDENCE:
            self._contain(slot, lambda: self._read_evidence(slot, incarnation, now), now)
        else:
            self._on_death(slot, now)

    def _contain(self, slot: Slot | None, do: Callable[[], object], now: float) -> None:
        """Do it; a bug of ours costs one child its life at most, and never the tree."""
        try:
            do()
        except Exception as error:  # noqa: BLE001 - see above
            _log.critical("a bug of the watchdog: %s", error, exc_info=True)
            self._entry(
                "internal-error",
                child=slot.name if slot is not None else None,
                text=traceback.format_exc(limit=-5)[-2000:],
            )
            if slot is not None:
                with contextlib.suppress(Exception):
                    commands = slot.machine.recover(alive=slot.alive is not None, now=now)
                    self._carry_out(slot, commands, now)

    def _expire(self, now: float) -> None:
        for slot in self._slots.values():
            self._contain(slot, lambda slot=slot: self._expire_slot(slot, now), now)  # type: ignore[misc]
        if self._trial is not None and self._trial_deadline <= now:
            self._trial_deadline = math.inf
            self._trial.kill(f"has not ended within {_TRIAL_TIMEOUT:g} s")
        if self._home_at <= now:
            self._home_at = math.inf
            self._contain(None, lambda: self._look_home(now), now)
        self._contain(None, lambda: self._advance(now), now)
        if self._is_good():
            self._manager.feed(now)
        self._manager.catch_up()
        if self._strangers:
            self._strangers = False
            self._contain(None, self._end_strangers, now)

    def _end_strangers(self) -> None:
        if self._reap_strangers():
            # What it had started came to us with its end, perhaps behind the last look.
            self._end_orphans()

    def _expire_slot(self, slot: Slot, now: float) -> None:
        if (slot.alive is not None) != (slot.machine.state in _WITH_PROCESS):
            # A bug of ours was contained in between.
            recovery = slot.machine.recover(alive=slot.alive is not None, now=now)
            self._carry_out(slot, recovery, now)
        self._carry_out(slot, slot.machine.expire(now, self._lot.random()), now)
        if slot.alive is not None and slot.alive.mute_at <= now:
            slot.alive.mute_at = math.inf
            self._obey_judge(slot, slot.alive.judge.mute(now), now)
        if slot.alive is not None and slot.machine.state is State.UP:
            self._obey_judge(slot, slot.alive.judge.expire(now), now)
        if slot.standby_at <= now:
            slot.standby_at = math.inf
            self._expire_standby(slot, now)

    def _next_deadline(self, now: float) -> float:
        # Never later than the next second, so that time we were away for is seen as such.
        nearest = min(next_moment(now, 1.0), self._trial_deadline, self._home_at)
        if self._manager.behind:
            nearest = min(nearest, now + _BUSY_MANAGER)
        for slot in self._slots.values():
            own = slot.machine.next_deadline()
            if own is not None and own < nearest:
                nearest = own
            nearest = min(nearest, slot.standby_at)
            alive = slot.alive
            if alive is None:
                continue
            nearest = min(nearest, alive.mute_at)
            if slot.machine.state is State.UP:
                verdict = alive.judge.next_deadline()
                if verdict is not None and verdict < nearest:
                    nearest = verdict
        return nearest

    def _advance(self, now: float) -> None:
        while told := self._tree.advance() or self._rollover.advance():
            for child, event in told:
                self._tell_machine(self._by_machine[id(child)], event, now)
        if self._tree.ready and not self._told_ready:
            self._told_ready = True
            self._entry("ready", seconds=round(now - self._started_at, 3))
            self._tell({"ready": True, "pid": os.getpid(), **self._extra_status()})
            self._manager.ready(self._state())
        if self._rollover.stuck is not None:
            self._go_back(self._rollover.stuck.spec.name)
        if self._previous >= 0 and self._rollover.done:
            # Every child has come up with the new code: there is no way back, and no need.
            os.close(self._previous)
            self._previous = -1
            self._entry("upgraded", image=self._image)
        blocked = self._tree.blocked_by()
        if blocked is not None:
            slot = self._by_machine[id(blocked)]
            said = slot.remains.said if slot.remains is not None else ""
            self._fail(f"{slot.name} does not start: {said or slot.last_end()}")

    def _fail(self, why: str) -> None:
        self._exit = EXIT_START_FAILED
        self._entry("start-failed", reason=why)
        self._tell({"error": why, "code": EXIT_START_FAILED})
        self._stop(time.monotonic())

    def _stop(self, now: float) -> None:
        self._manager.stopping()
        self._rollover = Rollover([])
        self._dismiss_standbys(now)
        for child, event in self._tree.stop():
            self._tell_machine(self._by_machine[id(child)], event, now)

    def _finish(self) -> None:
        """Nobody of ours is left: end what was not ours, give everything back."""
        sweep.kill_orphans(set(), set(), budget=_LAST_SWEEP)
        self._home.close()
        if self._exit == EXIT_OK and self._tree.over and not self._yielding:
            self._store.forget()
            self._manager.catch_up()
        self._give_back()

    # -- the runtime directory

    def _look_home(self, now: float) -> None:
        """Make again what somebody has removed: without it nobody finds us, or finds us running."""
        others = {
            held.name_in_runtime_dir: held for held in self._spec.held if held.name_in_runtime_dir
        }
        gone = self._home.missing((*_OWN_NAMES, *others))
        if not gone or self._tree.stopping:
            return
        try:
            self._restore(gone)
            changed = {others[name].name for name in gone & set(others)}
            for name in changed:
                self._held.open(next(one for one in self._spec.held if one.name == name), anew=True)
        except (instance.InstanceError, OSError) as error:
            self._entry("runtime-directory-lost", names=sorted(gone), reason=str(error))
            self._home_at = now + _HOME_AGAIN
            return
        self._entry("runtime-directory-restored", names=sorted(gone))
        for slot in self._slots.values():
            if changed.intersection(slot.spec.held):
                self._dismiss_standby(slot, now)
                self._tell_machine(slot, machine.Replace(), now)

    def _restore(self, gone: set[str]) -> None:
        """Raises `InstanceError` or `OSError`."""
        directory = self._spec.runtime_dir
        instance.prepare_directory(directory)
        self._home.watch()
        if instance.LOCK_NAME in gone:
            path = os.path.join(directory, instance.LOCK_NAME)
            lock = instance.InstanceLock.acquire(path)
            if lock is None:
                raise instance.InstanceError(f"{path} is another's by now")
            # The one before stays open: those who were born with it hold it as long as they live.
            self._lock = lock
        if instance.PID_NAME in gone:
            instance.write_pid_file(os.path.join(directory, instance.PID_NAME))
        if _CONTROL_NAME in gone:
            listener = control.listen(os.path.join(directory, _CONTROL_NAME))
            self._control.close()
            self._listen(listener)

    def _give_back(self) -> None:
        self._selector.close()
        for slot in self._slots.values():
            slot.kept.close()
        self._held.close()
        self._store.close()
        for _, write in self._log_channels.values():
            os.close(write)
        for name in (_CONTROL_NAME, instance.PID_NAME):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._spec.runtime_dir, name))

    def _was_away(self, by: float, now: float) -> None:
        """We were stopped, starved or suspended: nobody is accused of that time."""
        away, self._away = self._away, procfs.clocks()
        suspended = self._away - away
        self._back_at = now
        self._entry("watchdog-away", seconds=round(by, 3), suspended=round(suspended, 3))
        for slot in self._slots.values():
            slot.machine.postpone(by)
            if slot.alive is not None:
                slot.alive.mute_at += by
                slot.alive.judge.woke_late(by, now)

    # -- signals

    def _take_signals(self) -> None:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._signal_pipe = read
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGQUIT,
            signal.SIGCHLD,
        ):
            signal.signal(number, lambda _number, _frame: None)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # somebody else's habit is no reason to die
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._selector.register(read, selectors.EVENT_READ, (_SIGNALS, None, None))

    def _on_signals(self, now: float) -> None:
        numbers = set(os.read(self._signal_pipe, 512))
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            self._entry("stop-asked", by="signal")
            self._stop(now)
        if signal.SIGHUP in numbers:
            with contextlib.suppress(control.ControlError):  # said in the journal
                self._reload(now)
        if signal.SIGQUIT in numbers:
            self._entry("status", status=self._status())
        # Not now: a death of our own may lie in the same turn, and its fork comes first.
        self._strangers |= signal.SIGCHLD in numbers

    def _reap_strangers(self) -> bool:
        """Grandchildren whose parents are gone came to us; ours are reaped by their pidfds."""
        reaped = False
        for pid in set(procfs.children_of(os.getpid())) - self._pids():
            with contextlib.suppress(ChildProcessError):
                reaped |= os.waitpid(pid, os.WNOHANG) != (0, 0)
        return reaped

    def _pids(self) -> set[int]:
        """Every process that is ours and has not been reaped."""
        pids = {incarnation.pid for incarnation in self._living()} | {
            incarnation.pid for incarnation in self._dismissed
        }
        return pids | ({self._trial.pid} if self._trial is not None else set())

    def _living(self) -> list[Incarnation]:
        """Those that serve and those that stand by."""
        slots = self._slots.values()
        return [one for slot in slots for one in (slot.alive, slot.standby) if one is not None]

    # -- what children say

    def _read_lifeline(self, slot: Slot, now: float) -> None:
        """Take what lies in the pipe."""
        incarnation = slot.alive
        assert incarnation is not None
        newest: Beat | None = None
        try:
            for frame in self._read_frames(incarnation, now):
                if isinstance(frame, Beat):
                    newest = frame
                    incarnation.beat(frame, now)
                else:
                    self._on_said(slot, incarnation, frame.kind, frame.text, now)
        except CorruptLifeline as error:
            incarnation.said = str(error)
            self._selector.unregister(incarnation.up)
            self._obey_judge(slot, incarnation.judge.corrupt(now, str(error)), now)
            return
        if newest is not None:
            # Where they lie they are safe already; by themselves they would wake us twice for
            # every connection of a client.
            if slot.kept.limit:
                incarnation.drain_gifts(slot.kept)
                if slot.standby is not None and slot.kept.untold():
                    slot.standby.follow(slot.kept)
            own = newest._replace(duties=incarnation.witness.own_duties(newest.duties))
            self._obey_judge(slot, incarnation.judge.beat(own, now), now)
            for name in incarnation.witness.suspects(newest.duties):
                suspect = self._slots[name].alive
                if suspect is not None:
                    suspect.look(now)
            for accusation in incarnation.witness.accusations(newest.duties, now):
                self._accuse(slot, accusation, now)

    def _read_frames(self, incarnation: Incarnation, now: float) -> Iterator[Beat | Said]:
        """Raises `CorruptLifeline`."""
        for _ in range(_READS):
            try:
                data = os.read(incarnation.up, 16 * FRAME_SIZE)
            except BlockingIOError:
                return
            if not data:
                self._selector.unregister(incarnation.up)
                incarnation.mute_at = now + MUTE_TIMEOUT
                return
            yield from incarnation.decoder.feed(data)
            if len(data) < 16 * FRAME_SIZE:
                return  # an end of file raises another event

    def _on_said(
        self, slot: Slot, incarnation: Incarnation, kind: Kind, text: str, now: float
    ) -> None:
        if kind is Kind.READY:
            incarnation.judge.arm(now)
            slot.standby_at = now + _STANDBY_AFTER
            self._tell_machine(slot, machine.Ready(), now)
            self._advance(now)
        elif kind is Kind.SAY:
            incarnation.said = text
            self._tell({"progress": f"{slot.name}: {text}"})
        elif kind is Kind.ASKED and not self._tree.stopping:
            self._entry("stop-asked", by=slot.name)
            self._stop(now)
        elif kind is Kind.DUMPED and slot.machine.state is not State.STOPPING:
            # While it is stopping it was we who asked, and the report of its death has the stacks.
            self._dump_report(slot, incarnation, now)

    # -- verdicts

    def _obey_judge(self, slot: Slot, commands: list[JudgeCommand], now: float) -> None:
        incarnation = slot.alive
        for command in commands:
            if incarnation is None or incarnation is not slot.alive:
                return
            if isinstance(command, Look):
                facts = procfs.read_facts(incarnation.pid)
                self._obey_judge(slot, incarnation.judge.facts(facts, now), now)
            elif isinstance(command, Continue):
                incarnation.signal(signal.SIGCONT)
            elif isinstance(command, Note):
                verdict = command.verdict.value if command.verdict is not None else "ok"
                self._entry("verdict", child=slot.name, verdict=verdict, text=command.text)
            elif isinstance(command, Condemn):
                incarnation.condemned = command.verdict.value
                incarnation.diagnosis = command.text
                self._entry(
                    "condemned", child=slot.name, verdict=command.verdict.value, text=command.text
                )
                self._tell_machine(slot, machine.Condemned(command.verdict.value), now)

    def _accuse(self, witness: Slot, accusation: Accusation, now: float) -> None:
        """Whoever beats and does not serve is deaf, unless something else explains the trouble,
        or he has more to do than he can.

        Who asks while we or he himself or anybody on the way is away or just born, gets no
        answer and has proved nothing; who is silent is the judge's.  So is another on the way for
        whom something waits: it may be the answer.
        """
        assert witness.alive is not None
        on_the_way = [witness, *(self._slots[name] for name in witness.alive.witness.knows())]
        for slot in on_the_way:
            alive = slot.alive
            if (
                alive is None
                or not (slot.machine.state is State.UP or (slot is witness and self._is_new(slot)))
                or max(alive.quiet_until, self._back_at) > accusation.since
                or alive.is_silent(now)
            ):
                but = "was away meanwhile"
            elif slot.name not in accusation.accused and alive.neglects(now):
                but = "does not do what waits for it"
            else:
                continue
            self._entry(
                "not-condemned", child=", ".join(accusation.accused),
                text=f"{witness.name} gets no answer ({accusation.duty}), but {slot.name} {but}",
            )  # fmt: skip
            return
        for name in accusation.accused:
            slot = self._slots[name]
            assert slot.alive is not None  # it is on the way
            excuse = slot.alive.excuse(accusation.excused_by)
            if excuse:
                if now - slot.alive.excused_at >= _EXCUSE_INTERVAL:
                    slot.alive.excused_at = now
                    self._entry(
                        "not-condemned", child=name,
                        text=f"{witness.name} gets no answer ({accusation.duty}), but {name} "
                        f"{excuse}",
                    )  # fmt: skip
                continue
            slot.alive.condemned = Verdict.DEAF.value
            slot.alive.diagnosis = (
                f"{witness.name} gets no answer ({accusation.duty}) "
                f"since {now - accusation.since:.2f} s"
            )
            self._entry(
                "condemned", child=name, verdict=Verdict.DEAF.value, text=slot.alive.diagnosis
            )
            self._tell_machine(slot, machine.Condemned(Verdict.DEAF.value), now)

    def _is_new(self, slot: Slot) -> bool:
        """Whether it is on its way to serve for the first time, in a tree that has served.

        A witness gets no further while nobody answers it: to wait until it serves would be to
        wait for ever for those that it accuses.
        """
        return self._tree.ready and slot.machine.state is State.STARTING

    # -- deaths

    def _on_death(self, slot: Slot, now: float) -> None:
        incarnation = slot.alive
        assert incarnation is not None
        if incarnation.up in self._selector.get_map():
            self._contain(slot, lambda: self._read_lifeline(slot, now), now)
        self._contain(slot, lambda: incarnation.drain_gifts(slot.kept, dead=True), now)
        ended = incarnation.how_it_ended()
        self._unwatch(incarnation)
        slot.alive, slot.remains, slot.ended = None, incarnation, ended
        if incarnation.was_asked_to_end() and not self._tree.stopping:
            self._entry("stop-asked", by=slot.name)
            self._contain(None, lambda: self._stop(now), now)
        self._contain(slot, lambda: self._after_death(slot, ended, now), now)
        incarnation.reap()
        incarnation.close()  # what it said is still known; the report has been sent
        self._contain(None, self._end_orphans, now)
        self._contain(None, lambda: self._advance(now), now)

    def _after_death(self, slot: Slot, ended: machine.Gone, now: float) -> None:
        incarnation, before = slot.remains, slot.reason
        assert incarnation is not None
        slot.reason = incarnation.said if ended.code else ""
        if slot.reason and slot.reason == before and not self._tree.ready:
            # Twice the same reason in its own words: a third time would not change it.
            self._tell_machine(slot, machine.Dismiss(), now)
            self._tell_machine(slot, ended, now)
            if not self._tree.stopping:
                self._fail(f"{slot.name} does not start: {slot.reason}")
        else:
            self._tell_machine(slot, ended, now)

    def _end_orphans(self) -> None:
        """What the dead child had started came to us; it is not to outlive it."""
        ours = self._pids()
        if set(procfs.children_of(os.getpid())) <= ours:
            self._orphans = set()
            return
        spared = {os.fstat(incarnation.up).st_ino for incarnation in self._living()}
        # One that has not gone yet is killed once more, and said once.
        known, self._orphans = self._orphans, set(sweep.kill_orphans(ours, spared))
        if self._orphans - known:
            self._entry("orphans-killed", pids=sorted(self._orphans - known))

    # -- carrying out what a machine decided

    def _tell_machine(self, slot: Slot, event: machine.Event, now: float) -> None:
        """Whatever goes wrong with it is this child's, whosever news led to it."""
        self._contain(
            slot,
            lambda: self._carry_out(
                slot, slot.machine.receive(event, now, self._lot.random()), now
            ),
            now,
        )

    def _carry_out(self, slot: Slot, commands: list[machine.Command], now: float) -> None:
        for command in commands:
            if isinstance(command, machine.Spawn):
                self._spawn(slot, command.fresh, now)
            elif isinstance(command, machine.Ask) and slot.alive is not None:
                slot.alive.order(Order.YIELD if command.yielding or self._yielding else Order.STOP)
            elif isinstance(command, machine.Gather) and slot.alive is not None:
                self._gather(slot.alive)
                # Its handler writes there when it is done with the stacks, loop or no loop.
                data = (_EVIDENCE, slot, slot.alive)
                self._selector.register(slot.alive.wake, selectors.EVENT_READ, data)
            elif isinstance(command, machine.Kill) and slot.alive is not None:
                slot.alive.signal(signal.SIGKILL)
            elif isinstance(command, machine.ReportDeath):
                self._report_death(slot, now)
            elif isinstance(command, machine.Announce):
                self._announce(slot, command.note)
            elif isinstance(command, machine.GiveUp):
                self._exit = EXIT_GAVE_UP
                self._entry("giving-up", child=slot.name)
                if not self._told_ready:
                    said = slot.remains.said if slot.remains is not None else ""
                    self._tell({"error": f"{slot.name}: {said or 'dies again and again'}",
                                "code": EXIT_GAVE_UP})  # fmt: skip
                self._stop(now)

    @staticmethod
    def _gather(incarnation: Incarnation) -> None:
        """Look at it from outside, and have it write its stacks, also if it is stopped."""
        incarnation.snapshot = procfs.snapshot_text(incarnation.pid)
        if not incarnation.condemned:
            incarnation.condemned = glance(procfs.read_facts(incarnation.pid)).value
        incarnation.read_signals().discard(signal.SIGQUIT)  # of somebody else, before
        incarnation.signal(signal.SIGQUIT)
        incarnation.signal(signal.SIGCONT)

    def _read_evidence(self, slot: Slot, incarnation: Incarnation, now: float) -> None:
        if signal.SIGQUIT in incarnation.read_signals():
            self._selector.unregister(incarnation.wake)
            self._tell_machine(slot, machine.Gathered(), now)

    def _spawn(self, slot: Slot, fresh: bool, now: float) -> None:
        slot.number += 1
        incarnation = self._standby(slot, fresh, now)
        if incarnation is None:
            incarnation = Incarnation(slot.spec, slot.number, now, self._spec.beat_interval)
            try:
                incarnation.spawn(lambda ends: self._birth(slot, ends), fresh=fresh)
            except OSError as error:
                self._dismiss_standby(slot, now)
                reason = error.strerror or str(error)
                self._entry("spawn-failed", child=slot.name, reason=reason)
                self._tell_machine(slot, machine.SpawnFailed(reason), now)
                return
            self._watch(slot, incarnation)
            # Not before: the end of a process that shares our memory delays a fork.
            self._dismiss_standby(slot, now)
        slot.alive, slot.facts = incarnation, None
        self._tell_machine(slot, machine.Spawned(incarnation.pid), now)

    def _birth(self, slot: Slot, ends: ChildEnds, *, standby: bool = False) -> Birth:
        names = (LOG_CHILD,) if slot.name == LOG_CHILD else slot.spec.held
        return Birth(
            name=slot.name,
            incarnation=slot.number,
            title=self._spec.title or self._spec.name,
            comm=self._spec.comm or self._spec.name,
            watchdog_pid=os.getpid(),
            beat_interval=self._spec.beat_interval,
            target=slot.spec.target,
            settings=slot.spec.settings,
            duties=slot.spec.duties,
            oom_score_adj=slot.spec.oom_score_adj,
            log_level=logging.getLogger().level,
            up=ends.up,
            down=ends.down,
            gifts=ends.gifts,
            stacks=ends.stacks,
            wake=ends.wake,
            log=self._log_channels[slot.name][1],
            lock=self._lock.fd,
            held={name: self._held.descriptors(name) for name in names},
            given=slot.kept.follow() if standby else slot.kept.descriptors,
            standby=standby,
            confinement=slot.spec.confinement,
        )

    def _watch(self, slot: Slot, incarnation: Incarnation) -> None:
        data = (slot, incarnation)
        self._selector.register(incarnation.up, selectors.EVENT_READ, (_LIFELINES, *data))
        self._selector.register(incarnation.pidfd, selectors.EVENT_READ, (_DEATHS, *data))

    def _unwatch(self, incarnation: Incarnation) -> None:
        for fd in (incarnation.up, incarnation.pidfd, incarnation.wake):
            with contextlib.suppress(KeyError):
                self._selector.unregister(fd)

    # -- successors that are there before they are needed

    def _expire_standby(self, slot: Slot, now: float) -> None:
        """One is to be forked, or the one that was is not prepared in time."""
        standby = slot.standby
        if standby is None:
            self._fork_standby(slot, now)
        elif not standby.condemned:
            self._gather(standby)
            slot.standby_at = now + machine.EVIDENCE_TIMEOUT
        else:
            self._entry(
                "standby-failed", child=slot.name,
                reason=f"not prepared within {slot.spec.start_timeout:g} s",
            )  # fmt: skip
            standby.signal(signal.SIGKILL)

    def _fork_standby(self, slot: Slot, now: float) -> None:
        if not slot.spec.standby or slot.standby is not None or self._tree.stopping:
            return
        if not self._rollover.done:
            # What is up is still of the code before.
            slot.standby_at = now + _STANDBY_AGAIN
            return
        if slot.machine.state is not State.UP:
            return  # as soon as it is
        incarnation = Incarnation(slot.spec, slot.number + 1, now, self._spec.beat_interval)
        try:
            incarnation.spawn(lambda ends: self._birth(slot, ends, standby=True), fresh=False)
        except OSError as error:
            self._entry("standby-failed", child=slot.name, reason=error.strerror or str(error))
            slot.standby_at = now + _STANDBY_AGAIN
            return
        slot.standby, slot.standby_at = incarnation, now + slot.spec.start_timeout
        self._watch(slot, incarnation)

    def _standby(self, slot: Slot, fresh: bool, now: float) -> Incarnation | None:
        """The standby, serving from now on; None if there is none of use.

        ``fresh``: another address layout is wanted, and it has that of the one that died."""
        standby = slot.standby
        if (
            standby is None
            or fresh
            or slot.kept.untold() > _HAND_OVER_MOST
            or not standby.serve(slot.number, slot.kept, now)
        ):
            return None
        slot.standby = None
        # Woken by us, it waits for our processor; what is left for us to do can wait for it.
        os.sched_yield()
        return standby

    def _hear_standby(self, slot: Slot, priority: int, now: float) -> None:
        standby = slot.standby
        assert standby is not None
        if priority == _LIFELINES:
            self._read_standby(slot, standby, now)
        else:
            slot.standby, slot.standby_at = None, now + _STANDBY_AGAIN
            if standby.up in self._selector.get_map():
                self._read_standby(slot, standby, now)
            ended = standby.how_it_ended()
            if standby.was_asked_to_end() and not self._tree.stopping:
                self._entry("stop-asked", by=slot.name)
                self._stop(now)
            self._report(slot, standby, now, ended)
            self._bury(standby)

    def _read_standby(self, slot: Slot, standby: Incarnation, now: float) -> None:
        """All it may say is what others' signals asked of it, and why it cannot go on."""
        try:
            for frame in self._read_frames(standby, now):
                if isinstance(frame, Beat) or frame.kind is Kind.READY:
                    raise CorruptLifeline("it serves before its turn: it does not stand by")
                if frame.kind is Kind.PREPARED:
                    standby.prepared, standby.condemned = True, ""
                    slot.standby_at = math.inf
                self._on_said(slot, standby, frame.kind, frame.text, now)
        except CorruptLifeline as error:
            self._entry("standby-failed", child=slot.name, reason=str(error))
            self._dismiss_standby(slot, now)
            slot.standby_at = now + _STANDBY_AGAIN

    def _dismiss_standbys(self, now: float) -> None:
        for slot in self._slots.values():
            self._dismiss_standby(slot, now)

    def _dismiss_standby(self, slot: Slot, now: float) -> None:
        """Kill it: it is not what is wanted any more."""
        standby, slot.standby = slot.standby, None
        slot.standby_at = now + _STANDBY_AFTER
        if standby is not None:
            self._dismissed.add(standby)
            standby.signal(signal.SIGKILL)

    def _on_dismissed(self, slot: Slot, standby: Incarnation, now: float) -> None:
        asked = standby.was_asked_to_end()  # in the moment of its dismissal
        self._bury(standby)
        if asked and not self._tree.stopping:
            self._entry("stop-asked", by=slot.name)
            self._stop(now)

    def _bury(self, incarnation: Incarnation) -> None:
        self._dismissed.discard(incarnation)
        self._unwatch(incarnation)
        incarnation.reap()
        incarnation.close()

    # -- what is written down

    def _entry(self, event: str, **more: Any) -> None:
        self._log_pipe.send_entry({"event": event, **more})

    def _announce(self, slot: Slot, note: str) -> None:
        child = slot.machine
        more: dict[str, Any] = {"note": note} if note else {}
        if slot.alive is not None:
            more["pid"] = slot.alive.pid
        self._entry(
            "state", child=slot.name, state=child.state.value, why=child.why.value,
            restarts=child.restarts, **more,
        )  # fmt: skip
        if self._told_ready and not self._tree.stopping:
            why = f" ({child.why.value})" if child.why.value else ""
            self._manager.status(f"{self._state()}: {slot.name} {child.state.value}{why}")

    def _report_death(self, slot: Slot, now: float) -> None:
        if slot.remains is not None and slot.ended is not None:
            self._report(slot, slot.remains, now, slot.ended)

    def _dump_report(self, slot: Slot, incarnation: Incarnation, now: float) -> None:
        """An operator asked for the stacks (QUIT); the child goes on."""
        if now - incarnation.dumped_at < _DUMP_INTERVAL:
            return
        incarnation.dumped_at = now
        incarnation.snapshot = procfs.snapshot_text(incarnation.pid)
        self._report(slot, incarnation, now, machine.Gone(None, None), verdict="asked")
        incarnation.forget_stacks()

    def _report(
        self,
        slot: Slot,
        incarnation: Incarnation,
        now: float,
        ended: machine.Gone,
        verdict: str = "",
    ) -> None:
        try:
            self._log_pipe.send_report(self._build_report(slot, incarnation, now, ended, verdict))
        except Exception as error:  # noqa: BLE001 - evidence is never worth the tree
            self._entry("report-failed", child=slot.name, reason=repr(error))

    @staticmethod
    def _build_report(
        slot: Slot,
        incarnation: Incarnation,
        now: float,
        ended: machine.Gone,
        verdict: str,
    ) -> dict[str, Any]:
        return report.build(
            at=time.time(),
            child=slot.name,
            incarnation=incarnation.number,
            pid=incarnation.pid,
            verdict=verdict or incarnation.condemned or "dead",
            why=slot.machine.why.value,
            signal=ended.signal,
            exit_code=ended.code,
            rusage=incarnation.reap() if verdict != "asked" else {},
            stacks=incarnation.read_stacks(),
            snapshot=incarnation.snapshot,
            beats=[(now - at, beat) for at, beat in incarnation.beats],
            duties=slot.spec.duties,
            uptime=round(now - incarnation.started_at, 3),
            restarts=incarnation.number - 1,
            said=incarnation.said or None,
            diagnosis=incarnation.diagnosis or None,
        )

    # -- the control socket

    def _answer(self, verb: str, args: dict[str, Any]) -> Any:
        now = time.monotonic()
        if verb == "status":
            return self._status()
        if verb == "stop":
            self._entry("stop-asked", by="control")
            # One that is already stopping may be told only that nobody comes after it.
            self._yielding = bool(args.get("yield")) and (self._yielding or not self._tree.stopping)
            self._stop(now)
            return {"stopping": True, "pid": os.getpid()}
        if verb == "reload":
            return self._reload(now)
        if verb == "restart":
            return self._restart(str(args.get("name", "")), now)
        if verb == "dump":
            slot = self._slot(str(args.get("name", "")))
            if slot.alive is None:
                raise control.ControlError(f"{slot.name} is {slot.machine.state.value}")
            slot.alive.signal(signal.SIGQUIT)
            return {"pid": slot.alive.pid}
        if verb == "upgrade":
            return self._begin_trial()
        raise control.ControlError(f"unknown verb {verb!r}")

    def _slot(self, name: str) -> Slot:
        slot = self._slots.get(name)
        if slot is None:
            known = ", ".join(self._slots)
            raise control.ControlError(f"no child is named {name!r}; there are {known}")
        return slot

    def _restart(self, name: str, now: float) -> dict[str, Any]:
        slot = self._slot(name)
        if self._tree.stopping:
            raise control.ControlError("the service is stopping")
        self._entry("restart-asked", child=name)
        self._tell_machine(slot, machine.Replace(), now)
        return {"name": name, "incarnation": slot.number}

    def _reload(self, now: float) -> dict[str, Any]:
        self._manager.reloading()
        try:
            return self._reload_spec(now)
        finally:
            self._manager.ready(self._state())

    def _reload_spec(self, now: float) -> dict[str, Any]:
        if self._tree.stopping:
            raise control.ControlError("the service is stopping")
        self._dismiss_standbys(now)  # they were prepared for what was there before
        replaced: list[str] = []
        if self._on_reload is not None:
            try:
                replaced = self._apply(self._on_reload(), now)
            except Exception as error:
                # Whatever is wrong with what is new, what is old goes on.
                self._entry("reload-refused", reason=str(error))
                raise control.ControlError(f"reload refused: {error}") from error
        for slot in self._slots.values():
            if slot.name not in replaced and slot.alive is not None:
                slot.alive.order(Order.RELOAD)
        self._entry("reloaded", replaced=replaced)
        return {"replaced": replaced}

    def _apply(self, spec: TreeSpec, now: float) -> list[str]:
        """Go over to a new spec of the same children; returns the names of those replaced."""
        names = [child.name for child in self._all_children(spec)]
        if names != list(self._slots):
            raise control.ControlError(
                "other children than now take a restart: " + ", ".join(names)
            )
        changed, refused = set(), []
        for held in spec.held:
            try:
                if self._held.open(held):
                    changed.add(held.name)
            except Exception as error:  # noqa: BLE001 - an opener is the daemon author's
                refused.append(f"{held.name} stays what it was: {error}")
        wanted = {held.name for held in spec.held}
        for name in set(self._held.counts()) - wanted:
            self._store.release(name)
        self._held.keep_only({LOG_CHILD, *wanted})
        for held in spec.held:
            if held.stored and held.name in changed:
                self._store.hold(held.name, self._held.descriptors(held.name))
        self._spec = spec
        replaced = []
        for child in self._all_children(spec):
            slot = self._slots[child.name]
            if child != slot.spec or changed.intersection(child.held):
                slot.machine.take_spec(child)
                slot.kept.limit = child.keep_limit
                self._tell_machine(slot, machine.Replace(), now)
                replaced.append(child.name)
        if refused:
            raise control.ControlError("; ".join([*refused, f"replaced: {replaced}"]))
        return replaced

    # -- going over to new code

    def _begin_trial(self) -> dict[str, Any]:
        """Try the program on disk in a process of its own; `_end_trial` goes on."""
        plan = self._spec.upgrade
        if plan is None:
            raise control.ControlError("this tree does not know how to upgrade itself")
        if self._trial is not None or not self._rollover.done:
            raise control.ControlError("an upgrade is under way")
        if self._state() != State.UP.value:
            raise control.ControlError(f"the service is {self._state()}, not up")
        try:
            self._trial = Trial(plan.trial)
        except OSError as error:
            raise control.ControlError(f"the new code cannot be tried: {error}") from error
        self._trial_deadline = time.monotonic() + _TRIAL_TIMEOUT
        self._selector.register(self._trial.pidfd, selectors.EVENT_READ, (_TRIAL, None, None))
        self._entry("upgrade-trial", command=list(plan.trial))
        return {"trying": True, "image": self._image, "pid": os.getpid()}

    def _end_trial(self) -> None:
        trial, plan = self._trial, self._spec.upgrade
        assert trial is not None
        assert plan is not None
        self._selector.unregister(trial.pidfd)
        self._trial, self._trial_deadline = None, math.inf
        self._upgrade_failed = trial.end()
        if self._upgrade_failed or self._tree.stopping:
            self._entry("upgrade-refused", reason=self._upgrade_failed or "stopping")
            return
        self._exec(plan, self._archive, old=False)

    def _go_back(self, name: str) -> None:
        """The new code has a child that does not come up: the old one takes over again."""
        self._rollover = Rollover([])
        plan = self._spec.upgrade
        if plan is None or self._previous < 0:
            self._entry("upgrade-stuck", child=name)
            return
        self._entry("upgrade-undone", child=name)
        os.environ["PKVPN_UPGRADE_FAILED"] = f"{name} does not come up with the new code"
        self._exec(plan, self._previous, old=True)

    def _exec(self, plan: Upgrade, archive: int, *, old: bool) -> None:
        """Become the next image.  If that fails, nothing has changed and this one goes on."""
        self._dismiss_standbys(time.monotonic())  # they are of this code
        # Who goes back finds children of the code that it undoes.
        table = upgrade.write_table({**self._table(archive), "replace": old})
        self._entry("upgrade-exec", image=self._image + 1)
        signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
        try:
            upgrade.exec_image(plan, archive, table, self._descriptors(), old=old)
        except OSError as error:
            self._upgrade_failed = str(error)
            self._entry("upgrade-refused", reason=str(error))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def _table(self, archive: int) -> dict[str, Any]:
        return {
            "image": self._image,
            "started_at": self._started_at,
            "archive": archive,
            "lock": self._lock.fd,
            "log": self._log_channels,
            "control": self._control_fd,
            "ledgers": self._store.ledgers(),
            "held": {
                name: self._held.descriptors(name)
                for name in self._held.counts()
                if name != LOG_CHILD
            },
            "slots": [
                {
                    "name": slot.name,
                    "number": slot.number,
                    "restarts": slot.machine.restarts,
                    "up": slot.machine.state is State.UP,
                    "kept": {key.hex(): fd for key, fd in slot.kept.descriptors.items()},
                    "alive": slot.alive.as_table() if slot.alive is not None else None,
                }
                for slot in self._slots.values()
            ],
        }

    def _descriptors(self) -> set[int]:
        """All that the next image must find open."""
        found = {self._lock.fd, self._control_fd, self._archive, self._previous}
        found.update(write for _, write in self._log_channels.values())
        for name in self._held.counts():
            found.update(self._held.descriptors(name))
        for slot in self._slots.values():
            found.update(slot.kept.descriptors.values())
            if slot.alive is not None:
                found.update(slot.alive.descriptors())
        return found - {-1}

    def _adopt(self, slot: Slot, old: dict[str, Any], now: float) -> None:
        slot.number = old["number"]
        slot.kept.descriptors.update({bytes.fromhex(key): fd for key, fd in old["kept"].items()})
        if old["alive"] is None:
            return
        incarnation = Incarnation.from_table(slot.spec, old["alive"], self._spec.beat_interval)
        slot.machine.adopt(restarts=old["restarts"], up=old["up"], now=now)
        slot.alive = incarnation
        if old["up"]:
            incarnation.judge.arm(now)
        self._watch(slot, incarnation)

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "name": self._spec.name,
            "state": self._state(),
            "good": self._is_good(),
            "watchdog": {
                "pid": os.getpid(),
                "uptime": round(now - self._started_at, 3),
                "image": self._image,
                "upgrade": self._upgrade_state(),
                "held": self._held.counts(),
            },
            "children": [slot.status(now) for slot in self._slots.values()],
            **self._extra_status(),
        }

    def _upgrade_state(self) -> str:
        if self._trial is not None:
            return "trying"
        if not self._rollover.done:
            return "replacing children"
        return f"failed: {self._upgrade_failed}" if self._upgrade_failed else "none"

    def _state(self) -> str:
        """Where the tree is, in the words for a child: that of the child that is worst off."""
        if self._tree.stopping:
            return State.STOPPING.value
        if not self._tree.ready:
            return State.STARTING.value
        found = {one.machine.state for one in self._slots.values() if not is_over(one.machine)}
        worst = (State.FAILED, State.FAILING, State.BACKOFF, State.STOPPING, State.STARTING)
        return next((state.value for state in worst if state in found), State.UP.value)

    def _is_good(self) -> bool:
        """Whether there is nothing that only another watchdog could mend."""
        return self._told_ready and (
            self._tree.stopping
            or all(
                slot.machine.state is State.UP or is_over(slot.machine)
                for slot in self._slots.values()
                if slot.spec.vital
            )
        )

    def _extra_status(self) -> dict[str, Any]:
        return self._more_status() if self._more_status is not None else {}

    @staticmethod
    def _senders(spec: TreeSpec) -> tuple[str, ...]:
        """Whoever logs."""
        return (WATCHDOG, LOG_CHILD, *(child.name for child in spec.children))

    @staticmethod
    def _all_children(spec: TreeSpec) -> list[ChildSpec]:
        log = ChildSpec(
            LOG_CHILD,
            log_main,
            settings=replace(
                spec.log or LogSettings(state_dir=spec.state_dir),
                senders=Supervisor._senders(spec),
            ),
            duties=("write",),
            stop_timeout=2.0,
            confinement=spec.log_confinement,
            vital=False,  # a disk that is full is no reason to end what serves
        )
        return [log, *spec.children]


# --- pieces of the shell that need no supervisor ------------------------------------------


def _priority(key: selectors.SelectorKey) -> int:
    return key.data[0] if isinstance(key.data, tuple) else _CONTROL


def _log_channel() -> tuple[int, int]:
    read, write = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )
    for end in (read, write):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _LOG_BUFFER)
    return read.detach(), write.detach()


def _adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
