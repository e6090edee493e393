"""A tree without a watchdog: an edge in a forked process, and what is held for it."""

import array
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, cast

from pkvpn import channel
from pkvpn.edge.main import EdgeSettings, main
from pkvpn.watchdog.child import Child
from pkvpn.watchdog.lifeline import Duty
from tests.support import eventually, process_gone


class FakeChild:
    """The child's end, as `pkvpn.watchdog.child.Child` has it."""

    def __init__(
        self, held: dict[str, list[int]], given: dict[bytes, int], gifts: int, orders: int
    ) -> None:
        self.name = "edge-1"
        self.incarnation = 1
        self.stopping = False
        self.standing_by = False
        self.yielding = False
        self._held = held
        self._given = given
        self._gifts = socket.socket(fileno=gifts)
        self._orders = orders
        self._duties: dict[str, Duty] = {}
        self._waited: set[str] = set()

    def stand_by(self) -> None:
        """Our turn has come already."""

    def held(self, name: str) -> list[int]:
        return self._held[name]

    def given(self) -> dict[bytes, int]:
        return self._given

    def give(self, key: bytes, fd: int) -> bool:
        self._gifts.sendmsg(
            [b"G" + key], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        )
        return True

    def drop(self, key: bytes) -> bool:
        self._gifts.send(b"D" + key)
        return True

    def refusals(self) -> list[tuple[bytes, str]]:
        return []

    def fileno(self) -> int:
        return self._orders

    def receive(self) -> list[str]:
        order = os.read(self._orders, 100).decode()
        if order in {"stop", "yield", ""}:
            self.stopping, self.yielding = True, order == "yield"
        return [order]

    def duty(self, name: str) -> Duty:
        return self._duties.setdefault(name, Duty())

    def ready(self) -> None:
        self._gifts.send(b"R")

    def say(self, text: str) -> None:
        self._gifts.send(b"S" + text.encode())

    def turn(self, now: float) -> float:
        """Say so once for each duty for which something waits."""
        waits = {name for name, duty in self._duties.items() if duty.waiting_since}
        for name in waits - self._waited:
            self._gifts.send(b"S" + f"{name} waits".encode())
        self._waited = waits
        return 1.0


class ScriptedCore:
    """The core's end of the channel; a test says what it answers."""

    def __init__(self, control: int, frames: int) -> None:
        self.control = socket.socket(fileno=control)
        self.frames = socket.socket(fileno=frames)
        self.control.settimeout(10)
        self.frames.settimeout(10)

    def hear(self) -> channel.FromEdge:
        """The next message that is no count."""
        while True:
            message = channel.decode_from_edge(self.control.recv(channel.MAX_MESSAGE))
            if not isinstance(message, channel.Counts | channel.FlowSeen | channel.Totals):
                return message

    def expect(self, kind: type[Any]) -> Any:
        """The next message, which must be of this kind."""
        message = self.hear()
        assert isinstance(message, kind), message
        return message

    def wait_for(self, kind: type[Any]) -> Any:
        """The next message of this kind, whatever comes before."""
        while True:
            message = channel.decode_from_edge(self.control.recv(channel.MAX_MESSAGE))
            if isinstance(message, kind):
                return message

    def say(self, message: channel.FromCore) -> None:
        socket_ = self.frames if isinstance(message, channel.FramesOut) else self.control
        socket_.send(channel.encode(message))

    def hear_frames(self) -> tuple[int, list[bytes]]:
        message = channel.decode_from_edge(self.frames.recv(channel.MAX_MESSAGE))
        assert isinstance(message, channel.Frames)
        return message.conn, channel.split_blocks(bytes(message.blocks))

    def close(self) -> None:
        self.control.close()
        self.frames.close()


class FakeTree:
    """Holds what outlives an edge, forks edges and kills them."""

    def __init__(self, settings: EdgeSettings, pem: bytes) -> None:
        """``pem``: certificate and key."""
        self.settings = settings
        self.certificate = os.memfd_create("certificate", os.MFD_CLOEXEC)
        os.write(self.certificate, pem)
        self.pid = 0
        # Closed with the tree, however a test ends.
        self.clients: list[socket.socket] = []
        self.ready = False
        self.said: list[str] = []
        self.given: dict[bytes, int] = {}
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for edge_end, core_end in pairs:
            for end in (edge_end, core_end):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            edge_end.setblocking(False)
        self.core = ScriptedCore(*(pair[1].detach() for pair in pairs))
        self.channel = [pair[0].detach() for pair in pairs]
        self.checkpoint = os.memfd_create("checkpoint", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._gifts: socket.socket | None = None
        self._orders = -1

    def start(self, before: Callable[[], None] = lambda: None, *, wait: bool = True) -> None:
        """Fork an edge and wait until it serves; ``before`` runs in it first."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        read, write = os.pipe()
        held = {
            "listen": [self.listener.fileno()],
            "channel:edge-1": self.channel,
            "checkpoint:edge-1": [self.checkpoint],
            "certificate": [self.certificate],
        }
        self.pid = os.fork()
        if not self.pid:
            self._be_edge(held, theirs.detach(), read, before)
        theirs.close()
        os.close(read)
        self._gifts, self._orders = ours, write
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            self.drain()
            return self.ready

        eventually(is_ready)

    def _be_edge(
        self,
        held: dict[str, list[int]],
        gifts: int,
        orders: int,
        before: Callable[[], None],
    ) -> None:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            keep = {
                0,
                1,
                2,
                gifts,
                orders,
                *self.given.values(),
            }.union(*held.values())
            for fd in range(3, 4096):
                if fd not in keep:
                    try:
                        os.close(fd)
                    except OSError:
                        pass
            before()
            main(cast(Child, FakeChild(held, dict(self.given), gifts, orders)), self.settings)
            code = 0
        except BaseException:  # noqa: BLE001  # whatever it is, pytest must not go on in here
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def drain(self) -> dict[bytes, int]:
        """Take what the edge gave, dropped and said; return what is kept for the next one."""
        gifts = self._gifts
        assert gifts is not None
        while select.select([gifts], [], [], 0)[0]:
            data, fds, _, _ = socket.recv_fds(gifts, 1000, 4)
            if not data:
                break
            match data[:1]:
                case b"G":
                    self.given[data[1:]] = fds[0]
                case b"D":
                    os.close(self.given.pop(data[1:]))
                case b"R":
                    self.ready = True
                case _:
                    self.said.append(data[1:].decode())
        return self.given

    def kill(self) -> None:
        """Kill the edge, and take what it gave before."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._after_death()

    def stop(self, order: bytes = b"stop") -> int:
        """Ask the edge to stop, or to "yield" to a successor; returns its exit code."""
        os.write(self._orders, order)
        return self.wait_end()

    def wait_end(self) -> int:
        """Wait until the edge has ended by itself; returns its exit code."""
        eventually(lambda: process_gone(self.pid))
        _, status = os.waitpid(self.pid, 0)
        self._after_death()
        return os.waitstatus_to_exitcode(status)

    def _after_death(self) -> None:
        self.pid = 0
        self.ready = False
        self.drain()
        assert self._gifts is not None
        self._gifts.close()
        os.close(self._orders)

    def close(self) -> None:
        if self.pid:
            self.kill()
        for client in self.clients:
            client.close()
        for fd in (*self.channel, self.checkpoint, self.certificate, *self.given.values()):
            os.close(fd)
        self.listener.close()
        self.core.close()
