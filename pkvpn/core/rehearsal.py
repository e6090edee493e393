"""A dress rehearsal: what a core does in its first turns, done ahead by a successor that waits.

Strategy: as that of the edge (`pkvpn.edge.rehearsal`), and for the same reason.  A core with hubs
and users of its own hears an edge that is played by us: two clients log in and exchange frames;
then its successor hears of them from that edge, and of somebody new.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from pkvpn import channel
from pkvpn.channel import (
    Adopted,
    FlowSeen,
    Frames,
    Hello,
    Opened,
    Replay,
    Replayed,
    Request,
    State,
    conn_id,
)
from pkvpn.core.accounts import Accounts, HubRecord, UserRecord
from pkvpn.protocol import http
from pkvpn.protocol.errors import ProtocolError
from pkvpn.protocol.messages import AuthType, Login

if TYPE_CHECKING:
    from pkvpn.watchdog.child import Child

M = TypeVar("M")

# A stage on which nothing happens for so long is left.
_PATIENCE = 2.0
_HUB, _USER = "rehearsal", "rehearsal"
_FIRST, _SECOND, _NEW = (conn_id(1, 0.0, counter) for counter in (1, 2, 3))
_PEER, _LOCAL, _TLS = "127.0.0.1:50000", "127.0.0.1:443", "TLSv1.3 own TLS_AES_256_GCM_SHA384"


class Core(Protocol):
    """What is rehearsed."""

    def begin(self) -> None: ...
    def turn(self) -> None: ...
    def close(self) -> None: ...


def rehearse(child: Child, make_core: Callable[[Child, Accounts], Core]) -> None:
    """Play it through.  To be called while ``child`` stands by."""
    harmless = (OSError, channel.ChannelError, ProtocolError)
    child.rehearse("a core", _Stage(child, make_core).play, *harmless)


class _Stage:
    """A core, and an edge that is played by us."""

    def __init__(self, child: Child, make_core: Callable[[Child, Accounts], Core]) -> None:
        self._child = child
        self._make_core = make_core
        self._accounts = Accounts()
        self._accounts.apply(HubRecord(1, _HUB, True, 0, 0))
        self._accounts.apply(UserRecord(1, 1, _USER, "anonymous", b"", b"", 1))
        self._control: socket.socket
        self._frames: socket.socket
        self._states: dict[int, State] = {}  # the last one of each connection

    def play(self) -> None:
        """Raises OSError, ChannelError, ProtocolError."""
        first, second = (bytes.fromhex(f"0200000000{end:02x}") for end in (_FIRST & 3, _SECOND & 3))
        with self._core() as core:
            self._say(Replayed(self._greeting(core)))
            for conn in (_FIRST, _SECOND):
                self._say(Opened(conn, _PEER, _LOCAL, _TLS))
                self._ask(core, conn, _get())
                self._ask(core, conn, _signature())
                self._ask(core, conn, _login())
            for conn, frame in ((_FIRST, second + first), (_SECOND, first + second)):
                self._switch(core, conn, frame)
        with self._core() as core:
            epoch = self._greeting(core)
            for conn in (_FIRST, _SECOND):
                state = self._states[conn]
                self._say(Replay(conn, state.number, state.mode, _PEER, _LOCAL, _TLS, state.blob))
            self._say(FlowSeen(_FIRST, second + first))
            self._say(FlowSeen(_SECOND, first + second))
            self._say(Replayed(epoch))
            self._say(Opened(_NEW, _PEER, _LOCAL, _TLS))
            self._ask(core, _NEW, _get())
            self._switch(core, _SECOND, first + second)

    @contextmanager
    def _core(self) -> Iterator[Core]:
        with ExitStack() as stack:
            self._control, control = _pair(stack)
            self._frames, frames = _pair(stack)
            # It closes them itself.
            held = {"channel:core": [control.detach(), frames.detach()]}
            staged, _ = stack.enter_context(self._child.stage(held, {}))
            core = self._make_core(staged, self._accounts)
            stack.callback(core.close)
            core.begin()
            yield core

    def _greeting(self, core: Core) -> int:
        """The epoch in it; and the core hears that the edge speaks its version."""
        self._say(Adopted(channel.VERSION))
        return self._next(core, Hello).epoch

    def _ask(self, core: Core, conn: int, request: bytes) -> None:
        last = self._states.get(conn)
        self._say(Request(conn, last.number + 1 if last else 1, request))
        self._states[conn] = self._next(core, State)

    def _switch(self, core: Core, conn: int, macs: bytes) -> None:
        frame = macs + bytes(48)
        blocks = channel.join_blocks([frame])
        self._frames.send(channel.encode(Frames(conn, blocks)))
        self._receive(core, self._frames)

    def _say(self, message: channel.FromEdge) -> None:
        self._control.send(channel.encode(message))

    def _next(self, core: Core, kind: type[M]) -> M:
        """The next message of that kind; the others are for an edge."""
        while True:
            message = channel.decode_from_core(self._receive(core, self._control))
            if isinstance(message, kind):
                return message

    def _receive(self, core: Core, sock: socket.socket) -> bytes:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return sock.recv(channel.MAX_MESSAGE)
            except BlockingIOError:
                core.turn()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happens on the stage for {_PATIENCE:g} s")


def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    for sock in pair:
        stack.enter_context(sock)
    return pair


def _get() -> bytes:
    return http.build_request("GET", "/", host="localhost")


def _signature() -> bytes:
    return http.build_request(
        "POST", http.CONNECT_TARGET, host="localhost", content_type=http.IMAGE_TYPE,
        body=http.SIGNATURE,
    )  # fmt: skip


def _login() -> bytes:
    return http.build_request(
        "POST", http.VPN_TARGET, host="localhost", content_type=http.PACK_TYPE,
        body=Login(_HUB, _USER, AuthType.ANONYMOUS).to_pack().encode(),
    )  # fmt: skip
