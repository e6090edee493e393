"""A session with a VPN server: the socket, the TLS and the waiting around `machine`.

Strategy: nothing here blocks but `VpnClient.connect` and `VpnClient.receive`, which wait on
the client's one epoll.  Its descriptor stays the same through all reconnections, so
another loop registers it once and calls `VpnClient.handle` when it is readable or
`VpnClient.next_deadline` has come; a thousand clients in one process cost two descriptors
and one TLS connection each.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from itertools import islice

from pkvpn.client.machine import Comeback, Credentials, Frames, Lost, Step, Stream
from pkvpn.protocol import blocks
from pkvpn.protocol.errors import ProtocolError, meaning
from pkvpn.protocol.messages import AdditionalReply, ErrorReply, Welcome

# As long as the stock client waits.
TCP_TIMEOUT = 10.0
TLS_TIMEOUT = 15.0
# Frames that wait for a connection, as in the original; the newest are dropped.
QUEUE = 1024
# So much is encoded ahead of what the socket takes; the rest waits as frames.
_OUTPUT = 65536
_RECORD = 16384
# Records read in one call of `handle`, so that one busy client does not starve the others.
_RECORDS_A_TURN = 16

_Address = tuple[int, tuple[str, int] | tuple[str, int, int, int]]


class LoginRefused(Exception):
    """The server said no.  ``code`` is an `ErrorCode` or another number it sent."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(f"{text or meaning(code)} (code {code})")
        self.code = code
        self.text = text or meaning(code)


@functools.lru_cache(maxsize=8)
def client_context(ca_file: str | None = None) -> ssl.SSLContext:
    """The TLS settings of a client, shared by all that want the same.

    Without a CA file no certificate is checked: VPN servers usually sign their own.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(ca_file)
    return context


class VpnClient:
    """One session as a user of a hub, kept through the loss of its connections.

    The server's certificate is checked only if ``fingerprint`` (SHA-256 of the DER, hex,
    colons allowed) or ``ca_file`` is given, since servers usually sign their own; without
    either, somebody in the middle can pose as the server.  In any case a session is
    resumed only with the certificate it began with.

    ``stage`` is what the newest connection is at: "tcp", "tls", "signature" (until the
    Hello), "login" (until the welcome), "data".  ``error`` is why the last one ended.
    ``logins`` and ``resumptions`` count what succeeded, ``dropped`` counts frames that did
    not fit the queue.  A host name is looked up, blocking, at each full login.

    Nothing happens between calls: who connects must go on calling `receive` or `handle`, or
    the server takes the client for dead after the session's time-out.
    """

    __slots__ = (
        "_address",
        "_certificate",
        "_comeback",
        "_credentials",
        "_deadline",
        "_early",
        "_ended",
        "_epoll",
        "_fingerprint",
        "_host",
        "_more",
        "_name",
        "_port",
        "_probe",
        "_queue",
        "_reconnect",
        "_socket",
        "_stream",
        "_tls",
        "_tls_context",
        "_untried",
        "_wanted",
        "dropped",
        "error",
        "logins",
        "resumptions",
        "stage",
    )

    def __init__(
        self,
        host: str,
        port: int,
        hub: str,
        user: str,
        password: str = "",
        *,
        credentials: Credentials | None = None,
        ca_file: str | None = None,
        fingerprint: str | None = None,
        probe: bool = False,
        reconnect: bool = True,
    ) -> None:
        """``credentials`` replace hub, user and password.  ``probe``: ask for the page at
        / first and demand the mark that stock clients look for; SoftEther's own server has
        another page, which they know too, so leave it out there.  ``reconnect`` False:
        the first end is the end."""
        if not host.isprintable() or not host or host.startswith("."):
            raise ValueError(f"{host!r} cannot be the name of a host")
        self._host = host
        self._port = port
        self._name = f"[{host}]" if ":" in host else host
        self._credentials = credentials or Credentials.with_password(hub, user, password)
        self._tls_context = client_context(ca_file)
        self._fingerprint = _read_fingerprint(fingerprint)
        self._probe = probe
        self._reconnect = reconnect
        self._address: _Address | None = None  # the newest connection's
        self._untried: list[_Address] = []  # other addresses of the host, if that one is deaf
        self._certificate = b""  # SHA-256 of the one the session began with
        self._comeback = Comeback(os.urandom, now=time.monotonic())
        self._epoll = select.epoll()
        self._socket: socket.socket | None = None
        self._tls: ssl.SSLSocket | None = None
        self._stream: Stream | None = None
        self._deadline = 0.0  # of the TCP connect and the TLS handshake
        self._wanted = 0  # what the epoll was told to look for
        self._early: list[bytes] = []  # came with the welcome, while `connect` waited
        self._more = False  # there may be decrypted bytes that no event announces
        self._queue: deque[bytes] = deque()
        self._ended = False
        self.stage = "tcp"
        self.error: Exception | None = None
        self.logins = 0
        self.resumptions = 0
        self.dropped = 0

    # Blocking

    def connect(self, timeout: float = 30.0) -> None:
        """Log in.  Raises what made the first attempt fail: `LoginRefused`,
        `ProtocolError`, an `OSError` (TLS included), or `TimeoutError`."""
        until = time.monotonic() + timeout
        try:
            while not self.logins:
                self._wait(until)
                self._early = self.handle()
                if self.error is not None:
                    raise self.error
                if time.monotonic() >= until:
                    raise TimeoutError(f"no session after {timeout:g} s, at stage {self.stage}")
        except BaseException:
            self.close()
            raise

    def receive(self, timeout: float) -> list[bytes]:
        """The frames that came; empty after ``timeout`` seconds.

        Reconnects meanwhile if it must.  Raises `ConnectionError` if the session is over
        for good.
        """
        until = time.monotonic() + timeout
        while True:
            frames = self.handle()
            if frames or time.monotonic() >= until:
                return frames
            if self._ended:
                raise ConnectionError(f"the session is over: {self.error or 'closed'}")
            self._wait(until)

    def _wait(self, until: float) -> None:
        deadline = self.next_deadline()
        if deadline is not None:
            until = min(until, deadline)
        self._epoll.poll(max(0.0, until - time.monotonic()))

    # For any loop

    def fileno(self) -> int:
        """Readable when `handle` has something to do; the same for the client's whole life."""
        return self._epoll.fileno()

    def next_deadline(self) -> float | None:
        """When `handle` wants to be called at the latest (seconds, monotonic)."""
        if self._ended:
            return None
        if self._more or self._early or (self._socket is None and self._untried):
            return 0.0
        if self._socket is None:
            return self._comeback.next_deadline()
        return self._deadline if self._stream is None else self._stream.next_deadline()

    @property
    def established(self) -> bool:
        """Do frames travel now?"""
        return self._stream is not None and self._stream.step is Step.DATA

    @property
    def ended(self) -> bool:
        """Is it over for good?"""
        return self._ended

    @property
    def welcome(self) -> Welcome | None:
        """What the server granted, while the session lives."""
        return self._comeback.session

    @property
    def room(self) -> int:
        """How many frames `send` takes now."""
        return QUEUE - len(self._queue)

    def handle(self) -> list[bytes]:
        """Do what can be done without waiting; return the frames that came."""
        frames, self._early = self._early, []
        if self._ended:
            return frames
        now = time.monotonic()
        try:
            if self._socket is None:
                dial_at = self._comeback.next_deadline()
                if not self._untried:
                    if dial_at is None or now < dial_at:
                        return frames
                    self._look_up(now)
                self._dial(now)
            if self._tls is None and not self._finish_connect(now):
                return frames
            if self._stream is None and not self._finish_handshake(now):
                return frames
            self._read(frames, now)
            self._expire(now)
            self._write(now)
        except (OSError, ProtocolError, LoginRefused) as error:
            self._lose(error, now)
        return frames

    def send(self, frames: Iterable[bytes]) -> None:
        """Send Ethernet frames of 14 to 1600 bytes; queued while there is no connection.

        What does not fit the queue is dropped and counted.  Raises `ValueError` for what
        is no frame.
        """
        for frame in frames:
            if not blocks.MIN_FRAME <= len(frame) <= blocks.MAX_FRAME:
                raise ValueError(f"{len(frame)} bytes are no Ethernet frame")
            if len(self._queue) < QUEUE:
                self._queue.append(frame)
            else:
                self.dropped += 1
        if self.established:
            now = time.monotonic()
            try:
                self._write(now)
            except OSError as error:
                self._lose(error, now)

    def close(self) -> None:
        """Leave: what is queued is sent if it can be at once, then close_notify.

        To be called also when the client has ended by itself: `fileno` is valid until then.
        """
        if self._epoll.closed:
            return
        self._ended = True
        self._more = False
        if self.established:
            try:
                self._write(time.monotonic())
            except OSError:
                pass
        self._hang_up()
        self._untried = []
        self._queue.clear()
        self._epoll.close()

    # One connection

    def _look_up(self, now: float) -> None:
        """Begin an attempt: a full login tries all addresses of the host, in turn."""
        self.stage = "tcp"
        if self._comeback.dial(now) is not None and self._address is not None:
            self._untried = [self._address]
            return
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise OSError(f"{self._host!r} cannot be the name of a host") from None
        self._untried = [(entry[0], _as_address(entry[4])) for entry in found]

    def _dial(self, now: float) -> None:
        self._deadline = now + TCP_TIMEOUT
        self._address = self._untried.pop(0)
        family, address = self._address
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = self._socket.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, f"{os.strerror(code)}: {self._name}:{self._port}")
        self._wanted = select.EPOLLOUT
        self._epoll.register(self._socket.fileno(), self._wanted)

    def _finish_connect(self, now: float) -> bool:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, f"{os.strerror(code)}: {self._name}:{self._port}")
        try:
            self._socket.getpeername()
        except OSError:
            if now >= self._deadline:
                raise TimeoutError(f"no TCP connection after {TCP_TIMEOUT:g} s") from None
            return False
        self.stage = "tls"
        self._untried = []
        self._deadline = now + TLS_TIMEOUT
        self._socket = self._tls = self._tls_context.wrap_socket(
            self._socket, do_handshake_on_connect=False, server_hostname=self._host
        )
        return True

    def _finish_handshake(self, now: float) -> bool:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._want(select.EPOLLIN)
        except ssl.SSLWantWriteError:
            self._want(select.EPOLLOUT)
        else:
            self._check_certificate(now)
            self.stage = "signature"
            self._stream = Stream(
                self._comeback.session or self._credentials,
                host=self._name,
                now=now,
                random=os.urandom,
                probe=self._probe and self._comeback.session is None,
            )
            return True
        if now >= self._deadline:
            raise TimeoutError(f"no TLS connection after {TLS_TIMEOUT:g} s")
        return False

    def _check_certificate(self, now: float) -> None:
        assert self._tls is not None
        seen = hashlib.sha256(self._tls.getpeercert(binary_form=True) or b"").digest()
        if self._fingerprint and seen != self._fingerprint:
            raise ssl.SSLCertVerificationError(
                f"the server's certificate is {seen.hex()}, not {self._fingerprint.hex()}"
            )
        if self._comeback.session is None:
            self._certificate = seen
        elif seen != self._certificate:
            # The key of the session must not be told to somebody else.
            self._comeback.end_session(now)
            raise ssl.SSLCertVerificationError("the server's certificate has changed")

    def _read(self, frames: list[bytes], now: float) -> None:
        assert self._tls is not None
        assert self._stream is not None
        self._more = False
        for _ in range(_RECORDS_A_TURN):
            try:
                data = self._tls.recv(_RECORD)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not data:
                raise ConnectionError("the server has closed the connection")
            self._take(self._stream, data, frames, now)
        self._more = True

    def _take(self, stream: Stream, data: bytes, frames: list[bytes], now: float) -> None:
        for event in stream.receive(data, now):
            match event:
                case Frames():
                    frames += event.frames
                case Welcome():
                    self._comeback.welcomed(event, now)
                    self.logins += 1
                case AdditionalReply():
                    self.resumptions += 1
                case ErrorReply():
                    raise LoginRefused(event.code)
                case Lost():
                    raise TimeoutError(event.why)
        if stream.step is Step.DATA:
            self.stage = "data"
            self.error = None
            self._comeback.heard(now)
        elif stream.step is Step.REPLY:
            self.stage = "login"

    def _expire(self, now: float) -> None:
        assert self._stream is not None
        for event in self._stream.expire(now):
            assert isinstance(event, Lost)
            raise TimeoutError(event.why)

    def _write(self, now: float) -> None:
        assert self._tls is not None
        assert self._stream is not None
        output = self._stream.output
        while True:
            if self._queue and self._stream.step is Step.DATA and len(output) < _OUTPUT:
                batch = list(islice(self._queue, blocks.BATCH))
                for _ in batch:
                    self._queue.popleft()
                self._stream.send(batch, now)
            if not output:
                self._want(select.EPOLLIN)
                return
            try:
                # A repeat after "not now" offers at least as many bytes, as OpenSSL demands:
                # the output only grows.
                with memoryview(output) as view:
                    sent = self._tls.send(view[:_RECORD])
            except ssl.SSLWantWriteError:
                self._want(select.EPOLLIN | select.EPOLLOUT)
                return
            except ssl.SSLWantReadError:
                self._want(select.EPOLLIN)
                return
            del output[:sent]

    def _want(self, wanted: int) -> None:
        if wanted != self._wanted and self._socket is not None:
            self._wanted = wanted
            self._epoll.modify(self._socket.fileno(), wanted)

    def _lose(self, error: Exception, now: float) -> None:
        if self._untried:
            self._hang_up()  # the next address of the host is tried at once
            return
        self.error = error
        scheduled = self._comeback.next_deadline() is not None  # by `end_session`
        self._hang_up()
        if not self._reconnect:
            self._ended = True
        elif isinstance(error, LoginRefused):
            self._comeback.refused(error.code, now)
        elif not scheduled:
            self._comeback.lost(now)

    def _hang_up(self) -> None:
        """Close the connection, if there is one, with close_notify."""
        self._more = False
        self._stream = None
        tls, self._tls = self._tls, None
        plain, self._socket = self._socket, None
        if tls is not None:
            try:
                tls.unwrap()
            except (OSError, ValueError):
                pass  # the peer has not answered yet, or is gone
        if plain is not None:
            try:
                plain.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            plain.close()


def _as_address(found: tuple[object, ...]) -> tuple[str, int] | tuple[str, int, int, int]:
    return found  # type: ignore[return-value]  # what getaddrinfo gives for IPv4 and IPv6


def _read_fingerprint(text: str | None) -> bytes:
    if text is None:
        return b""
    try:
        fingerprint = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        fingerprint = b""
    if len(fingerprint) != hashlib.sha256().digest_size:
        raise ValueError(f"{text!r} is not a SHA-256 fingerprint in hex")
    return fingerprint
