"""Successors that are forked ahead: real processes, and what becomes of them in each event."""

from __future__ import annotations

import os
import signal
import socket
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog import procfs, supervisor
from pkvpn.watchdog.child import DROP, GIVE, Child
from pkvpn.watchdog.held import Kept
from pkvpn.watchdog.incarnation import Incarnation
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


def gives_and_drops(child: Child, trigger: str) -> None:
    """Drops the first of all that it gave, and gives another, when the trigger is there."""
    child.stand_by()
    left, right = socket.socketpair()
    for number in range(3):
        child.give(b"key %d" % number, left.fileno())
    child.say(" ".join(os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in (left, right)))
    child.ready()
    while not child.stopping:
        child.wait()
        if os.path.exists(trigger):
            os.unlink(trigger)
            child.drop(b"key 0")
            child.give(b"key 3", left.fileno())
            child.give(b"key 1", right.fileno())  # instead of the one before


def test_it_follows_what_is_given_and_dropped(tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    spec = replace(one(gives_and_drops), settings=str(trigger))
    with running(tmp_path, spec_in(tmp_path, spec), wait=False) as tree:
        left, right = tree.word()["progress"].removeprefix("one: ").split()
        assert tree.last_word()["ready"]
        waiting = standby_of(tree)

        def has() -> tuple[int, int]:
            links = [os.readlink(fd) for fd in Path(f"/proc/{waiting}/fd").iterdir()]
            return links.count(left), links.count(right)

        eventually(lambda: has() == (3, 0))
        trigger.touch()
        eventually(lambda: has() == (2, 1))


def messages(sock: socket.socket) -> list[tuple[bytes, int]]:
    """All that has come: what, and how many descriptors went with it."""
    found: list[tuple[bytes, int]] = []
    while True:
        try:
            message, fds, _, _ = socket.recv_fds(sock, 65536, 250)
        except BlockingIOError:
            return found
        for fd in fds:
            os.close(fd)
        found.append((message, len(fds)))


def test_a_standby_is_told_of_changes_once_and_only_of_what_stays() -> None:
    kept = Kept(limit=8)
    child, ours = seqpacket()
    standby, theirs = seqpacket()
    with child, ours, standby, theirs:

        def give(*keys: bytes) -> None:
            for key in keys:
                socket.send_fds(child, [GIVE + key], [child.fileno()])

        give(b"a", b"b")
        kept.drain(ours)
        assert set(kept.follow()) == {b"a", b"b"}
        assert kept.untold() == 0
        give(b"c", b"d", b"a")
        child.send(DROP + b"d")
        child.send(DROP + b"b")
        kept.drain(ours)
        assert kept.untold() == 4  # not of d, which came and went
        kept.tell(theirs)
        assert messages(standby) == [(b"L\x01a\x01b", 0), (b"H\x01c\x01a", 2)]
        assert kept.untold() == 0
        child.send(DROP + b"c")
        kept.drain(ours)
        assert kept.hand_over(theirs, 7)
        assert messages(standby) == [(b"L\x01c", 0), (b"S\0\0\0\x07", 0)]
        kept.close()


def seqpacket() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


def test_one_that_was_stopped_is_passed_over(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, one())) as tree:
        waiting = standby_of(tree)
        os.kill(waiting, signal.SIGSTOP)
        eventually(lambda: procfs.state_of(waiting) == "T")
        tree.signal(signal.SIGKILL, "one")
        assert tree.up("one", after=0)["pid"] != waiting
        eventually(lambda: process_gone(waiting))
        assert standby_of(tree) != waiting


def hears_nothing(_self: Incarnation, _kept: Kept) -> None:
    pass


def born_with_nothing(self: Kept) -> dict[bytes, int]:
    self._given = dict.fromkeys(self.descriptors)
    return {}


def test_what_a_standby_has_not_heard_of_and_is_too_much_a_fork_takes_along(
    tmp_path: Path,
) -> None:
    def deaf() -> None:
        supervisor._HAND_OVER_MOST = MANY - 1
        supervisor._STANDBY_AFTER = 0.0
        Incarnation.follow = hears_nothing  # type: ignore[assignment,method-assign]
        Kept.follow = born_with_nothing  # type: ignore[method-assign]

    with running(tmp_path, spec_in(tmp_path, one()), before=deaf) as tree:
        eventually(lambda: tree.child("one")["kept"] == MANY)
        waiting = standby_of(tree)
        tree.signal(signal.SIGKILL, "one")
        assert tree.up("one", after=0)["pid"] != waiting
        assert tree.word() == {"progress": f"one: incarnation 2 with {MANY}, whole: True"}


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


def absent(marker: Path, child: Child) -> None:
    """Cannot pass on what it is told while it stands by."""
    if child.standing_by:
        marker.touch()
        sum(range(10**12))
    impatient(child)


def test_term_to_one_that_is_dismissed_ends_the_service(tmp_path: Path) -> None:
    marker = tmp_path / "absent"
    with running(tmp_path, spec_in(tmp_path, one(target=partial(absent, marker)))) as tree:
        eventually(marker.exists)
        pid = tree.child("one")["standby"]
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: "ShdPnd:\t0000000000000000" in procfs_status(pid))
        tree.ask("reload")
        assert tree.wait_end() == 0
        assert tree.journal("stop-asked", by="one")


def procfs_status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text(encoding="utf-8")


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
        assert kept.hand_over(ours, 7)
        theirs.close()
        assert not kept.hand_over(ours, 8)
