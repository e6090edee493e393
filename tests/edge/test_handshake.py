"""The handshake by OpenSSL, and both record layers talking after it."""

import hmac
import itertools
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pkvpn.edge import handshake, tls_records
from pkvpn.edge.connection import scratch_size
from pkvpn.edge.handshake import Handshake, HandshakeError, KeyLog, OpenSSLRecords
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import (
    ALERT,
    APPLICATION_DATA,
    HANDSHAKE,
    SUITES,
    Alert,
    Opener,
    Sealer,
    TLSError,
)
from tests.edge.conftest import Pem


class Client:
    """An OpenSSL client on memory BIOs."""

    def __init__(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = version
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="10.0.0.1/tcp")

    def shake(self, data: bytes = b"") -> bytes:
        self.incoming.write(data)
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        return self.outgoing.read()


@pytest.fixture
def context(pem: Pem, key_log: KeyLog) -> Iterator[ssl.SSLContext]:
    context = handshake.make_context(pem.joined, key_log)
    yield context
    context.keylog_filename = None  # type: ignore[assignment]  # closes OpenSSL's file


def test_a_client_of_tls_13_leaves_its_secrets(context: ssl.SSLContext, key_log: KeyLog) -> None:
    server, client = Handshake(context, key_log), Client()
    client_hello = client.shake()
    client_finished = client.shake(server.feed(client_hello))
    client.tls.write(b"at once")
    # The client's first record comes with its last handshake message: it is not OpenSSL's.
    assert server.feed(client_finished + client.outgoing.read()) == b""
    assert server.done

    secrets = server.secrets()
    assert secrets is not None
    assert server.describe("own") == f"TLSv1.3 own {secrets.suite.name}"
    assert key_log.read() == b""

    record = server.leftover()
    out = bytearray(len(record))
    assert Opener(secrets.suite, secrets.read).open(memoryview(record), memoryview(out)) == (
        APPLICATION_DATA,
        7,
    )
    assert out.startswith(b"at once")
    client.incoming.write(Sealer(secrets.suite, secrets.write).seal_bytes(b"answer"))
    assert client.tls.read(100) == b"answer"


def test_the_handshake_works_byte_by_byte(context: ssl.SSLContext, key_log: KeyLog) -> None:
    server, client = Handshake(context, key_log), Client()
    to_server = client.shake()
    while not server.done:
        to_client = b"".join([server.feed(to_server[at : at + 1]) for at in range(len(to_server))])
        to_server = client.shake(to_client)
    assert server.secrets() is not None


def test_two_handshakes_at_once_keep_their_secrets_apart(
    context: ssl.SSLContext, key_log: KeyLog
) -> None:
    pairs = [(Handshake(context, key_log), Client()) for _ in range(3)]
    hellos = [client.shake() for _, client in pairs]
    flights = [server.feed(hello) for (server, _), hello in zip(pairs, hellos, strict=True)]
    ends = [client.shake(flight) for (_, client), flight in zip(pairs, flights, strict=True)]
    for (server, client), end in zip(pairs, ends, strict=True):
        server.feed(end)
        secrets = server.secrets()
        assert secrets is not None
        client.incoming.write(Sealer(secrets.suite, secrets.write).seal_bytes(b"yours"))
        assert client.tls.read(100) == b"yours"


def test_tls_12_stays_with_openssl(context: ssl.SSLContext, key_log: KeyLog) -> None:
    server, client = Handshake(context, key_log), Client(ssl.TLSVersion.TLSv1_2)
    to_server = client.shake()
    while not server.done:
        to_client = server.feed(to_server)
        to_server = client.shake(to_client)
    assert server.secrets() is None
    assert server.describe("openssl").startswith("TLSv1.2 openssl ECDHE-")


def _expand_12(master: bytes, seed: bytes, size: int) -> bytes:
    """The PRF of TLS 1.2 (RFC 5246 5) with SHA-384."""
    out, a = b"", seed
    while len(out) < size:
        a = hmac.digest(master, a, "sha384")
        out += hmac.digest(master, a + seed, "sha384")
    return out[:size]


def test_who_asks_openssl_for_a_new_handshake_is_ended(
    context: ssl.SSLContext, key_log: KeyLog, tmp_path: Path
) -> None:
    """OpenSSL says no of its own accord each time, into memory that nobody counts."""
    context.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384")
    server, client = Handshake(context, key_log), Client(ssl.TLSVersion.TLSv1_2)
    client.tls.context.keylog_filename = str(tmp_path / "keys")
    hello = to_server = client.shake()
    flight = b""
    while not server.done:
        to_client = server.feed(to_server)
        flight = flight or to_client
        to_server = client.shake(to_client)
    client.tls.context.keylog_filename = None  # type: ignore[assignment]
    master = bytes.fromhex((tmp_path / "keys").read_text().split()[-1])
    seed = b"key expansion" + flight[11:43] + hello[11:43]
    keys = _expand_12(master, seed, 72)
    cipher, salt, message = AESGCM(keys[:32]), keys[64:68], hello[5:]

    rx, tx = (Ring(memoryview(bytearray(65536)), 0, 0, 0) for _ in range(2))
    records = OpenSSLRecords(rx, tx, server)
    scratch = memoryview(bytearray(scratch_size(65536)))

    def ask(number: int) -> None:
        count = number.to_bytes(8, "big")
        size = len(message).to_bytes(2, "big")
        sealed = count + cipher.encrypt(salt + count, message, count + b"\x16\x03\x03" + size)
        rx.append(b"\x16\x03\x03" + len(sealed).to_bytes(2, "big") + sealed)
        records.open_all(scratch, 0, 0.0)

    with pytest.raises(TLSError, match="a new handshake"):
        ask(1)
    # Nor does what OpenSSL had said burst the ring.
    records.alert(Alert.CLOSE_NOTIFY)
    assert 0 < tx.end - tx.start < 1000


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\0" * 100]
)
def test_noise_is_a_handshake_error(context: ssl.SSLContext, key_log: KeyLog, noise: bytes) -> None:
    server = Handshake(context, key_log)
    with pytest.raises(HandshakeError):
        server.feed(noise)


def test_a_handshake_without_end_is_ended(context: ssl.SSLContext, key_log: KeyLog) -> None:
    server = Handshake(context, key_log)
    # The start of a message of 16 MB, and then more of it: OpenSSL has a limit of its own too.
    record = b"\x16\x03\x01\x00\x01\x01"
    server.feed(record)
    with pytest.raises(HandshakeError, match="no end"):
        server.feed(bytes(handshake.MAX_HANDSHAKE_BYTES))


# --- against the openssl program ------------------------------------------------------------------


def read_record(sock: socket.socket) -> bytes:
    header = sock.recv(5, socket.MSG_WAITALL)
    if len(header) < 5:
        return b""
    size = tls_records.record_size(header) - 5
    return header + sock.recv(size, socket.MSG_WAITALL)


def open_next(sock: socket.socket, opener: Opener) -> tuple[int, bytes]:
    record = read_record(sock)
    out = bytearray(len(record))
    kind, size = opener.open(memoryview(record), memoryview(out))
    return kind, bytes(out[:size])


def next_but_empty(sock: socket.socket, opener: Opener) -> tuple[int, bytes]:
    """The next record that says something: s_client sends an empty one after each command."""
    while True:
        kind, content = open_next(sock, opener)
        if kind != APPLICATION_DATA or content:
            return kind, content


def read_until(process: subprocess.Popen[bytes], text: bytes) -> None:
    """To be called before the next command: two that are read at once count as one."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never said")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(5)
        yield sock


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_openssl_s_client_understands_our_records(
    context: ssl.SSLContext, key_log: KeyLog, listener: socket.socket, suite: tls_records.Suite
) -> None:
    port = listener.getsockname()[1]
    client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-ciphersuites", suite.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    sock, _ = listener.accept()
    with sock, client:
        sock.settimeout(5)
        server = Handshake(context, key_log)
        while not server.done:
            sock.sendall(server.feed(sock.recv(4096)))
        secrets = server.secrets()
        assert secrets is not None
        assert secrets.suite == suite
        assert server.leftover() == b""
        sealer, opener = Sealer(suite, secrets.write), Opener(suite, secrets.read)

        def say(text: bytes) -> None:
            assert client.stdin is not None
            client.stdin.write(text)
            client.stdin.flush()

        say(b"hello\n")
        assert open_next(sock, opener) == (APPLICATION_DATA, b"hello\n")
        # k: the client's own KeyUpdate; K: the same, and it wants one of ours.
        for command, ask in ((b"k\n", False), (b"K\n", True)):
            say(command)
            read_until(client, b"KEYUPDATE")
            say(b"more\n")
            assert next_but_empty(sock, opener) == (HANDSHAKE, b"\x18\0\0\1" + bytes([ask]))
            opener.update()
            assert next_but_empty(sock, opener) == (APPLICATION_DATA, b"more\n")
        sock.sendall(sealer.seal_key_update(ask=False))
        # Ours, and the client's that we ask for.
        sock.sendall(sealer.seal_key_update(ask=True) + sealer.seal_bytes(b"under new keys\n"))
        read_until(client, b"under new keys")
        say(b"good\n")
        assert next_but_empty(sock, opener) == (HANDSHAKE, b"\x18\0\0\1\0")
        opener.update()
        assert next_but_empty(sock, opener) == (APPLICATION_DATA, b"good\n")
        # A long text in records of all sizes, then the goodbye.
        texts = [b"%d:" % size + b"x" * size + b"\n" for size in (1, 100, 16000)]
        sock.sendall(b"".join(sealer.seal_bytes(text) for text in texts))
        sock.sendall(sealer.seal_alert(tls_records.Alert.CLOSE_NOTIFY))
        assert open_next(sock, opener) == (ALERT, b"\1\0")
        shown = client.stdout.read()
        assert b"".join(texts) in shown
        assert b"closed\n" in shown


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_openssl_s_server_understands_our_records(
    pem: Pem, suite: tls_records.Suite, tmp_path: Path, key_log: KeyLog
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            *("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1"),
            *("-cert", pem.cert, "-key", pem.key, "-num_tickets", "0"),
            *("-ciphersuites", suite.name),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with server:
        for line in server.stdout:
            if line == b"ACCEPT\n":
                break
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.keylog_filename = key_log.path
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            sock.sendall(outgoing.read())
            assert incoming.read() == b""
            lines = {
                line.split()[0]: bytes.fromhex(line.split()[2].decode())
                for line in key_log.read().splitlines()
                if line[:1] != b"#"
            }
            sealer = Sealer(suite, lines[b"CLIENT_TRAFFIC_SECRET_0"])
            opener = Opener(suite, lines[b"SERVER_TRAFFIC_SECRET_0"])

            def say(text: bytes) -> None:
                assert server.stdin is not None
                server.stdin.write(text)
                server.stdin.flush()

            sock.sendall(sealer.seal_bytes(b"first\n"))
            read_until(server, b"first")
            for command, ask in ((b"k\n", False), (b"K\n", True)):
                say(command)
                assert open_next(sock, opener) == (HANDSHAKE, b"\x18\0\0\1" + bytes([ask]))
                opener.update()
            sock.sendall(sealer.seal_key_update(ask=True) + sealer.seal_bytes(b"second\n"))
            read_until(server, b"second")
            say(b"from the server\n")
            assert open_next(sock, opener) == (HANDSHAKE, b"\x18\0\0\1\0")
            opener.update()
            assert open_next(sock, opener) == (APPLICATION_DATA, b"from the server\n")
            text = os.urandom(8000).hex().encode() + b"\n"
            sock.sendall(sealer.seal_bytes(text) + sealer.seal_alert(0))
            assert open_next(sock, opener) == (ALERT, b"\1\0")
            shown = server.stdout.read()
            assert text in shown


def test_records_of_another_connection_are_refused() -> None:
    for suite, other in itertools.permutations(SUITES.values(), 2):
        record = Sealer(suite, b"1" * tls_records.secret_size(suite)).seal_bytes(b"x")
        opener = Opener(other, b"1" * tls_records.secret_size(other))
        with pytest.raises(TLSError):
            opener.open(memoryview(record), memoryview(bytearray(100)))
