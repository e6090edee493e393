"""How a real tree ends: in every state, by every signal, and when its watchdog is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pkvpn.watchdog import instance, procfs
from pkvpn.watchdog.control import ControlError
from pkvpn.watchdog.policy import OnLimit
from pkvpn.watchdog.spec import HeldSpec, TreeSpec
from pkvpn.watchdog.supervisor import EXIT_GAVE_UP
from tests.support import eventually
from tests.watchdog.running import POLICY, Running, all_gone, child, running, spec_in

pytestmark = pytest.mark.slow


# Times two are killed one after the other; `PKVPN_KILL_ROUNDS=200` takes a minute or two.
KILL_ROUNDS = int(os.environ.get("PKVPN_KILL_ROUNDS", "52"))


def ends_cleanly(tree: Running, pids: list[int]) -> None:
    """Exit code 0, nobody left, nothing left lying about."""
    assert tree.wait_end() == 0, tree.stderr.read_text()
    assert all_gone(pids)
    assert tree.holders() == []
    assert sorted(path.name for path in tree.runtime_dir.iterdir()) == ["lock"]
    assert tree.journal("internal-error") == []


# --- in every state


def test_a_stop_ends_the_children_in_reverse_order(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pids = tree.descendants()
        tree.ask("stop")
        ends_cleanly(tree, pids)
        ended = [one["child"] for one in tree.journal("state", state="down")]
        assert ended == ["two", "one"]  # who writes this down ends last


def test_a_stop_while_a_child_starts(tmp_path: Path) -> None:
    bad = child("bad", "never_ready", tmp_path, start_timeout=30.0)
    (tmp_path / "trigger").touch()
    with running(tmp_path, spec_in(tmp_path, bad, child("after")), wait=False) as tree:
        eventually(lambda: tree.child("bad")["state"] == "starting")
        assert tree.status()["state"] == "starting"
        pids = tree.descendants()
        tree.ask("stop")
        ends_cleanly(tree, pids)
        assert tree.journal("state", child="after") == []


def test_a_stop_while_a_child_waits_for_its_turn_to_come_back(tmp_path: Path) -> None:
    policy = replace(POLICY, first=20.0, cap=20.0, healthy_after=100.0)
    bad = child("bad", "kills_itself", tmp_path, again=True, policy=policy)
    with running(tmp_path, spec_in(tmp_path, bad)) as tree:
        tree.trigger.touch()
        eventually(lambda: tree.child("bad")["state"] == "backoff")
        assert tree.status()["state"] == "backoff"
        tree.ask("stop")
        ends_cleanly(tree, [])


@pytest.mark.parametrize("how", ["blocked_on_a_lock", "busy_in_c", "stops_itself_always"])
def test_a_stop_while_a_child_hangs(tmp_path: Path, how: str) -> None:
    bad = child("bad", how, tmp_path, hang_timeout=30.0, stop_timeout=0.3)
    with running(tmp_path, spec_in(tmp_path, bad, child("two"))) as tree:
        pids = tree.descendants()
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        tree.ask("stop")
        ends_cleanly(tree, pids)
        report = tree.report("bad")
        assert (report["why"], report["signal"]) == ("stopped", 9)
        assert how in report["stacks"]


def test_one_that_ignores_the_stop_is_killed_with_its_stacks_in_the_report(tmp_path: Path) -> None:
    bad = child("bad", "ignores_the_stop", tmp_path, stop_timeout=0.3)
    with running(tmp_path, spec_in(tmp_path, bad)) as tree:
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        tree.ask("stop")
        ends_cleanly(tree, [])
        assert "ignores_the_stop" in tree.report("bad")["stacks"]


def test_stops_upon_stops_are_one_and_answered_all_the_while(tmp_path: Path) -> None:
    bad = child("bad", "ignores_the_stop", tmp_path, stop_timeout=0.5)
    with running(tmp_path, spec_in(tmp_path, bad, child("two"))) as tree:
        pids = tree.descendants()
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        for _ in range(5):
            tree.ask("stop")
            tree.signal(signal.SIGTERM)
            assert tree.status()["state"] == "stopping"
        for verb in ("reload", "upgrade"):
            with pytest.raises(ControlError):
                tree.ask(verb)
        with pytest.raises(ControlError):
            tree.ask("restart", name="two")
        tree.signal(signal.SIGHUP)
        ends_cleanly(tree, pids)


def test_a_stop_wins_over_a_restart_that_has_begun(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pids = tree.descendants()
        tree.ask("restart", name="two")
        tree.ask("stop")
        ends_cleanly(tree, pids)


def test_who_gives_up_ends_the_tree_with_its_own_code(tmp_path: Path) -> None:
    policy = replace(POLICY, intensity=1, on_limit=OnLimit.GIVE_UP, healthy_after=100.0)
    bad = child("bad", "kills_itself", tmp_path, again=True, policy=policy)
    with running(tmp_path, spec_in(tmp_path, bad, child("two"))) as tree:
        tree.trigger.touch()
        assert tree.wait_end() == EXIT_GAVE_UP
        assert [one["child"] for one in tree.journal("giving-up")] == ["bad"]
        assert tree.holders() == []


def test_who_fails_for_good_goes_on_at_the_cap_and_says_so(tmp_path: Path) -> None:
    policy = replace(POLICY, intensity=1, healthy_after=100.0)
    bad = child("bad", "kills_itself", tmp_path, again=True, policy=policy)
    with running(tmp_path, spec_in(tmp_path, bad)) as tree:
        tree.trigger.touch()
        eventually(lambda: tree.child("bad")["state"] == "failing")
        assert tree.status()["state"] in ("failing", "starting")
        tree.trigger.unlink()
        tree.up("bad")


# --- by signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["", "log", "one", "two"])
def test_a_request_to_end_ends_the_service_whoever_gets_it(
    tmp_path: Path, name: str, number: signal.Signals
) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pids = tree.descendants()
        tree.signal(number, name)
        ends_cleanly(tree, pids)
        assert tree.journal("stop-asked")[0]["by"] == (name or "signal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_in_the_middle_of_the_start_means_what_it_means_later(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Also before the watchdog can do anything about it."""
    spec = spec_in(tmp_path, child("one"), held=(HeldSpec("hit", lambda: hit_ourselves(number)),))
    with running(tmp_path, spec, wait=False) as tree:
        if number in (signal.SIGTERM, signal.SIGINT):
            ends_cleanly(tree, [])
            assert tree.journal("stop-asked")[0]["by"] == "signal"
        else:
            assert tree.last_word()["ready"]
            event = "reloaded" if number == signal.SIGHUP else "status"
            eventually(lambda: tree.journal(event))


def hit_ourselves(number: signal.Signals) -> list[int]:
    """An opener, which the watchdog calls before it hears signals."""
    os.kill(os.getpid(), number)
    return [os.open(os.devnull, os.O_RDONLY)]


@pytest.mark.parametrize("how", ["blocked_on_a_lock", "busy_in_c"])
def test_a_request_to_end_is_not_lost_with_a_child_that_hangs(tmp_path: Path, how: str) -> None:
    """The child cannot pass it on; the watchdog finds it when the child is dead."""
    with running(tmp_path, spec_in(tmp_path, child("bad", how, tmp_path))) as tree:
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        tree.signal(signal.SIGTERM, "bad")
        ends_cleanly(tree, [])
        assert [one["by"] for one in tree.journal("stop-asked")] == ["bad"]


def test_hup_reloads_at_the_watchdog_and_is_nothing_to_a_child(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one"), child("two"))
    changed = spec_in(tmp_path, child("one"), child("two", stop_timeout=2.0))
    with running(tmp_path, spec, on_reload=lambda: changed) as tree:
        one, two = tree.pid_of("one"), tree.pid_of("two")
        tree.signal(signal.SIGHUP, "one")
        tree.signal(signal.SIGHUP, "log")
        tree.signal(signal.SIGHUP)
        eventually(lambda: tree.journal("reloaded"))
        assert tree.journal("reloaded")[0]["replaced"] == ["two"]
        tree.up("two", after=0)
        assert tree.pid_of("one") == one
        assert tree.pid_of("two") != two


def test_a_reload_that_is_refused_changes_nothing_and_ends_nobody(tmp_path: Path) -> None:
    def refuse() -> TreeSpec:
        raise ValueError("line 3: what is this")

    with running(tmp_path, spec_in(tmp_path, child("one")), on_reload=refuse) as tree:
        one = tree.pid_of("one")
        tree.signal(signal.SIGHUP)
        eventually(lambda: tree.journal("reload-refused"))
        with pytest.raises(ControlError, match="line 3"):
            tree.ask("reload")
        assert tree.pid_of("one") == one


def test_quit_writes_the_stacks_of_a_child_into_a_report_and_it_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        one = tree.pid_of("one")
        tree.signal(signal.SIGQUIT, "one")
        report = tree.report("one")
        assert (report["class"], report["pid"], report["signal"]) == ("asked", one, None)
        assert "in good" in report["stacks"]
        tree.signal(signal.SIGQUIT)
        eventually(lambda: tree.journal("status"))
        assert (tree.pid_of("one"), tree.child("one")["state"]) == (one, "up")


def test_signals_of_other_habits_do_not_end_the_watchdog(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD):
            tree.signal(number)
        assert tree.status()["state"] == "up"


# --- pauses


@pytest.mark.parametrize("whole", [False, True])
def test_nobody_is_accused_of_a_pause_of_the_watchdog(tmp_path: Path, whole: bool) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pids = [tree.pid, *tree.descendants()]
        for pid in pids if whole else pids[:1]:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)  # three hang deadlines
        for pid in pids if whole else pids[:1]:
            os.kill(pid, signal.SIGCONT)
        # On a busy machine it is away for shorter times as well.
        eventually(lambda: any(one["seconds"] > 0.8 for one in tree.journal("watchdog-away")))
        time.sleep(0.7)
        assert [tree.pid, *tree.descendants()] == pids
        assert tree.journal("condemned") == []


def test_pauses_of_single_children_kill_nobody(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        pids = tree.descendants()
        for name in ("one", "two", "log"):
            tree.signal(signal.SIGSTOP, name)
            for verdict in ("stopped", "ok"):
                eventually(lambda: tree.journal("verdict", child=name, verdict=verdict))  # noqa: B023
        assert tree.descendants() == pids


# --- when the watchdog is killed


def kill_watchdog(tree: Running) -> list[int]:
    """Kill it; its children end by themselves."""
    pids = tree.descendants()
    os.kill(tree.pid, signal.SIGKILL)
    eventually(lambda: all_gone(pids))
    assert tree.wait_end() == -signal.SIGKILL
    return pids


def test_no_child_outlives_its_watchdog(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"), child("two"))) as tree:
        assert len(kill_watchdog(tree)) == 3
        assert tree.holders() == []


@pytest.mark.parametrize("how", ["blocked_on_a_lock", "busy_in_c", "ignores_the_stop", "mute"])
def test_nor_does_one_that_hangs(tmp_path: Path, how: str) -> None:
    bad = child("bad", how, tmp_path, hang_timeout=30.0)
    with running(tmp_path, spec_in(tmp_path, bad)) as tree:
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        kill_watchdog(tree)


def test_nor_one_that_is_stopped(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one", hang_timeout=30.0))) as tree:
        tree.signal(signal.SIGSTOP, "one")
        kill_watchdog(tree)


def test_nor_one_that_has_just_been_born(tmp_path: Path) -> None:
    """At instants spread over the start of a tree and its respawns."""
    for round_ in range(20):
        directory = tmp_path / str(round_)
        directory.mkdir()
        policy = replace(POLICY, first=0.001, cap=0.001, jitter=0.0, intensity=10_000)
        bad = child("bad", "kills_itself", directory, again=True, policy=policy)
        with running(directory, spec_in(directory, bad), wait=round_ % 2 == 0) as tree:
            tree.trigger.touch()
            time.sleep(round_ * 0.003)
            os.kill(tree.pid, signal.SIGKILL)
            assert tree.wait_end() == -signal.SIGKILL
            eventually(lambda tree=tree: tree.holders() == [])  # type: ignore[misc]


@pytest.mark.timeout(600)
def test_nor_does_one_whose_death_was_followed_by_the_watchdogs(tmp_path: Path) -> None:
    """Somebody kills the child first, sees it come back, and kills the watchdog: 0 to 5 ms apart,
    which is before, in and after the respawn."""
    for round_ in range(KILL_ROUNDS):
        directory = tmp_path / str(round_)
        directory.mkdir()
        with running(directory, spec_in(directory, child("one"))) as tree:
            victim = tree.pid_of("one")
            os.kill(victim, signal.SIGKILL)
            time.sleep(round_ % 26 * 0.0002)
            os.kill(tree.pid, signal.SIGKILL)
            assert tree.wait_end() == -signal.SIGKILL
            eventually(lambda tree=tree: tree.holders() == [])  # type: ignore[misc]


def test_nor_one_that_was_being_stopped(tmp_path: Path) -> None:
    bad = child("bad", "ignores_the_stop", tmp_path, stop_timeout=30.0)
    with running(tmp_path, spec_in(tmp_path, bad, child("two"))) as tree:
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        tree.ask("stop")
        eventually(lambda: tree.child("two")["state"] == "down")
        kill_watchdog(tree)
        assert tree.holders() == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace opens the window from outside")
def test_nor_one_between_the_fork_and_its_first_line(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        # Every prctl from now on begins late, in the watchdog's children too.
        tracer = subprocess.Popen(
            ["strace", "-f", "-qq", "-e", "inject=prctl:delay_enter=700000", "-e", "trace=prctl",
             "-p", str(tree.pid)],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            eventually(lambda: "TracerPid:\t0" not in Path(f"/proc/{tree.pid}/status").read_text())
            before = set(tree.descendants())
            tree.signal(signal.SIGKILL, "one")
            (young,) = eventually(lambda: set(tree.descendants()) - before)
            os.kill(tree.pid, signal.SIGKILL)
            eventually(lambda: all_gone([young, *before]))
        finally:
            tracer.terminate()
            tracer.wait()
            assert tracer.stderr is not None
            tracer.stderr.close()
        assert tree.wait_end() == -signal.SIGKILL
        assert tree.holders() == []


def test_what_grandchildren_are_left_the_next_start_sweeps(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("bad", "keeps_a_grandchild", tmp_path))
    with running(tmp_path, spec) as tree:
        tree.trigger.touch()
        (left,) = eventually(lambda: procfs.descendants(tree.pid_of("bad")))
        os.kill(tree.pid, signal.SIGKILL)
        assert tree.wait_end() == -signal.SIGKILL
        eventually(lambda: tree.holders() == [left])
        with running(tmp_path, spec) as after:
            assert all_gone([left])
            after.ask("stop")
            ends_cleanly(after, [left])


# --- grandchildren while the watchdog lives


@pytest.mark.parametrize(
    "how", ["leaves_a_grandchild", "leaves_a_grandchild_in_a_session", "leaves_a_daemon"]
)
def test_what_a_child_leaves_does_not_outlive_it(tmp_path: Path, how: str) -> None:
    with running(tmp_path, spec_in(tmp_path, child("bad", how, tmp_path))) as tree:
        others = {tree.pid, tree.pid_of("log")}
        tree.trigger.touch()
        bad = tree.up("bad", after=0)["pid"]
        (entry, *_) = eventually(lambda: tree.journal("orphans-killed"))
        assert entry["pids"]
        # Reaped, too; its descriptors are closed some time before that.
        eventually(lambda: procfs.children_of(tree.pid) == [tree.pid_of("log"), bad])
        assert set(tree.holders()) == {*others, bad}


def test_nor_does_what_that_starts_before_the_kill_reaches_it(tmp_path: Path) -> None:
    """However late the watchdog gets to it."""
    look = procfs.descendants

    def look_too_early(pid: int) -> list[int]:
        procfs.descendants = look
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: look(pid))
        time.sleep(1.2)
        return []

    def watchdog_looks_too_early() -> None:
        procfs.descendants = look_too_early

    bad = child("bad", "leaves_one_that_forks", tmp_path)
    with running(tmp_path, spec_in(tmp_path, bad), before=watchdog_looks_too_early) as tree:
        tree.trigger.touch()
        bad_pid = tree.up("bad", after=0)["pid"]
        eventually(lambda: len(tree.journal("orphans-killed")) == 2)
        eventually(lambda: procfs.children_of(tree.pid) == [tree.pid_of("log"), bad_pid])
        tree.ask("stop")
        ends_cleanly(tree, [])


def test_nor_does_it_outlive_a_stop(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("bad", "keeps_a_grandchild", tmp_path))) as tree:
        tree.trigger.touch()
        eventually(lambda: len(tree.descendants()) == 3)
        pids = tree.descendants()
        tree.ask("stop")
        ends_cleanly(tree, pids)


# --- one instance


def test_fifty_starts_at_once_give_one_tree(tmp_path: Path) -> None:
    from contextlib import ExitStack

    spec = spec_in(tmp_path, child("one"))
    with ExitStack() as stack:
        trees = [stack.enter_context(running(tmp_path, spec, wait=False)) for _ in range(50)]
        words = [tree.last_word() for tree in trees]
        winners = [tree for tree, word in zip(trees, words, strict=True) if "ready" in word]
        assert len(winners) == 1
        assert all(word == {"already": winners[0].pid} for word in words if "ready" not in word)
        assert len(winners[0].holders()) == 3
        winners[0].ask("stop")
        for tree in trees:
            assert tree.wait_end(within=30.0) == 0


def test_a_start_while_the_old_one_stops_says_who_is_still_there(tmp_path: Path) -> None:
    bad = child("bad", "ignores_the_stop", tmp_path, stop_timeout=1.0)
    with running(tmp_path, spec_in(tmp_path, bad)) as tree:
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        tree.ask("stop")
        with running(tmp_path, spec_in(tmp_path, child("one")), wait=False) as second:
            assert second.last_word() == {"already": tree.pid}
            assert second.wait_end() == 0
            assert (
                tree.wait_end() == 0
            )  # the socket and the pid file were not the second's to remove
        with running(tmp_path, spec_in(tmp_path, child("one"))) as third:
            assert third.status()["state"] == "up"


def test_the_pid_file_says_who_it_is_and_a_stale_one_is_nobody(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one"))
    with running(tmp_path, spec) as tree:
        found = instance.read_pid_file(str(tree.runtime_dir / instance.PID_NAME))
        assert found is not None
        assert found.pid == tree.pid
        assert instance.pid_file_is_alive(found)
        os.kill(tree.pid, signal.SIGKILL)
        tree.wait_end()
        assert not instance.pid_file_is_alive(found)
    with running(tmp_path, spec) as again:
        assert again.status()["watchdog"]["pid"] == again.pid


def test_the_children_wear_the_names_that_operators_look_for(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one"), title="greeter svc", comm="greeter")
    with running(tmp_path, spec) as tree:
        titles = {pid: procfs.title_of(pid) for pid in (tree.pid, *tree.descendants())}
        assert list(titles.values()) == ["greeter svc", "greeter svc: log", "greeter svc: one"]
        for pid in titles:
            assert Path(f"/proc/{pid}/comm").read_text() == "greeter\n"
            assert (os.getsid(pid) == pid) == (pid != tree.pid or os.getsid(pid) == tree.pid)
