"""The journal: written through trouble, read while it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvpn.watchdog.journal import (
    JOURNAL_NAME,
    JournalWriter,
    RotatingFile,
    follow,
    make_entry,
    read_entries,
    render,
    utc_text,
)

FULL = Path("/dev/full")


def entry(number: int) -> dict[str, object]:
    return make_entry("test", wall=1_700_000_000.5 + number, mono=float(number), number=number)


def numbers(entries: list[dict[str, object]]) -> list[object]:
    return [one["number"] for one in entries if one["event"] == "test"]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    journal = JournalWriter(str(tmp_path), max_bytes=1000, keep=3)
    yield journal
    journal.close()


def test_an_entry_says_when_in_utc_and_on_the_clock_that_is_never_set() -> None:
    assert make_entry("up", wall=0.0015, mono=1.5, child="core", pid=7, why=None) == {
        "at": "1970-01-01T00:00:00.001Z",
        "mono": 1.5,
        "event": "up",
        "child": "core",
        "pid": 7,
    }


def test_time_text_has_milliseconds() -> None:
    assert utc_text(1_700_000_000.9996) == "2023-11-14T22:13:20.999Z"


def test_what_is_written_is_read_in_order(writer: JournalWriter, tmp_path: Path) -> None:
    assert all(writer.append(entry(number)) for number in range(5))

    assert numbers(read_entries(str(tmp_path))) == [0, 1, 2, 3, 4]
    assert numbers(read_entries(str(tmp_path), last=2)) == [3, 4]
    assert read_entries(str(tmp_path), last=0) == []


def test_no_journal_has_no_entries(tmp_path: Path) -> None:
    assert read_entries(str(tmp_path / "none")) == []


def test_rotation_bounds_the_size_and_keeps_the_newest(
    writer: JournalWriter, tmp_path: Path
) -> None:
    for number in range(200):
        assert writer.append(entry(number))

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [JOURNAL_NAME, *(f"{JOURNAL_NAME}.{number}" for number in (1, 2, 3))]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    found = numbers(read_entries(str(tmp_path)))
    assert found == list(range(200 - len(found), 200))
    assert numbers(read_entries(str(tmp_path), last=30)) == list(range(170, 200))


def test_a_torn_line_is_skipped_and_completed(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(b'{"event": "test", "number": 0}\n{"event": "te')
    journal = JournalWriter(str(tmp_path))
    assert journal.append(entry(1))
    journal.close()

    assert numbers(read_entries(str(tmp_path))) == [0, 1]


def test_what_is_no_entry_is_skipped(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(
        b'\xff\xfe\n[]\n{"a": 1}\n\n{"event": "test", "number": 3}\n'
    )
    assert numbers(read_entries(str(tmp_path))) == [3]


def test_a_full_disk_is_counted_and_said_when_it_works_again(
    writer: JournalWriter, tmp_path: Path
) -> None:
    assert writer.append(entry(0))
    path = tmp_path / JOURNAL_NAME
    path.rename(tmp_path / "kept")
    path.symlink_to(FULL)
    assert not writer.append(entry(1))
    assert not writer.append(entry(2))
    path.unlink()
    (tmp_path / "kept").rename(path)
    assert writer.append(entry(3))

    entries = read_entries(str(tmp_path))
    assert numbers(entries) == [0, 3]
    (said,) = [one for one in entries if one["event"] == "dropped"]
    assert said["count"] == 2
    assert os.strerror(errno.ENOSPC) in said["why"]
    assert said["at"] == entry(3)["at"]
    assert writer.dropped == 2


def test_a_removed_directory_is_made_again(writer: JournalWriter, tmp_path: Path) -> None:
    assert writer.append(entry(0))
    shutil.rmtree(tmp_path)
    assert writer.append(entry(1))
    assert numbers(read_entries(str(tmp_path))) == [1]


def test_a_directory_that_cannot_be_made_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    journal = JournalWriter(str(tmp_path / "file"))
    assert not journal.append(entry(0))
    assert journal.dropped == 1
    journal.close()


def test_a_foreign_rotation_is_followed(writer: JournalWriter, tmp_path: Path) -> None:
    assert writer.append(entry(0))
    (tmp_path / JOURNAL_NAME).rename(tmp_path / "journal.old")
    assert writer.append(entry(1))
    assert numbers(read_entries(str(tmp_path))) == [1]


def test_an_entry_that_is_no_json_is_counted(writer: JournalWriter) -> None:
    assert not writer.append({"event": object()})
    assert writer.append(entry(1))


def test_text_that_is_no_unicode_is_kept_readable(writer: JournalWriter, tmp_path: Path) -> None:
    assert writer.append({**entry(0), "text": "\udcff"})
    assert len((tmp_path / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()) == 1


def test_a_file_that_keeps_nothing_starts_again(tmp_path: Path) -> None:
    file = RotatingFile(str(tmp_path / "log"), max_bytes=10, keep=0)
    file.write(b"12345678\n")
    file.write(b"abcdefgh\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"abcdefgh\n"
    assert file.path == str(tmp_path / "log")


# Following


class Steps:
    """Does one step each time the follower has nothing, then ends it."""

    def __init__(self, *steps: object) -> None:
        self.steps = list(steps)

    def __call__(self) -> bool:
        if not self.steps:
            return False
        step = self.steps.pop(0)
        assert callable(step)
        step()
        return True


def append(writer: JournalWriter, *wanted: int) -> None:
    for number in wanted:
        assert writer.append(entry(number))


def test_following_shows_what_comes_after(writer: JournalWriter, tmp_path: Path) -> None:
    append(writer, 0, 1)
    steps = Steps(lambda: append(writer, 2), lambda: None, lambda: append(writer, 3, 4))
    assert numbers(list(follow(str(tmp_path), steps))) == [2, 3, 4]


def test_following_waits_for_a_journal(writer: JournalWriter, tmp_path: Path) -> None:
    assert numbers(list(follow(str(tmp_path), Steps(lambda: append(writer, 7))))) == [7]


def test_following_goes_through_rotations(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path), max_bytes=200, keep=20)
    append(writer, 0)
    steps = Steps(*(lambda n=n: append(writer, *range(n, n + 7)) for n in range(1, 50, 7)))
    assert numbers(list(follow(str(tmp_path), steps))) == list(range(1, 50))
    writer.close()


def test_following_goes_on_after_what_was_rotated_out(
    writer: JournalWriter, tmp_path: Path
) -> None:
    append(writer, 0)
    found = follow(str(tmp_path), Steps(lambda: append(writer, *range(1, 300))))
    shown = numbers(list(found))
    kept = numbers(read_entries(str(tmp_path)))
    # The rest of the file it had open, then all that is left.
    assert shown[: -len(kept)] == list(range(1, 1 + len(shown) - len(kept)))
    assert shown[-len(kept) :] == kept
    assert len(shown) < 299


def test_following_a_file_that_was_cut_starts_again(writer: JournalWriter, tmp_path: Path) -> None:
    append(writer, 0, 1, 2)

    def cut() -> None:
        os.truncate(tmp_path / JOURNAL_NAME, 0)
        append(writer, 9)

    assert numbers(list(follow(str(tmp_path), Steps(cut)))) == [9]


def test_following_shows_a_line_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    path.touch()
    line = json.dumps(entry(5)).encode() + b"\n"

    def add(data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)

    steps = Steps(lambda: add(line[:10]), lambda: add(line[10:]))
    assert numbers(list(follow(str(tmp_path), steps))) == [5]


# For a human


def test_a_rendered_entry_is_one_line() -> None:
    shown = render(
        {
            "at": "2023-11-14T22:13:20.500Z",
            "mono": 12.0,
            "event": "verdict",
            "child": "core",
            "text": "blocked\nin \x1b[31mfutex",
            "pid": 7,
            "gap": 1.25,
            "state": "up",
        }
    )
    assert shown == (
        "2023-11-14 22:13:20.500Z core: verdict blocked | in ?[31mfutex (pid=7, gap=1.25, state=up)"
    )
    assert render({"event": "x"}) == "? x"
