"""A dress rehearsal: what an edge does in its first turns, done ahead by a successor that waits.

Strategy: what a process does for the first time costs it milliseconds, and those of a new edge are
milliseconds in which no client is served.  So a successor plays them through while nobody waits:
it is an edge whose clients, core and watchdog are its own and at the other end of its own sockets;
then the successor of that edge, which adopts its connections.  Nothing of the real ones is touched,
and whatever goes wrong only means that the successor will be slower.
"""

import gc
import os
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from pkvpn import channel
from pkvpn.channel import Adopted, Flow, Frames, FramesOut, Hello, Mode, Opened, Request, State
from pkvpn.protocol.blocks import encode_batch
from pkvpn.watchdog.child import Child

# A stage on which nothing happens for so long is left.
_PATIENCE = 2.0
_EPOCH = 1
_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
# From the first client to the second.
_FRAME = bytes.fromhex("020000000002 020000000001 88b5") + bytes(50)


class Edge(Protocol):
    """What is rehearsed."""

    def adopt(self) -> None: ...
    def turn(self, timeout: float) -> None: ...
    def close(self) -> None: ...


def rehearse(child: Child, make_edge: Callable[[Child], Edge]) -> None:
    """Play it through.  To be called while ``child`` stands by."""

    def play() -> None:
        with ExitStack() as stack:
            _Stage(child, make_edge, stack).play()

    try:
        child.rehearse("an edge", play, OSError, channel.ChannelError, ValueError)
    finally:
        gc.enable()  # an edge that is left while it adopts has not come to that


class _Client:
    """The other end of a connection, step by step."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext) -> None:
        self.sock = socket.create_connection(address, _PATIENCE)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self._to_say = b""
        self._shaken = False
        self.heard = 0  # bytes

    def say(self, data: bytes) -> None:
        """As soon as hands are shaken."""
        self._to_say += data

    def step(self) -> None:
        """Do what can be done without waiting."""
        try:
            self._incoming.write(self.sock.recv(65536))
        except BlockingIOError:
            pass
        try:
            if not self._shaken:
                self._tls.do_handshake()
                self._shaken = True
            if self._to_say:
                self._tls.write(self._to_say)
                self._to_say = b""
            while data := self._tls.read(65536):
                self.heard += len(data)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        self.sock.send(self._outgoing.read())


class _Stage:
    """An edge between two clients and a core that are all played by us."""

    def __init__(self, child: Child, make_edge: Callable[[Child], Edge], stack: ExitStack) -> None:
        self._child = child
        self._make_edge = make_edge
        self._stack = stack
        self._control, control = self._pair()
        self._frames, frames = self._pair()
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        self._address = listener.getsockname()
        memory = os.memfd_create("rehearsal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, memory)
        self._held = {
            f"channel:{child.name}": [control.fileno(), frames.fileno()],
            "listen": [listener.fileno()],
            f"checkpoint:{child.name}": [memory],
        }
        self._given: dict[bytes, int] = {}
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE  # it is ourselves
        self._clients: list[_Client] = []
        self._conns: list[int] = []

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        for sock in pair:
            self._stack.enter_context(sock)
        return pair

    def play(self) -> None:
        """Two clients come and exchange frames, the edge dies, and its successor goes on.

        Raises OSError, ChannelError, ValueError.
        """
        with self._child.stage(self._held, self._given) as (staged, gifts):
            edge = self._make_edge(staged)
            sender, receiver = self._come(edge), self._come(edge)
            self._send(edge, sender, receiver)  # by way of the core, which teaches a flow
            self._send(edge, sender, receiver)
            edge.close()
            while len(self._given) < len(self._clients):
                message, (fd,), _, _ = socket.recv_fds(gifts, 64, 1)
                self._given[message[1:]] = fd
                self._stack.callback(os.close, fd)
        # An edge takes what it adopts.
        given = {key: os.dup(fd) for key, fd in self._given.items()}
        with self._child.stage(self._held, given) as (staged, _):
            edge = self._make_edge(staged)
            edge.adopt()
            self._send(edge, sender, receiver)
            self._come(edge)
            edge.close()

    def _come(self, edge: Edge) -> _Client:
        """A client comes, asks, and is answered."""
        client = _Client(self._address, self._context)
        self._stack.enter_context(client.sock)
        self._clients.append(client)
        client.say(_REQUEST)
        self._until(edge, lambda: client.heard >= len(_REPLY))
        return client

    def _send(self, edge: Edge, sender: _Client, receiver: _Client) -> None:
        batch = encode_batch([_FRAME])
        heard = receiver.heard + len(batch)
        sender.say(batch)
        self._until(edge, lambda: receiver.heard >= heard)

    def _until(self, edge: Edge, over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not over():
            for client in self._clients:
                client.step()
            edge.turn(0.0)
            self._be_the_core()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happens on the stage for {_PATIENCE:g} s")

    def _be_the_core(self) -> None:
        for sock in (self._control, self._frames):
            while True:
                try:
                    message = channel.decode_from_edge(sock.recv(channel.MAX_MESSAGE))
                except BlockingIOError:
                    break
                self._answer(message)

    def _answer(self, message: channel.FromEdge) -> None:
        match message:
            case Adopted():
                self._say(Hello(channel.VERSION, _EPOCH))
            case Opened(conn):
                self._conns.append(conn)
            case Request(conn, number):
                self._say(State(conn, number, _REPLY, Mode.BLOCKS, "", 60.0, True, b""))
            case Frames(conn, blocks):
                _, to_conn, *_ = self._conns
                self._frames.send(channel.encode(FramesOut((to_conn,), bytes(blocks))))
                self._say(Flow(conn, bytes(blocks[4:16]), to_conn))
            case _:
                pass  # what a core writes down

    def _say(self, message: channel.FromCore) -> None:
        self._control.send(channel.encode(message))
