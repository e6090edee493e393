"""The log child, which alone writes to disk for the tree, and the pipes that lead to it.

Each process has a pipe of its own, by which it is known: what a child that was taken over says
of itself does not count, it cannot speak for another, and a flood of it fills its own pipe only.
Journal entries and crash reports are the watchdog's.

Strategy: whoever sends never waits: a message that finds the pipe full is dropped and counted, and
the next one that passes says how many are missing.  The log child never raises for a disk's sake:
it counts, falls back to stderr, and opens anew what was removed or rotated.  A disk that hangs
hangs this process alone; the watchdog goes on judging.
"""

from __future__ import annotations

import json
import logging
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pkvpn.watchdog import report as reports
from pkvpn.watchdog.journal import JournalWriter, RotatingFile, make_entry, utc_text

__all__ = ["MAX_MESSAGE", "LogPipe", "LogSettings", "decode", "encode", "main"]

# One message on the SEQPACKET socket, big endian:
#   1  kind: 'L' log record, 'J' journal entry, 'R' crash report
#   4  how many messages of this process were dropped before this one
#   the rest: one JSON object
_HEAD = struct.Struct("!cI")

# Far below what a socket takes by default, so that some of the longest fit in as well.
MAX_MESSAGE = 60 * 1024

# Messages read in one turn of the loop before it looks at its orders again.
_BATCH = 128

# Seconds between two batches.  Lines come in crowds, and each read by itself costs a wake-up, which
# is as much as the line; a pipe has room for some hundred.
_PAUSE = 0.05

# Different crashes that are told apart.
_MAX_FINGERPRINTS = 256

# Longest wait at the end for what is still queued.
_DRAIN_BUDGET = 1.0

# stderr is for emergencies: not more lines of a failing disk a second than these.
_FALLBACK_RATE = 20.0

# Beyond it no date is written: the end of the year 9999, less a day for all time zones.
_MAX_TIME = 253402214400


# The sender whose pipe carries more than log lines.
WATCHDOG = "watchdog"


class _Duty(Protocol):
    done: int
    waiting_since: float


class _Child(Protocol):
    """What we use of `pkvpn.watchdog.child.Child`."""

    @property
    def stopping(self) -> bool: ...
    def held(self, name: str) -> list[int]: ...
    def fileno(self) -> int: ...
    def receive(self) -> list[str]: ...
    def duty(self, name: str) -> _Duty: ...
    def ready(self) -> None: ...
    def turn(self, now: float) -> float: ...


Formatter = logging.Formatter | Callable[[logging.LogRecord], str]


@dataclass(frozen=True)
class LogSettings:
    """Where things go and how much of them is kept.

    ``log_file`` None: log lines go to stderr.  ``echo``: they go to stderr as well as to the
    file.  ``formatter`` for the file, ``echo_formatter`` for stderr (None: the same).
    ``rate``: log lines a second and process, beyond a burst of ``burst``; the rest is counted.
    """

    state_dir: str
    log_file: str | None = None
    echo: bool = False
    formatter: Formatter | None = None
    echo_formatter: Formatter | None = None
    log_max_bytes: int = 10_000_000
    log_keep: int = 4
    journal_max_bytes: int = 1_000_000
    journal_keep: int = 4
    max_reports: int = 100
    max_reports_bytes: int = 5_000_000
    rate: float = 200.0
    burst: float = 1000.0
    tail_lines: int = 60
    held: str = "log"
    # Whose pipe each of the held descriptors is, in their order.
    senders: tuple[str, ...] = (WATCHDOG,)

    @property
    def reports_dir(self) -> str:
        return os.path.join(self.state_dir, "crashes")


# The sender's end


def encode(kind: bytes, dropped: int, body: dict[str, Any]) -> bytes:
    """One message of at most `MAX_MESSAGE` bytes; a longer body loses its longest texts."""
    head = _HEAD.pack(kind, min(dropped, 0xFFFFFFFF))
    data = _json(body)
    if len(head) + len(data) > MAX_MESSAGE:
        data = reports.encode(body, MAX_MESSAGE - len(head))
    return head + data


def decode(message: bytes) -> tuple[bytes, int, dict[str, Any]]:
    """(kind, dropped, body).  Raises ValueError for what is no message."""
    if len(message) < _HEAD.size:
        raise ValueError(f"a message of {len(message)} bytes")
    kind, dropped = _HEAD.unpack_from(message)
    try:
        body = json.loads(message[_HEAD.size :])
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("the body is no object")
    return kind, dropped, body


def _json(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode(errors="backslashreplace")


class LogPipe:
    """The sender's end, for the watchdog and every child.  Never blocks and never raises.

    ``fd``: the write end, non-blocking SOCK_SEQPACKET; it stays the caller's.  A message is one
    call, so threads and a fork do not mix two.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unsaid = 0
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """How many messages of this process found the pipe full, in all."""
        return self._dropped

    def send_entry(self, entry: dict[str, Any]) -> bool:
        """A journal entry, of the watchdog only; adds ``at`` and ``mono`` if they are missing."""
        if "at" not in entry or "mono" not in entry:
            now = make_entry("", wall=time.time(), mono=time.monotonic())
            entry = {**now, **entry}
        return self._send(b"J", entry)

    def send_report(self, report: dict[str, Any]) -> bool:
        """A crash report made by `report.build`; of the watchdog only."""
        return self._send(b"R", report)

    def send_record(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception as error:  # noqa: BLE001 - arguments that do not fit; logging never raises
            message = f"{record.msg!r} (its arguments do not fit: {error})"
        body: dict[str, Any] = {
            "level": record.levelno,
            "logger": record.name,
            "message": message,
            "created": record.created,
        }
        if record.exc_info and record.exc_info[0] is not None:
            body["exc"] = _plain.formatException(record.exc_info)
        elif record.exc_text:
            body["exc"] = record.exc_text
        return self._send(b"L", body)

    def handler(self) -> logging.Handler:
        """For the root logger of the process."""
        return _PipeHandler(self)

    def _send(self, kind: bytes, body: dict[str, Any]) -> bool:
        unsaid = self._unsaid
        try:
            os.write(self._fd, encode(kind, unsaid, body))
        except (OSError, ValueError, TypeError, RecursionError):
            self._unsaid += 1
            self._dropped += 1
            return False
        self._unsaid -= unsaid
        return True


class _PipeHandler(logging.Handler):
    def __init__(self, pipe: LogPipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send_record(record)


_plain = logging.Formatter()


# The log child


def main(child: _Child, settings: LogSettings) -> None:
    """Write what comes until a stop, then what is still queued."""
    duty = child.duty("write")
    writer = _Writer(settings)
    pipes = _Pipes(dict(zip(child.held(settings.held), settings.senders, strict=True)), writer)
    poller = pipes.poller
    poller.register(child.fileno(), select.POLLIN)
    orders = select.poll()
    orders.register(child.fileno(), select.POLLIN)
    child.ready()
    try:
        while pipes.open and not child.stopping:
            now = time.monotonic()
            wait = min(child.turn(now), writer.next_deadline(now))
            events = dict(poller.poll(max(0.0, wait) * 1000))
            if events.keys() - {child.fileno()}:
                duty.waiting_since = time.monotonic()
                count = pipes.read()
                duty.done += count
                duty.waiting_since = 0.0
                if count < _BATCH:
                    orders.poll(1000 * min(_PAUSE, child.turn(time.monotonic())))
            writer.expire(time.monotonic())
            if child.fileno() in events:
                child.receive()
        deadline = time.monotonic() + _DRAIN_BUDGET
        while pipes.read() and time.monotonic() < deadline:
            child.turn(time.monotonic())
    finally:
        writer.close()


class _Pipes:
    """The ends that we read.  ``senders``: whose each of them is."""

    def __init__(self, senders: dict[int, str], writer: _Writer) -> None:
        self.poller = select.poll()
        self._writer = writer
        # The watchdog first; see `read`.
        self.open = dict(sorted(senders.items(), key=lambda item: item[1] != WATCHDOG))
        for fd in self.open:
            self.poller.register(fd, select.POLLIN)

    def read(self) -> int:
        """Write what is queued, at most a batch of each; how many messages that was."""
        # The watchdog's are read first and written last: by then what a child had said before it
        # died has been read as well, whose tail goes into the report of its death.
        read = [(process, self._take(fd)) for fd, process in list(self.open.items())]
        for process, messages in reversed(read):
            for message in messages:
                self._writer.take(process, message)
        return sum(len(messages) for _, messages in read)

    def _take(self, fd: int) -> list[bytes]:
        messages: list[bytes] = []
        while len(messages) < _BATCH:
            try:
                message = os.read(fd, MAX_MESSAGE + 1)
            except BlockingIOError:
                break
            except ConnectionError:
                message = b""
            if not message and self._has_ended(fd):
                self.poller.unregister(fd)
                del self.open[fd]
                break
            messages.append(message)
        return messages

    def _has_ended(self, fd: int) -> bool:
        """Nobody holds the other end any more; else it was a message of no bytes."""
        poller = select.poll()
        poller.register(fd, 0)
        return bool(poller.poll(0))


class _Bucket:
    """How many lines a process may still write, and how many it was refused."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._filled_at = now
        self.refused = 0

    def take(self, now: float) -> bool:
        self._fill(now)
        if self._level < 1:
            self.refused += 1
            return False
        self._level -= 1
        return True

    def has_room(self, now: float) -> bool:
        """Whether the flood is over: a tenth of the burst is free again."""
        self._fill(now)
        return self._level >= max(1.0, self._burst / 10)

    def _fill(self, now: float) -> None:
        gained = (now - self._filled_at) * self._rate
        self._level = min(self._burst, self._level + gained)
        self._filled_at = now


class _Writer:
    """Sorts messages to the log, the journal and the crash reports."""

    def __init__(self, settings: LogSettings) -> None:
        self._settings = settings
        self._formatter = _as_callable(settings.formatter)
        self._echo_formatter = _as_callable(settings.echo_formatter or settings.formatter)
        self._file: RotatingFile | None = None
        if settings.log_file is not None:
            self._file = RotatingFile(
                settings.log_file, max_bytes=settings.log_max_bytes, keep=settings.log_keep
            )
        self._journal = JournalWriter(
            settings.state_dir, max_bytes=settings.journal_max_bytes, keep=settings.journal_keep
        )
        self._store = reports.ReportStore(
            settings.reports_dir,
            max_reports=settings.max_reports,
            max_bytes=settings.max_reports_bytes,
        )
        self._tails: dict[str, deque[str]] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._fallback = _Bucket(_FALLBACK_RATE, _FALLBACK_RATE, time.monotonic())
        # How often each crash has come, the latest last.
        self._fingerprints: dict[str, int] = {}
        self._missing = 0  # lines that are not in the log file
        self._missing_why = ""

    def take(self, process: str, message: bytes) -> None:
        """Write one message of this process wherever it belongs; never raises."""
        try:
            kind, dropped, body = decode(message)
        except ValueError as error:
            self._complain(process, f"a message of {process} that cannot be read: {error}")
            return
        if dropped:
            why = f"{dropped} messages of {process} were lost: the log pipe was full"
            self._complain(process, why, logging.WARNING)
        if kind == b"L":
            self._take_record(process, body)
        elif kind == b"J" and process == WATCHDOG:
            if not self._journal.append(body):
                self._emergency(f"journal: {json.dumps(body, default=str)}")
        elif kind == b"R" and process == WATCHDOG:
            self._take_report(body)
        else:
            self._complain(process, f"a message of {process} of kind {kind!r}")

    def next_deadline(self, now: float) -> float:
        """Seconds until `expire` has something to say."""
        return 1.0 if any(bucket.refused for bucket in self._buckets.values()) else 60.0

    def expire(self, now: float) -> None:
        """Say how many lines a flood has cost, once it is over."""
        for process, bucket in self._buckets.items():
            if bucket.refused and bucket.has_room(now):
                self._say_refused(process, bucket)

    def close(self) -> None:
        for process, bucket in self._buckets.items():
            if bucket.refused:
                self._say_refused(process, bucket)
        if self._file is not None:
            self._file.close()
        self._journal.close()

    def _say_refused(self, process: str, bucket: _Bucket) -> None:
        count, bucket.refused = bucket.refused, 0
        self._own_line(
            logging.WARNING,
            f"{count} lines of {process} were left out: more than {self._settings.rate:g} a second",
        )

    # Log lines

    def _take_record(self, process: str, body: dict[str, Any]) -> None:
        record = _record(process, body)
        tail = self._tails.setdefault(process, deque(maxlen=self._settings.tail_lines))
        tail.append(f"{utc_text(record.created)} {record.levelname} {record.getMessage()}")
        if record.exc_text:
            tail.extend(record.exc_text.splitlines()[-10:])
        if self._may_write(process):
            self._line(record)

    def _may_write(self, process: str) -> bool:
        now = time.monotonic()
        bucket = self._buckets.get(process)
        if bucket is None:
            bucket = _Bucket(self._settings.rate, self._settings.burst, now)
            self._buckets[process] = bucket
        return bucket.take(now)

    def _complain(self, process: str, text: str, level: int = logging.ERROR) -> None:
        """A line of our own that counts as one of the process that is its cause."""
        if self._may_write(process):
            self._own_line(level, text)

    def _own_line(self, level: int, text: str) -> None:
        """A line of our own; not through the pipe, which may be why there is something to say."""
        body = {"level": level, "logger": __name__, "message": text, "created": time.time()}
        self._line(_record("log", body))

    def _line(self, record: logging.LogRecord) -> None:
        if self._file is None:
            self._stderr(self._format(self._echo_formatter, record))
            return
        if self._settings.echo:
            self._stderr(self._format(self._echo_formatter, record))
        text = self._format(self._formatter, record)
        try:
            if self._missing:
                self._file.write(
                    _encode_line(
                        f"{utc_text(time.time())} log: {self._missing} lines are missing here: "
                        f"{self._missing_why}"
                    )
                )
                self._missing = 0
            self._file.write(_encode_line(text))
        except OSError as error:
            self._missing += 1
            self._missing_why = str(error)
            if not self._settings.echo:
                self._emergency(text)

    def _format(
        self, formatter: Callable[[logging.LogRecord], str], record: logging.LogRecord
    ) -> str:
        try:
            return formatter(record)
        except Exception as error:  # noqa: BLE001 - a formatter of somebody else must not end us
            return f"{_default_format(record)} (formatter failed: {error})"

    # Crash reports

    def _take_report(self, body: dict[str, Any]) -> None:
        tail = self._tails.get(str(body.get("child", "")))
        if tail and not body.get("log"):
            body["log"] = list(tail)
        self._note_fingerprint(body)
        try:
            self._store.save(body)
        except (OSError, ValueError, TypeError) as error:
            where = reports.standing_line(str(body.get("stacks", "")))
            text = f"crash report {body.get('id')} could not be kept: {error}"
            self._own_line(logging.ERROR, f"{text} (stood in {where})" if where else text)

    def _note_fingerprint(self, body: dict[str, Any]) -> None:
        """Say so when the same crash comes again and again: the 2nd, 4th, 8th ... time."""
        print_ = str(body.get("fingerprint") or "")
        if not print_:
            return
        times = self._fingerprints.pop(print_, 0) + 1
        self._fingerprints[print_] = times
        if len(self._fingerprints) > _MAX_FINGERPRINTS:
            del self._fingerprints[next(iter(self._fingerprints))]  # the one seen longest ago
        if times > 1 and times & (times - 1) == 0:
            where = reports.standing_line(str(body.get("stacks", "")))
            entry = make_entry("same-crash", wall=time.time(), mono=time.monotonic())
            text = f"{times} times the same since the log child began: {where}"
            child = str(body.get("child", ""))
            self._journal.append({**entry, "child": child, "text": text, "fingerprint": print_})

    # stderr

    def _emergency(self, text: str) -> None:
        if self._fallback.take(time.monotonic()):
            self._stderr(text)

    def _stderr(self, text: str) -> None:
        """A line on stderr if it takes one now: a terminal that hangs must not hang us."""
        try:
            fd = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            if any(event & select.POLLOUT for _, event in poller.poll(0)):
                os.write(fd, _encode_line(text))
        except (OSError, ValueError):
            pass  # closed, or a dead terminal: nowhere left to say it


def _record(process: str, body: dict[str, Any]) -> logging.LogRecord:
    """The record as it was in the process that wrote it, as far as formatters care."""
    level = body.get("level")
    level = level if isinstance(level, int) else logging.INFO
    created = body.get("created")
    if not (isinstance(created, int | float) and 0 <= created < _MAX_TIME):  # nor NaN
        created = time.time()
    record = logging.makeLogRecord(
        {
            "name": str(body.get("logger", "")),
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "msg": str(body.get("message", "")),
            "created": created,
            "msecs": int(created * 1000) % 1000,
            "processName": process,
        }
    )
    if body.get("exc"):
        record.exc_text = str(body["exc"])
    return record


def _default_format(record: logging.LogRecord) -> str:
    text = (
        f"{utc_text(record.created)} {record.processName} {record.levelname} "
        f"{record.name}: {record.getMessage()}"
    )
    return f"{text}\n{record.exc_text}" if record.exc_text else text


def _as_callable(formatter: Formatter | None) -> Callable[[logging.LogRecord], str]:
    if formatter is None:
        return _default_format
    return formatter.format if isinstance(formatter, logging.Formatter) else formatter


def _encode_line(text: str) -> bytes:
    return text.encode(errors="backslashreplace") + b"\n"
