"""The shell of the watchdog on Windows: the decisions are those of every system.

Strategy: as `pkvpn.watchdog.supervisor`, with what Windows has.  Children are spawned, in a job
that ends with us; beats and orders go over one socket to each; the end of a process is asked of its
handle whenever something has happened on that socket, and with each turn of the loop.  Listening
sockets are opened here and duplicated into each incarnation, so whoever connects while nobody
serves waits.

Not here, since Windows has nothing to make it of: standbys (a fork), descriptors that are given
and go on in a successor (a TLS connection of OpenSSL's lives in one process), upgrades (an exec).
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import math
import os
import queue
import random
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
from multiprocess import get_context

from pkvpn.watchdog import machine, report
from pkvpn.watchdog.control import ControlError
from pkvpn.watchdog.journal import make_entry
from pkvpn.watchdog.lifeline import (
    FRAME_SIZE,
    CorruptLifeline,
    Kind,
    LifelineDecoder,
    Order,
    encode_order,
    next_moment,
)
from pkvpn.watchdog.machine import ChildMachine, State
from pkvpn.watchdog.spec import ChildSpec, TreeSpec
from pkvpn.watchdog.tree import Tree
from pkvpn.watchdog.verdict import Beat, Condemn, Facts, Judge, Limits, Look, Note
from pkvpn.watchdog.verdict import Command as JudgeCommand
from pkvpn.windows.child import Birth, run_child
from pkvpn.windows.control import Server
from pkvpn.windows.handles import END_SIGNALS, AlreadyRunning, Job, Passed, only_one

_log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_START_FAILED = 1
EXIT_GAVE_UP = 75

# Between the end of a socket and that of its process; who lives on for longer is mute.
_MUTE_TIMEOUT = 0.2
_LOOK_AGAIN = 0.01
_MAX_STACKS = 64 * 1024
# Exit codes from here on are exceptions that nobody handled (access violation, stack overflow).
_WILD = 0xC0000000
_JOURNAL_BYTES, _JOURNAL_KEEP = 1_000_000, 4
_MAX_ENTRIES = 10_000

Tell = Callable[[dict[str, Any]], None]

_spawn = get_context("spawn")


class Incarnation:
    """One living process of a child, and the watchdog's end of the socket between them."""

    def __init__(self, spec: ChildSpec, number: int, now: float, beat_interval: float) -> None:
        self.spec = spec
        self.number = number
        self.started_at = now
        self.said = ""
        self.condemned = ""
        self.diagnosis = ""
        self.beats: list[tuple[float, Beat]] = []
        self.mute_at = math.inf
        self.orders = 0
        self.decoder = LifelineDecoder(len(spec.duties))
        self.judge = Judge(
            0,
            Limits(
                beat_interval=beat_interval,
                hang_timeout=spec.hang_timeout,
                stopped_timeout=spec.stopped_timeout,
                deaf_timeout=spec.deaf_timeout,
                duty_names=spec.duties,
            ),
        )

    def spawn(self, birth: Callable[[Passed], Birth], job: Job) -> None:
        """Make the process.  Raises `OSError`; then nothing is left of it.

        It takes until that process has read what it is born with.
        """
        self.line, theirs = socket.socketpair()
        self.line.setblocking(False)
        try:
            self.process: Any = _spawn.Process(
                target=run_child, args=(birth(Passed(theirs)),), name=self.spec.name
            )
            self.process.start()
            self.pid = self.process.pid or 0
            job.take_in(self.process.sentinel)
        except BaseException:
            if self.process.pid is not None:
                self.process.kill()
                self.process.join()
            self.line.close()
            raise
        finally:
            theirs.close()

    def order(self, order: Order) -> None:
        """It has room for thousands of orders, or it is gone."""
        self.orders += 1
        try:
            self.line.send(encode_order(order, self.orders))
        except OSError:
            pass

    def how_it_ended(self) -> machine.Gone | None:
        """None: it lives."""
        code = self.process.exitcode
        if code is None:
            return None
        return machine.Gone(code, None, wild=code >= _WILD)

    def close(self) -> None:
        self.line.close()
        self.process.close()


class Slot:
    """One child of the tree over all its incarnations."""

    def __init__(self, spec: ChildSpec) -> None:
        self.machine = ChildMachine(spec)
        self.alive: Incarnation | None = None
        self.number = 0
        self.said = ""  # last words of the incarnation before
        self.ended: machine.Gone | None = None

    @property
    def spec(self) -> ChildSpec:
        return self.machine.spec

    @property
    def name(self) -> str:
        return self.spec.name

    def status(self, now: float) -> dict[str, Any]:
        child, alive = self.machine, self.alive
        status: dict[str, Any] = {
            "name": self.name,
            "pid": None,
            "state": child.state.value,
            "why": child.why.value,
            "restarts": child.restarts,
            "undead": child.undead,
        }
        if alive is None:
            return status
        status |= {
            "pid": alive.pid,
            "verdict": alive.condemned or alive.judge.verdict,
            "uptime": round(now - alive.started_at, 3),
        }
        if alive.beats:
            at, beat = alive.beats[-1]
            status["last_beat_age"] = round(now - at, 3)
            status["duties"] = {
                name: {"done": done, "waiting": round(now - since, 3) if since else 0.0}
                for name, (done, since) in zip(self.spec.duties, beat.duties, strict=True)
            }
        try:
            status["rss"] = psutil.Process(alive.pid).memory_info().rss
        except psutil.Error:
            pass  # it has just ended
        return status


class Supervisor:
    """Runs one tree from the first child to the last."""

    def __init__(self, spec: TreeSpec, tell: Tell, status: Callable[[], dict[str, Any]]) -> None:
        self._spec = spec
        self._tell = tell
        self._more_status = status
        self._started_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._job = Job()
        self._lot = random.Random()  # noqa: S311 - jitter
        self._exit = EXIT_OK
        self._told_ready = False
        self._held: dict[str, list[socket.socket]] = {}
        self._slots = {child.name: Slot(child) for child in spec.children}
        self._by_machine = {id(slot.machine): slot for slot in self._slots.values()}
        self._tree = Tree([slot.machine for slot in self._slots.values()])
        self._journal = _Journal(os.path.join(spec.state_dir, "journal.jsonl"))
        self._wake, self._waker = socket.socketpair()

    # -- the life of the tree

    def run(self) -> int:
        """Bring the tree up, keep it up until a stop, and return the exit code."""
        spec = self._spec
        for name in ("stacks", "log"):
            os.makedirs(os.path.join(spec.state_dir, name), exist_ok=True)
        self._take_signals()
        try:
            for held in spec.held:
                self._held[held.name] = [socket.socket(fileno=fd) for fd in held.open()]
            control = Server(spec.runtime_dir, self._selector, self._answer)
        except OSError as error:
            self._tell({"error": str(error), "code": EXIT_START_FAILED})
            return EXIT_START_FAILED
        self._entry("starting", pid=os.getpid())
        try:
            self._advance(time.monotonic())
            self._loop(control)
        finally:
            control.close()
            self._selector.close()
            for socks in self._held.values():
                for sock in socks:
                    sock.close()
            self._entry("ended", code=self._exit)
            self._journal.close()
        return self._exit

    def ask_to_stop(self) -> None:
        """To be called by any thread."""
        self._waker.send(b"!")

    def _take_signals(self) -> None:
        """Ctrl-C and Ctrl-Break of the console; a service is asked by `ask_to_stop`."""
        for one in (self._wake, self._waker):
            one.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_wake)
        if threading.current_thread() is not threading.main_thread():
            return  # of a service: it has no console, and Python takes signals in that thread only
        for number in END_SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def _on_wake(self) -> None:
        if self._wake.recv(512):
            self._entry("stop-asked", by="signal")
            self._stop(time.monotonic())

    def _loop(self, control: Server) -> None:
        asleep_at, timeout = time.monotonic(), 0.0
        while not self._tree.over:
            events = self._selector.select(timeout)
            now = time.monotonic()
            away = now - asleep_at - timeout
            if away > self._spec.beat_interval:
                self._was_away(away, now)
            for key, mask in events:
                if isinstance(key.data, Slot):
                    self._read(key.data, now)
                elif not control.handle(key, mask):
                    key.data()
            for slot in self._slots.values():
                self._expire(slot, now)
            self._advance(now)
            asleep_at = time.monotonic()
            if asleep_at - now > self._spec.beat_interval:
                # A start takes long enough for beats of the others to lie there.
                self._was_away(asleep_at - now, asleep_at)
                timeout = 0.0
            else:
                timeout = max(0.0, self._next_deadline(asleep_at) - asleep_at)

    def _next_deadline(self, now: float) -> float:
        nearest = next_moment(now, self._spec.beat_interval)
        for slot in self._slots.values():
            own = slot.machine.next_deadline()
            nearest = min(nearest, own if own is not None else math.inf)
            if slot.alive is not None:
                if slot.alive.mute_at < math.inf:
                    nearest = min(nearest, now + _LOOK_AGAIN)
                if slot.machine.state is State.UP:
                    verdict = slot.alive.judge.next_deadline()
                    nearest = min(nearest, verdict if verdict is not None else math.inf)
        return nearest

    def _was_away(self, by: float, now: float) -> None:
        """We were stopped, starved or busy: nobody is accused of that time."""
        self._entry("watchdog-away", seconds=round(by, 3))
        for slot in self._slots.values():
            slot.machine.postpone(by)
            if slot.alive is not None:
                slot.alive.mute_at += by
                slot.alive.judge.woke_late(by, now)

    def _advance(self, now: float) -> None:
        while told := self._tree.advance():
            for child, event in told:
                self._tell_machine(self._by_machine[id(child)], event, now)
        if self._tree.ready and not self._told_ready:
            self._told_ready = True
            self._entry("ready", seconds=round(now - self._started_at, 3))
            self._tell({"ready": True, "pid": os.getpid(), **self._more_status()})
        blocked = self._tree.blocked_by()
        if blocked is not None:
            slot = self._by_machine[id(blocked)]
            why = slot.said or (f"exit code {slot.ended.code}" if slot.ended else "it never lived")
            self._exit = EXIT_START_FAILED
            self._entry("start-failed", child=slot.name, reason=why)
            self._tell({"error": f"{slot.name} does not start: {why}", "code": EXIT_START_FAILED})
            self._stop(now)

    def _stop(self, now: float) -> None:
        for child, event in self._tree.stop():
            self._tell_machine(self._by_machine[id(child)], event, now)

    # -- what children say, and how they end

    def _read(self, slot: Slot, now: float) -> None:
        """Take what lies in the socket."""
        alive = slot.alive
        if alive is None or alive.mute_at < math.inf:
            return  # gone earlier in this very turn
        try:
            data = alive.line.recv(16 * FRAME_SIZE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._selector.unregister(alive.line)
            alive.mute_at = now + _MUTE_TIMEOUT
            return
        try:
            frames = alive.decoder.feed(data)
        except CorruptLifeline as error:
            alive.said = str(error)
            self._obey(slot, alive.judge.corrupt(now, str(error)), now)
            return
        for frame in frames:
            if isinstance(frame, Beat):
                alive.beats = [*alive.beats[-9:], (now, frame)]
            elif frame.kind is Kind.READY:
                alive.judge.arm(now)
                self._tell_machine(slot, machine.Ready(), now)
            elif frame.kind is Kind.SAY:
                alive.said = frame.text
                self._tell({"progress": f"{slot.name}: {frame.text}"})
        if frames and isinstance(frames[-1], Beat):
            self._obey(slot, alive.judge.beat(frames[-1], now), now)

    def _expire(self, slot: Slot, now: float) -> None:
        alive = slot.alive
        if alive is not None and (ended := alive.how_it_ended()) is not None:
            self._on_death(slot, alive, ended, now)
        self._carry_out(slot, slot.machine.expire(now, self._lot.random()), now)
        if slot.alive is not None and slot.alive.mute_at <= now:
            slot.alive.mute_at = now + _MUTE_TIMEOUT
            self._obey(slot, slot.alive.judge.mute(now), now)
        if slot.alive is not None and slot.machine.state is State.UP:
            self._obey(slot, slot.alive.judge.expire(now), now)

    def _on_death(self, slot: Slot, alive: Incarnation, ended: machine.Gone, now: float) -> None:
        if alive.mute_at == math.inf:
            self._read(slot, now)  # its last words
        if alive.mute_at == math.inf:
            self._selector.unregister(alive.line)
        slot.alive, slot.said, slot.ended = None, alive.said, ended
        # Before the next one of the name writes its own there.
        stacks = self._read_stacks(slot)
        report_it = False
        for command in slot.machine.receive(ended, now, self._lot.random()):
            if isinstance(command, machine.ReportDeath):
                report_it = True
            else:
                self._carry_out(slot, [command], now)
        if report_it:
            self._report(slot, alive, ended, stacks, now)
        alive.close()

    def _obey(self, slot: Slot, commands: list[JudgeCommand], now: float) -> None:
        alive = slot.alive
        for command in commands:
            if alive is None or alive is not slot.alive:
                return
            if isinstance(command, Look):
                # Windows does not say what a thread waits for: silence is all there is to go by.
                self._obey(slot, alive.judge.facts(Facts(), now), now)
            elif isinstance(command, Note):
                verdict = command.verdict.value if command.verdict is not None else "ok"
                self._entry("verdict", child=slot.name, verdict=verdict, text=command.text)
            elif isinstance(command, Condemn):
                alive.condemned, alive.diagnosis = command.verdict.value, command.text
                self._entry(
                    "condemned", child=slot.name, verdict=command.verdict.value, text=command.text
                )
                self._tell_machine(slot, machine.Condemned(command.verdict.value), now)

    # -- carrying out what a machine decided

    def _tell_machine(self, slot: Slot, event: machine.Event, now: float) -> None:
        self._carry_out(slot, slot.machine.receive(event, now, self._lot.random()), now)

    def _carry_out(self, slot: Slot, commands: list[machine.Command], now: float) -> None:
        for command in commands:
            if isinstance(command, machine.Spawn):
                self._start(slot, now)
            elif isinstance(command, machine.Announce):
                self._announce(slot, command.note)
            elif isinstance(command, machine.GiveUp):
                self._exit = EXIT_GAVE_UP
                self._entry("giving-up", child=slot.name)
                self._stop(now)
            elif slot.alive is None:
                continue
            elif isinstance(command, machine.Ask):
                slot.alive.order(Order.YIELD if command.yielding else Order.STOP)
            elif isinstance(command, machine.Kill):
                slot.alive.process.kill()
            elif (
                isinstance(command, machine.Gather) and slot.machine.phase is machine.Phase.EVIDENCE
            ):
                # Its stacks are there: a thread of its own wrote them before it was condemned.
                self._tell_machine(slot, machine.Gathered(), now)

    def _start(self, slot: Slot, now: float) -> None:
        slot.number += 1
        alive = Incarnation(slot.spec, slot.number, now, self._spec.beat_interval)
        try:
            alive.spawn(lambda line: self._birth(slot, line), self._job)
        except OSError as error:
            reason = error.strerror or str(error)
            self._entry("spawn-failed", child=slot.name, reason=reason)
            self._tell_machine(slot, machine.SpawnFailed(reason), now)
            return
        slot.alive = alive
        self._selector.register(alive.line, selectors.EVENT_READ, slot)
        self._tell_machine(slot, machine.Spawned(alive.pid), now)

    def _birth(self, slot: Slot, line: Passed) -> Birth:
        return Birth(
            name=slot.name,
            incarnation=slot.number,
            beat_interval=self._spec.beat_interval,
            hang_timeout=slot.spec.hang_timeout,
            target=slot.spec.target,
            settings=slot.spec.settings,
            duties=slot.spec.duties,
            line=line,
            stacks=self._stacks_of(slot.name),
            log=os.path.join(self._spec.state_dir, "log", f"{slot.name}.log"),
            log_level=logging.getLogger().level,
            held={name: [Passed(sock) for sock in self._held[name]] for name in slot.spec.held},
        )

    # -- what is written down

    def _stacks_of(self, name: str) -> str:
        return os.path.join(self._spec.state_dir, "stacks", name)

    def _read_stacks(self, slot: Slot) -> str:
        try:
            with open(self._stacks_of(slot.name), encoding="utf-8", errors="replace") as file:
                return file.read(_MAX_STACKS)
        except OSError:
            return ""

    def _report(
        self, slot: Slot, dead: Incarnation, ended: machine.Gone, stacks: str, now: float
    ) -> None:
        self._journal.write_report(
            os.path.join(self._spec.state_dir, "crashes"),
            report.build(
                at=time.time(),
                child=slot.name,
                incarnation=dead.number,
                pid=dead.pid,
                verdict=dead.condemned or "dead",
                why=slot.machine.why.value,
                exit_code=ended.code,
                stacks=stacks,
                beats=[(now - at, beat) for at, beat in dead.beats],
                duties=slot.spec.duties,
                uptime=round(now - dead.started_at, 3),
                restarts=dead.number - 1,
                said=dead.said or None,
                diagnosis=dead.diagnosis or None,
            ),
        )

    def _entry(self, event: str, **more: Any) -> None:
        entry = make_entry(event, wall=time.time(), mono=time.monotonic(), **more)
        self._journal.write(entry)

    def _announce(self, slot: Slot, note: str) -> None:
        child = slot.machine
        self._entry(
            "state", child=slot.name, state=child.state.value, why=child.why.value,
            restarts=child.restarts, note=note or None,
            pid=slot.alive.pid if slot.alive is not None else None,
        )  # fmt: skip

    # -- the control connection

    def _answer(self, verb: str, args: dict[str, Any]) -> Any:
        now = time.monotonic()
        if verb == "status":
            return self._status(now)
        if verb == "stop":
            self._entry("stop-asked", by="control")
            self._stop(now)
            return {"stopping": True, "pid": os.getpid()}
        if verb == "restart":
            return self._restart(str(args.get("name", "")), now)
        raise ControlError(f"there is no {verb!r} on Windows; there are status, stop, restart")

    def _restart(self, name: str, now: float) -> dict[str, Any]:
        slot = self._slots.get(name)
        if slot is None:
            known = ", ".join(self._slots)
            raise ControlError(f"no child is named {name!r}; there are {known}")
        if self._tree.stopping:
            raise ControlError("the service is stopping")
        self._entry("restart-asked", child=name)
        self._tell_machine(slot, machine.Replace(), now)
        return {"name": name, "incarnation": slot.number}

    def _status(self, now: float) -> dict[str, Any]:
        return {
            "name": self._spec.name,
            "state": self._state(),
            "watchdog": {"pid": os.getpid(), "uptime": round(now - self._started_at, 3)},
            "children": [slot.status(now) for slot in self._slots.values()],
            **self._more_status(),
        }

    def _state(self) -> str:
        if self._tree.stopping:
            return State.STOPPING.value
        if not self._tree.ready:
            return State.STARTING.value
        found = {one.machine.state for one in self._slots.values()}
        worst = (State.FAILED, State.FAILING, State.BACKOFF, State.STOPPING, State.STARTING)
        return next((state.value for state in worst if state in found), State.UP.value)


class _Journal:
    """What is to be remembered, written by a thread: who judges waits for no disk.

    What does not fit into the queue is lost; a disk that hangs for so long has worse to say.
    """

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            path, maxBytes=_JOURNAL_BYTES, backupCount=_JOURNAL_KEEP, encoding="utf-8"
        )
        file.setFormatter(logging.Formatter("%(message)s"))
        entries: queue.Queue[Any] = queue.Queue(_MAX_ENTRIES)
        self._queue = entries
        self._listener = logging.handlers.QueueListener(entries, _Files(file))
        self._listener.start()

    def write(self, entry: dict[str, Any]) -> None:
        self._put("", json.dumps(entry, default=str))

    def write_report(self, directory: str, one: report.Report) -> None:
        """One file, by its id."""
        name = os.path.join(directory, f"{one['id']}.json")
        self._put(name, report.encode(one).decode())

    def _put(self, path: str, text: str) -> None:
        try:
            self._queue.put_nowait(logging.makeLogRecord({"msg": text, "report": path}))
        except queue.Full:
            pass

    def close(self) -> None:
        """To be called once nothing is judged any more: what is queued is written."""
        self._listener.stop()
        for handler in self._listener.handlers:
            handler.close()


class _Files(logging.Handler):
    """Reports into files of their own, the rest into the journal."""

    def __init__(self, journal: logging.Handler) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        path = getattr(record, "report", "")
        if not path:
            self._journal.handle(record)
            return
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(record.getMessage())
        except OSError as error:
            self._journal.handle(logging.makeLogRecord({"msg": json.dumps({"error": str(error)})}))

    def close(self) -> None:
        self._journal.close()
        super().close()


def run_tree(
    spec: TreeSpec,
    *,
    tell: Tell = lambda _line: None,
    status: Callable[[], dict[str, Any]] = dict,
    begun: Callable[[Supervisor], None] = lambda _supervisor: None,
) -> int:
    """Be the watchdog of ``spec`` until a stop; returns the exit code.

    ``tell`` gets what `pkvpn.watchdog.run.run_tree` tells.  ``begun``: called with the supervisor
    before it runs, for who wants to end it from another thread.
    """
    try:
        with only_one(spec.runtime_dir):
            supervisor = Supervisor(spec, tell, status)
            begun(supervisor)
            return supervisor.run()
    except AlreadyRunning as error:
        tell({"already": True, "directory": str(error)})
        return EXIT_OK
    except OSError as error:
        tell({"error": str(error), "code": EXIT_START_FAILED})
        return EXIT_START_FAILED
