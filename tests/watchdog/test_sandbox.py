"""What is left to a confined process, tried in real ones."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog import sandbox
from pkvpn.watchdog.confinement import Confinement, Files, Network, User
from pkvpn.watchdog.sandbox import Abilities, ConfinementError, describe
from tests.support import eventually, process_gone
from tests.watchdog.running import child, running, spec_in

ABLE = sandbox.abilities()
needs_seccomp = pytest.mark.skipif(not ABLE.seccomp, reason="no seccomp here")
needs_landlock = pytest.mark.skipif(not ABLE.landlock, reason="no Landlock here")

CALLS = Confinement(calls=True)
CLOSED = Confinement(calls=True, network=Network.NONE)
# Debian has it everywhere, and it owns nothing.
NOBODY = User("nobody", 65534, 65534)


def in_sandbox(confinement: Confinement, deed: Callable[[], Any]) -> Any:
    """What ``deed`` returns in a confined process: its value, its OSError or its signal."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            sandbox.confine(confinement, lambda: None)
            try:
                result: Any = deed()
            except OSError as error:
                result = type(error)
            os.write(write, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status))
    return pickle.loads(data)


def execute() -> None:
    os.execv("/bin/true", ["true"])


def trace() -> int:
    return int(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))  # PTRACE_ATTACH


@needs_seccomp
@pytest.mark.parametrize(
    "deed",
    [
        os.fork,
        execute,
        trace,
        lambda: os.kill(os.getppid(), 0),
        lambda: os.kill(0, 0),
        lambda: os.pidfd_open(os.getppid()),
        lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    ],
    ids=["fork", "exec", "ptrace", "kill", "kill-group", "pidfd", "prlimit"],
)
def test_a_deed_that_no_child_needs_ends_it(deed: Callable[[], Any]) -> None:
    assert in_sandbox(CALLS, deed) is signal.SIGSYS


@needs_seccomp
def test_threads_signals_to_oneself_and_limits_of_ones_own_go_on() -> None:
    def deed() -> list[int]:
        found: list[int] = []
        thread = threading.Thread(target=found.append, args=(1,))
        thread.start()
        thread.join()
        signal.signal(signal.SIGUSR1, lambda number, _: found.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        return found

    assert in_sandbox(CLOSED, deed) == [1, signal.SIGUSR1]


@needs_seccomp
def test_sockets_that_are_there_go_on_and_others_are_not_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with client, peer:

            def talk() -> bytes:
                peer.sendall(b"a")
                peer.sendmsg([b"b"])
                return client.recv(2, socket.MSG_WAITALL)

            assert in_sandbox(CLOSED, talk) == b"ab"
            address = server.getsockname()
            fast = 0x20000000  # MSG_FASTOPEN
            for deed in (
                lambda: socket.socket().close(),
                lambda: client.connect(address),
                lambda: client.sendto(b"", fast, address),
                server.listen,
            ):
                assert in_sandbox(CLOSED, deed) is signal.SIGSYS
                assert in_sandbox(CALLS, deed) is not signal.SIGSYS


@needs_landlock
def test_only_files_that_are_named_are_opened(tmp_path: Path) -> None:
    ours, read_only, secret = tmp_path / "ours", tmp_path / "read", tmp_path / "secret"
    ours.mkdir()
    read_only.write_text("r")
    secret.write_text("s")
    confinement = Confinement(
        files=Files(read=(str(read_only), str(tmp_path / "missing")), write=(str(ours),))
    )

    def write() -> str:
        (ours / "a").write_text("w")
        (ours / "a").rename(ours / "b")
        os.link(ours / "b", ours / "c")
        (ours / "b").unlink()
        return (ours / "c").read_text() + read_only.read_text()

    assert in_sandbox(confinement, write) == "wr"
    for deed in (
        secret.read_text,
        lambda: read_only.write_text(""),
        lambda: secret.rename(ours / "s"),
        lambda: os.link(secret, ours / "s"),
        lambda: (ours / "s").symlink_to(secret),
        lambda: os.listdir(tmp_path),
        lambda: os.truncate(secret, 0),
        lambda: os.execv("/bin/true", ["true"]),
    ):
        # Out of one directory and into another it is as if they were two disks.
        assert in_sandbox(confinement, deed) in (PermissionError, OSError)
    assert secret.read_text() == "s"
    assert os.listdir(ours) == ["c"]


@needs_landlock
def test_memory_files_are_still_opened_by_their_number() -> None:
    """The edge's checkpoint and OpenSSL's key log are."""
    memory = os.memfd_create("test")

    def deed() -> int:
        return os.write(os.open(f"/proc/self/fd/{memory}", os.O_RDWR), b"abc")

    assert in_sandbox(Confinement(files=Files()), deed) == 3
    os.close(memory)


@pytest.mark.skipif(ABLE.landlock < 6, reason="Landlock of this kernel knows no signals")
def test_without_seccomp_landlock_keeps_signals_in() -> None:
    confinement = Confinement(files=Files())
    assert in_sandbox(confinement, lambda: os.kill(os.getppid(), 0)) is PermissionError


def status_of_oneself() -> dict[str, str]:
    with open("/proc/self/status", encoding="ascii") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file)


def test_nothing_is_gained_and_no_core_is_dumped() -> None:
    def deed() -> tuple[str, tuple[int, int], int]:
        limit = resource.getrlimit(resource.RLIMIT_CORE)
        return status_of_oneself()["NoNewPrivs"], limit, ctypes.CDLL(None).prctl(3)  # GET_DUMPABLE

    privileges, limit, dumpable = in_sandbox(Confinement(), deed)
    assert (privileges, limit) == ("1", (1, 1))
    assert dumpable == (0 if ABLE.root else 1)


@pytest.mark.root
def test_capabilities_are_gone_for_good() -> None:
    found = in_sandbox(Confinement(capabilities=("dac_override",)), status_of_oneself)
    assert {found[f"Cap{which}"] for which in ("Prm", "Eff", "Bnd")} == {"0000000000000002"}
    assert int(found["CapAmb"], 16) == int(found["CapInh"], 16) == 0


@pytest.mark.root
def test_another_user_has_no_groups_no_capabilities_and_no_files_of_root(tmp_path: Path) -> None:
    confinement = Confinement(user=NOBODY, capabilities=("dac_override",))
    found = in_sandbox(confinement, status_of_oneself)
    assert set(found["Uid"].split()) == set(found["Gid"].split()) == {"65534"}
    assert found["Groups"].strip() == ""
    assert int(found["CapPrm"], 16) == 0
    (tmp_path / "secret").touch(0o600)
    assert in_sandbox(confinement, (tmp_path / "secret").read_text) is PermissionError
    assert in_sandbox(confinement, lambda: os.setuid(0)) is PermissionError


@pytest.mark.root
def test_a_user_that_cannot_be_had_is_named() -> None:
    def deed() -> None:
        sandbox.confine(Confinement(user=NOBODY), lambda: None)

    def again() -> str:
        with pytest.raises(ConfinementError) as raised:
            deed()
        return str(raised.value)

    # Whoever has given everything up cannot become anybody.
    assert in_sandbox(Confinement(), again) == "user nobody: Operation not permitted"


def test_what_is_not_in_force_says_why() -> None:
    confinement = Confinement(files=Files(), calls=True)
    told = describe(confinement, Abilities(landlock=0, seccomp=False, root=False))
    assert told["landlock"] == "this kernel has none"
    assert told["seccomp"] == "this kernel or machine has none"
    assert told["dumpable"].startswith("yes: ")
    told = describe(Confinement(user=NOBODY), Abilities(landlock=7, seccomp=True, root=True))
    assert (told["user"], told["landlock"], told["seccomp"]) == ("nobody", "off", "off")
    assert describe(None, Abilities(landlock=7, seccomp=True, root=True)) == {}


# --- in a tree


@needs_seccomp
@pytest.mark.slow
def test_a_forbidden_deed_is_reported_with_its_stack_and_the_child_comes_back(
    tmp_path: Path,
) -> None:
    spec = spec_in(tmp_path, child("worker", "keeps_a_grandchild", tmp_path, confinement=CALLS))
    with running(tmp_path, spec) as tree:
        tree.trigger.touch()
        tree.up("worker", after=0)
        report = tree.report("worker")
        assert report["signal"] == signal.SIGSYS
        assert "keeps_a_grandchild" in report["stacks"]
        assert tree.child("worker")["confinement"]["seccomp"] == "on"


@pytest.mark.slow
@pytest.mark.root
def test_a_child_of_another_user_dies_with_the_watchdog_and_can_be_looked_at(
    tmp_path: Path,
) -> None:
    spec = spec_in(tmp_path, child("worker", confinement=Confinement(user=NOBODY)))
    with running(tmp_path, spec) as tree:
        status = tree.up("worker")
        assert status["fds"] > 5
        assert os.stat(f"/proc/{status['pid']}/exe").st_size > 0
        tree.signal(signal.SIGQUIT, "worker")
        assert "wait" in tree.report("worker")["stacks"]
        tree.signal(signal.SIGKILL)
        eventually(lambda: process_gone(status["pid"]), within=5.0)
