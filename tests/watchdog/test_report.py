"""Crash reports: bounded, whole or absent, and the line of code first."""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from pkvpn.watchdog.report import (
    MAX_REPORT,
    Report,
    ReportError,
    ReportStore,
    build,
    cut,
    encode,
    fingerprint,
    list_reports,
    load_report,
    render,
    standing_line,
)
from pkvpn.watchdog.verdict import Beat

DUMP = """\
Thread 0x00007f0000000001 (most recent call first):
  File "/opt/queue.py", line 171 in get
  File "/opt/threading.py", line 982 in run

Thread 0x00007f0000000002 (most recent call first):
  File "/opt/pkvpn/core/main.py", line 123 in _serve
  File "/opt/pkvpn/core/main.py", line 88 in main
"""

FATAL = """\
Fatal Python error: Segmentation fault

Current thread 0x00007f0000000001 (most recent call first):
  File "/opt/ctypes/__init__.py", line 519 in string_at
  File "/opt/pkvpn/edge/main.py", line 9 in main

Thread 0x00007f0000000002 (most recent call first):
  File "/opt/threading.py", line 5 in wait
"""


def a_report(at: float = 1_700_000_000.25, **more: object) -> Report:
    given: dict[str, object] = {
        "child": "core",
        "incarnation": 2,
        "pid": 4711,
        "verdict": "blocked",
        "why": "hang",
        "signal": 9,
        "stacks": DUMP,
        "snapshot": {"status": "Name:\tvpnserver"},
        "beats": [(0.4, Beat(8, 0.01, ((17, 0.0), (3, 99.5)))), (0.2, Beat(9, 0.0, ((18, 0.0),)))],
        "duties": ("login",),
        "uptime": 12.5,
        "restarts": 1,
        "rusage": {"user_s": 0.5},
        **more,
    }
    return build(at=at, **given)  # type: ignore[arg-type]


def test_a_report_says_who_when_and_why() -> None:
    report = a_report(said="loading", nothing=None)

    assert report["id"] == "20231114T221320.250Z-core-2"
    assert report["class"] == "blocked"
    assert report["said"] == "loading"
    assert "nothing" not in report
    assert report["beats"][0] == {
        "age": 0.4,
        "seq": 8,
        "lag": 0.01,
        "duties": {
            "login": {"done": 17, "waiting_since": 0.0},
            "duty 2": {"done": 3, "waiting_since": 99.5},
        },
    }
    assert json.loads(encode(report)) == report


def test_every_field_is_cut_with_a_mark() -> None:
    report = a_report(
        stacks="s" * 100_000,
        snapshot={"status": "p" * 10_000},
        log=["l" * 1000] * 500,
        beats=[(0.0, Beat(number, 0.0, ())) for number in range(100)],
        why="w" * 5000,
        said="x" * 5000,
    )
    assert "80000 characters cut" in report["stacks"]
    assert "8000 characters cut" in report["proc"]["status"]
    assert len(report["log"]) == 60
    assert "700 characters cut" in report["log"][0]
    assert [beat["seq"] for beat in report["beats"]] == list(range(80, 100))
    assert "4000 characters cut" in report["why"]
    assert "4000 characters cut" in report["said"]
    assert len(encode(report)) <= MAX_REPORT


@pytest.mark.parametrize("limit", [40_000, 5_000, 700, 2])
def test_an_encoded_report_fits_whatever_is_in_it(limit: int) -> None:
    report = a_report(
        stacks="\n\u20ac" * 30_000,
        snapshot=dict.fromkeys("abcdefgh", "\x00" * 5000),
        log=["\udcff" * 400] * 60,
    )
    encoded = encode(report, limit)
    assert len(encoded) <= limit
    json.loads(encoded)


def test_cutting_keeps_both_ends() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 10 + "b" * 10, 4) == "aa\n... 16 characters cut ...\nbb"


# Where it stood


def test_the_main_thread_is_the_last_one() -> None:
    assert standing_line(DUMP) == "_serve at /opt/pkvpn/core/main.py:123"


def test_after_a_fatal_signal_it_is_the_thread_that_got_it() -> None:
    assert standing_line(FATAL) == "string_at at /opt/ctypes/__init__.py:519"
    # A dump that was asked for earlier lies before it in the same file.
    assert standing_line(DUMP + FATAL) == "string_at at /opt/ctypes/__init__.py:519"


@pytest.mark.parametrize(
    "stacks", ["", "nonsense", "Thread 0x1 (most recent call first):\n  <no Python frame>\n"]
)
def test_without_a_frame_there_is_no_line(stacks: str) -> None:
    assert standing_line(stacks) is None


def test_a_real_dump_names_the_innermost_line_of_the_main_thread() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            where = standing_line(file.read())
    finally:
        go.set()
        thread.join()
    assert where is not None
    assert where.startswith("test_a_real_dump_names_the_innermost_line_of_the_main_thread at ")
    assert f"{os.path.basename(__file__)}:" in where


# On disk


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    store = ReportStore(str(tmp_path / "crashes"))
    report = a_report()
    path = store.save(report)

    assert os.path.basename(path) == f"{report['id']}.json"
    assert os.stat(path).st_mode & 0o777 == 0o600
    directory = str(tmp_path / "crashes")
    assert list_reports(directory) == [report]
    assert load_report(directory, report["id"]) == report
    assert load_report(directory, "last") == report
    assert load_report(directory, "20231114") == report


def test_an_unknown_report_is_named(tmp_path: Path) -> None:
    store = ReportStore(str(tmp_path))
    with pytest.raises(ReportError, match=r"no crash report 'last' in "):
        load_report(str(tmp_path), "last")
    store.save(a_report(1.0))
    store.save(a_report(1.5))
    with pytest.raises(ReportError, match=r"no crash report '\.\./etc/passwd' in .*"):
        load_report(str(tmp_path), "../etc/passwd")
    with pytest.raises(ReportError, match=r"may be any of 19700101T000001\.000Z-core-2, "):
        load_report(str(tmp_path), "1970")
    with pytest.raises(ReportError, match="no crash report ''"):
        load_report(str(tmp_path), "")


def test_a_directory_that_does_not_exist_holds_no_reports(tmp_path: Path) -> None:
    assert list_reports(str(tmp_path / "none")) == []


def test_a_damaged_report_is_listed_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "20230101-x.json").write_text("{")
    (tmp_path / "20230102-x.json").write_text("[]")
    listed = list_reports(str(tmp_path))
    assert [report["id"] for report in listed] == ["20230102-x", "20230101-x"]
    assert all("damaged" in report["error"] for report in listed)


def test_the_oldest_go_beyond_the_bounds(tmp_path: Path) -> None:
    (tmp_path / ".tmp-old").touch()  # of a writer that was killed
    store = ReportStore(str(tmp_path), max_reports=3)
    for second in range(6):
        store.save(a_report(float(second)))
    assert [report["at"][17:19] for report in list_reports(str(tmp_path))] == ["05", "04", "03"]
    assert len(list(tmp_path.iterdir())) == 3

    size = max(path.stat().st_size for path in tmp_path.iterdir())
    ReportStore(str(tmp_path), max_bytes=2 * size).save(a_report(9.0))
    assert [report["at"][17:19] for report in list_reports(str(tmp_path))] == ["09", "05"]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    report = a_report()
    (tmp_path / f"{report['id']}.json").mkdir()  # the rename fails
    with pytest.raises(OSError, match="director"):
        ReportStore(str(tmp_path)).save(report)
    assert [path.name for path in tmp_path.iterdir()] == [f"{report['id']}.json"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_an_id_is_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="no name for a crash report"):
        ReportStore(str(tmp_path)).save({"id": name})


# For a human


def test_a_rendered_report_begins_with_what_and_where() -> None:
    report = a_report(log=["a line\x1b[2J"], said="loading", core_dumped=True)
    lines = render(report).splitlines()

    assert lines[0] == "core: blocked, signal 9 (SIGKILL), core dumped: hang"
    assert lines[1] == "stood in _serve at /opt/pkvpn/core/main.py:123"
    text = "\n".join(lines)
    assert "pid 4711, incarnation 2, 1 restarts before" in text
    assert "said         loading" in text
    assert "  a line?[2J" in text
    assert "/proc, status:" in text


def test_a_rendered_report_without_anything_says_so() -> None:
    lines = render({"child": "core", "signal": 222, "exit_code": 3}).splitlines()
    assert lines[0] == "core: ?, signal 222, exit code 3: no reason known"
    assert lines[1] == "where it stood is not known: no stacks"


CRASH = """Fatal Python error: Segmentation fault

Thread 0x00007f (most recent call first):
  File "/a/threading.py", line 5 in wait

Current thread 0x00008f (most recent call first):
  File "/a/pkvpn/core/hub.py", line {line} in switch
  File "/a/pkvpn/core/main.py", line 90 in _hear_frames
"""


def test_the_same_crash_has_the_same_fingerprint_wherever_it_is_installed() -> None:
    first = fingerprint("core", "dead", CRASH.format(line=7))
    assert len(first) == 12
    moved = CRASH.format(line=9).replace("0x00008f", "0x11118f").replace('"/a/', '"/other/')
    assert fingerprint("core", "dead", moved) == first
    assert fingerprint("edge-1", "dead", moved) == fingerprint("edge-2", "dead", moved) != first
    for other in (
        fingerprint("core", "busy", CRASH),
        fingerprint("core", "dead", CRASH.replace("_hear_frames", "_hear_request")),
    ):
        assert other not in (first, "")
    assert fingerprint("core", "dead", "") == fingerprint("core", "asked", CRASH) == ""
    assert standing_line(CRASH.format(line=7)) == "switch at /a/pkvpn/core/hub.py:7"
