"""A core in a process of its own, and an edge that follows a script."""

import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from pkvpn import channel
from pkvpn.channel import (
    Adopted,
    FlowSeen,
    Frames,
    FramesOut,
    FromCore,
    FromEdge,
    Hello,
    Mode,
    Opened,
    Replay,
    Replayed,
    Request,
    State,
    conn_id,
    join_blocks,
    split_blocks,
)
from pkvpn.core.main import main
from pkvpn.core.settings import CoreSettings
from pkvpn.core.store import Store
from pkvpn.protocol.hashes import user_key
from pkvpn.protocol.messages import Welcome
from pkvpn.watchdog.child import Child
from pkvpn.watchdog.control import ask, listen
from pkvpn.watchdog.lifeline import Duty
from tests.core.desk import SIGNATURE, login, pack_of

M = TypeVar("M")

TIMEOUT = 10.0


class FakeChild:
    """What `pkvpn.watchdog.child.Child` is to a core, without a watchdog."""

    def __init__(
        self,
        held: dict[str, list[int]],
        given: dict[bytes, int],
        ready_fd: int,
        incarnation: int,
        may_give: bool,
    ) -> None:
        self.name = "core"
        self._may_give = may_give
        self.incarnation = incarnation
        self.stopping = False
        self.standing_by = False
        self._held = held
        self._given = given
        self._ready_fd = ready_fd
        self._duties: dict[str, Duty] = {}
        self._wake, wake = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_args: object) -> None:
        self.stopping = True

    def stand_by(self) -> None:
        """Our turn has come already."""

    def held(self, name: str) -> list[int]:
        return self._held[name]

    def given(self) -> dict[bytes, int]:
        return self._given

    def give(self, key: bytes, fd: int) -> bool:
        # The tests open what a core gives beforehand, but for those in which it is of no use.
        assert self._may_give, f"{key!r} was given, descriptor {fd}"
        return True

    def fileno(self) -> int:
        return self._wake

    def receive(self) -> list[str]:
        os.read(self._wake, 100)
        return ["stop"]

    def duty(self, name: str) -> Duty:
        return self._duties.setdefault(name, Duty())

    def ready(self) -> None:
        os.write(self._ready_fd, b"ready")

    def say(self, text: str) -> None:
        pass

    def turn(self, now: float) -> float:
        return 0.2


class Tree:
    """Everything a watchdog holds for a core, which can be killed and started again."""

    def __init__(self, state_dir: Path, edges: int = 1, **settings: Any) -> None:
        self.state_dir = str(state_dir)
        self.settings = CoreSettings(self.state_dir, **settings)
        self.admin = str(state_dir / "admin.sock")
        self.canary = bytes(range(32))
        canary = os.memfd_create("canary")
        os.write(canary, self.canary)
        mark = os.memfd_create("mark")
        os.ftruncate(mark, 1024)
        self.given = {b"core mark": mark}
        self.held = {"channel:core": [], "admin": [listen(self.admin)], "canary": [canary]}
        self.edges: list[Edge] = []
        for index in range(1, edges + 1):
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in ("c", "f")]
            self.edges.append(Edge(index, *(pair[0] for pair in pairs)))
            for pair in pairs:
                pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
                pair[1].setblocking(False)
                self.held["channel:core"].append(pair[1].detach())
        self.pid = 0
        self.incarnation = 0
        self.may_give = False

    def add_tap(self, name: str) -> socket.socket:
        """A device whose other side is ours: a datagram is a frame."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.settimeout(TIMEOUT)
        theirs.setblocking(False)
        self.held[f"tap:{name}"] = [theirs.detach()]
        return ours

    def add_accounts(self) -> None:
        """Hub T with u1 (pw1), u2 (pw2) and anon."""
        store = Store(self.state_dir)
        store.add_hub("T")
        for name, password in (("u1", "pw1"), ("u2", "pw2")):
            store.add_user("T", name, "password", password=user_key(password, name))
        store.add_user("T", "anon", "anonymous")
        store.close()

    def start(self, before: Callable[[], None] = lambda: None, *, wait: bool = True) -> None:
        """Start a core; ``before`` runs in it first."""
        read_fd, ready_fd = os.pipe()
        self.incarnation += 1
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(read_fd)
                before()
                child = FakeChild(self.held, self.given, ready_fd, self.incarnation, self.may_give)
                main(cast(Child, child), self.settings)
                code = 0
            except SystemExit as end:
                os.write(ready_fd, str(end.code).encode())
            except BaseException:  # noqa: BLE001  it must not return into the test
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(ready_fd)
        try:
            if wait:
                said = os.read(read_fd, 1000).decode()
                assert said == "ready", said
        finally:
            os.close(read_fd)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end_core(self, number: int = signal.SIGKILL) -> int:
        """Signal the core and wait for it; its exit code, negative for a signal."""
        pid, self.pid = self.pid, 0
        os.kill(pid, number)
        return self.wait(pid)

    def wait(self, pid: int) -> int:
        deadline = time.monotonic() + TIMEOUT
        while True:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            select.select([], [], [], 0.005)

    def close(self) -> None:
        if self.pid:
            self.end_core()
        for edge in self.edges:
            edge.control.close()
            edge.frames.close()
        for fds in self.held.values():
            for fd in fds:
                os.close(fd)
        for fd in self.given.values():
            os.close(fd)

    def ask(self, verb: str, **args: Any) -> Any:
        return ask(self.admin, verb, args, timeout=TIMEOUT)


class Edge:
    """The other end of one edge's channel."""

    def __init__(self, index: int, control: socket.socket, frames: socket.socket) -> None:
        self.index = index
        self.control = control
        self.frames = frames
        for sock in (control, frames):
            sock.settimeout(TIMEOUT)
        self._heard: list[FromCore] = []

    def conn(self, counter: int) -> int:
        return conn_id(self.index, 5.0, counter)

    def say(self, *messages: FromEdge) -> None:
        for message in messages:
            sock = self.frames if isinstance(message, Frames) else self.control
            sock.send(channel.encode(message))

    def hear(self, kind: type[M]) -> M:
        """The next control message, or the next FramesOut, which must be of this kind."""
        sock = self.frames if kind is FramesOut else self.control
        message = channel.decode_from_core(sock.recv(channel.MAX_MESSAGE))
        assert isinstance(message, kind), message
        return message

    def silent(self) -> bool:
        """Nothing has come.  To be asked after something that came later was heard."""
        return not select.select([self.control, self.frames], [], [], 0)[0]

    def open(self, counter: int, peer: str = "192.0.2.1:50000") -> int:
        conn = self.conn(counter)
        self.say(Opened(conn, peer, "192.0.2.9:443", "TLSv1.3 own TLS_AES_256_GCM_SHA384"))
        return conn

    def request(self, conn: int, number: int, raw: bytes) -> State:
        self.say(Request(conn, number, raw))
        state = self.hear(State)
        assert (state.conn, state.number) == (conn, number)
        return state

    def greet(self, counter: int) -> tuple[int, State, bytes]:
        """A connection with its Hello: its name, the State, the random."""
        conn = self.open(counter)
        state = self.request(conn, 1, SIGNATURE)
        return conn, state, pack_of(state.reply).get_data("random")

    def log_in(
        self, counter: int, user: str = "u1", password: str = "pw1", hub: str = "T", **fields: Any
    ) -> tuple[State, Welcome]:
        conn, _, random = self.greet(counter)
        state = self.request(conn, 2, login(user, password, hub, random=random, **fields))
        return state, Welcome.from_pack(pack_of(state.reply))

    def send(self, conn: int, *frames: bytes) -> None:
        self.say(Frames(conn, join_blocks(list(frames))))

    def receive(self) -> tuple[tuple[int, ...], list[bytes]]:
        message = self.hear(FramesOut)
        return message.conns, split_blocks(bytes(message.blocks))

    def replay(self, epoch: int, *states: State, flows: tuple[tuple[int, bytes], ...] = ()) -> None:
        """Answer a Hello: these are the last States applied."""
        for state in states:
            self.say(
                Replay(
                    state.conn,
                    state.number,
                    Mode(state.mode),
                    "192.0.2.1:50000",
                    "192.0.2.9:443",
                    "TLSv1.3",
                    state.blob,
                )
            )
        for conn, key in flows:
            self.say(FlowSeen(conn, key))
        self.say(Replayed(epoch))

    def begin(self) -> int:
        """Be a new edge without connections; the epoch."""
        epoch = self.hear(Hello).epoch
        self.say(Adopted(channel.VERSION))
        assert self.hear(Hello).epoch == epoch
        self.replay(epoch)
        return epoch
