"""The event journal: one JSON object a line, bounded in size, read while it is written.

Strategy: the writer (in the log child) never raises for a disk's sake.  What cannot be written is
counted, and the first entry that passes again is preceded by one that says how many are missing.
A line is written by one call; a torn last line (a crash, a full disk) is completed by a newline
before the next one and skipped by readers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "JOURNAL_NAME",
    "JournalWriter",
    "RotatingFile",
    "follow",
    "make_entry",
    "read_entries",
    "render",
    "utc_text",
]

JOURNAL_NAME = "journal.jsonl"

Entry = dict[str, Any]


def utc_text(wall: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC with milliseconds."""
    moment = datetime.fromtimestamp(wall, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def make_entry(
    event: str, *, wall: float, mono: float, child: str | None = None, **fields: Any
) -> Entry:
    """One entry.  ``wall``: time.time(); ``mono``: time.monotonic(), by which entries are
    compared, because the wall clock may be set.  ``fields`` must be JSON; None is left out."""
    entry: Entry = {"at": utc_text(wall), "mono": round(mono, 6), "event": event}
    if child is not None:
        entry["child"] = child
    entry.update((key, value) for key, value in fields.items() if value is not None)
    return entry


class RotatingFile:
    """An append-only file, renamed to ``.1``, ``.2`` ... when it would grow beyond its bound.

    ``write`` raises OSError and nothing else.  It looks each time whether the file is still the
    one of that name, so that a removed directory or a foreign logrotate is noticed at once.
    """

    def __init__(self, path: str, *, max_bytes: int, keep: int, mode: int = 0o600) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._mode = mode
        self._fd = -1
        self._torn = False

    @property
    def path(self) -> str:
        return self._path

    def write(self, line: bytes) -> None:
        """Append one line, which ends with a newline."""
        size = self._ready()
        if self._torn:
            line = b"\n" + line
        if size > 0 and size + len(line) > self._max_bytes:
            self._rotate()
            self._ready()
        written = os.write(self._fd, line)
        # A full disk takes a part and refuses the rest.
        self._torn = written != len(line)
        if self._torn:
            raise OSError(f"{self._path}: {written} of {len(line)} bytes written")

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _ready(self) -> int:
        """Have the file open that bears the name now; return its size."""
        if self._fd >= 0:
            ours = os.fstat(self._fd)
            try:
                named = os.stat(self._path)
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino):
                return ours.st_size
            self.close()
        os.makedirs(os.path.dirname(self._path) or ".", mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        self._fd = os.open(self._path, flags, self._mode)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        return size

    def _rotate(self) -> None:
        self.close()
        if self._keep < 1:
            os.unlink(self._path)
            return
        for number in range(self._keep, 0, -1):
            older = f"{self._path}.{number}"
            newer = f"{self._path}.{number - 1}" if number > 1 else self._path
            try:
                os.replace(newer, older)
            except FileNotFoundError:
                pass


class JournalWriter:
    """Appends entries to ``directory``; knows how many it could not write and why."""

    def __init__(self, directory: str, *, max_bytes: int = 1_000_000, keep: int = 4) -> None:
        path = os.path.join(directory, JOURNAL_NAME)
        self._file = RotatingFile(path, max_bytes=max_bytes, keep=keep)
        self._dropped = 0
        self._why = ""
        self._all_dropped = 0

    @property
    def dropped(self) -> int:
        """How many entries were not written, in all."""
        return self._all_dropped

    def append(self, entry: Entry) -> bool:
        """Write one entry; False: counted as dropped.  Never raises for what the disk does."""
        try:
            line = _line(entry)
            if self._dropped:
                said: Entry = {key: entry[key] for key in ("at", "mono") if key in entry}
                said |= {"event": "dropped", "count": self._dropped, "why": self._why}
                self._file.write(_line(said))
                self._dropped = 0
            self._file.write(line)
        except (OSError, TypeError, ValueError) as error:
            self._dropped += 1
            self._all_dropped += 1
            self._why = str(error)
            return False
        return True

    def close(self) -> None:
        self._file.close()


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace") + b"\n"


# Reading


def _paths(directory: str) -> list[str]:
    """The journal's files that exist, newest first."""
    base = os.path.join(directory, JOURNAL_NAME)
    found = [base] if os.path.exists(base) else []
    number = 1
    while os.path.exists(f"{base}.{number}"):
        found.append(f"{base}.{number}")
        number += 1
    return found


def _parse(line: bytes) -> Entry | None:
    """The entry of a line; None for a torn one and for what is no entry."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def read_entries(directory: str, last: int | None = None) -> list[Entry]:
    """The ``last`` entries (None: all there are), oldest first.  No journal: none."""
    batches: list[list[Entry]] = []
    count = 0
    for path in _paths(directory):
        if last is not None and count >= last:
            break
        try:
            with open(path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            continue  # rotated away meanwhile
        batch = [entry for entry in map(_parse, lines) if entry is not None]
        count += len(batch)
        batches.append(batch)
    entries = [entry for batch in reversed(batches) for entry in batch]
    if last is None:
        return entries
    return entries[-last:] if last > 0 else []


def _wait_a_little() -> bool:
    time.sleep(0.2)
    return True


def follow(directory: str, wait: Callable[[], bool] = _wait_a_little) -> Iterator[Entry]:
    """Yield entries as they are written from now on, through rotations.

    ``wait`` is called when there is nothing new; it returns False to end.  A journal that does
    not exist yet is waited for.
    """
    follower = _Follower(directory)
    try:
        while True:
            entries = follower.read()
            yield from entries
            if not entries and not wait():
                return
    finally:
        follower.close()


class _Follower:
    """Knows which file it reads, by inode, how far it came, and the unfinished line."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fd = -1
        self._rest = b""
        newest = _paths(directory)[:1]
        if newest and self._open(newest[0]):
            os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def read(self) -> list[Entry]:
        """What is new; the file is left for its successor only when it is read to its end."""
        entries = self._drain()
        while not entries and self._next_file():
            entries = self._drain()
        return entries

    def _open(self, path: str) -> bool:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._go_on_with(fd)
        return True

    def _go_on_with(self, fd: int) -> None:
        self.close()
        self._fd = fd
        self._rest = b""

    def _drain(self) -> list[Entry]:
        if self._fd < 0:
            return []
        if os.fstat(self._fd).st_size < os.lseek(self._fd, 0, os.SEEK_CUR):
            os.lseek(self._fd, 0, os.SEEK_SET)  # cut by somebody
            self._rest = b""
        data = self._rest
        while block := os.read(self._fd, 1 << 16):
            data += block
        *lines, self._rest = data.split(b"\n")
        return [entry for entry in map(_parse, lines) if entry is not None]

    def _next_file(self) -> bool:
        """Go to the file after ours, if the writer has gone there.  To be called at the end
        of ours; what was written to it between that and the rename is read before leaving."""
        paths = _paths(self._directory)
        if self._fd < 0:
            return bool(paths) and self._open(paths[-1])
        for newer, path in zip([None, *paths], paths, strict=False):
            if not self._is_ours(path):
                continue
            if newer is None or os.lseek(self._fd, 0, os.SEEK_CUR) < os.fstat(self._fd).st_size:
                return False
            try:
                fd = os.open(newer, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False  # it is being rotated: look again later
            if not self._is_ours(path):
                os.close(fd)  # rotated between our two looks: this is not the next file
                return False
            self._go_on_with(fd)
            return True
        # Rotated out of the bound, or removed: go on with the oldest there is.
        return bool(paths) and self._open(paths[-1])

    def _is_ours(self, path: str) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except FileNotFoundError:
            return False


_SHOWN_FIRST = ("at", "mono", "event", "child", "text")


def render(entry: Entry) -> str:
    """One line for a human: time, child, event, text, then the rest as ``key=value``."""
    at = str(entry.get("at", "?")).replace("T", " ")
    subject = f" {entry['child']}:" if entry.get("child") else ""
    parts = [f"{at}{subject} {entry.get('event', '?')}"]
    if entry.get("text"):
        parts.append(_one_line(entry["text"]))
    rest = [f"{key}={_value(entry[key])}" for key in entry if key not in _SHOWN_FIRST]
    if rest:
        parts.append(f"({', '.join(rest)})")
    return " ".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return _one_line(value if isinstance(value, str) else json.dumps(value))


def _one_line(value: Any) -> str:
    """Text of a child must not paint the operator's terminal."""
    text = str(value)
    return "".join(char if char.isprintable() else "?" for char in text.replace("\n", " | "))
