"""The log child and the pipe that leads to it, with a child's end that is driven by steps."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog import logchild
from pkvpn.watchdog.journal import read_entries
from pkvpn.watchdog.logchild import MAX_MESSAGE, WATCHDOG, LogPipe, LogSettings, main
from pkvpn.watchdog.report import build, list_reports

NOW = 1_700_000_000.25


class FakeDuty:
    def __init__(self) -> None:
        self.done = 0
        self.waiting_since = 0.0


class FakeChild:
    """Does one step per turn of the loop; a stop is asked for after the last."""

    def __init__(self, fds: list[int], steps: list[Callable[[], object]]) -> None:
        self._held = {"log": fds}
        self._steps = steps
        self._never, self._other = os.pipe()
        self.is_ready = False
        self.write_duty = FakeDuty()

    @property
    def stopping(self) -> bool:
        return not self._steps

    def held(self, name: str) -> list[int]:
        return self._held[name]

    def fileno(self) -> int:
        return self._never

    def receive(self) -> list[str]:
        return []

    def duty(self, name: str) -> FakeDuty:
        assert name == "write"
        return self.write_duty

    def ready(self) -> None:
        self.is_ready = True

    def turn(self, now: float) -> float:
        if self._steps:
            self._steps.pop(0)()
        return 0.0

    def close(self) -> None:
        os.close(self._never)
        os.close(self._other)


class Place:
    """Pipes, a directory, and a log child that may be run again and again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_file = directory / "log" / "service.log"
        self._ends = {
            name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            for name in ("edge-1", WATCHDOG, "core")
        }
        self.pipe = self.pipe_of("core")
        self.watchdog = self.pipe_of(WATCHDOG)
        self.settings: dict[str, Any] = {"log_file": str(self.log_file)}

    def pipe_of(self, process: str) -> LogPipe:
        return LogPipe(self._ends[process][1].fileno())

    def raw(self, message: bytes, process: str = "core") -> None:
        self._ends[process][1].send(message)

    def hang_up(self) -> None:
        for _, write in self._ends.values():
            write.close()

    def run(self, *steps: Callable[[], object]) -> FakeChild:
        child = FakeChild([read.fileno() for read, _ in self._ends.values()], list(steps))
        settings = LogSettings(
            state_dir=str(self.directory), senders=tuple(self._ends), **self.settings
        )
        try:
            main(child, settings)
        finally:
            child.close()
        return child

    def log(self) -> list[str]:
        return self.log_file.read_text().splitlines()

    def close(self) -> None:
        for ends in self._ends.values():
            for end in ends:
                end.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


def record(message: str, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    return logging.makeLogRecord(
        {
            "name": "pkvpn.core",
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "msg": message,
            "created": NOW,
            **more,
        }
    )


def a_logger(place: Place) -> logging.Logger:
    """One of its own: those of `getLogger` stay for all tests."""
    logger = logging.Logger("pkvpn.test")  # noqa: LOG001 - on purpose, see above
    logger.addHandler(place.pipe.handler())
    return logger


def test_lines_entries_and_reports_each_find_their_place(place: Place) -> None:
    place.pipe.send_record(record("hello"))
    place.watchdog.send_entry({"event": "state", "child": "core"})
    place.watchdog.send_report(a_report())
    child = place.run()

    assert child.is_ready
    assert place.log() == ["2023-11-14T22:13:20.250Z core INFO pkvpn.core: hello"]
    (entry,) = read_entries(str(place.directory))
    assert (entry["event"], entry["child"]) == ("state", "core")
    assert entry["at"].endswith("Z")
    assert entry["mono"] > 0
    (report,) = list_reports(str(place.directory / "crashes"))
    assert report["class"] == "blocked"


def a_report() -> dict[str, Any]:
    return build(
        at=NOW, child="core", incarnation=1, pid=7, verdict="blocked", why="hang", stacks=STACKS
    )


STACKS = 'Current thread 0x1 (most recent call first):\n  File "/x/main.py", line 5 in serve\n'


def test_a_running_child_counts_its_duty(place: Place) -> None:
    child = place.run(lambda: place.pipe.send_record(record("1")), lambda: None, lambda: None)
    assert place.log()[0].endswith(": 1")
    assert child.write_duty.done == 1
    assert child.write_duty.waiting_since == 0.0


def test_what_is_queued_at_the_stop_is_still_written(place: Place) -> None:
    steps = [lambda: [place.pipe.send_record(record(str(n))) for n in range(100)]]
    place.run(*steps)
    assert [line.rpartition(" ")[2] for line in place.log()] == [str(n) for n in range(100)]


def test_it_ends_when_nobody_is_left_to_write(place: Place) -> None:
    place.pipe.send_record(record("last words"))
    place.hang_up()
    place.run(*[lambda: None] * 1000)
    assert place.log()[0].endswith("last words")


def test_a_report_gets_the_tail_of_its_childs_log(place: Place) -> None:
    place.settings["tail_lines"] = 3
    for number in range(5):
        place.pipe.send_record(record(f"line {number}"))
    place.pipe_of("edge-1").send_record(record("another's"))
    place.watchdog.send_report(a_report())
    place.run()

    (report,) = list_reports(str(place.directory / "crashes"))
    assert [line.rpartition("INFO ")[2] for line in report["log"]] == ["line 2", "line 3", "line 4"]


def test_the_same_crash_again_and_again_is_an_event(place: Place) -> None:
    for _ in range(5):
        place.watchdog.send_report(a_report())
    place.watchdog.send_report({**a_report(), "fingerprint": "another"})
    place.watchdog.send_report({**a_report(), "fingerprint": ""})
    place.run()
    entries = read_entries(str(place.directory))
    assert [(one["event"], one["child"]) for one in entries] == [("same-crash", "core")] * 2
    assert [one["text"].split()[0] for one in entries] == ["2", "4"]
    assert entries[0]["text"].endswith("serve at /x/main.py:5")


def test_an_exception_travels_as_text(place: Place) -> None:
    logger = a_logger(place)
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it %s", "failed")
    place.run()

    log = place.log()
    assert log[0].endswith("core ERROR pkvpn.test: it failed")
    assert log[1] == "Traceback (most recent call last):"
    assert log[-1] == "ValueError: why"


def test_a_record_whose_arguments_do_not_fit_is_shown_all_the_same(place: Place) -> None:
    logger = a_logger(place)
    logger.error("%d sheep", "no")
    place.run()
    assert "'%d sheep' (its arguments do not fit: " in place.log()[0]


@pytest.mark.parametrize("how", ["formatter", "callable"])
def test_the_formatter_comes_from_the_settings(place: Place, how: str) -> None:
    formatter = logging.Formatter("%(levelname)s|%(processName)s|%(message)s")
    place.settings["formatter"] = formatter if how == "formatter" else formatter.format
    place.pipe.send_record(record("x", logging.WARNING))
    place.run()
    assert place.log() == ["WARNING|core|x"]


def test_a_formatter_that_fails_costs_no_line(place: Place) -> None:
    def broken(_record: logging.LogRecord) -> str:
        raise KeyError("colour")

    place.settings["formatter"] = broken
    place.pipe.send_record(record("kept"))
    place.run()
    assert place.log()[0].endswith("pkvpn.core: kept (formatter failed: 'colour')")


def test_without_a_log_file_lines_go_to_stderr(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.settings = {}
    place.pipe.send_record(record("seen"))
    place.run()
    assert capfd.readouterr().err.endswith("pkvpn.core: seen\n")


def test_in_the_foreground_lines_go_to_both(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.settings |= {"echo": True, "echo_formatter": logging.Formatter("! %(message)s")}
    place.pipe.send_record(record("seen"))
    place.run()
    assert capfd.readouterr().err == "! seen\n"
    assert place.log()[0].endswith("seen")


# What does not fit or does not pass


def test_a_full_pipe_never_blocks_and_the_loss_is_said(place: Place) -> None:
    sent = 0
    while place.pipe.send_record(record("x" * 500)):
        sent += 1
    assert not place.pipe.send_record(record("lost"))
    assert place.pipe.dropped == 2
    # A flood of one leaves room for all others.
    assert place.watchdog.send_entry({"event": "kept"})
    place.settings["burst"] = 1e9
    place.run(*[lambda: None] * 50)
    assert place.pipe.send_record(record("after"))
    place.run()

    log = place.log()
    assert len(log) == sent + 2
    assert log[-2].endswith("2 messages of core were lost: the log pipe was full")
    assert log[-1].endswith("after")
    place.pipe.send_record(record("said once"))
    place.run()
    assert len(place.log()) == sent + 3


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\u20ac\n" * 100_000, "\x00" * 100_000])
def test_a_message_that_is_too_long_is_cut_with_a_mark(place: Place, text: str) -> None:
    assert place.pipe.send_record(record(text))
    assert place.watchdog.send_entry({"event": "long", "text": text})
    assert place.watchdog.send_report({**a_report(), "stacks": text})
    place.run()

    assert "characters cut" in place.log_file.read_text()
    (entry,) = read_entries(str(place.directory))
    assert "characters cut" in entry["text"]
    (report,) = list_reports(str(place.directory / "crashes"))
    assert "characters cut" in report["stacks"]


def test_a_body_that_is_no_json_is_sent_as_text(place: Place) -> None:
    assert place.watchdog.send_entry({"event": "odd", "what": Path("/x")})
    assert not place.watchdog.send_entry({"event": "odd", (1, 2): 3})  # type: ignore[dict-item]
    place.run()
    assert read_entries(str(place.directory))[0]["what"] == "/x"


@pytest.mark.parametrize("message", [b"", b"L", b"L\0\0\0\0{", b"J\0\0\0\0[]", b"J\0\0\0\0\xff"])
def test_garbage_is_said_and_survived(place: Place, message: bytes) -> None:
    place.raw(message)
    place.raw(b"?\0\0\0\0{}")
    place.pipe.send_record(record("still here"))
    place.run()
    log = place.log()
    assert "a message of core that cannot be read" in log[0]
    assert log[1].endswith("a message of core of kind b'?'")
    assert log[2].endswith("still here")


def test_odd_fields_of_a_record_are_survived(place: Place) -> None:
    body = json.dumps({"level": "high", "created": "now", "message": 5, "exc": 7})
    place.raw(b"L\0\0\0\0" + body.encode())
    place.run()
    assert " core INFO : 5" in place.log()[0]


@pytest.mark.parametrize("created", ["1e400", "NaN", "-1", "1e30", "9" * 400, "true"])
def test_a_time_that_is_none_is_survived(place: Place, created: str) -> None:
    place.raw(b'L\0\0\0\0{"message":"here","created":' + created.encode() + b"}")
    place.run()
    assert place.log()[0].endswith(": here")


@pytest.mark.parametrize("kind", [b"L", b"J", b"R"])
def test_a_body_that_is_nested_too_deeply_is_survived(place: Place, kind: bytes) -> None:
    place.raw(kind + b"\0\0\0\0" + b"[" * 50000)
    place.pipe.send_record(record("still here"))
    place.run()
    assert "a message of core that cannot be read" in place.log()[0]
    assert place.log()[1].endswith("still here")


def test_a_child_speaks_for_nobody_else(place: Place) -> None:
    assert place.pipe.send_entry({"event": "stop-asked", "by": "core"})
    assert place.pipe.send_report(a_report())
    place.pipe.send_record(record("x", processName="edge-1"))
    place.run()
    assert not read_entries(str(place.directory))
    assert not list_reports(str(place.directory / "crashes"))
    told = [line.split(" ", 1)[1] for line in place.log()]
    assert told[:2][0].endswith("a message of core of kind b'J'")
    assert told[:2][1].endswith("a message of core of kind b'R'")
    assert told[2].startswith("core INFO")


def test_a_message_never_exceeds_its_bound() -> None:
    body = {"event": "x", **{f"k{n}": "v" * 3000 for n in range(100)}}
    assert len(logchild.encode(b"J", 2**40, body)) <= MAX_MESSAGE
    kind, dropped, _ = logchild.decode(logchild.encode(b"J", 2**40, body))
    assert (kind, dropped) == (b"J", 2**32 - 1)


def test_a_flood_is_cut_and_counted_per_process(place: Place) -> None:
    place.settings |= {"rate": 0.001, "burst": 10}
    for number in range(50):
        place.pipe.send_record(record(str(number)))
    place.pipe_of("edge-1").send_record(record("calm"))
    place.run()

    log = place.log()
    assert len(log) == 12
    assert sum(line.endswith("calm") for line in log) == 1
    assert log[11].endswith("40 lines of core were left out: more than 0.001 a second")


@pytest.mark.parametrize("message", [b"", b"?\0\0\0\0{}", b'L\0\0\0\1{"message":"x"}'])
def test_a_flood_of_what_is_no_line_is_cut_as_well(place: Place, message: bytes) -> None:
    place.settings |= {"rate": 0.001, "burst": 10}
    for _ in range(50):
        place.raw(message)
    place.run()
    assert len(place.log()) == 11


def test_a_flood_that_is_over_is_said_while_running(place: Place) -> None:
    place.settings |= {"rate": 1e6, "burst": 1}
    bucket = logchild._Bucket(rate=10.0, burst=20.0, now=0.0)
    assert sum(bucket.take(0.0) for _ in range(50)) == 20
    assert bucket.refused == 30
    assert not bucket.has_room(0.1)
    assert bucket.has_room(0.2)
    assert bucket.take(0.2)
    assert bucket.take(0.2)
    assert not bucket.take(0.2)


# Disks


def test_a_full_disk_sends_lines_to_stderr_and_says_what_is_missing(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.log_file.parent.mkdir()
    place.log_file.symlink_to("/dev/full")
    place.run(
        lambda: place.pipe.send_record(record("one")),
        lambda: None,
        place.log_file.unlink,
        lambda: place.pipe.send_record(record("two")),
        lambda: None,
    )
    assert capfd.readouterr().err.endswith("pkvpn.core: one\n")
    log = place.log()
    assert "1 lines are missing here: " in log[0]
    assert log[1].endswith("two")


def test_a_removed_log_directory_is_made_again(place: Place) -> None:
    place.run(
        lambda: place.pipe.send_record(record("one")),
        lambda: None,
        lambda: shutil.rmtree(place.log_file.parent),
        lambda: place.pipe.send_record(record("two")),
        lambda: None,
    )
    assert [line.rpartition(" ")[2] for line in place.log()] == ["two"]


def test_a_log_that_was_rotated_by_others_is_opened_anew(place: Place) -> None:
    place.run(
        lambda: place.pipe.send_record(record("one")),
        lambda: None,
        lambda: place.log_file.rename(place.directory / "old.log"),
        lambda: place.pipe.send_record(record("two")),
        lambda: None,
    )
    assert [line.rpartition(" ")[2] for line in place.log()] == ["two"]


def test_the_log_rotates_by_its_size(place: Place) -> None:
    place.settings |= {"log_max_bytes": 1000, "log_keep": 2}
    for number in range(60):
        place.pipe.send_record(record(str(number)))
    place.run()
    assert sorted(path.name for path in place.log_file.parent.iterdir()) == [
        "service.log", "service.log.1", "service.log.2",
    ]  # fmt: skip


def test_nothing_on_disk_works_and_nothing_is_raised(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.directory / "file").touch()
    place.directory /= "file"
    place.settings["log_file"] = str(place.directory / "log")
    place.pipe.send_record(record("line"))
    place.watchdog.send_entry({"event": "state"})
    place.watchdog.send_report(a_report())
    place.run()

    err = capfd.readouterr().err
    assert "pkvpn.core: line\n" in err
    assert 'journal: {"at"' in err
    assert "crash report 20231114T221320.250Z-core-1 could not be kept: " in err
    assert "(stood in serve at /x/main.py:5)" in err


def test_a_storm_of_failures_does_not_flood_stderr(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.directory / "file").touch()
    place.settings["log_file"] = str(place.directory / "file" / "log")
    for number in range(120):
        place.pipe.send_record(record(str(number)))
    place.run()
    assert 20 <= len(capfd.readouterr().err.splitlines()) < 60


def test_a_closed_stderr_is_survived(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr("sys.__stderr__", stderr)
        os.close(read)
        place.settings = {}
        place.pipe.send_record(record("nobody hears"))
        place.run()


def test_a_stderr_that_takes_nothing_does_not_hang_us(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 65536)
    except BlockingIOError:
        pass
    os.set_blocking(write, True)
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr("sys.__stderr__", stderr)
        place.settings = {}
        place.pipe.send_record(record("nobody reads"))
        place.run()
    os.close(read)
