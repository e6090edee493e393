"""A scripted VPN server on the loopback, built on the same codecs as the real one.

Strategy: one thread with one selector does everything, so there is no order of events
that a test did not ask for; tests change what it does by assigning to its fields between
connections and by `FakeServer.call`, which runs a function in its loop.  A frame goes to
all other sessions, or back to its sender if ``reflect`` is set.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import queue
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pkvpn.protocol import blocks, http
from pkvpn.protocol.blocks import BlockDecoder
from pkvpn.protocol.errors import ErrorCode
from pkvpn.protocol.hashes import secure_password, user_key
from pkvpn.protocol.messages import (
    AdditionalConnect,
    AdditionalReply,
    ErrorReply,
    Hello,
    Login,
    Noop,
    Welcome,
    read_client_message,
)
from pkvpn.protocol.pack import Pack


def make_certificate(folder: Path, name: str = "server") -> Path:
    """A self-signed certificate for 127.0.0.1 with its key in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@dataclasses.dataclass
class _Connection:
    tls: ssl.SSLSocket
    shaken: bool = False
    random: bytes = b""
    cutter: http.RequestCutter = dataclasses.field(default_factory=http.RequestCutter)
    decoder: BlockDecoder = dataclasses.field(default_factory=BlockDecoder)
    in_data: bool = False
    output: bytearray = dataclasses.field(default_factory=bytearray)
    closing: bool = False


class FakeServer:
    """Knows one user: u1 with password pw1, in every hub."""

    def __init__(self, certificate: Path) -> None:
        # What a test may change.
        self.user, self.password = "u1", "pw1"
        self.timeout = 20.0
        self.welcome: dict[str, Any] = {}  # fields of Welcome to replace
        self.refuse_login = 0
        self.refuse_resumption = 0
        self.page = http.build_probe_page()
        self.silent_at = ""  # a stage of the client: "tls", "signature", "login", "data"
        self.noops = 0  # said before the answer to a login
        self.reflect = False
        self.behind_welcome = b""  # sent in the same write
        # What a test may look at.
        self.logins: list[Login] = []
        self.resumptions = 0
        self.connections = 0
        self.keep_alives = 0
        self.frames: list[bytes] = []
        self.proper_ends = 0  # close_notify of the client
        self.errors: list[Exception] = []

        self._keys: set[bytes] = set()
        self._held = Pack()  # a login that waits for the end of a dialog
        self._open: list[_Connection] = []
        self._selector = selectors.DefaultSelector()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.use_certificate(certificate)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._running = True
        self._thread = threading.Thread(target=self._run, name="fake server")

    def use_certificate(self, certificate: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._context.num_tickets = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self._stop)
        self._thread.join()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        if self.errors:
            raise self.errors[0]

    # From the test's thread

    def call(self, function: Callable[[], None]) -> None:
        """Run it in the loop and wait until it has run."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        self._calls.put(run)
        self._wake_write.send(b"!")
        assert done.wait(10)

    def close_all(self) -> None:
        """End every connection, with close_notify."""
        self.call(partial(self._end_all, self._close))

    def cut_all(self) -> None:
        """End every connection as a killed process does."""
        self.call(partial(self._end_all, self._cut))

    def send_all(self, data: bytes) -> None:
        """Send raw bytes of the data phase on every connection."""

        def send() -> None:
            for connection in self._open:
                connection.output += data
                self._flush(connection)

        self.call(send)

    # In the loop

    def _end_all(self, end: Callable[[_Connection], None]) -> None:
        for connection in list(self._open):
            end(connection)

    def _run(self) -> None:
        while self._running:
            for key, _ in self._selector.select():
                try:
                    self._handle(key)
                except Exception as error:  # noqa: BLE001  # shown at the end of the test
                    self.errors.append(error)

    def _handle(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._wake_read:
            self._wake_read.recv(4096)
            while not self._calls.empty():
                self._calls.get()()
        elif key.fileobj is self._listener:
            self._accept()
        elif key.data in self._open:
            try:
                self._serve(key.data)
            except OSError:
                self._cut(key.data)

    def _stop(self) -> None:
        self._running = False
        self._end_all(self._close)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        plain, _ = self._listener.accept()
        plain.setblocking(False)
        self.connections += 1
        tls = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        connection = _Connection(tls)
        self._open.append(connection)
        self._selector.register(tls, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection) -> None:
        try:
            if self.silent_at == "tls":
                # A short pause instead of a busy loop: what came stays unread.
                threading.Event().wait(0.005)
                return
            if not connection.shaken:
                connection.tls.do_handshake()
                connection.shaken = True
            self._flush(connection)
            while connection in self._open:
                data = connection.tls.recv(65536)
                if not data:
                    self.proper_ends += 1
                    self._close(connection)
                    return
                self._take(connection, data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass

    def _take(self, connection: _Connection, data: bytes) -> None:
        if not connection.in_data:
            for raw in connection.cutter.feed(data):
                self._answer(connection, http.parse_request(raw))
            if not connection.in_data:
                return
            data = connection.cutter.rest()
        frames = connection.decoder.feed(data)
        self.keep_alives += connection.decoder.keep_alives
        connection.decoder.keep_alives = 0
        self.frames += frames
        if frames and self.silent_at != "data":
            batch = blocks.encode_batch(frames)
            for other in list(self._open):
                if other.in_data and (other is connection) == self.reflect:
                    other.output += batch
                    self._flush(other)

    def _answer(self, connection: _Connection, request: http.Request) -> None:
        if request.target == "/":
            connection.output += self.page
        elif request.target == http.CONNECT_TARGET and http.is_signature(request.body):
            if self.silent_at == "signature":
                return
            connection.random = os.urandom(20)
            self._reply(connection, Hello(connection.random, "fake").to_pack())
        elif self.silent_at != "login":
            self._log_in(connection, Pack.decode(request.body))
        self._flush(connection)

    def _log_in(self, connection: _Connection, pack: Pack) -> None:
        message = read_client_message(pack)
        if self.noops:
            self.noops -= 1
            self._held = pack if not isinstance(message, Noop) else self._held
            self._reply(connection, Noop().to_pack())
            return
        if isinstance(message, Noop):
            message = read_client_message(self._held)
        match message:
            case Login():
                self.logins.append(message)
                code = self.refuse_login or self._judge(connection, message)
                if code:
                    self._refuse(connection, code)
                    return
                key = os.urandom(20)
                self._keys.add(key)
                welcome = Welcome("SID-U1-1", "CID-1", key, self.timeout)
                welcome = dataclasses.replace(welcome, **self.welcome)
                self._reply(connection, Pack.decode(welcome.encode()))
                connection.output += self.behind_welcome
            case AdditionalConnect():
                code = self.refuse_resumption
                if not code and message.session_key not in self._keys:
                    code = ErrorCode.SESSION_TIMEOUT
                if code:
                    self._refuse(connection, code)
                    return
                self.resumptions += 1
                self._reply(connection, AdditionalReply().to_pack())
        connection.in_data = True

    def _judge(self, connection: _Connection, login: Login) -> int:
        key = user_key(self.password, self.user)
        if login.user.lower() != self.user or (
            login.secure_password != secure_password(key, connection.random)
            and login.plain_password != self.password
        ):
            return ErrorCode.AUTH_FAILED
        return 0

    def _refuse(self, connection: _Connection, code: int) -> None:
        self._reply(connection, ErrorReply(code).to_pack())
        self._flush(connection)
        self._close(connection)

    def _reply(self, connection: _Connection, pack: Pack) -> None:
        connection.output += http.build_pack_response(pack.encode())

    def _flush(self, connection: _Connection) -> None:
        try:
            while connection.output:
                sent = connection.tls.send(bytes(connection.output[:16384]))
                del connection.output[:sent]
            events = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
        except OSError:
            self._cut(connection)
            return
        if connection in self._open:
            self._selector.modify(connection.tls, events, connection)

    def _close(self, connection: _Connection) -> None:
        try:
            connection.tls.unwrap()
        except (OSError, ValueError):
            pass
        self._cut(connection)

    def _cut(self, connection: _Connection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._selector.unregister(connection.tls)
            connection.tls.close()
