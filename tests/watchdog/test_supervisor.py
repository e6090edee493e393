"""Real children that misbehave: who is found guilty of what, and what follows."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog.report import standing_line
from pkvpn.watchdog.witness import Accuses
from tests.support import eventually, process_gone
from tests.watchdog.running import Running, child, running, spec_in

pytestmark = pytest.mark.slow


def misbehave(tmp_path: Path, how: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have a child misbehave in a tree; (its status once it serves again, its crash report).

    In each case: the others were left alone, the fork came before the report, the old process
    is gone.
    """
    spec = spec_in(tmp_path, child("one"), child("bad", how, tmp_path, **more), child("two"))
    with running(tmp_path, spec) as tree:
        bad, others = tree.pid_of("bad"), (tree.pid_of("one"), tree.pid_of("two"))
        tree.trigger.touch()
        status = tree.up("bad", after=0)
        report = tree.report("bad")
        assert process_gone(bad)
        assert (tree.pid_of("one"), tree.pid_of("two")) == others
        assert report["pid"] == bad
        assert status["pid"] != bad
        eventually(lambda: tree.journal("state", child="bad")[-1]["state"] == "up")
        assert not tree.journal("internal-error")
        tree.ask("stop")
        assert tree.wait_end() == 0
        assert tree.holders() == []
        assert "a bug of the watchdog" not in tree.stderr.read_text()
    return status, report


def stood_in(report: dict[str, Any]) -> str:
    """The function where the child stood."""
    where = standing_line(report["stacks"])
    assert where is not None, report
    assert "naughty.py:" in where, where
    return where.split(" at ")[0]


# --- hangs: class, why, and the line of code


@pytest.mark.parametrize(
    ("how", "verdict"),
    [
        ("blocked_on_a_lock", "blocked"),
        ("busy_in_python", "busy"),
        ("busy_in_c", "busy"),
    ],
)
def test_a_hang_is_judged_reported_with_its_line_and_replaced(
    tmp_path: Path, how: str, verdict: str
) -> None:
    status, report = misbehave(tmp_path, how)
    assert (status["why"], status["restarts"]) == ("hang", 1)
    assert (report["class"], report["why"], report["signal"]) == (verdict, "hang", 9)
    assert stood_in(report) == how
    assert report["diagnosis"].startswith("no beat for ")
    assert report["beats"]
    assert report["proc"]["stat"]


def test_threads_that_live_do_not_hide_a_loop_that_is_dead(tmp_path: Path) -> None:
    _, report = misbehave(tmp_path, "silent_with_a_live_thread")
    assert report["class"] == "blocked"
    assert "silent_with_a_live_thread" in report["stacks"]
    assert report["stacks"].count("Thread 0x") + report["stacks"].count("Current thread") >= 2


def test_what_waits_and_is_not_done_is_deaf_though_it_beats(tmp_path: Path) -> None:
    status, report = misbehave(tmp_path, "deaf", deaf_timeout=0.3)
    assert (status["why"], report["class"]) == ("hang", "deaf")
    assert "deaf" in report["stacks"]
    assert report["beats"][-1]["duties"]["work"]["waiting_since"] > 0


@pytest.mark.parametrize("how", ["overloaded", "lost_in_work", "idle_and_counts"])
def test_who_is_accused_is_excused_only_if_it_works_as_hard_as_it_can(
    tmp_path: Path, how: str
) -> None:
    accuses = Accuses("work", ("bad",), patience=0.8, excused_by=("work",))
    other = tmp_path / "witness"
    other.mkdir()
    witness = child("witness", "accuses", other, accuses=(accuses,), deaf_timeout=60.0)
    spec = spec_in(tmp_path, child("bad", how, tmp_path), witness)
    with running(tmp_path, spec) as tree:
        bad = tree.pid_of("bad")
        tree.trigger.touch()
        (other / "trigger").touch()
        if how == "overloaded":
            (entry,) = eventually(lambda: tree.journal("not-condemned", child="bad"))
            assert "is busy" in entry["text"]
            assert tree.pid_of("bad") == bad
        else:
            assert tree.report("bad")["class"] == "deaf"
        assert not tree.journal("internal-error")


def test_nobody_is_guilty_of_an_answer_that_another_on_the_way_does_not_pass_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "witness").mkdir()
    (tmp_path / "relay").mkdir()
    witness = child(
        "witness", "accuses", tmp_path / "witness", duties=("work", "relayed"), deaf_timeout=60.0,
        accuses=(Accuses("work", ("innocent",), patience=1.2), Accuses("relayed", ("relay",))),
    )  # fmt: skip
    relay = child("relay", "deaf", tmp_path / "relay", deaf_timeout=60.0)
    with running(tmp_path, spec_in(tmp_path, child("innocent"), relay, witness)) as tree:
        (tmp_path / "relay" / "trigger").touch()
        (tmp_path / "witness" / "trigger").touch()
        entry = eventually(lambda: tree.journal("not-condemned", child="innocent"))[0]
        assert "relay does not do what waits for it" in entry["text"]
        assert not tree.journal("condemned")
        assert not tree.journal("internal-error")


@pytest.mark.parametrize("how", ["corrupt", "corrupt_flood"])
def test_garbage_on_the_lifeline_is_corrupt(tmp_path: Path, how: str) -> None:
    status, report = misbehave(tmp_path, how)
    assert (status["why"], report["class"]) == ("hang", "corrupt")
    assert stood_in(report) == how


def test_half_a_frame_puts_what_follows_out_of_step(tmp_path: Path) -> None:
    _, report = misbehave(tmp_path, "partial_frame")
    assert report["class"] == "corrupt"


def test_a_lifeline_that_ends_before_the_process_is_mute(tmp_path: Path) -> None:
    status, report = misbehave(tmp_path, "mute")
    assert (status["why"], report["class"]) == ("hang", "mute")
    assert stood_in(report) == "mute"


def test_one_that_is_stopped_is_continued_once_and_not_killed(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("bad", "stops_itself", tmp_path))) as tree:
        bad = tree.pid_of("bad")
        tree.trigger.touch()
        (entry,) = eventually(lambda: tree.journal("verdict", verdict="stopped"))
        assert "continued" in entry["text"]
        eventually(lambda: tree.journal("verdict", verdict="ok"))
        assert (tree.pid_of("bad"), tree.child("bad")["restarts"]) == (bad, 0)
        assert tree.reports() == []


def test_one_that_is_stopped_again_is_replaced_with_its_stacks(tmp_path: Path) -> None:
    status, report = misbehave(tmp_path, "stops_itself_always")
    assert (status["why"], report["class"]) == ("hang", "stopped")
    assert stood_in(report) == "stops_itself_always"


# --- deaths


@pytest.mark.parametrize(
    ("how", "number"),
    [("segfaults", signal.SIGSEGV), ("aborts", signal.SIGABRT)],
)
def test_a_wild_crash_tells_where_and_the_next_one_has_a_new_image(
    tmp_path: Path, how: str, number: signal.Signals
) -> None:
    status, report = misbehave(tmp_path, how)
    assert status["why"] == "crash"
    assert (report["class"], report["signal"], report["exit_code"]) == ("dead", number, None)
    assert how in report["stacks"]


def test_of_two_that_die_at_once_it_is_known_how_each_did(tmp_path: Path) -> None:
    """The successor of the one is forked before the other is looked at."""
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        one, two = tree.pid_of("one"), tree.pid_of("two")
        tree.signal(signal.SIGSTOP)
        for pid, number in ((one, signal.SIGKILL), (two, signal.SIGSEGV)):
            os.kill(pid, number)
            eventually(lambda: process_gone(pid))  # noqa: B023
        tree.signal(signal.SIGCONT)
        assert tree.report("one")["signal"] == signal.SIGKILL
        assert tree.report("two")["signal"] == signal.SIGSEGV


def test_a_new_image_has_another_layout_than_the_watchdogs(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("bad", "segfaults", tmp_path))) as tree:
        before = _stack_of(tree.pid_of("bad"))
        assert before == _stack_of(tree.pid)
        tree.trigger.touch()
        tree.up("bad", after=0)
        assert _stack_of(tree.pid_of("bad")) != before
        tree.signal(signal.SIGKILL, "bad")
        tree.up("bad", after=1)
        assert _stack_of(tree.pid_of("bad")) == before


def _stack_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (stack,) = (line.split()[0] for line in lines if line.endswith("[stack]"))
    return stack.split("-")[1]


@pytest.mark.parametrize(
    ("how", "why", "code", "number"),
    [("exits_0", "clean", 0, None), ("kills_itself", "crash", None, signal.SIGKILL)],
)
def test_an_end_that_nobody_asked_for_is_followed_by_a_new_one(
    tmp_path: Path, how: str, why: str, code: int | None, number: int | None
) -> None:
    status, report = misbehave(tmp_path, how)
    assert status["why"] == why
    assert (report["exit_code"], report["signal"]) == (code, number)
    assert report["rusage"]["user_s"] >= 0


def test_an_exception_is_reported_with_the_line_that_raised_it(tmp_path: Path) -> None:
    status, report = misbehave(tmp_path, "raises")
    assert (status["why"], report["exit_code"]) == ("crash", 1)
    assert stood_in(report) == "raises"
    assert report["said"] == "ZeroDivisionError: the answer is not a number"
    assert any("the answer is not a number" in line for line in report["log"])


def test_one_that_never_gets_ready_is_ended_at_its_start_deadline(tmp_path: Path) -> None:
    spec = spec_in(
        tmp_path, child("bad", "never_ready", tmp_path, start_timeout=0.3), child("after")
    )
    (tmp_path / "trigger").touch()
    with running(tmp_path, spec) as tree:
        report = tree.report("bad")
        assert report["why"] == "start-timeout"
        assert report["class"] in ("blocked", "busy")  # its loop turns: what a glance hit upon
        assert "never_ready" in report["stacks"]
        assert tree.child("bad")["restarts"] == 1


def test_a_reason_given_twice_ends_the_start_at_once(tmp_path: Path) -> None:
    bad = child("bad", "exits_1_with_a_reason", tmp_path, again=True)
    (tmp_path / "trigger").touch()
    with running(tmp_path, spec_in(tmp_path, bad), wait=False) as tree:
        word = tree.last_word()
        reason = "the certificate /nowhere/server.crt cannot be read"
        assert word == {"error": f"bad does not start: {reason}", "code": 1}
        assert tree.wait_end() == 1
        assert len(tree.reports("bad")) == 2
        assert tree.reports("bad")[0]["said"] == reason
        assert not tree.runtime_dir.joinpath("pid").exists()


def test_a_reason_given_once_does_not_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "trigger").touch()
    spec = spec_in(tmp_path, child("bad", "exits_1_with_a_reason", tmp_path))
    with running(tmp_path, spec) as tree:
        assert tree.child("bad")["restarts"] == 1


def test_the_fork_comes_before_the_report(tmp_path: Path) -> None:
    """The successor is there before the report of its predecessor is even sent."""
    with running(tmp_path, spec_in(tmp_path, child("bad", "kills_itself", tmp_path))) as tree:
        with stopped(tree, "log"):
            tree.trigger.touch()
            tree.up("bad", after=0)
            assert tree.reports("bad") == []
        assert tree.report("bad")["signal"] == signal.SIGKILL


class stopped:  # noqa: N801 - reads as a word in a with statement
    """A child that is stopped for a while, shorter than its hang deadline."""

    def __init__(self, tree: Running, name: str) -> None:
        self._pid = tree.pid_of(name)

    def __enter__(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGCONT)
