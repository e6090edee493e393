"""A whole VPN tree of our own: directories, a port of the loopback, and nothing that outlives us.

Strategy: the watchdog is our child and is killed by the kernel if we die; its children go with
it.  Everything is asked of it through its own sockets, as an operator would.  The port is chosen
once, so that a tree that is started again is found where the last one was.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from pkvpn.chaos.traffic import HUB, PASSWORD, USERS
from pkvpn.watchdog import control, instance
from pkvpn.watchdog.journal import read_entries
from pkvpn.watchdog.sweep import kill_tree

T = TypeVar("T")

START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0
# A process that the kernel is to end is gone, or a zombie, after so long.
GONE_TIMEOUT = 2.0


class TreeError(Exception):
    """The tree does not do what it must before anything can be tried on it."""


def wait_until(condition: Callable[[], T], within: float, what: str, every: float = 0.005) -> T:
    """The condition's first true value; `TreeError` naming what was waited for.

    An `OSError`, which is a service that does not answer just now, counts as not yet.
    """
    deadline = time.monotonic() + within
    while True:
        value: T | None = None
        with contextlib.suppress(OSError, control.ControlError):
            value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TreeError(f"not within {within:g} s: {what}")
        time.sleep(every)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class OwnTree:
    """A tree that is started, asked, hurt and ended by one process, ours."""

    def __init__(self, settings: str = "", *, orders: bool = False) -> None:
        """``settings``: more of its configuration, TOML.  ``orders``: its children misbehave
        when they are told to (`injector.order`)."""
        # Short: the path of a socket has 108 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix=f"pkvpn-chaos-{os.getpid()}-", dir="/tmp"))
        self.config = self.directory / "pkvpn.toml"
        self.orders = self.directory / "orders" if orders else None
        # Whose modules run.
        self.code = Path(__file__).resolve().parents[2]
        self.settings = settings
        # Chosen here: a configuration that is written again is to say the same.
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if self.orders is not None:
            self.orders.mkdir()

    def copy_code(self) -> Path:
        """From the next start on, run a copy of the package, which may be changed; where it is."""
        package = self.directory / "code" / "pkvpn"
        shutil.copytree(Path(__file__).resolve().parents[1], package)
        self.code = package.parent
        return package

    def __enter__(self) -> Self:
        try:
            self.start()
            self.ask("hub.add", name=HUB)
            for user in USERS:
                self.ask("user.add", hub=HUB, name=user, password=PASSWORD)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # -- start and end

    def start(self, *, prefix: tuple[str, ...] = (), **more: Any) -> None:
        """Start it and wait until it serves.  ``prefix``: words before its command line; ``more``
        goes to `subprocess.Popen`.  Raises `TreeError`."""
        self._process, answer = self.launch(prefix=prefix, **more)
        if not answer.get("ready"):
            raise TreeError(f"the tree did not start: {answer}")

    def launch(
        self, *, prefix: tuple[str, ...] = (), **more: Any
    ) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        """Start a watchdog; it and the last of what it says of its start, empty for nothing."""
        process = self.spawn(prefix=prefix, **more)
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        deadline = time.monotonic() + START_TIMEOUT
        buffer = b""
        with process.stdout as said:
            while not answer or "progress" in answer:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([said], [], [], left)[0]:
                    process.kill()
                    raise TreeError(f"nothing but {answer} within {START_TIMEOUT:g} s")
                data = os.read(said.fileno(), 65536)
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
        return process, answer

    def spawn(self, *, prefix: tuple[str, ...] = (), **more: Any) -> subprocess.Popen[bytes]:
        """Start a watchdog and wait for nothing; its words come on its standard output."""
        self.write_config()
        settings: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,  # the same stands in its log
            # Not where another copy of the package may lie.
            "cwd": self.directory,
            "env": {**os.environ, "PYTHONPATH": str(self.code)},
            "start_new_session": True,  # ^C is ours, and we tell it
        }
        return subprocess.Popen([*prefix, *self.command()], **{**settings, **more})

    def command(self) -> list[str]:
        orders = [str(self.orders)] if self.orders is not None else []
        return [
            *(sys.executable, "-m", "pkvpn.chaos", str(self.config), *orders),
            *("--parent", str(os.getpid())),
        ]

    def write_config(self) -> None:
        self.config.write_text(
            '[service]\nstate_dir = "state"\nruntime_dir = "run"\n'
            # Users of their own may not pass to a temporary directory.
            'core_user = ""\nedge_user = ""\n'
            f'listen = ["127.0.0.1:{self._port}"]\n{self.settings}',
            encoding="utf-8",
        )

    def ended(self) -> int | None:
        """The watchdog's exit code; None while it runs, or if none is there to ask."""
        return None if self._process is None else self._process.poll()

    def abandon(self) -> subprocess.Popen[bytes]:
        """Let go of the watchdog, which somebody else is to reap."""
        assert self._process is not None
        process, self._process = self._process, None
        return process

    def wait_end(self, within: float = STOP_TIMEOUT) -> int:
        """Wait for the end of the watchdog and of all that was in its tree; the exit code."""
        assert self._process is not None
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise TreeError(f"the watchdog has not ended within {within:g} s") from None
        self._process = None
        wait_until(lambda: not self.holders(), GONE_TIMEOUT, "the whole tree is gone")
        return code

    def stop(self) -> int:
        """Ask it to stop; the exit code of the watchdog."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self.wait_end()

    def close(self) -> None:
        """End it, by force if need be, and remove all it wrote."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.end_by_force()
        shutil.rmtree(self.directory, ignore_errors=True)

    def end_by_force(self) -> None:
        """End whatever is left of it, asking nobody."""
        process, self._process = self._process, None
        if self.holders():
            kill_tree(str(self.runtime), log=lambda _line: None)
        if process is not None:
            process.kill()
            process.wait()

    # -- asking

    @property
    def port(self) -> int:
        return self._port

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def runtime(self) -> Path:
        return self.directory / "run"

    def watchdog(self, verb: str, **args: Any) -> Any:
        return control.ask(str(self.runtime / "control.sock"), verb, args)

    def ask(self, verb: str, **args: Any) -> Any:
        """The core's answer."""
        return control.ask(str(self.runtime / "admin.sock"), verb, args, timeout=10.0)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.watchdog("status")
        return answer

    def children(self) -> dict[str, dict[str, Any]]:
        return {child["name"]: child for child in self.status()["children"]}

    def pids(self) -> dict[str, int]:
        """Name of a child that has a process, or "watchdog", -> its pid."""
        status = self.status()
        found = {child["name"]: int(child["pid"]) for child in status["children"] if child["pid"]}
        return found | {"watchdog": int(status["watchdog"]["pid"])}

    def is_up(self) -> bool:
        """Does every child serve?"""
        return bool(self.status()["state"] == "up")

    def holders(self) -> list[int]:
        """Every process of this tree that lives, found by the lock that all of them carry."""
        return instance.holders(str(self.runtime / instance.LOCK_NAME))

    def journal(self, after: float = 0.0) -> list[dict[str, Any]]:
        """What was written down since a moment of CLOCK_MONOTONIC."""
        entries = read_entries(str(self.state), last=1000)
        return [entry for entry in entries if float(entry.get("mono", 0.0)) >= after]
