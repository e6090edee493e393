import io
import json
import logging
import os
import sys
from typing import TextIO

import pytest

from pkvpn import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)


def line(kind: str, stream: TextIO | None, message: str = "it works", child: str = "core") -> str:
    record = logging.makeLogRecord(
        {
            "name": "pkvpn.core",
            "levelno": logging.WARNING,
            "levelname": "WARNING",
            "msg": message,
            "created": 0.25,
            "processName": child,
        }
    )
    return logs.make_formatter(kind, stream).format(record)


def test_a_file_gets_plain_lines_with_time_level_and_child() -> None:
    text = line("auto", None)

    assert text.endswith(" WARNING core: it works")
    assert ".250" in text.split()[0]


def test_a_terminal_gets_colours_and_a_pipe_gets_none() -> None:
    assert "\x1b[" in line("auto", Terminal())
    assert "\x1b[" not in line("auto", io.StringIO())
    assert "\x1b[" not in line("plain", Terminal())


def test_no_color_is_respected_and_force_color_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in line("auto", Terminal())

    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in line("auto", Terminal())


@pytest.mark.parametrize(
    ("kind", "stream"), [("plain", None), ("auto", Terminal()), ("journal", Terminal())]
)
def test_a_message_stays_one_harmless_line(kind: str, stream: TextIO | None) -> None:
    text = line(kind, stream, "user \x1b[2J\nWARNING core: forged\r")

    assert "\n" not in text
    assert r"user \x1b[2J\nWARNING core: forged\r" in text


def test_json_is_one_object_a_line() -> None:
    entry = json.loads(line("json", Terminal(), "a\nb"))

    assert entry["message"] == "a\nb"
    assert entry["level"] == "warning"
    assert entry["child"] == "core"
    assert entry["logger"] == "pkvpn.core"


def test_under_systemd_each_line_has_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w", encoding="utf-8") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert line("auto", stream) == "<4>core: it works"

        # Inherited, but the stream was redirected since.
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not line("auto", stream).startswith("<")


def test_a_traceback_has_its_own_lines_with_a_priority_each() -> None:
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "oh", (), sys.exc_info())
    text = logs.make_formatter("journal", io.StringIO()).format(record)

    assert len(text.splitlines()) > 3
    assert all(each.startswith("<3>") for each in text.splitlines())
    assert "broken" in json.loads(logs.JsonFormatter().format(record))["exception"]


def test_a_closed_standard_error_is_no_journal() -> None:
    assert not logs.is_journal(None)
