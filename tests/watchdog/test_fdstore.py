"""What the service manager hands over, and what it is given to keep."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkvpn.config import Address
from pkvpn.listeners import Listeners
from pkvpn.watchdog import fdstore
from pkvpn.watchdog.fdstore import FdStore
from pkvpn.watchdog.notify import Notify
from pkvpn.watchdog.spec import HeldSpec
from tests.support import eventually
from tests.system.bed import ROOT
from tests.watchdog.running import child, running, spec_in

TAKE = """
import json, os
from pkvpn.watchdog import fdstore
found = fdstore.take_inherited(os.environ, int(os.environ.pop("ME", os.getpid())))
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps([found, left, [os.get_inheritable(fd) for fds in found.values() for fd in fds]]))
"""


def taken(**environ: str) -> list[object]:
    """What a process takes that gets two descriptors from number 3 on."""
    script = 'exec 3</dev/null 4</dev/null; LISTEN_PID=$$ exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", TAKE],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_descriptors_come_by_their_names_and_are_said_once() -> None:
    two = {"listen": [3], "x": [4]}
    assert taken(LISTEN_FDS="2", LISTEN_FDNAMES="listen:x") == [two, [], [False, False]]
    assert taken(LISTEN_FDS="2", LISTEN_FDNAMES="x:x")[0] == {"x": [3, 4]}
    assert taken(LISTEN_FDS="2")[0] == {"unknown": [3, 4]}


def test_what_is_meant_for_another_process_is_not_taken() -> None:
    assert taken(LISTEN_FDS="2", LISTEN_FDNAMES="a:b", ME="1") == [{}, [], []]
    assert fdstore.take_inherited({}, 1) == {}


def test_listeners_go_on_with_sockets_that_are_there_and_open_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        known = Address("127.0.0.1", theirs.getsockname()[1])
        listeners = Listeners()
        addresses = (known, Address("127.0.0.1", 0))
        listeners.adopt((known,), [theirs.fileno()])
        opened = listeners.open(addresses)
        try:
            assert os.path.sameopenfile(opened[0], theirs.fileno())
            assert not os.get_blocking(opened[0])
            assert [one["state"] for one in listeners.status()] == ["listening"] * 2
        finally:
            for fd in opened:
                os.close(fd)


class Keeper:
    """Keeps descriptors as systemd does, but for what it notices of sockets by itself."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(self.path)
        self._kept: dict[str, list[int]] = {}

    def kept(self) -> dict[str, list[int]]:
        """All of it, by name."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._sock, 4096, 4)
            except BlockingIOError:
                return self._kept
            what, _, name = message.decode().partition("\nFDNAME=")
            if what == "FDSTORE=1":
                self._kept.setdefault(name, []).extend(fds)
            elif what == "FDSTOREREMOVE=1":
                self._close(self._kept.pop(name, []))

    def hand_over(self) -> dict[str, list[int]]:
        """To the next process: copies, as it keeps its own."""
        return {name: [os.dup(fd) for fd in fds] for name, fds in self.kept().items()}

    def close(self) -> None:
        for fds in self.kept().values():
            self._close(fds)
        self._sock.close()

    @staticmethod
    def _close(fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path / "notify")
    yield made
    made.close()


@pytest.fixture
def store(keeper: Keeper) -> Iterator[FdStore]:
    made = FdStore(Notify(keeper.path), enabled=True)
    made.begin({}, [])
    yield made
    made.close()


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    """Both ends of two."""
    made = [*socket.socketpair(), *socket.socketpair()]
    yield made
    for one in made:
        one.close()


def sorted_out(
    keeper: Keeper,
) -> tuple[dict[str, int], dict[tuple[str, bytes], tuple[int, int]], list[str]]:
    """What the next process finds: counts of what is held, gifts as (device, inode), ledgers."""
    held, gifts, ledgers = fdstore.sort_inherited(keeper.hand_over())
    found = {gift: (os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd, gift in gifts.items()}
    for fds in (*held.values(), list(gifts)):
        Keeper._close(fds)
    return {name: len(fds) for name, fds in held.items()}, found, ledgers


def identity(fd: int) -> tuple[int, int]:
    return os.fstat(fd).st_dev, os.fstat(fd).st_ino


def test_the_next_process_gets_each_gift_under_its_key(
    keeper: Keeper, store: FdStore, connections: list[socket.socket]
) -> None:
    mark = os.memfd_create("mark")
    try:
        store.keep("edge-1", b"\0one", connections[0].fileno())
        store.keep("edge-2", b"two", connections[2].fileno())
        store.keep("core", b"mark", mark)
        assert [name for name in keeper.kept() if name == "g"] == ["g"]
        held, gifts, ledgers = sorted_out(keeper)
        assert held == {}
        assert len(ledgers) == 1
        assert gifts == {
            ("edge-1", b"\0one"): identity(connections[0].fileno()),
            ("edge-2", b"two"): identity(connections[2].fileno()),
            ("core", b"mark"): identity(mark),
        }
        store.drop(mark, True)
        assert ("core", b"mark") not in sorted_out(keeper)[1]
    finally:
        os.close(mark)


def test_a_gift_is_dropped_by_a_shutdown_which_the_manager_sees(
    keeper: Keeper, store: FdStore, connections: list[socket.socket]
) -> None:
    store.keep("edge-1", b"one", connections[0].fileno())
    store.drop(connections[0].fileno(), True)
    assert connections[1].recv(1) == b""
    store.drop(connections[2].fileno(), True)  # never given
    connections[2].send(b"x")


def test_what_is_given_again_is_not_shut_down(
    keeper: Keeper, store: FdStore, connections: list[socket.socket]
) -> None:
    again = os.dup(connections[0].fileno())
    try:
        store.keep("edge-1", b"one", connections[0].fileno())
        store.drop(connections[0].fileno(), False)
        store.keep("edge-1", b"one", again)
        connections[1].send(b"x")
        assert list(sorted_out(keeper)[1]) == [("edge-1", b"one")]
        assert os.read(again, 1) == b"x"
    finally:
        os.close(again)


def test_what_is_held_is_kept_under_its_own_name_and_replaced(
    keeper: Keeper, store: FdStore, connections: list[socket.socket]
) -> None:
    ends = [one.fileno() for one in connections]
    store.hold("checkpoint:edge-1", ends[:2])
    store.hold("listen", ends[2:3])
    assert sorted_out(keeper)[0] == {"checkpoint%3Aedge-1": 2, "listen": 1}
    store.hold("checkpoint:edge-1", ends[3:])
    store.release("listen")
    assert sorted_out(keeper)[0] == {"checkpoint%3Aedge-1": 1}


def test_another_image_writes_another_ledger_and_the_end_leaves_nothing(
    keeper: Keeper, store: FdStore, connections: list[socket.socket]
) -> None:
    fd = connections[0].fileno()
    store.keep("edge-1", b"one", fd)
    store.hold("listen", [connections[2].fileno()])
    successor = FdStore(Notify(keeper.path), enabled=True)
    successor.begin({fd: ("edge-1", b"one")}, store.ledgers())
    successor.hold("listen", [connections[2].fileno()])
    _, gifts, ledgers = sorted_out(keeper)
    assert list(gifts) == [("edge-1", b"one")]
    assert ledgers == successor.ledgers() != store.ledgers()
    successor.forget()
    successor.close()
    assert keeper.kept() == {}


def test_a_ledger_does_not_grow_for_ever(
    keeper: Keeper, store: FdStore, connections: list[socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fdstore, "_LINES", 10)
    fd = connections[0].fileno()
    before = store.ledgers()
    for number in range(30):
        store.keep("edge-1", b"%d" % number, fd)
        keeper.kept()
    assert store.ledgers() != before
    _, gifts, ledgers = sorted_out(keeper)
    assert ledgers == store.ledgers()
    assert list(gifts) == [("edge-1", b"29")]


def test_what_nobody_knows_is_nobodys(
    keeper: Keeper, store: FdStore, connections: list[socket.socket]
) -> None:
    Notify(keeper.path).store("g", connections[0].fileno())
    assert list(sorted_out(keeper)[1]) == [("", b"")]


def test_without_a_manager_that_keeps_nothing_is_said(
    keeper: Keeper, connections: list[socket.socket]
) -> None:
    disabled = FdStore(Notify(keeper.path), enabled=False)
    disabled.begin({}, [])
    disabled.keep("edge-1", b"one", connections[0].fileno())
    disabled.hold("listen", [connections[0].fileno()])
    disabled.drop(connections[0].fileno(), True)
    disabled.forget()
    disabled.close()
    assert keeper.kept() == {}
    connections[0].send(b"x")


def test_a_manager_that_does_not_read_gets_everything_later(
    keeper: Keeper, connections: list[socket.socket]
) -> None:
    notify = Notify(keeper.path)
    sent = 0
    while not notify.behind:
        notify.store(f"n{sent}", connections[0].fileno())
        sent += 1
    notify.unstore("n0")
    assert len(keeper.kept()) == sent - 1
    notify.catch_up()
    assert not notify.behind
    assert set(keeper.kept()) == {f"n{number}" for number in range(1, sent)}


@pytest.mark.slow
def test_a_tree_that_makes_way_leaves_what_it_holds_and_one_that_stops_does_not(
    tmp_path: Path, keeper: Keeper
) -> None:
    def started_by_it() -> None:
        os.environ.update(NOTIFY_SOCKET=keeper.path, FDSTORE="10")

    held = HeldSpec("memory", lambda: [os.memfd_create("memory")], stored=True)
    other = HeldSpec("other", lambda: [os.memfd_create("other")])
    spec = spec_in(tmp_path, child("one", held=("memory", "other")), held=(held, other))

    def names() -> set[str]:
        return {name.partition("-")[0] for name in keeper.kept()}

    with running(tmp_path, spec, before=started_by_it) as tree:
        eventually(lambda: names() == {"memory", "ledger"})
        tree.ask("stop", **{"yield": True})
        tree.signal(signal.SIGTERM)  # which systemd sends in any case
        assert tree.wait_end() == 0
        assert names() == {"memory", "ledger"}
    with running(tmp_path, spec, before=started_by_it) as tree:
        tree.ask("stop", **{"yield": True})
        tree.ask("stop")  # after all
        assert tree.wait_end() == 0
        eventually(lambda: "memory" not in names())
