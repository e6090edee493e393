"""The TLS handshake of one connection, by OpenSSL, and what it leaves to go on with.

Strategy: OpenSSL sees only memory BIOs.  With TLS 1.3 the edge takes over when the handshake is
done: the two traffic secrets come from OpenSSL's key log, which is a memory file of its own that
is emptied after each step, so that it only ever holds the secrets of the step just made.  What
lies unread in the incoming BIO then is the first thing that the record layer of our own opens.
Everything else (TLS 1.2, or a key log that says nothing) stays with OpenSSL.
"""

import os
import ssl
from typing import NamedTuple, cast

from pkvpn.edge import tls_records
from pkvpn.edge.certificate import SHOWN_SIZE, fingerprint
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import Alert, Suite, TLSError

# OpenSSL wants some kilobytes for a ClientHello; whoever sends more is no client.
MAX_HANDSHAKE_BYTES = 65536

# TLS 1.2 without forward secrecy, or with a cipher that only OpenSSL's defaults still allow, is
# not spoken.
TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class HandshakeError(Exception):
    """The handshake failed; the text says what OpenSSL saw."""


class Secrets(NamedTuple):
    """What the record layer of our own goes on with."""

    suite: Suite
    read: bytes  # CLIENT_TRAFFIC_SECRET_0
    write: bytes  # SERVER_TRAFFIC_SECRET_0


class KeyLog:
    """A memory file that OpenSSL writes the secrets of a handshake to.

    One per process.  Between two steps of handshakes it is empty, and it is gone with the process.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("keylog", os.MFD_CLOEXEC)
        # OpenSSL's file is opened by name, and so has a position of its own: Python opens it for
        # appending, so a file that has been emptied starts at 0 again.
        self.path = f"/proc/self/fd/{self.fd}"

    def empty(self) -> None:
        os.ftruncate(self.fd, 0)

    def read(self) -> bytes:
        return os.pread(self.fd, 65536, 0)

    def close(self) -> None:
        os.close(self.fd)


def make_context(pem: bytes, key_log: KeyLog) -> ssl.SSLContext:
    """The TLS side of a server.  ``pem``: its key, its certificate and the chain of that.

    Raises OSError (ssl.SSLError) if they are of no use.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(TLS12_CIPHERS)
    # A ticket is a record of OpenSSL's under the key that is ours by then, and nobody resumes.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # OpenSSL reads them from a file only.
    file = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(file, pem)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    context.keylog_filename = key_log.path
    return context


class HandshakeServer:
    """What the handshakes of this process begin with: certificate, key, and the key log."""

    def __init__(self, source: int) -> None:
        """``source``: a descriptor from which key and certificate can be read."""
        self._source = source
        self._key_log = KeyLog()
        self._context: ssl.SSLContext | None = None
        self._shown = ""

    @property
    def loaded(self) -> bool:
        return self._context is not None

    def load(self) -> None:
        """Read them, for handshakes from now on.

        Raises OSError or ValueError; then all stays as it was.

        The context before lives as long as its last handshake, and keeps its own key log open.
        """
        pem = os.pread(self._source, os.fstat(self._source).st_size, 0)
        shown = fingerprint(pem.decode())[:SHOWN_SIZE]
        self._context = make_context(pem, self._key_log)
        self._shown = shown

    def begin(self) -> "Handshake":
        """A handshake with somebody.  To be called when it is ``loaded``."""
        assert self._context is not None
        return Handshake(self._context, self._key_log, self._shown)

    def close(self) -> None:
        if self._context is not None:
            # Closes OpenSSL's file.
            self._context.keylog_filename = None  # type: ignore[assignment]
        self._key_log.close()


class Handshake:
    """One handshake, step by step.

    ``feed`` what has come, send what ``feed`` returns, until ``done``.
    """

    __slots__ = (
        "_incoming",
        "_key_log",
        "_outgoing",
        "_received",
        "_secrets",
        "_shown",
        "done",
        "tls",
    )

    def __init__(self, context: ssl.SSLContext, key_log: KeyLog, shown: str = "") -> None:
        """``shown``: what to call the certificate of this context."""
        self._shown = shown
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._key_log = key_log
        self._received = 0
        self._secrets: dict[bytes, bytes] = {}
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.done = False

    def feed(self, data: bytes | memoryview) -> bytes:
        """Go on with these bytes; return what must be sent.

        Raises HandshakeError; what ``alert`` returns then should still be sent.
        """
        self._received += len(data)
        if self._received > MAX_HANDSHAKE_BYTES:
            raise HandshakeError(f"{self._received} bytes and no end of the handshake")
        self._incoming.write(data)
        try:
            self.tls.do_handshake()
            self.done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise HandshakeError(error.reason or str(error)) from None
        finally:
            self._read_secrets()
            self._key_log.empty()
        return self._outgoing.read()

    def alert(self) -> bytes:
        """What OpenSSL has to say to the peer after an error."""
        return self._outgoing.read()

    def _read_secrets(self) -> None:
        # NSS key log format: a label, the client's random, the secret; one line each.
        for line in self._key_log.read().splitlines():
            label, _, rest = line.partition(b" ")
            if label in {b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0"}:
                self._secrets[label] = rest.partition(b" ")[2]

    def secrets(self) -> Secrets | None:
        """To be called once when done: the secrets, or None if OpenSSL must go on itself."""
        cipher = self.tls.cipher()
        secrets, self._secrets = self._secrets, {}
        if self.tls.version() != "TLSv1.3" or cipher is None:
            return None
        suite = tls_records.SUITES.get(cipher[0])
        if suite is None or len(secrets) != 2:
            return None
        try:
            read = bytes.fromhex(secrets[b"CLIENT_TRAFFIC_SECRET_0"].decode())
            write = bytes.fromhex(secrets[b"SERVER_TRAFFIC_SECRET_0"].decode())
        except ValueError:
            return None
        size = tls_records.secret_size(suite)
        return Secrets(suite, read, write) if len(read) == len(write) == size else None

    def leftover(self) -> bytes:
        """Bytes that OpenSSL has not looked at: records of the time after the handshake."""
        return self._incoming.read()

    def bios(self) -> tuple[ssl.MemoryBIO, ssl.MemoryBIO]:
        """The incoming and the outgoing BIO, for whoever goes on with OpenSSL."""
        return self._incoming, self._outgoing

    def describe(self, records: str) -> str:
        """Such as "TLSv1.3 own TLS_AES_256_GCM_SHA384 8d51c3c0a1b2c3d4".

        ``records``: own or openssl.  The last is the certificate that was shown.
        """
        cipher = self.tls.cipher()
        words = [self.tls.version(), records, cipher[0] if cipher else "none", self._shown]
        return " ".join(word for word in words if word)


class OpenSSLRecords:
    """The records of a connection that stays with OpenSSL, on the same two rings.

    Fulfils `pkvpn.edge.connection.Records`.  What has been opened lies in OpenSSL's and in our
    heap, so nobody else can go on with such a connection.
    """

    __slots__ = (
        "_end",
        "_incoming",
        "_outgoing",
        "_rest",
        "_rx",
        "_scratch",
        "_tls",
        "_tx",
        "kind",
        "peer_closed",
        "whole_at",
    )

    def __init__(self, rx: Ring, tx: Ring, shaken: Handshake) -> None:
        self.kind = "openssl"
        self.peer_closed = False
        self.whole_at = 0  # OpenSSL does not open anything twice
        self._rx = rx
        self._tx = tx
        self._tls = shaken.tls
        self._incoming, self._outgoing = shaken.bios()
        # Opened and not consumed.
        self._rest = b""
        self._scratch = memoryview(b"")
        self._end = 0

    def open_all(self, scratch: memoryview, at: int, now: float) -> tuple[int, int]:
        rx = self._rx
        while rx.start < rx.end:
            piece = rx.first_piece()
            self._incoming.write(piece)
            rx.start += len(piece)
        end = at + len(self._rest)
        scratch[at:end] = self._rest
        try:
            while True:
                # With a buffer it returns a size, which typeshed does not know.
                size = cast(int, self._tls.read(len(scratch) - end, scratch[end:]))
                if not size:
                    self.peer_closed = True
                    break
                end += size
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.peer_closed = True
        except ssl.SSLError as error:
            raise TLSError(Alert.DECODE_ERROR, error.reason or str(error)) from None
        if self._outgoing.pending:
            # It refuses each handshake that is asked for, into memory that has no limit.
            raise TLSError(Alert.UNEXPECTED_MESSAGE, "client asks for a new handshake")
        self._scratch, self._end = scratch, end
        return at, end

    def consume(self, to: int) -> int:
        self._rest = bytes(self._scratch[to : self._end])
        return 1

    def skip_over(self, size: int) -> None:
        self._rest = self._rest[size:]

    def room(self) -> int:
        # TLS 1.2 adds 29 bytes to each 16 KiB; the rest is for what must always fit.
        room = self._tx.limit - (self._tx.end - self._tx.start) - 1024
        return max(0, room - 64 * (room // 16384 + 1))

    def write(self, buffer: memoryview, start: int, end: int) -> None:
        try:
            self._tls.write(buffer[start:end])
        except ssl.SSLError:
            return  # it is broken; who reads from it will hear why
        self._tx.append(self._outgoing.read())

    def key_update(self, *, ask: bool) -> None:
        """TLS 1.2 has none: its clients are not healed by it, and not poisoned either."""

    def renew(self) -> bool:
        """OpenSSL counts its records itself."""
        return False

    def alert(self, description: int) -> None:
        """Close; OpenSSL has said by itself what was wrong with the peer's bytes."""
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # the peer has not answered yet, and need not
        goodbye = self._outgoing.read()
        if len(goodbye) <= self._tx.room():
            self._tx.append(goodbye)


# OpenSSL sets itself up at its first use, which takes milliseconds: at import, so once in the
# watchdog and not in every edge that is forked from it.  No key is loaded here.
ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
