"""Successors that are forked ahead: real processes, and what becomes of them in each event."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog import procfs, supervisor
from pkvpn.watchdog.child import Child
from pkvpn.watchdog.held import Kept
from tests.support import eventually, process_gone
from tests.watchdog.running import Running, all_gone, child, running, spec_in

pytestmark = pytest.mark.slow

MANY = 300  # more than go along with one message


def prepared(child: Child) -> None:
    """Stands by, then says who it is and what it got."""
    child.stand_by()
    given = sorted(child.given())
    if not given:
        for number in range(MANY):
            left, right = socket.socketpair()
            while not child.give(b"key %d" % number, left.fileno()):
                child.wait(0.01)
            left.close()
            right.close()
    whole = all(os.fstat(fd) for fd in child.given().values())
    child.say(f"incarnation {child.incarnation} with {len(given)}, whole: {whole}")
    child.ready()
    while not child.stopping:
        child.wait()


def impatient(child: Child) -> None:
    child.ready()
    while not child.stopping:
        child.wait()


def one(target: Any = prepared, **more: Any) -> Any:
    from dataclasses import replace

    return replace(child("one", standby=True, keep_limit=MANY, **more), target=target)


def standby_of(tree: Running) -> int:
    """The pid of the one that waits, once it waits."""

    def look() -> int:
        pid = tree.child("one")["standby"]
        waits = pid and procfs.title_of(pid).endswith("one standby")
        return int(pid) if waits and procfs.state_of(pid) == "S" else 0

    return eventually(look, within=15.0)


def test_it_takes_over_with_all_that_was_given(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        eventually(lambda: tree.child("one")["kept"] == MANY)
        for restarts in range(2):
            waiting = standby_of(tree)
            tree.signal(signal.SIGKILL, "one")
            now = tree.up("one", after=restarts)
            assert now["pid"] == waiting
            eventually(lambda pid=waiting: procfs.title_of(pid).endswith(": one"))  # type: ignore[misc]
            assert tree.word() == {
                "progress": f"one: incarnation {restarts + 2} with {MANY}, whole: True"
            }
            assert standby_of(tree) != waiting
            assert tree.child("one")["kept"] == MANY
        tree.ask("stop")
        assert tree.wait_end() == 0
        assert tree.holders() == []


def test_it_has_nothing_that_was_given_before_its_turn(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        eventually(lambda: tree.child("one")["kept"] == MANY)
        waiting = standby_of(tree)
        found = [os.readlink(fd) for fd in Path(f"/proc/{waiting}/fd").iterdir()]
        assert len(found) < 30


def test_one_that_was_stopped_is_passed_over(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        waiting = standby_of(tree)
        os.kill(waiting, signal.SIGSTOP)
        eventually(lambda: procfs.state_of(waiting) == "T")
        tree.signal(signal.SIGKILL, "one")
        assert tree.up("one", after=0)["pid"] != waiting
        eventually(lambda: process_gone(waiting))
        assert standby_of(tree) != waiting


def test_where_too_much_is_given_a_fork_takes_it_along(tmp_path: Path) -> None:
    def few() -> None:
        supervisor._HAND_OVER_MOST = MANY - 1
        supervisor._STANDBY_AFTER = 0.0

    with running(tmp_path, spec_in(tmp_path, one()), before=few) as tree:
        eventually(lambda: tree.child("one")["kept"] == MANY)
        tree.signal(signal.SIGKILL, "one")
        tree.up("one", after=0)
        assert tree.word() == {"progress": f"one: incarnation 2 with {MANY}, whole: True"}
        assert tree.child("one")["standby"] is None


def test_after_a_wild_death_the_next_one_has_another_address_layout(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        waiting = standby_of(tree)
        tree.signal(signal.SIGSEGV, "one")
        assert tree.up("one", after=0)["pid"] != waiting
        eventually(lambda: process_gone(waiting))


def test_when_it_dies_itself_it_is_reported_and_replaced(tmp_path: Path) -> None:
    def again_soon() -> None:
        supervisor._STANDBY_AGAIN = 0.1

    with running(tmp_path, spec_in(tmp_path, one()), before=again_soon) as tree:
        serving, waiting = tree.pid_of("one"), standby_of(tree)
        os.kill(waiting, signal.SIGKILL)
        report = tree.report("one")
        assert (report["pid"], report["signal"]) == (waiting, signal.SIGKILL)
        assert eventually(lambda: standby_of(tree) not in (0, waiting))
        assert tree.pid_of("one") == serving
        assert tree.child("one")["restarts"] == 0


def test_term_to_it_ends_the_service(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        os.kill(standby_of(tree), signal.SIGTERM)
        assert tree.wait_end() == 0
        assert tree.journal("stop-asked", by="one")
        assert tree.holders() == []


def test_quit_to_it_gives_its_stacks(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        waiting = standby_of(tree)
        os.kill(waiting, signal.SIGQUIT)
        report = tree.report("one")
        assert (report["pid"], report["class"]) == (waiting, "asked")
        assert "stand_by" in str(report["stacks"])
        assert standby_of(tree) == waiting


def test_a_reload_has_it_prepared_anew(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        waiting = standby_of(tree)
        tree.ask("reload")
        eventually(lambda: process_gone(waiting))
        assert standby_of(tree) != waiting


def test_it_does_not_outlive_the_watchdog(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        pids = [tree.pid_of("one"), standby_of(tree)]
        os.kill(tree.pid, signal.SIGKILL)
        assert tree.wait_end() == -signal.SIGKILL
        eventually(lambda: all_gone(pids))


def test_one_that_does_not_wait_is_not_let_in(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one(impatient))) as tree:
        serving = tree.pid_of("one")
        (entry, *_) = eventually(lambda: tree.journal("standby-failed"))
        assert "does not stand by" in entry["reason"]
        assert tree.pid_of("one") == serving
        tree.signal(signal.SIGKILL, "one")
        assert tree.up("one", after=0)


def hangs_ahead(child: Child) -> None:
    """Hangs in what it does ahead of its turn."""
    if child.standing_by:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()  # here it hangs
    impatient(child)


def test_one_that_hangs_before_it_waits_is_passed_over_and_reported(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one(hangs_ahead, start_timeout=1.0))) as tree:
        eventually(lambda: tree.child("one")["standby"])
        tree.signal(signal.SIGKILL, "one")
        tree.up("one", after=0)
        entry = eventually(lambda: tree.journal("standby-failed"))[0]
        assert entry["reason"] == "not prepared within 1 s"
        report = eventually(lambda: [r for r in tree.reports("one") if r["class"] == "blocked"])[0]
        assert "in hangs_ahead" in report["stacks"]
        assert tree.child("one")["restarts"] == 1


def test_what_does_not_fit_is_not_handed_over_by_half() -> None:
    kept = Kept(limit=8)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with ours, theirs:
        kept.descriptors = {b"key": theirs.fileno()}
        assert kept.hand_over(ours, 7)
        theirs.close()
        assert not kept.hand_over(ours, 8)
