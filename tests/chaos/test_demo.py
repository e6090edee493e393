"""The demo, and what remains of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.leftovers import directories, leftovers, processes
from tests.support import eventually

pytestmark = pytest.mark.slow


def demo(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pkvpn", "demo", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_demo_kills_children_and_loses_nothing() -> None:
    program = demo("--seconds", "5", "--json")
    said, complained = program.communicate(timeout=60)
    assert (program.returncode, complained) == (0, "")
    found = json.loads(said)
    assert found["kills"].keys() >= {"core", "edge-1"}
    assert (found["sessions"], found["lost"], found["refused"]) == (2, 0, 0)
    assert found["arrived"] > 1000
    assert found["longest_silence_ms"] > 0.0
    assert not leftovers(program.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_tells_what_was_and_leaves_nothing(number: int) -> None:
    program = demo("--seconds", "60")
    assert program.stdout is not None
    assert program.stderr is not None
    with program.stdout as said, program.stderr as complained:
        first = ""
        while "kill -9" not in first:
            first = said.readline()
            assert first, complained.read()
        program.send_signal(number)
        rest = said.read()
        assert (program.wait(20), complained.read()) == (0, "")
    assert "frames" in rest
    assert "2 of 2" in rest
    assert not leftovers(program.pid)


def test_of_a_demo_that_is_killed_no_process_is_left() -> None:
    program = demo("--seconds", "60")
    assert program.stdout is not None
    assert program.stderr is not None
    with program.stdout as said, program.stderr:
        while "canary" not in said.readline():
            pass
        (place,) = directories(program.pid)
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
        eventually(lambda: not processes(program.pid))
    for path in sorted(Path(place).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(place).rmdir()
