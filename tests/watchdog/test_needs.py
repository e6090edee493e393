"""A system on which the service cannot run, and what it is told of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkvpn.watchdog import needs

# The numbers of calls on x86-64 and, from 424 on, everywhere.
CALLS = {"pidfd_open": 434, "memfd_create": 319, "epoll": 291}

# A filter that lets one call look as on a kernel that has not got it: ENOSYS.
WITHOUT = """
import ctypes, os, struct, sys
number, *command = sys.argv[1:]
program = b"".join(struct.pack("=HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, int(number)),
    (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7FFF0000)))
code = ctypes.create_string_buffer(program, len(program))
filter = ctypes.create_string_buffer(struct.pack("=H6xQ", 4, ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter, 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(command[0], command)
"""


def vpnserver(config: Path, *verb: str) -> list[str]:
    return [sys.executable, "-m", "pkvpn", "--config", str(config), *verb]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(
        '[service]\nlisten = ["127.0.0.1:0"]\nstate_dir = "state"\nruntime_dir = "run"\n'
    )
    return path


def refused(config: Path, command: list[str]) -> str:
    """What it says when it ends with 1, having left nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30.0)
    assert done.returncode == 1, done
    assert [path.name for path in config.parent.iterdir()] == ["c.toml"]
    return done.stderr


def test_here_nothing_is_missing() -> None:
    assert needs.missing() == []


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of calls of x86-64")
@pytest.mark.parametrize("name", CALLS)
def test_without_a_call_it_does_not_start_and_says_which(name: str, config: Path) -> None:
    for verb in ("start", "execsvc"):
        command = [sys.executable, "-c", WITHOUT, str(CALLS[name]), *vpnserver(config, verb)]
        said = refused(config, command)
        assert f"which lacks {name} (" in said
        assert "Function not implemented" in said


@pytest.mark.root
@pytest.mark.parametrize("verb", ["start", "execsvc", "restart"])
def test_without_proc_it_does_not_start_and_says_so(verb: str, config: Path) -> None:
    hide = 'mount -t tmpfs none /proc && exec "$@"'
    said = refused(config, ["unshare", "--mount", "sh", "-c", hide, "sh", *vpnserver(config, verb)])
    assert "which lacks /proc (to see what a process is at): No such file" in said


def test_on_another_unix_python_has_no_name_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.pidfd_open")
    monkeypatch.delattr("select.epoll")
    assert [one.partition(" ")[0] for one in needs.missing()] == ["pidfd_open", "epoll"]
    assert needs.missing()[0].endswith("not known here")
