"""A supervised tree on Windows: starts, stops, deaths, hangs, and who goes with whom."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import eventually
from tests.windows import wine

pytestmark = [pytest.mark.windows, pytest.mark.slow]


class Tree:
    """One that runs, seen from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._ends = directory / "ends"
        self.process = wine.start(
            "-m", "tests.windows.tree", "run", wine.windows_path(directory),
            PKVPN_TEST_PORT=str(self.port), PKVPN_TEST_ENDS=wine.windows_path(self._ends),
        )  # fmt: skip
        self.ready = self.read_line()

    def read_line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        told: dict[str, Any] = json.loads(line)
        return told

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def ask(self, verb: str) -> dict[str, Any]:
        """By a process of its own, as an operator does."""
        answer: dict[str, Any] = json.loads(
            wine.run("-m", "tests.windows.tree", verb, wine.windows_path(self.directory))
        )
        return answer

    def wish(self, wish: bytes, timeout: float = 15.0) -> int:
        """Say it to the child that serves; its pid."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(wish)
            return int(connection.recv(100))

    def pids(self) -> dict[str, int]:
        return {child["name"]: child["pid"] for child in self.ask("status")["children"]}

    def events(self) -> list[dict[str, Any]]:
        lines = (self.directory / "journal.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def reports(self) -> dict[int, dict[str, Any]]:
        """By the pid of the dead."""
        found = (self.directory / "crashes").glob("*.json")
        return {one["pid"]: one for one in (json.loads(path.read_text()) for path in found)}

    def report_of(self, pid: int) -> dict[str, Any]:
        return eventually(lambda: self.reports().get(pid)) or {}

    def ended_as_asked(self) -> list[str]:
        return self._ends.read_text().split()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.ask("stop")
                self.process.wait(15)
            finally:
                self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """It heals itself: one for all that do not end it."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    try:
        assert tree.ready.get("ready"), tree.ready
        yield tree
    finally:
        tree.close()


def test_all_are_called_vpnserver(tree: Tree) -> None:
    pids = tree.pids()
    listed = wine.run("-m", "tests.windows.tree", "list", "-")
    programs = {
        int(pid): program.rpartition("\\")[2]
        for pid, program in (line.split(" ", 1) for line in listed.splitlines())
    }
    names = {programs.get(pid) for pid in [*pids.values(), tree.ready["pid"]]}
    assert names == {"vpnserver.exe"}


def test_one_that_dies_is_replaced_and_who_connects_meanwhile_is_served(tree: Tree) -> None:
    before = tree.wish(b"exit")
    after = tree.wish(b"hello")
    assert after != before
    report = tree.report_of(before)
    assert (report["child"], report["exit_code"], report["why"]) == ("echo", 3, "crash")
    others = tree.pids()
    # By force, as the Task Manager does it.
    wine.run("-m", "tests.windows.tree", "kill", str(others["first"]))
    eventually(lambda: tree.pids()["first"] not in {None, others["first"]})
    assert tree.pids()["last"] == others["last"]


def test_one_that_hangs_is_killed_and_the_report_says_where_it_stood(tree: Tree) -> None:
    hung = tree.wish(b"hang")
    assert tree.wish(b"hello") != hung
    report = tree.report_of(hung)
    assert (report["class"], report["why"]) == ("blocked", "hang")
    assert "in echo" in report["stacks"]
    assert [event["verdict"] for event in tree.events() if event["event"] == "condemned"] == [
        "blocked"
    ]


def test_an_access_violation_is_reported_with_its_place(tree: Tree) -> None:
    wild = tree.wish(b"wild")
    assert tree.wish(b"hello") != wild
    report = tree.report_of(wild)
    assert report["exit_code"] == 0xC0000005
    assert "access violation" in report["stacks"]


def test_there_is_one_watchdog_at_a_time_and_only_who_knows_the_secret_may_ask(
    tree: Tree,
) -> None:
    second = Tree(tree.directory)
    try:
        assert second.ready.get("already")
        assert second.process.wait(15) == 0
    finally:
        second.close()
    told = json.loads((tree.directory / "control.json").read_text())
    with socket.create_connection(("127.0.0.1", told["port"]), 5.0) as stranger:
        stranger.sendall(b'{"do": "stop", "args": {"secret": "00"}}\n')
        answer = json.loads(stranger.recv(4096))
    assert not answer["ok"]
    assert "secret" in answer["error"]
    before = tree.pids()["last"]
    tree.ask("restart:last")
    eventually(lambda: tree.pids()["last"] not in {None, before})
    assert before not in tree.reports()


def test_children_end_in_the_reverse_order_and_with_the_watchdog(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    try:
        assert tree.ask("stop")["stopping"]
        assert tree.process.wait(15) == 0
        assert tree.ended_as_asked() == ["last", "echo", "first"]
        assert not tree.reports()
    finally:
        tree.close()
    tree = Tree(tmp_path)
    try:
        tree.wish(b"hang", timeout=5.0)  # one that reads nothing any more goes as well
        wine.run("-m", "tests.windows.tree", "kill", str(tree.ready["pid"]))
        tree.process.wait(15)
        eventually(lambda: refuses(tree.port))
    finally:
        tree.close()


def refuses(port: int) -> bool:
    """Nobody holds the listening socket any more."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except ConnectionRefusedError:
        return True
    return False


def test_who_cannot_start_ends_it_with_its_own_words(tmp_path: Path) -> None:
    """A port that another has: nobody is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = wine.start(
            "-m", "tests.windows.tree", "run", wine.windows_path(tmp_path),
            PKVPN_TEST_PORT=str(taken.getsockname()[1]), PKVPN_TEST_ENDS="none",
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 1
    assert "error" in json.loads(out)
