"""How a log record becomes a line: coloured, plain, JSON, or for systemd's journal.

Strategy: one formatter for one stream, chosen once by `make_formatter`.  Whatever a message holds,
it stays one line, since names and reasons in it come from the network and must not be able to
forge another line or paint the operator's terminal; only tracebacks have more than one.
The log child gives each record the name of the child it comes from, as `processName`.
"""

import json
import logging
import os
from datetime import datetime
from typing import Any, TextIO

# colorlog is only imported for a terminal: it is 20 ms that a log file does not need.

_PLAIN = "%(asctime)s %(levelname)-7s %(processName)s: %(message)s"
_COLOURED = "%(asctime)s %(log_color)s%(levelname)-7s%(reset)s %(processName)s: %(message)s"
_JOURNAL = "%(processName)s: %(message)s"

# sd-daemon(3): the priority in front of each line, from syslog's levels.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


def one_line(text: str) -> str:
    """Write control characters as escapes, so that the text stays one harmless line."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def local_time(record: logging.LogRecord) -> str:
    """Return when the record was made, with milliseconds and the offset from UTC (ISO 8601)."""
    return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class _OneLineFormatter(logging.Formatter):
    """What all lines for people have in common."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return local_time(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = one_line(record.message)
        return super().formatMessage(record)


class PlainFormatter(_OneLineFormatter):
    """A line with time, level and child."""

    def __init__(self) -> None:
        super().__init__(_PLAIN)


class JournalFormatter(_OneLineFormatter):
    """A priority instead of time and level, which the journal writes itself."""

    def __init__(self) -> None:
        super().__init__(_JOURNAL)

    def format(self, record: logging.LogRecord) -> str:
        number = next((prio for level, prio in _PRIORITIES if record.levelno >= level), 7)
        # The journal makes an entry of each line, so each of a traceback needs the priority.
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": local_time(record),
            "level": record.levelname.lower(),
            "child": record.processName,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            entry["exception"] = record.exc_text
        return json.dumps(entry)


def make_formatter(kind: str, stream: TextIO | None) -> logging.Formatter:
    """Return the formatter for a stream, or for a file if that is None.

    `kind` is [log] format: auto, plain, json or journal.
    """
    if kind == "json":
        return JsonFormatter()
    if stream is None or kind == "plain":
        return PlainFormatter()
    if kind == "journal" or is_journal(stream):
        return JournalFormatter()
    if _wants_colour(stream):
        return _coloured(stream)
    return PlainFormatter()


def _wants_colour(stream: TextIO) -> bool:
    """Decide as colorlog does: FORCE_COLOR, else NO_COLOR, else whether it is a terminal."""
    if "FORCE_COLOR" in os.environ:
        return True
    return "NO_COLOR" not in os.environ and stream.isatty()


def is_journal(stream: TextIO | None) -> bool:
    """Compare with JOURNAL_STREAM, "device:inode" (systemd.exec(5)).

    The variable alone proves nothing: it is inherited, and the stream may have been redirected.
    None, which is what Python makes of a closed standard stream, is no journal.
    """
    if stream is None:
        return False
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def _coloured(stream: TextIO) -> logging.Formatter:
    import colorlog

    class ColouredFormatter(_OneLineFormatter, colorlog.ColoredFormatter):
        """A plain line whose level has a colour."""

    return ColouredFormatter(_COLOURED, stream=stream)
