"""The example of the framework does what its docstring says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvpn.watchdog import ask, procfs
from tests.support import eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Greeter:
    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.socket = str(directory / "run" / "control.sock")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "greeter.py"), str(directory), str(self.port)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        eventually(lambda: ask(self.socket, "status")["state"] == "up")

    def greets(self) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10.0) as guest:
            return guest.recv(100).decode()

    def pid(self, name: str) -> int:
        return next(
            int(one["pid"]) for one in ask(self.socket, "status")["children"] if one["name"] == name
        )


@pytest.fixture
def greeter(tmp_path: Path) -> Iterator[Greeter]:
    made = Greeter(tmp_path)
    yield made
    made.process.terminate()
    made.process.wait(10.0)


def test_nobody_is_refused_while_a_door_is_replaced(greeter: Greeter) -> None:
    assert greeter.greets() == "hello from incarnation 1\n"
    for number in (2, 3, 4):
        os.kill(greeter.pid("door"), signal.SIGKILL)
        assert greeter.greets() == f"hello from incarnation {number}\n"


def test_a_term_to_any_of_them_ends_the_tree(greeter: Greeter) -> None:
    pids = procfs.descendants(greeter.process.pid)
    os.kill(greeter.pid("door"), signal.SIGTERM)
    assert greeter.process.wait(10.0) == 0
    assert [pid for pid in pids if procfs.read_facts(pid) is not None] == []
