"""From inside an edge and a core that were taken over: what they try is refused and reported.

The targets are the product's; in each turn of their loop they look for a deed into memory that the
test shares with them, since they may open no files.  What ends the process is in its crash report,
what is only refused they write back.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pwd
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from pkvpn.app import Service, prepare_directories
from pkvpn.config import load
from pkvpn.watchdog import sandbox
from pkvpn.watchdog.child import Child
from pkvpn.watchdog.spec import HeldSpec, TreeSpec
from tests.support import eventually
from tests.watchdog.running import Running, running

ABLE = sandbox.abilities()
pytestmark = [
    pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(120),
    pytest.mark.skipif(not ABLE.seccomp, reason="no seccomp here"),
    pytest.mark.skipif(not ABLE.landlock, reason="no Landlock here"),
]  # fmt: skip

CORE, EDGE = "daemon", "nobody"
SIZE = 65536

CONFIG = f"""[service]
listen = ["127.0.0.1:0"]
state_dir = "state"
runtime_dir = "run"
core_user = "{CORE}"
edge_user = "{EDGE}"
[watchdog]
beat_interval = 0.05
hang_timeout = 0.5
healthy_after = 0.05
"""

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Facts:
    """What a subverted process knows of the others."""

    watchdog: int
    other: int  # an edge or a core, which the one that asks is not
    paths: dict[str, str]
    port: int


class Memory:
    """An order to one child and its answer; the test and the child see the same."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 2 * SIZE)

    def put(self, what: Any, *, answer: bool = False) -> None:
        data = json.dumps(what).encode()
        at = SIZE if answer else 0
        self._memory[at + 4 : at + 4 + len(data)] = data
        self._memory[at : at + 4] = struct.pack("=I", len(data))

    def take(self, *, answer: bool = False) -> Any:
        at = SIZE if answer else 0
        (size,) = struct.unpack("=I", self._memory[at : at + 4])
        if not size:
            return None
        self._memory[at : at + 4] = bytes(4)
        return json.loads(self._memory[at + 4 : at + 4 + size])


@dataclass(frozen=True)
class Subverted:
    """A target that runs another one with a child that obeys whoever has taken it over."""

    target: Callable[..., None]

    def __call__(self, child: Child, settings: Any) -> None:
        self.target(cast(Child, _Obedient(child)), settings)


class _Obedient:
    def __init__(self, child: Child) -> None:
        self._child = child
        (fd,) = child.held(f"orders:{child.name}")
        self._memory = Memory(fd)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)

    def turn(self, now: float) -> float:
        order = self._memory.take()
        if order:
            deed, facts = order
            try:
                done = DEEDS[deed](self._child, Facts(**facts))
            except OSError as error:
                done = type(error).__name__
            self._memory.put(done, answer=True)
        return min(0.02, self._child.turn(now))


# --- what is tried


def reads(paths: list[str]) -> list[str]:
    """Those that could be opened."""
    opened = []
    for path in paths:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_PATH | os.O_DIRECTORY):
            try:
                os.close(os.open(path, flags))
            except OSError:
                continue
            if not flags & os.O_PATH:  # a name for something, which nothing can be read from
                opened.append(path)
    return opened


def files(_child: Child, facts: Facts) -> Any:
    others = [f"/proc/{pid}/mem" for pid in (facts.watchdog, facts.other)]
    return reads([*facts.paths.values(), *others, "/etc/shadow", "/etc/passwd", "/dev/mem", "/tmp"])


def descriptors_of_others(_child: Child, facts: Facts) -> Any:
    found = []
    for pid in (facts.watchdog, facts.other):
        for number in range(3, 64):
            try:
                found.append(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
            except OSError:
                continue
    return found


def new_files(_child: Child, facts: Facts) -> Any:
    made = []
    for directory in (facts.paths["state"], facts.paths["run"], "/tmp", "/dev/shm"):
        try:
            os.close(os.open(f"{directory}/subverted", os.O_RDWR | os.O_CREAT, 0o600))
            made.append(directory)
        except OSError:
            continue
    return made


def forks(_child: Child, _facts: Facts) -> Any:
    return os.fork()


def executes(_child: Child, _facts: Facts) -> Any:
    os.execv("/bin/true", ["true"])


def connects_with_a_new_socket(_child: Child, facts: Facts) -> Any:
    return socket.create_connection(("127.0.0.1", facts.port)).fileno()


def connects_to_the_control_socket(_child: Child, facts: Facts) -> Any:
    return socket.socket(socket.AF_UNIX).connect(facts.paths["control"])


def kills_the_watchdog(_child: Child, facts: Facts) -> Any:
    os.kill(facts.watchdog, signal.SIGKILL)


def kills_the_other(_child: Child, facts: Facts) -> Any:
    os.kill(facts.other, signal.SIGKILL)


def traces_the_watchdog(_child: Child, facts: Facts) -> Any:
    return libc.ptrace(0x4206, facts.watchdog, 0, 0)  # SEIZE


def reads_memory_of_the_other(_child: Child, facts: Facts) -> Any:
    return libc.process_vm_readv(facts.other, None, 0, None, 0, 0)


def takes_a_descriptor_of_the_watchdog(_child: Child, facts: Facts) -> Any:
    pidfd = libc.syscall(434, facts.watchdog, 0)
    return libc.syscall(438, pidfd, 3, 0)


def becomes_root(_child: Child, _facts: Facts) -> Any:
    os.setuid(0)


def gives_too_much(child: Child, _facts: Facts) -> Any:
    """Too many at once, none, something that is no socket, and sockets that linger."""
    gifts = child._gifts
    null = os.open(os.devnull, os.O_RDONLY)
    for fds in ([null] * 60, [null] * 3, []):
        socket.send_fds(gifts, [b"Gmany"], fds)
    socket.send_fds(gifts, [b"?" * 60], [null])
    gifts.send(b"")
    for number in range(40):
        left, right = socket.socketpair()
        with left, right:
            left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
            left.setblocking(False)
            try:
                left.send(bytes(1 << 20))
            except BlockingIOError:
                pass
            child.give(b"linger%d" % number, left.fileno())
    for number in range(40):
        child.drop(b"linger%d" % number)
    os.close(null)
    return "given"


def garbage_in_the_lifeline(child: Child, _facts: Facts) -> Any:
    os.write(child._birth.up, os.urandom(4000))


def garbage_in_the_log(child: Child, _facts: Facts) -> Any:
    for _ in range(200):
        try:
            os.write(child._birth.log, os.urandom(3000))
            os.write(child._birth.log, b'J\0\0\0\0{"event":"ready","child":"core"}')
        except BlockingIOError:
            break
    return "written"


ENDS = (
    forks, executes, connects_with_a_new_socket, connects_to_the_control_socket,
    kills_the_watchdog, kills_the_other, traces_the_watchdog, reads_memory_of_the_other,
    takes_a_descriptor_of_the_watchdog,
)  # fmt: skip
REFUSED = (files, descriptors_of_others, new_files, becomes_root)
OTHERS = (gives_too_much, garbage_in_the_lifeline, garbage_in_the_log)
DEEDS = {deed.__name__: deed for deed in (*ENDS, *REFUSED, *OTHERS)}


# --- the tree that is tried on


class Subject:
    """The tree, and the orders to it."""

    def __init__(self, tree: Running, directory: Path, orders: dict[str, int]) -> None:
        self.tree = tree
        self.directory = directory
        self._memory = {name: Memory(fd) for name, fd in orders.items()}

    def order(self, name: str, deed: Callable[[Child, Facts], Any]) -> None:
        status = self.tree.status()
        state, run = self.directory / "state", self.directory / "run"
        mine = name.partition("-")[0]
        paths = {
            "state": state, "run": run, "key": state / "server.key", "log": state / "pkvpn.log",
            "journal": state / "journal.jsonl", "lock": run / "lock",
            "control": run / "control.sock", "admin": run / "admin.sock",
        }  # fmt: skip
        if mine == "edge":
            paths |= {"database": state / "core/pkvpn.db", "secret": state / "core/session.key"}
        other = "core" if mine == "edge" else "edge-1"
        facts = {
            "watchdog": status["watchdog"]["pid"], "other": self.tree.pid_of(other),
            "paths": {what: str(path) for what, path in paths.items()},
            "port": status["listeners"][0]["port"] if "listeners" in status else 0,
        }  # fmt: skip
        self._memory[name].take(answer=True)
        self._memory[name].put([deed.__name__, facts])

    def answer_to(self, name: str, deed: Callable[[Child, Facts], Any]) -> Any:
        self.order(name, deed)
        found: list[Any] = []

        def heard() -> bool:
            answer = self._memory[name].take(answer=True)
            if answer is not None:
                found.append(answer)
            return bool(found)

        eventually(heard)
        return found[0]

    def is_unharmed(self, watchdog: int) -> None:
        assert self.tree.status()["watchdog"]["pid"] == watchdog
        for child in self.tree.status()["children"]:
            self.tree.up(child["name"])


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    for name in (CORE, EDGE):
        try:
            pwd.getpwnam(name)
        except KeyError:
            pytest.skip(f"there is no user {name} here")
    # Where other users may pass, as they may below /var/lib.
    directory = Path(tempfile.mkdtemp(prefix="pkvpn-subverted-"))
    directory.chmod(0o711)
    (directory / "pkvpn.toml").write_text(CONFIG, encoding="utf-8")
    settings = load(directory / "pkvpn.toml")
    orders = {}
    for name in ("core", "edge-1"):
        orders[name] = os.memfd_create(f"orders-{name}")
        os.ftruncate(orders[name], 2 * SIZE)
    umask = os.umask(0o077)
    try:
        prepare_directories(settings)
        with running(directory, subvert(Service(settings, foreground=False), orders)) as tree:
            yield Subject(tree, directory, orders)
            os.kill(tree.pid, signal.SIGTERM)
            assert tree.wait_end() == 0
    finally:
        os.umask(umask)
        for fd in orders.values():
            os.close(fd)
        shutil.rmtree(directory)


def subvert(service: Service, orders: dict[str, int]) -> TreeSpec:
    spec = service.tree(service.settings)
    children = tuple(
        replace(child, target=Subverted(child.target), held=(*child.held, f"orders:{child.name}"))
        if child.name in orders
        else child
        for child in spec.children
    )
    held = [
        HeldSpec(f"orders:{name}", lambda fd=fd: [os.dup(fd)])  # type: ignore[misc]
        for name, fd in orders.items()
    ]
    return replace(spec, children=children, held=(*spec.held, *held))


BOTH = pytest.mark.parametrize("name", ["core", "edge-1"])


@BOTH
@pytest.mark.parametrize("deed", ENDS, ids=lambda deed: deed.__name__)
def test_a_deed_that_ends_it_is_in_its_report(
    subject: Subject, name: str, deed: Callable[[Child, Facts], Any]
) -> None:
    tree = subject.tree
    watchdog, before = tree.status()["watchdog"]["pid"], tree.up(name)["restarts"]
    reports = len(tree.reports(name))
    subject.order(name, deed)
    tree.up(name, after=before)
    eventually(lambda: len(tree.reports(name)) > reports)
    report = tree.reports(name)[0]
    assert report["signal"] == signal.SIGSYS
    assert deed.__name__ in report["stacks"]
    subject.is_unharmed(watchdog)


@BOTH
@pytest.mark.parametrize(
    ("deed", "answer"),
    [
        (files, []),
        (descriptors_of_others, []),
        (new_files, []),
        (becomes_root, "PermissionError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_its_own_is_refused(
    subject: Subject, name: str, deed: Callable[[Child, Facts], Any], answer: Any
) -> None:
    watchdog, before = subject.tree.status()["watchdog"]["pid"], subject.tree.pid_of(name)
    assert subject.answer_to(name, deed) == answer
    subject.is_unharmed(watchdog)
    assert subject.tree.pid_of(name) == before


@BOTH
def test_descriptors_that_nobody_wants_are_refused_and_counted(subject: Subject, name: str) -> None:
    tree = subject.tree
    watchdog, before = tree.status()["watchdog"], tree.child(name)["kept_refused"]
    assert subject.answer_to(name, gives_too_much) == "given"
    eventually(lambda: tree.child(name)["kept_refused"] >= before + 4)
    subject.is_unharmed(watchdog["pid"])


@BOTH
def test_garbage_in_the_lifeline_ends_it(subject: Subject, name: str) -> None:
    tree = subject.tree
    watchdog, before = tree.status()["watchdog"]["pid"], tree.up(name)["restarts"]
    reports = len(tree.reports(name))
    subject.order(name, garbage_in_the_lifeline)
    tree.up(name, after=before)
    eventually(lambda: len(tree.reports(name)) > reports)
    assert tree.reports(name)[0]["class"] == "corrupt"
    subject.is_unharmed(watchdog)


@BOTH
def test_nobody_speaks_for_another_in_the_journal(subject: Subject, name: str) -> None:
    before = len(subject.tree.journal("ready"))
    assert subject.answer_to(name, garbage_in_the_log) == "written"
    subject.is_unharmed(subject.tree.status()["watchdog"]["pid"])
    assert len(subject.tree.journal("ready")) == before
