"""The TLS 1.3 record layer (RFC 8446, sections 5, 7.2 and 7.3) after somebody else's handshake.

Strategy: a direction of a connection is a suite, a traffic secret and a sequence number, nothing
else; whoever has these three can go on with it, in this process or in another one.  Nothing here
buffers: records are opened from, and sealed into, memory of the caller.

What keeps this safe, and what every change must keep true:

* A nonce is the direction's iv xor the sequence number.  `Sealer.seal` is the only place that
  uses a number for writing, and counts it up before it returns; a number that was given to
  `Sealer` at its start must never have been used for bytes that left the machine.
* A record that cannot be authenticated ends the connection; its sequence number is not used up,
  so opening the same bytes again, after a restart, meets the same number.
* A new secret starts at number 0 and the old one is forgotten in the same step.
* Whatever a peer sends, the only exception that leaves is `TLSError`.
"""

import functools
import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

# A record:
#   1  type, always 23 (application data) once the handshake is over
#   2  0x0303
#   2  size of what follows
#   n  the sealed inner text: content, 1 byte true type, zeros
#   16 of it the tag
HEADER_SIZE = 5
TAG_SIZE = 16
MAX_CONTENT = 16384  # RFC 8446 5.1
MAX_INNER = MAX_CONTENT + 1  # 5.4: with the type and the padding
MAX_SEALED = MAX_CONTENT + 256  # 5.2
MAX_RECORD = HEADER_SIZE + MAX_SEALED
# What sealing adds to a content.
OVERHEAD = HEADER_SIZE + 1 + TAG_SIZE

ALERT = 21
HANDSHAKE = 22
APPLICATION_DATA = 23

# RFC 8446 5.5 allows AES-GCM 2^24.5 full records under one key; a third of that leaves time for
# the peer's answer.  ChaCha20-Poly1305 has no limit near, and the same rule does no harm.
RECORDS_PER_KEY = 1 << 23

_HEADER = struct.Struct("!BHH")


class Alert:
    """Descriptions of an alert (RFC 8446 6) that this layer sends or knows."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    INTERNAL_ERROR = 80
    USER_CANCELED = 90


class TLSError(Exception):
    """The peer broke the record layer; ``alert`` is what it should be told."""

    def __init__(self, alert: int, text: str) -> None:
        super().__init__(text)
        self.alert = alert


class Cipher(Protocol):
    """What is used of the two ciphers of `cryptography`."""

    def encrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int: ...
    def decrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int: ...


class Suite(NamedTuple):
    """A cipher suite of TLS 1.3."""

    name: str
    number: int  # as in the handshake
    hash: str
    key_size: int
    cipher: Callable[[bytes], Cipher]


AES_128_GCM = Suite("TLS_AES_128_GCM_SHA256", 0x1301, "sha256", 16, AESGCM)
AES_256_GCM = Suite("TLS_AES_256_GCM_SHA384", 0x1302, "sha384", 32, AESGCM)
CHACHA20 = Suite("TLS_CHACHA20_POLY1305_SHA256", 0x1303, "sha256", 32, ChaCha20Poly1305)
SUITES = {suite.name: suite for suite in (AES_128_GCM, AES_256_GCM, CHACHA20)}
SUITE_NUMBERS = {suite.number: suite for suite in SUITES.values()}


_SECRET_SIZES = {suite: hashlib.new(suite.hash).digest_size for suite in SUITES.values()}


def secret_size(suite: Suite) -> int:
    """How long a traffic secret of the suite is."""
    return _SECRET_SIZES[suite]


@functools.cache
def _label_info(label: str, size: int) -> bytes:
    full = b"tls13 " + label.encode()
    return struct.pack("!HB", size, len(full)) + full + b"\0"


def expand_label(hash_name: str, secret: bytes, label: str, size: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446 7.1 with an empty context."""
    info = _label_info(label, size)
    out = block = b""
    counter = 1
    while len(out) < size:
        block = hmac.digest(secret, block + info + bytes([counter]), hash_name)
        out += block
        counter += 1
    return out[:size]


class _Direction:
    """The keys of one direction."""

    __slots__ = ("_cipher", "_iv", "secret", "sequence", "suite")

    def __init__(self, suite: Suite, secret: bytes, sequence: int = 0) -> None:
        if len(secret) != secret_size(suite):
            raise ValueError(f"a secret of {len(secret)} bytes for {suite.name}")
        self.suite = suite
        self._use(secret, sequence)

    def _use(self, secret: bytes, sequence: int) -> None:
        suite = self.suite
        self.secret = secret
        # The number of the next record, never of one that was already made or opened.
        self.sequence = sequence
        self._cipher = suite.cipher(expand_label(suite.hash, secret, "key", suite.key_size))
        self._iv = int.from_bytes(expand_label(suite.hash, secret, "iv", 12), "big")

    def update(self) -> None:
        """Go on with the next generation of the secret (RFC 8446 7.2).

        To be called right behind the record that carries the KeyUpdate.
        """
        suite = self.suite
        self._use(expand_label(suite.hash, self.secret, "traffic upd", len(self.secret)), 0)


class Sealer(_Direction):
    """Makes the records of one direction."""

    __slots__ = ()

    def seal(self, inner: memoryview, out: memoryview) -> int:
        """Write one record into ``out`` and return its size.

        ``inner`` is the content with its true type as the last byte, at most MAX_INNER bytes;
        ``out`` has room for len(inner) + HEADER_SIZE + TAG_SIZE bytes.
        """
        size = len(inner)
        assert 0 < size <= MAX_INNER  # test_an_inner_text_that_is_too_long_is_never_sealed
        end = size + (HEADER_SIZE + TAG_SIZE)
        header = _HEADER.pack(APPLICATION_DATA, 0x0303, size + TAG_SIZE)
        out[:HEADER_SIZE] = header
        sequence = self.sequence
        # First counted up, then used: nothing that may fail in between can use it twice.
        self.sequence = sequence + 1
        self._cipher.encrypt_into(
            (self._iv ^ sequence).to_bytes(12, "big"), inner, header, out[HEADER_SIZE:end]
        )
        return end

    def seal_bytes(self, content: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """One record of a content of at most MAX_CONTENT bytes."""
        out = bytearray(len(content) + OVERHEAD)
        self.seal(memoryview(content + bytes([kind])), memoryview(out))
        return bytes(out)

    def seal_alert(self, description: int) -> bytes:
        """The record of an alert; close_notify is a warning, all others are fatal."""
        return self.seal_bytes(
            bytes([1 if description == Alert.CLOSE_NOTIFY else 2, description]), ALERT
        )

    def seal_key_update(self, *, ask: bool) -> bytes:
        """The record of a KeyUpdate; all later records are under the next secret.

        ``ask``: the peer must answer with a KeyUpdate of its own.
        """
        record = self.seal_bytes(b"\x18\0\0\1" + bytes([ask]), HANDSHAKE)
        self.update()
        return record


class Opener(_Direction):
    """Opens the records of one direction."""

    __slots__ = ()

    def open(self, record: memoryview, out: memoryview) -> tuple[int, int]:
        """Open one whole record into ``out``; return its true type and the size of its content.

        ``out`` has room for all that `record_size` said; bytes behind the content are of no use.
        Raises TLSError, and then the sequence number is as before.
        """
        size = len(record) - (HEADER_SIZE + TAG_SIZE)
        sequence = self.sequence
        try:
            self._cipher.decrypt_into(
                (self._iv ^ sequence).to_bytes(12, "big"),
                record[HEADER_SIZE:],
                record[:HEADER_SIZE],
                out[:size],
            )
        except InvalidTag:
            raise TLSError(Alert.BAD_RECORD_MAC, f"record {sequence} is not authentic") from None
        end = size - 1
        kind = out[end]
        if not kind:
            end = len(bytes(out[:size]).rstrip(b"\0")) - 1
            if end < 0:
                raise TLSError(Alert.UNEXPECTED_MESSAGE, f"record {sequence} is nothing but zeros")
            kind = out[end]
        if kind != APPLICATION_DATA:
            if kind not in {ALERT, HANDSHAKE}:
                raise TLSError(Alert.UNEXPECTED_MESSAGE, f"record {sequence} is of type {kind}")
            if not end:
                raise TLSError(
                    Alert.UNEXPECTED_MESSAGE, f"record {sequence} of type {kind} is empty"
                )
        self.sequence = sequence + 1
        return kind, end


def record_size(header: memoryview | bytes | bytearray, at: int = 0) -> int:
    """The size of the record that starts with these HEADER_SIZE bytes, header included.

    Raises TLSError if no such record may come after the handshake.
    """
    kind, version, size = _HEADER.unpack_from(header, at)
    if kind != APPLICATION_DATA or version != 0x0303:
        raise TLSError(Alert.UNEXPECTED_MESSAGE, f"record of type {kind}, version {version:#06x}")
    if size > MAX_INNER + TAG_SIZE:
        # Padding cannot make it longer either, so it is refused before it has come.
        raise TLSError(Alert.RECORD_OVERFLOW, f"record of {size} bytes")
    if size < 1 + TAG_SIZE:
        raise TLSError(Alert.DECODE_ERROR, f"record of {size} bytes")
    return HEADER_SIZE + int(size)


def read_key_update(content: bytes) -> bool:
    """Does this handshake content, which must be one whole KeyUpdate, ask for an answer?

    A KeyUpdate is the last of its record (RFC 8446 5.1), and no other handshake message may come
    from a client that we gave no ticket and asked for no certificate.  Raises TLSError.
    """
    if len(content) != 5 or content[:4] != b"\x18\0\0\1":
        raise TLSError(Alert.UNEXPECTED_MESSAGE, f"handshake message {content[:8].hex()}")
    if content[4] > 1:
        raise TLSError(Alert.ILLEGAL_PARAMETER, f"KeyUpdate with request {content[4]}")
    return content[4] == 1


def read_alert(content: bytes) -> int:
    """The description of an alert.  Raises TLSError if it is none."""
    if len(content) != 2:
        raise TLSError(Alert.DECODE_ERROR, f"alert of {len(content)} bytes")
    return content[1]


def _warm_up() -> None:
    """Have the ciphers set themselves up at import: once, and not in every edge that is forked."""
    for suite in SUITES.values():
        Sealer(suite, bytes(secret_size(suite))).seal(
            memoryview(bytearray(16)), memoryview(bytearray(64))
        )


_warm_up()
