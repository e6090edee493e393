"""Crash reports: what is known of a child's end, bounded, and written whole or not at all.

Strategy: `build` is pure and knows the bounds; a report fits into one message to the log child.
Every field is cut with a mark that says how much is missing, never silently.  What a reader
wants first, the line of code where the child stood, stands first when a report is rendered.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pkvpn.watchdog.journal import utc_text
from pkvpn.watchdog.verdict import Beat

__all__ = [
    "MAX_REPORT",
    "ReportError",
    "ReportStore",
    "build",
    "cut",
    "encode",
    "list_reports",
    "load_report",
    "render",
    "standing_line",
]

Report = dict[str, Any]

# Bounds of the fields, in characters.  Together they stay below one message of the log pipe
# (60 KB) for plain text; `encode` shortens what is longer when encoded.
_STACKS = 20_000
_PROC_ENTRY = 2_000
_TEXT = 1_000
_BEATS = 20
_LOG_LINES = 60
_LOG_LINE = 300

# Without the tail of the log, which the log child adds.
MAX_REPORT = 56 * 1024


class ReportError(Exception):
    """No such report, or it cannot be read."""


def cut(text: str, limit: int) -> str:
    """``text`` in at most about ``limit`` characters; the middle goes, with a mark.

    Both ends matter: of stacks the first thread and the main thread, which comes last.
    """
    if len(text) <= limit:
        return text
    head = limit // 2
    tail = limit - head
    return f"{text[:head]}\n... {len(text) - limit} characters cut ...\n{text[len(text) - tail :]}"


def build(
    *,
    at: float,
    child: str,
    incarnation: int,
    pid: int,
    verdict: str,
    why: str,
    signal: int | None = None,
    exit_code: int | None = None,
    core_dumped: bool = False,
    rusage: Mapping[str, float] | None = None,
    stacks: str = "",
    snapshot: Mapping[str, str] | None = None,
    beats: Sequence[tuple[float, Beat]] = (),
    duties: Sequence[str] = (),
    log: Sequence[str] = (),
    uptime: float | None = None,
    restarts: int = 0,
    **more: Any,
) -> Report:
    """A report as a dict of JSON values.

    ``at``: time.time() of the death; ``verdict``: the class; ``why``: of the state machine;
    ``stacks``: text of faulthandler; ``snapshot``: `procfs.snapshot_text`; ``beats``: the last
    ones, oldest first, each with its age in seconds; ``duties``: their names; ``log``: lines,
    added by the log child; ``more``: whatever else is known, JSON values of a few words.
    """
    text_at = utc_text(at)
    compact = re.sub(r"[-:]", "", text_at)
    report: Report = {
        "id": f"{compact}-{child}-{incarnation}",
        "at": text_at,
        "child": child,
        "incarnation": incarnation,
        "pid": pid,
        "class": verdict,
        "why": cut(why, _TEXT),
        "signal": signal,
        "exit_code": exit_code,
        "core_dumped": core_dumped,
        "uptime": uptime,
        "restarts": restarts,
        "rusage": dict(rusage or {}),
        "fingerprint": fingerprint(child, verdict, stacks),
        "stacks": cut(stacks, _STACKS),
        "beats": [_beat(age, beat, duties) for age, beat in beats[-_BEATS:]],
        "proc": {name: cut(text, _PROC_ENTRY) for name, text in (snapshot or {}).items()},
        "log": [cut(line, _LOG_LINE) for line in log[-_LOG_LINES:]],
    }
    for key, value in more.items():
        if value is not None:
            report[key] = cut(value, _TEXT) if isinstance(value, str) else value
    return report


def _beat(age: float, beat: Beat, names: Sequence[str]) -> dict[str, Any]:
    return {
        "age": round(age, 3),
        "seq": beat.seq,
        "lag": round(beat.lag, 4),
        "duties": {
            names[number] if number < len(names) else f"duty {number + 1}": {
                "done": done,
                "waiting_since": round(since, 3),
            }
            for number, (done, since) in enumerate(beat.duties)
        },
    }


def encode(report: Mapping[str, Any], limit: int = MAX_REPORT) -> bytes:
    """The report as JSON of at most ``limit`` bytes; the longest texts are halved until it fits."""
    report = dict(report)
    while True:
        data = json.dumps(report, ensure_ascii=False, indent=1, default=str)
        encoded = data.encode(errors="backslashreplace")
        if len(encoded) <= limit:
            return encoded
        _halve_longest(report)


def _halve_longest(report: Report) -> None:
    """Make the field that takes most room half as long; what is short already goes altogether,
    because the mark of a cut has a length too."""
    key = _longest(report)
    value = report[key]
    if isinstance(value, str) and len(value) > 200:
        report[key] = cut(value, len(value) // 2)
    elif isinstance(value, dict) and len(value) > 0:
        value = dict(value)
        _halve_longest(value)
        report[key] = value
    elif isinstance(value, list) and len(value) > 1:
        report[key] = value[(len(value) + 1) // 2 :]  # the newest are at the end
    else:
        del report[key]


def _longest(report: Report) -> str:
    return max(report, key=lambda name: len(json.dumps(report[name], default=str)))


# Where the child stood

_THREAD = re.compile(r"^(Current thread|Thread|Stack)\b.*\(most recent call first\):\s*$")
_FRAME = re.compile(r'^\s+File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$')
# Frames that tell crashes apart; what called all of them says nothing.
_DEPTH = 8
_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r'^\s+File "(?P<file>.*)", line (?P<line>\d+), in (?P<name>.*)$')


def standing_line(stacks: str) -> str | None:
    """ "function at file:line" of the innermost frame, from a text of faulthandler.

    After a fatal signal: of the thread that got it.  Else of the main thread, which
    faulthandler writes last.  After an exception: where it was raised.  None if there is no
    such line.
    """
    frames = _standing_frames(stacks)
    if not frames:
        return None
    return f"{frames[0]['name']} at {frames[0]['file']}:{frames[0]['line']}"


def fingerprint(child: str, verdict: str, stacks: str) -> str:
    """What crashes of one cause have in common: who, how, and the functions it stood in.

    Without the numbers of lines and without their addresses, which another build moves.  Empty if
    there are no stacks, and for stacks that somebody asked for.
    """
    frames = _standing_frames(stacks)
    if not frames or verdict == "asked":
        return ""
    places = [f"{frame['name']} {frame['file'].rpartition('/')[2]}" for frame in frames[:_DEPTH]]
    # Edges are of one kind.
    text = "\n".join([child.rstrip("0123456789-"), verdict, *places])
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:12]


def _standing_frames(stacks: str) -> list[re.Match[str]]:
    """Of the thread that counts, the innermost first."""
    if _TRACEBACK in stacks and "Fatal Python error" not in stacks:
        raised = [match for line in stacks.splitlines() if (match := _RAISED.match(line))]
        if raised:
            return raised[::-1]
    threads: list[tuple[bool, list[re.Match[str]]]] = []
    fatal = False
    reading = False
    for line in stacks.splitlines():
        if line.startswith("Fatal Python error"):
            fatal = True
            threads.clear()
        if _THREAD.match(line):
            threads.append((line.startswith("Current thread"), []))
            reading = True
        elif reading and (frame := _FRAME.match(line)):
            threads[-1][1].append(frame)
        elif threads and threads[-1][1]:
            reading = False
    if not threads:
        return []
    if fatal:
        for current, frames in threads:
            if current:
                return frames
    return threads[-1][1]


# On disk

_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_TMP = ".tmp-"


class ReportStore:
    """Keeps the newest reports in a directory, at most so many and so many bytes.

    ``save`` raises OSError and nothing else.
    """

    def __init__(self, directory: str, *, max_reports: int = 100, max_bytes: int = 5_000_000):
        self._directory = directory
        self._max_reports = max_reports
        self._max_bytes = max_bytes

    def save(self, report: Mapping[str, Any]) -> str:
        """Write the report whole or not at all; returns its path."""
        name = str(report.get("id", ""))
        if not _ID.match(name):
            raise OSError(f"{name!r} is no name for a crash report")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        path = os.path.join(self._directory, f"{name}.json")
        tmp = os.path.join(self._directory, f"{_TMP}{name}")
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(encode(report, self._max_bytes))
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        except OSError:
            try:
                os.unlink(tmp)
            except OSError:
                pass
            raise
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._prune(keep=path, tmp=tmp)
        return path

    def _prune(self, keep: str, tmp: str) -> None:
        """Remove the oldest beyond the bounds, and what a dead writer left half done."""
        sizes: list[tuple[str, int]] = []
        for name in sorted(os.listdir(self._directory), reverse=True):
            path = os.path.join(self._directory, name)
            try:
                if name.startswith(_TMP):
                    if path != tmp:
                        os.unlink(path)
                elif name.endswith(".json"):
                    sizes.append((path, os.stat(path).st_size))
            except FileNotFoundError:
                continue  # the operator tidies up too
        total = 0
        for count, (path, size) in enumerate(sizes, 1):
            total += size
            if path != keep and (count > self._max_reports or total > self._max_bytes):
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass


def list_reports(directory: str) -> list[Report]:
    """All reports, newest first, whole; what cannot be read appears with its ``error``."""
    reports = []
    for name in _names(directory):
        try:
            reports.append(_load(directory, name))
        except ReportError as error:
            reports.append({"id": name, "error": str(error)})
    return reports


def load_report(directory: str, name: str) -> Report:
    """The report with this id, or whose id alone begins so; "last": the newest.

    Raises `ReportError`, which names the id and the directory.
    """
    names = _names(directory)
    if name == "last" and names:
        return _load(directory, names[0])
    if name in names:
        return _load(directory, name)
    similar = [known for known in names if name and known.startswith(name)]
    if not similar:
        raise ReportError(f"no crash report {name!r} in {directory}")
    if len(similar) > 1:
        raise ReportError(f"crash report {name!r} may be any of {', '.join(sorted(similar)[:5])}")
    return _load(directory, similar[0])


def _names(directory: str) -> list[str]:
    """Ids, newest first: an id begins with its time."""
    try:
        found = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ReportError(f"{directory}: {error.strerror}") from error
    return sorted(
        (name.removesuffix(".json") for name in found if name.endswith(".json")), reverse=True
    )


def _load(directory: str, name: str) -> Report:
    path = os.path.join(directory, f"{name}.json")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            report = json.load(file)
    except OSError as error:
        raise ReportError(f"crash report {name!r}: {error.strerror} ({path})") from error
    except ValueError as error:
        raise ReportError(f"crash report {name!r} is damaged: {error} ({path})") from error
    if not isinstance(report, dict):
        raise ReportError(f"crash report {name!r} is damaged: not an object ({path})")
    return report


# For a human


def render(report: Mapping[str, Any]) -> str:
    """The report as text; what happened and where the child stood come first."""
    lines = [f"{report.get('child', '?')}: {_ending(report)}"]
    where = standing_line(str(report.get("stacks") or ""))
    lines.append(f"stood in {where}" if where else "where it stood is not known: no stacks")
    lines.append("")
    uptime = report.get("uptime")
    lines.append(f"report       {report.get('id', '?')}")
    lines.append(f"at           {report.get('at', '?')}")
    lines.append(
        f"process      pid {report.get('pid', '?')}, incarnation {report.get('incarnation', '?')}, "
        f"{report.get('restarts', '?')} restarts before"
    )
    if isinstance(uptime, int | float):
        lines.append(f"lived        {uptime:.3f} s")
    if report.get("rusage"):
        used = ", ".join(f"{key} {value}" for key, value in report["rusage"].items())
        lines.append(f"used         {used}")
    known = {
        *("id", "at", "child", "incarnation", "pid", "class", "why", "signal", "exit_code"),
        *("core_dumped", "uptime", "restarts", "rusage", "stacks", "beats", "proc", "log"),
    }
    lines.extend(f"{key:<12} {report[key]}" for key in report if key not in known)
    if report.get("stacks"):
        lines += ["", "stacks:", _indent(report["stacks"])]
    if report.get("beats"):
        lines += ["", "last beats, oldest first:"]
        lines += [f"  {json.dumps(beat, ensure_ascii=False)}" for beat in report["beats"]]
    for name, text in (report.get("proc") or {}).items():
        lines += ["", f"/proc, {name}:", _indent(text)]
    if report.get("log"):
        lines += ["", "last lines of its log:"]
        lines += [_indent(line) for line in report["log"]]
    return _printable("\n".join(lines))


def _ending(report: Mapping[str, Any]) -> str:
    parts = [str(report.get("class", "?"))]
    if report.get("signal") is not None:
        dumped = ", core dumped" if report.get("core_dumped") else ""
        parts.append(f"signal {_signal_name(report['signal'])}{dumped}")
    if report.get("exit_code") is not None:
        parts.append(f"exit code {report['exit_code']}")
    return f"{', '.join(parts)}: {report.get('why') or 'no reason known'}"


def _signal_name(number: Any) -> str:
    # The names are the same on every system we run on for the signals that end a process.
    import signal

    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in str(text).splitlines())


def _printable(text: str) -> str:
    """A report holds what a broken child wrote: it must not paint the operator's terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
