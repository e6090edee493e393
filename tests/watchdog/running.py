"""A tree of real processes, run by a watchdog that is forked from the test."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pkvpn.watchdog import instance, procfs, sweep
from pkvpn.watchdog.control import ask
from pkvpn.watchdog.journal import read_entries
from pkvpn.watchdog.policy import RestartPolicy
from pkvpn.watchdog.report import list_reports
from pkvpn.watchdog.run import run_tree
from pkvpn.watchdog.spec import ChildSpec, HeldSpec, TreeSpec
from tests import naughty
from tests.support import eventually, process_gone

# Quick enough for a test, and slow enough for a machine that does other things as well.
POLICY = RestartPolicy(first=0.02, cap=0.2)


class Running:
    """A watchdog and what can be seen of it from outside."""

    def __init__(self, directory: Path, pid: int, words: int) -> None:
        self.pid = pid
        self.runtime_dir = directory / "run"
        self.state_dir = directory / "state"
        self.trigger = directory / "trigger"
        self.stderr = directory / "stderr"
        self.code: int | None = None
        self._words = words
        self._waiting = b""

    # -- asking

    def ask(self, verb: str, **args: Any) -> Any:
        return ask(str(self.runtime_dir / "control.sock"), verb, args)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("status")
        return found

    def child(self, name: str) -> dict[str, Any]:
        (found,) = (one for one in self.status()["children"] if one["name"] == name)
        return dict(found)

    def pid_of(self, name: str) -> int:
        return int(self.child(name)["pid"])

    def up(self, name: str, *, after: int = -1) -> dict[str, Any]:
        """Wait until the child serves with more than ``after`` restarts; its status."""

        def look() -> dict[str, Any] | None:
            found = self.child(name)
            return found if found["state"] == "up" and found["restarts"] > after else None

        found = eventually(look, within=15.0)
        assert found is not None
        return found

    def word(self, within: float = 15.0) -> dict[str, Any]:
        """The next thing that `start` would be told."""
        os.set_blocking(self._words, False)

        def read() -> bool:
            with suppress(BlockingIOError):
                self._waiting += os.read(self._words, 65536)
            return b"\n" in self._waiting

        eventually(read, within=within)
        line, _, self._waiting = self._waiting.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def last_word(self) -> dict[str, Any]:
        word = self.word()
        while "progress" in word:
            word = self.word()
        return word

    # -- what was written down

    def journal(self, event: str = "", **fields: Any) -> list[dict[str, Any]]:
        wanted = {**({"event": event} if event else {}), **fields}
        return [
            entry
            for entry in read_entries(str(self.state_dir))
            if all(entry.get(key) == value for key, value in wanted.items())
        ]

    def reports(self, child: str = "") -> list[dict[str, Any]]:
        found = list_reports(str(self.state_dir / "crashes"))
        return [one for one in found if not child or one.get("child") == child]

    def report(self, child: str) -> dict[str, Any]:
        """The newest report of a child, once it is there."""
        return eventually(lambda: self.reports(child))[0]

    # -- doing

    def signal(self, number: signal.Signals, name: str = "") -> None:
        os.kill(self.pid_of(name) if name else self.pid, number)

    def wait_end(self, within: float = 15.0) -> int:
        """The watchdog's exit code; nobody of the tree is left."""
        if self.code is None:

            def reaped() -> bool:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.code = os.waitstatus_to_exitcode(status)
                return self.code is not None

            eventually(reaped, within=within)
        assert self.code is not None
        return self.code

    def holders(self) -> list[int]:
        return instance.holders(str(self.runtime_dir / instance.LOCK_NAME))

    def descendants(self) -> list[int]:
        return procfs.descendants(self.pid)

    def close(self) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            sweep.kill_tree(str(self.runtime_dir), lambda _line: None)
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait_end()
        else:
            sweep.kill_tree(str(self.runtime_dir), lambda _line: None)
        os.close(self._words)


def spec_in(
    directory: Path, *children: ChildSpec, held: tuple[HeldSpec, ...] = (), **more: Any
) -> TreeSpec:
    return TreeSpec(
        "naughty", children, str(directory / "run"), str(directory / "state"), held=held,
        **{"beat_interval": 0.05, **more},
    )  # fmt: skip


def child(name: str, how: str = "", directory: Path | None = None, **more: Any) -> ChildSpec:
    """A child that misbehaves in this way when the test says so; no way: a good one."""
    again = more.pop("again", False)
    more = {"policy": POLICY, "hang_timeout": 0.3, "stop_timeout": 1.0, "duties": ("work",), **more}
    if not how:
        return ChildSpec(name, naughty.good, **more)
    assert directory is not None
    settings = naughty.Naughty(how, str(directory / "trigger"), again)
    return ChildSpec(name, naughty.target, settings, **more)


@contextmanager
def running(
    directory: Path,
    spec: TreeSpec,
    *,
    wait: bool = True,
    on_reload: Callable[[], TreeSpec] | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[Running]:
    """The tree, up; ended by force after the test if the test has not ended it.

    ``before``: called in the process that will be the watchdog.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(read)
            os.setsid()
            errors = os.open(directory / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            if before is not None:
                before()

            def tell(line: dict[str, Any]) -> None:
                os.write(write, json.dumps(line).encode() + b"\n")

            code = run_tree(spec, tell=tell, on_reload=on_reload)
        except BaseException:  # noqa: BLE001 - it must not come back into pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    tree = Running(directory, pid, read)
    try:
        if wait:
            word = tree.last_word()
            assert word.get("ready"), (word, tree.stderr.read_text())
        yield tree
    except BaseException:
        for entry in tree.journal():
            print(entry)
        print(tree.stderr.read_text() if tree.stderr.exists() else "")
        raise
    finally:
        tree.close()


def all_gone(pids: list[int]) -> bool:
    return all(process_gone(pid) for pid in pids)
