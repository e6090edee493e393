"""The demo, and what remains of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import eventually

pytestmark = pytest.mark.slow


def traces() -> set[str]:
    """Directories and processes of trees of our own."""
    places = {str(path) for path in Path("/tmp").glob("pkvpn-chaos-*")}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "pkvpn-chaos-" in words or "pkvpn.chaos" in words:
                places.add(f"{entry.name} {words}")
    return places


def demo(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pkvpn", "demo", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_demo_kills_children_and_loses_nothing() -> None:
    before = traces()
    program = demo("--seconds", "5", "--json")
    said, complained = program.communicate(timeout=60)
    assert (program.returncode, complained) == (0, "")
    found = json.loads(said)
    assert found["kills"].keys() >= {"core", "edge-1"}
    assert (found["sessions"], found["lost"], found["refused"]) == (2, 0, 0)
    assert found["arrived"] > 1000
    assert found["longest_silence_ms"] > 0.0
    assert traces() <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_tells_what_was_and_leaves_nothing(number: int) -> None:
    before = traces()
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
    assert traces() <= before


def test_of_a_demo_that_is_killed_no_process_is_left() -> None:
    before = traces()
    program = demo("--seconds", "60")
    assert program.stdout is not None
    assert program.stderr is not None
    with program.stdout as said, program.stderr:
        while "canary" not in said.readline():
            pass
        (place,) = {one for one in traces() - before if one.startswith("/tmp/")}
        os.kill(program.pid, signal.SIGKILL)
        program.wait()
        eventually(lambda: not [one for one in traces() - before if not one.startswith("/tmp/")])
    for path in sorted(Path(place).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(place).rmdir()
