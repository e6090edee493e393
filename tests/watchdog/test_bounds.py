"""What a real tree holds, and that neither deaths, floods nor bugs make it hold more or wait."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog import procfs
from pkvpn.watchdog.child import Child
from pkvpn.watchdog.control import ControlError
from pkvpn.watchdog.machine import ChildMachine
from pkvpn.watchdog.spec import ChildSpec, HeldSpec
from pkvpn.watchdog.supervisor import Supervisor
from tests.support import eventually
from tests.watchdog.running import POLICY, child, running, spec_in
from tests.watchdog.trees import removed

pytestmark = pytest.mark.slow


# --- descriptors


def open_pair() -> list[int]:
    left, right = socket.socketpair()
    return [left.detach(), right.detach()]


def memory(name: str) -> HeldSpec:
    return HeldSpec(name, lambda: [os.memfd_create(f"held-{name}")])


def descriptors_of(pid: int) -> dict[int, str]:
    directory = Path(f"/proc/{pid}/fd")
    return {int(path.name): os.readlink(path) for path in directory.iterdir()}


def test_a_child_has_the_descriptors_that_its_spec_names_and_no_others(tmp_path: Path) -> None:
    spec = spec_in(
        tmp_path,
        child("one", held=("mine", "ours")),
        child("two", held=("ours",)),
        held=(memory("mine"), memory("ours"), memory("nobodys")),
    )
    with running(tmp_path, spec) as tree:
        for restarts in range(2):
            for name, held in (("one", ["mine", "ours"]), ("two", ["ours"])):
                found = list(descriptors_of(tree.pid_of(name)).values())
                names = sorted(one for one in found if "held-" in one)
                assert names == [f"/memfd:held-{one} (deleted)" for one in held]
                found = [one for one in found if "held-" not in one]
                # Its two lifelines, the wake-up pipe (both ends); gifts and log; its epoll; its
                # stacks; the lock; the three standard ones.
                assert sum(one.startswith("pipe:") for one in found) == 4
                assert sum(one.startswith("socket:") for one in found) == 2
                assert sum(one == "anon_inode:[eventpoll]" for one in found) == 1
                assert sum("stacks-" in one for one in found) == 1
                assert sum(one.endswith("/run/lock") for one in found) == 1
                assert len(found) == 4 + 2 + 1 + 1 + 1 + 3
            tree.signal(signal.SIGKILL, "one")
            tree.up("one", after=restarts)


def test_what_is_held_is_the_same_thing_in_each_incarnation(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one", held=("mine",)), held=(memory("mine"),))
    with running(tmp_path, spec) as tree:
        assert tree.status()["watchdog"]["held"] == {"mine": 1, "log": 3}
        before = _memory_of(tree.pid_of("one"))
        tree.signal(signal.SIGKILL, "one")
        tree.up("one", after=0)
        assert _memory_of(tree.pid_of("one")) == before


def _memory_of(pid: int) -> int:
    (fd,) = (fd for fd, what in descriptors_of(pid).items() if "held-" in what)
    return Path(f"/proc/{pid}/fd/{fd}").stat().st_ino


def giver(child: Child) -> None:
    """Gives, drops and takes, one step in each incarnation; says what it found."""
    given = child.given()
    texts = sorted(f"{key.decode()}={os.pread(fd, 20, 0).decode()}" for key, fd in given.items())
    child.say(" ".join(texts))
    if child.incarnation == 1:
        for number in range(3):
            fd = os.memfd_create("gift")
            os.write(fd, b"from %d" % child.incarnation)
            assert child.give(b"k%d" % number, fd)
            os.close(fd)
    elif child.incarnation == 2:
        assert child.drop(b"k0")
        taken = child.take(b"k1")
        assert taken is not None
        assert os.pread(taken, 20, 0) == b"from 1"
        over = os.memfd_create("gift")
        os.write(over, b"from 2")
        for key in (b"k2", b"k3", b"k4", b"k5", b"k6"):  # the first replaces, the last is too many
            assert child.give(key, over)
        refused: list[tuple[bytes, str]] = []
        while not refused:
            child.wait(0.01)
            refused = child.refusals()
        child.say(f"refused {refused}")
    child.ready()
    while not child.stopping:
        child.wait()


def test_what_is_given_comes_to_the_successor_until_it_is_dropped(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, ChildSpec("giver", giver, keep_limit=4, policy=POLICY))
    with running(tmp_path, spec) as tree:
        for restarts in range(2):
            eventually(lambda: tree.child("giver")["state"] == "up")
            tree.signal(signal.SIGKILL, "giver")
            tree.up("giver", after=restarts)
        eventually(lambda: len(tree.reports("giver")) == 2)  # the log child takes its time
        said = [one.get("said", "") for one in reversed(tree.reports("giver"))]
        assert said == ["", "refused [(b'k6', 'at most 4 are kept')]"]
        found = tree.child("giver")
        assert (found["kept"], found["kept_limit"], found["kept_refused"]) == (4, 4, 1)
        tree.signal(signal.SIGKILL, "giver")
        eventually(lambda: len(tree.reports("giver")) == 3)
        assert tree.reports("giver")[0]["said"] == "k2=from 2 k3=from 2 k4=from 2 k5=from 2"


def test_what_was_given_in_the_moment_of_death_is_not_lost(tmp_path: Path) -> None:
    bad = child("bad", "gives_ten", tmp_path, keep_limit=100)
    with running(tmp_path, spec_in(tmp_path, bad)) as tree:
        tree.trigger.touch()
        tree.up("bad", after=0)
        assert tree.child("bad")["kept"] == 10


def hoarder(child: Child) -> None:
    """Gives ten thousand descriptors in its first incarnation."""
    number = len(child.given())
    fd = os.open(os.devnull, os.O_RDONLY)
    while number < 10_000:
        if child.give(b"%d" % number, fd):
            number += 1
        child.turn(time.monotonic())
    child.ready()
    while not child.stopping:
        child.wait()


def test_ten_thousand_descriptors_are_kept_and_come_to_each_successor(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 12_000:
        pytest.skip(f"RLIMIT_NOFILE is {hard}")
    spec = spec_in(
        tmp_path,
        ChildSpec("hoarder", hoarder, keep_limit=10_000, policy=POLICY),
        child("other"),
    )
    with running(tmp_path, spec) as tree:
        eventually(lambda: tree.child("hoarder")["kept"] == 10_000)
        tree.signal(signal.SIGKILL, "hoarder")
        tree.up("hoarder", after=0)
        found = tree.child("hoarder")
        assert (found["kept"], found["kept_refused"]) == (10_000, 0)
        assert len(descriptors_of(found["pid"])) > 10_000
        assert len(descriptors_of(tree.pid_of("other"))) < 20
        tree.signal(signal.SIGKILL, "other")
        tree.up("other", after=0)
        assert len(descriptors_of(tree.pid_of("other"))) < 20


def test_who_gives_much_does_not_wait_for_the_next_beat(tmp_path: Path) -> None:
    hoard = ChildSpec("hoarder", hoarder, keep_limit=10_000, policy=POLICY, hang_timeout=100.0)
    spec = spec_in(tmp_path, hoard, beat_interval=30.0)
    with running(tmp_path, spec) as tree:
        # In its start: it has room for some hundred at a time.
        assert tree.child("hoarder")["kept"] == 10_000


# --- floods


@pytest.mark.parametrize(
    "how", ["beats_without_end", "gives_without_end", "asks_without_end", "busy_in_python"]
)
def test_a_flood_of_one_child_neither_drowns_answers_nor_harms_the_others(
    tmp_path: Path, how: str
) -> None:
    bad = child("bad", how, tmp_path, hang_timeout=5.0, keep_limit=10)
    with running(tmp_path, spec_in(tmp_path, bad, child("two"))) as tree:
        two = tree.pid_of("two")
        tree.trigger.touch()
        eventually(lambda: not tree.trigger.exists())
        for _ in range(200):
            tree.status()  # has a limit of its own
        assert (tree.pid_of("two"), tree.child("two")["verdict"]) == (two, "ok")
        assert len(tree.reports("bad")) <= 3
        assert tree.journal("internal-error") == []


def test_answers_come_in_every_state(tmp_path: Path) -> None:
    """While children start, hang, are killed, wait, fail and stop."""
    policy = POLICY
    spec = spec_in(
        tmp_path,
        child("mad", "kills_itself", tmp_path, again=True, policy=policy),
        child("hung", "busy_in_c", tmp_path, again=True, policy=policy),
        child("deaf", "leaves_a_daemon", tmp_path, again=True, policy=policy),
    )
    with running(tmp_path, spec) as tree:
        tree.trigger.touch()
        seen: set[str] = set()

        def asked() -> bool:
            # Each answer has a limit of its own.
            seen.update(one["state"] for one in tree.status()["children"])
            return {"up", "starting", "failing"} <= seen

        eventually(asked, within=30.0, every=0.0)
        assert tree.journal("internal-error") == []


# --- growth


def test_two_hundred_respawns_leave_nothing_behind(tmp_path: Path) -> None:
    names = ("one", "two")
    spec = spec_in(tmp_path, *(child(name, policy=POLICY) for name in names))
    with running(tmp_path, spec) as tree:
        log = tree.pid_of("log")

        def respawn(count: int) -> None:
            for number in range(count):
                name = names[number % 2]
                before = tree.child(name)["restarts"]
                tree.ask("restart", name=name) if number % 3 == 0 else tree.signal(
                    signal.SIGKILL, name
                )
                tree.up(name, after=before)

        def holds() -> tuple[int, int, list[int]]:
            facts = procfs.read_facts(tree.pid)
            assert facts is not None
            assert facts.rss_bytes is not None
            family = procfs.children_of(tree.pid)
            return len(descriptors_of(tree.pid)), facts.rss_bytes, family

        respawn(20)
        fds, rss, _ = holds()
        respawn(200)
        fds_after, rss_after, family = holds()
        assert fds_after <= fds + 1  # the control connection that was just closed
        assert rss_after < rss + 2_000_000
        assert family == [log, *(tree.pid_of(name) for name in names)] or len(family) == 3
        assert len(os.listdir(f"/proc/{tree.pid}/task")) == 1
        assert all(tree.child(name)["fds"] == 12 for name in names)
        # The oldest goes when the newest has been written.
        crashes = tree.state_dir / "crashes"
        eventually(lambda: len(list(crashes.iterdir())) <= 100)


# --- bugs of ours, and what the system refuses


def broken(method: Any, how_often: int) -> Any:
    """The method, which raises when it is called the first times for the child "bad"."""
    left = [how_often]

    def call(self: Any, slot: Any, *args: Any) -> Any:
        if slot.name == "bad" and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("a bug")
        return method(self, slot, *args)

    return call


@pytest.mark.parametrize(
    "where", ["_read_lifeline", "_after_death", "_expire_slot", "_report_death", "_spawn"]
)
def test_a_bug_in_the_handling_of_one_child_does_not_take_the_tree_down(
    tmp_path: Path, where: str
) -> None:
    def sabotage() -> None:
        setattr(Supervisor, where, broken(getattr(Supervisor, where), 3))

    spec = spec_in(tmp_path, child("one"), child("bad"))
    with running(tmp_path, spec, before=sabotage) as tree:
        one = tree.pid_of("one")
        for restarts in range(2):
            tree.up("bad")
            before = tree.child("bad")["restarts"]
            tree.signal(signal.SIGKILL, "bad")
            tree.up("bad", after=before)
            assert tree.pid_of("one") == one, restarts
        assert "a bug" in eventually(lambda: tree.journal("internal-error"))[0]["text"]
        tree.ask("stop")
        assert tree.wait_end() == 0
        assert tree.holders() == []


def test_a_bug_of_the_table_does_not_take_the_tree_down(tmp_path: Path) -> None:
    def sabotage() -> None:
        receive = ChildMachine.receive

        def forgets(self: ChildMachine, *args: Any) -> Any:
            if self.spec.name == "bad" and self.restarts == 0 and type(args[0]).__name__ == "Gone":
                self._spawns += 1
                self.restarts = 1
                raise RuntimeError("a bug")
            return receive(self, *args)

        setattr(ChildMachine, "receive", forgets)  # noqa: B010 - mypy would not have it

    with running(tmp_path, spec_in(tmp_path, child("bad")), before=sabotage) as tree:
        tree.signal(signal.SIGKILL, "bad")
        tree.up("bad", after=0)


def test_no_descriptors_left_is_a_spawn_that_failed_and_is_tried_again(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("bad"), child("two"))) as tree:
        used = len(descriptors_of(tree.pid))
        soft, hard = resource.prlimit(tree.pid, resource.RLIMIT_NOFILE)
        two = tree.pid_of("two")
        bad = tree.pid_of("bad")
        resource.prlimit(tree.pid, resource.RLIMIT_NOFILE, (used - 3, hard))
        os.kill(bad, signal.SIGKILL)
        eventually(lambda: tree.journal("spawn-failed"))
        resource.prlimit(tree.pid, resource.RLIMIT_NOFILE, (soft, hard))
        tree.up("bad", after=0)
        assert tree.pid_of("two") == two
        assert tree.journal("internal-error") == []


def test_a_child_is_reaped_without_opening_a_file() -> None:
    """What a death of a child wants imported is there before: there may be no descriptor left."""
    program = """
import sys, resource
from pkvpn.watchdog import incarnation
process = incarnation._fork.Process(target=int)
process.start()
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
process.join(timeout=0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
def test_no_processes_left_is_a_spawn_that_failed_and_is_tried_again(tmp_path: Path) -> None:
    group = Path(f"/sys/fs/cgroup/pids/pkvpn-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup for pids: {error}")
    try:
        with running(tmp_path, spec_in(tmp_path, child("bad"))) as tree:
            used = len(descriptors_of(tree.pid))
            (group / "cgroup.procs").write_text(str(tree.pid))
            (group / "pids.max").write_text("1")
            tree.signal(signal.SIGKILL, "bad")
            eventually(lambda: len(tree.journal("spawn-failed")) > 1)
            assert tree.child("bad")["why"] == "spawn-failed"
            (group / "pids.max").write_text("max")
            tree.up("bad", after=0)
            # No try has left anything open.
            eventually(lambda: len(descriptors_of(tree.pid)) <= used)
            tree.ask("stop")
            assert tree.wait_end() == 0
    finally:
        eventually(lambda: removed(group))


def test_verbs_that_are_not_there_and_names_that_are_not_are_refused(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        for verb, args in (("dance", {}), ("restart", {"name": "nobody"}), ("dump", {}),
                           ("upgrade", {})):  # fmt: skip
            with pytest.raises(ControlError):
                tree.ask(verb, **args)
        assert tree.ask("restart", name="one") == {"name": "one", "incarnation": 1}
        tree.up("one", after=0)


# --- starts that cannot be


def refuse() -> list[int]:
    raise OSError("no address to listen on: 127.0.0.1:1 is taken")


def test_an_opener_that_fails_ends_the_start_in_its_own_words(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one"), held=(memory("fine"), HeldSpec("door", refuse)))
    with running(tmp_path, spec, wait=False) as tree:
        assert tree.last_word() == {
            "error": "no address to listen on: 127.0.0.1:1 is taken", "code": 1,
        }  # fmt: skip
        assert tree.wait_end() == 1
        assert sorted(path.name for path in tree.runtime_dir.iterdir()) == ["lock"]


def test_a_directory_that_is_none_ends_the_start_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with running(tmp_path, spec_in(tmp_path, child("one")), wait=False) as tree:
        word = tree.last_word()
        assert word["code"] == 1
        assert word["error"].startswith(f"{tmp_path}/state: ")
        assert tree.wait_end() == 1


def test_openers_that_fail_at_a_reload_leave_what_was_there(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one", held=("door",)), held=(memory("door"),))
    worse = spec_in(
        tmp_path, child("one", held=("door",)), held=(HeldSpec("door", refuse, key="another"),)
    )
    with running(tmp_path, spec, on_reload=lambda: worse) as tree:
        one = tree.pid_of("one")
        with pytest.raises(ControlError, match="door stays what it was: no address"):
            tree.ask("reload")
        assert tree.pid_of("one") == one
        assert tree.status()["watchdog"]["held"]["door"] == 1
