"""The child's end of the tree: from the fork to the target, and what the target sees.

Strategy: the first lines after the fork decide whether an orphan can be left, so they come in
this order: death signal, is the parent still the one that forked us, own session, default
signals, title, close what is not ours, give up all rights but those of its spec.  After that
nothing here ever blocks: beats and requests that do not fit are counters and can be sent again.

Every beat is sent from `Child.turn`, which the working loop calls: a loop that hangs is
silent, whatever its threads do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from multiprocess import spawn

from pkvpn.watchdog import lifeline, sandbox
from pkvpn.watchdog.confinement import Confinement
from pkvpn.watchdog.lifeline import Duty, Kind, Order, next_moment
from pkvpn.watchdog.logchild import LogPipe
from pkvpn.watchdog.titles import set_title

_log = logging.getLogger(__name__)

# A child whose parent is gone ends with this; nobody is left to read it but a test.
EXIT_ORPHAN = 79

# On the gift socket, one message each: 1 byte what, then the key.
#   up    G give (one descriptor goes with it), D drop       down  R refused: key, NUL, why
# and to a standby, of what was given and dropped since it was born:
#   H handed over: for each descriptor that goes with it 1 byte length, key
#   L let go: 1 byte length, key, of each
# and when its turn has come:
#   S serve: number of the incarnation, 4 bytes
GIVE, DROP, REFUSED, HANDED, LET_GO, SERVE = b"G", b"D", b"R", b"H", b"L", b"S"
MAX_KEY = 64
# The watchdog takes them when it reads a beat.  After so many the next beat comes early: the socket
# has room for some two hundred.
_GIFTS_PER_BEAT = 64
# Descriptors in one message; the kernel takes 253.
HANDED_AT_ONCE = 128
_MAX_HANDED = 1 + HANDED_AT_ONCE * (1 + MAX_KEY)

# As plain numbers and made once: the enumeration costs half a millisecond of each respawn.
ALL_SIGNALS = frozenset(map(int, signal.valid_signals()))
# They ask for the end of the service.
END_SIGNALS = frozenset({int(signal.SIGTERM), int(signal.SIGINT)})
# A write to what is gone, or over a limit, is an error where it happens, and no signal.
_IGNORED = {int(signal.SIGPIPE), int(signal.SIGXFSZ)}
_RESET = [
    (number, signal.SIG_IGN if number in _IGNORED else signal.SIG_DFL)
    for number in sorted(ALL_SIGNALS - {signal.SIGKILL, signal.SIGSTOP})
]

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Birth:
    """What a child is born with.  Descriptors are numbers, valid in the child."""

    name: str
    incarnation: int
    title: str
    comm: str
    watchdog_pid: int
    beat_interval: float
    target: Callable[..., None]
    settings: Any
    duties: tuple[str, ...]
    oom_score_adj: int
    log_level: int
    up: int  # lifeline, write end
    down: int  # lifeline, read end
    gifts: int  # SEQPACKET
    stacks: int  # memfd; outlives the process
    wake: tuple[int, int]  # a pipe into which signal handlers write; outlives the process
    log: int  # SEQPACKET
    lock: int  # the instance lock: open as long as any process of the tree lives
    standby: bool = False  # forked ahead: waits for its turn
    confinement: Confinement | None = None
    held: dict[str, list[int]] = field(default_factory=dict)
    given: dict[bytes, int] = field(default_factory=dict)

    def descriptors(self) -> set[int]:
        """All that the child keeps."""
        own = {self.up, self.down, self.gifts, self.stacks, self.log, self.lock, *self.wake}
        return own.union(*self.held.values(), self.given.values())


class Child:
    """What a target holds of the tree it lives in."""

    def __init__(self, birth: Birth) -> None:
        self.name = birth.name
        self.incarnation = birth.incarnation
        self.standing_by = birth.standby  # until our turn comes
        self.stopping = False
        self.yielding = False  # stopping, and a successor goes on with what is given and held
        self._birth = birth
        self._gifts = socket.socket(fileno=birth.gifts)
        self._orders = lifeline.OrderDecoder()
        self._duties = {name: Duty() for name in birth.duties}
        self._refusals: list[tuple[bytes, str]] = []
        self._seq = 0
        self._lag = 0.0
        self._next_beat = time.monotonic()
        self._asked = False  # somebody sent us TERM
        self._passed_on = False  # and the watchdog will read of it
        self._dumped = False  # somebody sent us QUIT
        self._untaken = 0  # what was given and dropped since the last beat
        self._wake_read, self._wake_write = birth.wake
        self._epoll = select.epoll()
        for fd in (birth.down, birth.gifts, self._wake_read):
            self._epoll.register(fd, select.EPOLLIN)

    # -- what the watchdog holds for us

    def held(self, name: str) -> list[int]:
        """The descriptors held under ``name``, the same in every incarnation.

        Raises `KeyError` if the child's spec does not name it.
        """
        return self._birth.held[name]

    def given(self) -> dict[bytes, int]:
        """What predecessors gave and did not drop: key -> descriptor."""
        return self._birth.given

    def give(self, key: bytes, fd: int) -> bool:
        """Have the watchdog keep a duplicate of ``fd`` under ``key`` for our successor.

        False: not now, the way is full; try again later.  A refusal comes with `refusals`.
        """
        if not 1 <= len(key) <= MAX_KEY:
            raise ValueError(f"a key is 1 to {MAX_KEY} bytes, this has {len(key)}")
        return self._send_gift(GIVE + key, [fd])

    def drop(self, key: bytes) -> bool:
        """Have the watchdog close its duplicate.  False: not now; try again later."""
        return self._send_gift(DROP + key, [])

    def take(self, key: bytes) -> int | None:
        """Take back what a predecessor gave: it is ours alone from now on.

        None: not now; try again later.  Raises `KeyError` if nothing was given under ``key``.
        """
        fd = self._birth.given[key]
        if not self.drop(key):
            return None
        del self._birth.given[key]
        return fd

    def refusals(self) -> list[tuple[bytes, str]]:
        """What was given and is not kept, since the last call: (key, why)."""
        refusals, self._refusals = self._refusals, []
        return refusals

    # -- what a target with a standby calls

    def rehearse(self, who: str, play: Callable[[], None], *harmless: type[Exception]) -> None:
        """Play something through before `stand_by`; nobody is to read of it in the log.

        That one of ``harmless`` is raised is told, and means only that our turn will be slower.
        ``who``: we, in that line.
        """
        failed: Exception | None = None
        logging.disable()
        try:
            play()
        except harmless as error:
            failed = error
        finally:
            logging.disable(logging.NOTSET)
        if failed is not None:
            _log.warning("%s that stands by has not rehearsed: %s", who, failed)

    @contextmanager
    def stage(
        self, held: dict[str, list[int]], given: dict[bytes, int]
    ) -> Iterator[tuple[Child, socket.socket]]:
        """A child as we shall be one, to rehearse with before `stand_by`, and the other end of
        its gift socket.

        What a process does for the first time costs it milliseconds, most of them page faults of
        code and memory that it shared until then.  On a stage nobody waits for it, and nobody
        hears what is said.  ``held`` and ``given``: of the stage, and the caller's to close.
        """
        pipes = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(3)]
        (_, up), (down, _), wake = pipes
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        birth = replace(
            self._birth, up=up, down=down, wake=wake, gifts=theirs.detach(), standby=False,
            held=held, given=given,
        )  # fmt: skip
        staged = Child(birth)
        try:
            yield staged, ours
        finally:
            staged._epoll.close()
            staged._gifts.close()
            ours.close()
            for pipe in pipes:
                for fd in pipe:
                    os.close(fd)

    def stand_by(self) -> None:
        """Wait for our turn; to be called when all is done that can be done ahead of it.

        Who is confined to it makes no sockets of its own from here on.

        Returns at once in a process that was forked to serve.  In one that was forked ahead,
        `given` and `incarnation` hold from here on, and what is held is not to be touched before:
        it is another's that long.
        """
        sandbox.close_network(self._birth.confinement)
        if not self.standing_by:
            return
        gc.collect()
        gc.freeze()  # what is prepared stays; a collection while we serve need not look at it
        self._must_say(Kind.PREPARED)
        while self.standing_by:
            self._epoll.poll()
            self._pass_on()
            self.receive()
        self._next_beat = time.monotonic()
        set_title(f"{self._birth.title}: {self.name}", self._birth.comm)

    # -- what the loop calls

    def fileno(self) -> int:
        """Readable when `receive` has something to do.  May be nested in an epoll."""
        return self._epoll.fileno()

    def receive(self) -> list[str]:
        """Return what was ordered since the last call ("stop", "yield", "reload"); never blocks."""
        # A TERM stays in the pipe until it is passed on: if we never get there, the watchdog
        # finds it when we are dead.
        if self._passed_on or not self._asked:
            signals = self._read_quietly(self._wake_read) or b""
            if not END_SIGNALS.isdisjoint(signals) and not self._passed_on:
                # It has come just now: our handler runs a moment later, and the orders that are
                # read below may be the last ones.
                self._asked = True
                self._pass_on()
                if not self._passed_on:
                    os.write(self._wake_write, signals)
        self._read_gifts()
        data = self._read_quietly(self._birth.down)
        if data == b"":  # end of file: nobody is left above us
            os._exit(EXIT_ORPHAN)
        orders = self._orders.feed(data or b"")
        for order in orders:
            if order in (Order.STOP, Order.YIELD):
                self.stopping, self.yielding = True, order is Order.YIELD
        return [order.name.lower() for order in orders]

    def turn(self, now: float) -> float:
        """To be called once in each turn of the loop; sends a beat when one is due.

        Returns the seconds after which it wants to be called again.
        """
        if self._next_beat > 0.0:
            self._lag = max(self._lag, now - self._next_beat)
        if now >= self._next_beat:
            self._seq += 1
            duties = [(duty.done, duty.waiting_since) for duty in self._duties.values()]
            self._say(lifeline.encode_beat(self._seq, self._lag, duties))
            self._lag = 0.0
            self._untaken = 0
            self._next_beat = next_moment(now, self._birth.beat_interval)
            self._pass_on()  # with each beat, until it is heard
        elif self._dumped:
            self._pass_on()
        return max(0.0, self._next_beat - now)

    def wait(self, timeout: float | None = None) -> list[str]:
        """A whole turn for a loop that has nothing else to wait for: beat, wait, receive."""
        until_beat = self.turn(time.monotonic())
        self._epoll.poll(until_beat if timeout is None else min(timeout, until_beat))
        return self.receive()

    def duty(self, name: str) -> Duty:
        """The counters of one duty that the spec names."""
        return self._duties[name]

    def hurry(self) -> None:
        """Have the next `turn` send a beat at once: a duty has news that cannot wait."""
        self._next_beat = 0.0

    def ready(self) -> None:
        """Say that we serve.  To be called once, when the first request could be answered."""
        self._must_say(Kind.READY)
        self.hurry()

    def say(self, text: str) -> None:
        """Progress of the start, or why it fails; `start` shows the last one."""
        self._must_say(Kind.SAY, text)

    # -- inside

    def take_signals(self) -> None:
        """TERM and INT ask for the end of the service, QUIT for our stacks, HUP is nobody's."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in END_SIGNALS:
            signal.signal(number, self._on_term)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGQUIT, self._on_quit)
        # Written by C code from within the signal handler, so also while other C code keeps
        # the GIL; what we set just above runs after it, when Python gets its turn.
        faulthandler.register(signal.SIGQUIT, self._birth.stacks, all_threads=True, chain=True)
        # What a confined process gets for a call that it has no right to; chained, it dies of it.
        faulthandler.register(signal.SIGSYS, self._birth.stacks, all_threads=True, chain=True)

    def _on_term(self, _number: int, _frame: object) -> None:
        self._asked = True
        self.hurry()

    def _on_quit(self, _number: int, _frame: object) -> None:
        self._dumped = True

    def _pass_on(self) -> None:
        """Tell the watchdog what somebody else's signals asked of us."""
        # Who makes way says it too: it is the whole service that is to end, not only we.
        if self._asked and (self.yielding or not self.stopping):
            self._passed_on |= self._say(lifeline.encode_said(Kind.ASKED, self._seq))
        if self._dumped:
            self._dumped = not self._say(lifeline.encode_said(Kind.DUMPED, self._seq))

    def _say(self, frame: bytes) -> bool:
        try:
            return os.write(self._birth.up, frame) == len(frame)
        except BlockingIOError:
            return False  # the watchdog is stopped or busy; the next beat says it all
        except BrokenPipeError:
            os._exit(EXIT_ORPHAN)

    def _must_say(self, kind: Kind, text: str = "") -> None:
        """Said once in a life, while the pipe has room for hundreds: a second try is enough."""
        frame = lifeline.encode_said(kind, self._seq, text)
        if not self._say(frame):
            poller = select.poll()
            poller.register(self._birth.up, select.POLLOUT)
            poller.poll(1000)
            self._say(frame)

    def _send_gift(self, message: bytes, fds: list[int]) -> bool:
        try:
            if fds:
                socket.send_fds(self._gifts, [message], fds)
            else:
                self._gifts.send(message)
        except (BlockingIOError, TimeoutError):
            self.hurry()
            return False
        except OSError as error:
            # ETOOMANYREFS: too many descriptors in flight; ENOBUFS, EPIPE: not now either.
            _log.debug("a gift was not sent: %s", error)
            self.hurry()
            return False
        self._untaken += 1
        if self._untaken == _GIFTS_PER_BEAT:
            self.hurry()
        return True

    def _read_gifts(self) -> None:
        """What the watchdog says of what was given, and hands over when our turn comes."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(
                    self._gifts, _MAX_HANDED, HANDED_AT_ONCE, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:  # nothing more, or nobody
                return
            if not message:
                return
            what, body = message[:1], message[1:]
            if what == REFUSED:
                key, _, why = body.rpartition(b"\0")
                self._refusals.append((key, why.decode(errors="replace")))
            elif what == HANDED:
                self._birth.given.update(zip(_unpack_keys(body), fds, strict=True))
            elif what == LET_GO:
                for key in _unpack_keys(body):
                    os.close(self._birth.given.pop(key))
            elif what == SERVE:
                self.incarnation = int.from_bytes(body, "big")
                self.standing_by = False

    @staticmethod
    def _read_quietly(fd: int) -> bytes | None:
        """What can be read now; None if there is nothing, b"" at end of file."""
        try:
            return os.read(fd, 4096)
        except BlockingIOError:
            return None


def pack_keys(keys: Iterable[bytes]) -> bytes:
    """As they stand in HANDED and LET_GO."""
    return b"".join(bytes([len(key)]) + key for key in keys)


def _unpack_keys(body: bytes) -> Iterator[bytes]:
    while body:
        end = 1 + body[0]
        yield body[1:end]
        body = body[end:]


# --- from the fork to the target ----------------------------------------------------------


def set_death_signal(watchdog_pid: int) -> None:
    """Be killed when the watchdog ends.  To be called again after a change of credentials.

    The comparison closes the window in which the watchdog died before the call: it is not
    retroactive.  Against the pid of before the fork, not against 1: there are subreapers.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != watchdog_pid:
        os._exit(EXIT_ORPHAN)


def run_child(birth: Birth) -> NoReturn:
    """Be the child ``birth`` describes.  Called in the new process; never returns."""
    set_death_signal(birth.watchdog_pid)
    os.setsid()
    _reset_signals()
    standby = " standby" if birth.standby else ""
    set_title(f"{birth.title}: {birth.name}{standby}", birth.comm)
    close_all_but(birth.descriptors())
    set_oom_score(birth.oom_score_adj)
    faulthandler.enable(birth.stacks, all_threads=True)
    _route_logging(birth)
    child = Child(birth)
    child.take_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    code = 1
    try:
        _confine(birth)
        if birth.settings is None:
            birth.target(child)
        else:
            birth.target(child, birth.settings)
        code = 0
    except SystemExit as end:
        code = _exit_code(child, end)
    except BaseException as error:  # noqa: BLE001 - whatever it was, the report names it
        os.write(birth.stacks, traceback.format_exc().encode())
        _log.critical("%s ends: %s", birth.name, error, exc_info=True)
        child.say(f"{type(error).__name__}: {error}")
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                pass
        os._exit(code)


def _confine(birth: Birth) -> None:
    if birth.confinement is None:
        return
    try:
        sandbox.confine(birth.confinement, lambda: set_death_signal(birth.watchdog_pid))
    except sandbox.ConfinementError as error:
        raise SystemExit(f"it cannot be confined: {error}") from None


def exec_child(birth: Birth) -> NoReturn:
    """Be the child ``birth`` describes, in a new image: a wild crash may have been a probe
    for our address layout, and a fork would keep it."""
    set_death_signal(birth.watchdog_pid)
    table = os.memfd_create("birth", os.MFD_CLOEXEC)
    program = spawn.get_preparation_data(birth.name)
    del program["authkey"]  # nobody uses it, and it does not want to be written anywhere
    os.write(table, pickle.dumps(program))
    os.write(table, pickle.dumps(birth))
    os.lseek(table, 0, os.SEEK_SET)
    for fd in {table, *birth.descriptors()}:
        os.set_inheritable(fd, True)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    line = f"from pkvpn.watchdog.child import resume; resume({table})"
    os.execv(sys.executable, [sys.executable, "-c", line])


def resume(table: int) -> NoReturn:
    """First line of the image that `exec_child` started; ``table`` comes from our own parent."""
    with open(table, "rb") as file:
        # Both were written by exec_child, in this very process.
        spawn.prepare(pickle.load(file))  # noqa: S301 - sys.path, and the program's __main__
        birth = pickle.load(file)  # noqa: S301
    for fd in birth.descriptors():
        os.set_inheritable(fd, False)
    run_child(birth)


def _exit_code(child: Child, end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    child.say(str(end.code))
    _log.error("%s ends: %s", child.name, end.code)
    return 1


def _reset_signals() -> None:
    """Nothing of the watchdog's handlers, nor of what its starter had ignored."""
    signal.set_wakeup_fd(-1)
    for number, wanted in _RESET:
        if signal.getsignal(number) is not wanted:
            signal.signal(number, wanted)


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep``, in as few calls as it takes."""
    low = 3
    for fd in sorted(keep):
        if fd > low:
            os.closerange(low, fd)
        low = max(low, fd + 1)
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def set_oom_score(value: int) -> None:
    """How soon we are killed where memory is short; what cannot be set stays."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    except OSError:
        return  # no /proc, or not ours to write
    try:
        os.write(fd, str(value).encode())
    except OSError:
        pass  # lowering it takes a right that User Mode does not have
    finally:
        os.close(fd)


def _route_logging(birth: Birth) -> None:
    root = logging.getLogger()
    root.handlers[:] = [LogPipe(birth.log).handler()]
    root.setLevel(birth.log_level)
    # What nobody sends need not be looked up for each line (see "Optimization" in the manual of
    # logging): from where it was called, and by which thread.
    logging._srcfile = None  # noqa: SLF001  the documented way
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
