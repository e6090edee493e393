"""The client's shell against a scripted server on the loopback."""

from __future__ import annotations

import hashlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pkvpn.client import session
from pkvpn.client.machine import Credentials
from pkvpn.client.session import LoginRefused, VpnClient
from pkvpn.protocol import blocks, http
from pkvpn.protocol.errors import ErrorCode, ProtocolError, meaning
from tests.client.fake_server import FakeServer, make_certificate
from tests.support import eventually

FRAME = b"\xff" * 6 + b"\x02aaaaa" + b"\x88\xb5" + bytes(46)


@contextmanager
def client(server: FakeServer, **options: Any) -> Iterator[VpnClient]:
    with closing(VpnClient("127.0.0.1", server.port, "T", "u1", "pw1", **options)) as it:
        yield it


def drive(clients: list[VpnClient], until: Callable[[], bool], within: float = 5.0) -> list[bytes]:
    """Turn a loop of its own, as a load generator does; all frames that came."""
    poll = select.poll()
    for it in clients:
        poll.register(it.fileno(), select.POLLIN)
    frames: list[bytes] = []
    end = time.monotonic() + within
    while not until():
        assert time.monotonic() < end, [(it.stage, it.error) for it in clients]
        deadlines = [d for it in clients if (d := it.next_deadline()) is not None]
        wait = min([*deadlines, time.monotonic() + 0.02]) - time.monotonic()
        poll.poll(max(0.0, wait) * 1000)
        for it in clients:
            frames += it.handle()
    return frames


def test_two_clients_exchange_frames(server: FakeServer) -> None:
    with client(server, probe=True) as a, client(server) as b:
        a.connect(5)
        b.connect(5)
        assert (a.stage, a.established, a.logins) == ("data", True, 1)
        assert a.welcome is not None
        assert a.welcome.session_name == "SID-U1-1"
        a.send([FRAME])
        assert b.receive(5) == [FRAME]
        assert a.receive(0.0) == []


def test_much_data_arrives_whole_and_in_order(server: FakeServer) -> None:
    with client(server) as a, client(server) as b:
        a.connect(5)
        b.connect(5)
        frames = [i.to_bytes(4, "big") + bytes(1510) for i in range(session.QUEUE)]
        a.send(frames)
        got: list[bytes] = []
        # The server's thread may take its time: both ends must go on while buffers are full.
        drive([a], lambda: len(server.frames) == len(frames))
        while len(got) < len(frames):
            more = b.receive(5)
            assert more
            got += more
        assert got == frames
        assert a.dropped == 0


def test_a_frame_that_comes_with_the_welcome_is_not_lost(server: FakeServer) -> None:
    server.behind_welcome = blocks.encode_batch([FRAME])
    with client(server) as a:
        a.connect(5)
        assert a.next_deadline() is not None
        assert a.receive(5) == [FRAME]


def test_keep_alives_are_sent(server: FakeServer) -> None:
    server.timeout = 0.5
    with client(server, reconnect=False) as a:
        a.connect(5)
        drive([a], lambda: server.keep_alives >= 2)


@pytest.mark.parametrize("end", ["close_all", "cut_all"])
def test_a_lost_connection_is_made_again_at_once(server: FakeServer, end: str) -> None:
    with client(server) as a, client(server) as b:
        a.connect(5)
        b.connect(5)
        started = time.monotonic()
        getattr(server, end)()
        drive([a, b], lambda: a.resumptions == b.resumptions == 1)
        assert time.monotonic() - started < 0.9  # not the second attempt
        assert (a.logins, b.logins, server.resumptions) == (1, 1, 2)
        a.send([FRAME])
        assert b.receive(5) == [FRAME]


def test_frames_wait_for_the_connection_and_the_newest_are_dropped(server: FakeServer) -> None:
    with client(server) as a:
        a.connect(5)
        server.close_all()
        drive([a], lambda: not a.established)
        a.send([FRAME] * (session.QUEUE + 3))
        assert (a.dropped, a.room) == (3, 0)
        drive([a], lambda: len(server.frames) == session.QUEUE)


def test_a_session_that_has_ended_is_followed_by_a_full_login(server: FakeServer) -> None:
    with client(server) as a:
        a.connect(5)
        server.refuse_resumption = ErrorCode.SESSION_TIMEOUT
        server.close_all()
        drive([a], lambda: a.logins == 2)
        assert a.resumptions == 0
        assert a.established


def test_a_changed_certificate_ends_the_session_before_its_key_is_told(
    server: FakeServer, tmp_path: Path
) -> None:
    with client(server) as a:
        a.connect(5)
        other = make_certificate(tmp_path, "other")
        server.call(lambda: server.use_certificate(other))
        server.close_all()
        drive([a], lambda: a.error is not None and "has changed" in str(a.error))
        drive([a], lambda: a.logins == 2)
        assert server.resumptions == 0


@pytest.mark.parametrize("code", [ErrorCode.AUTH_FAILED, ErrorCode.SERVER_CANT_ACCEPT, 777])
def test_a_refused_login(server: FakeServer, code: int) -> None:
    server.refuse_login = code
    with client(server) as a, pytest.raises(LoginRefused) as caught:
        a.connect(5)
    assert caught.value.code == code
    assert caught.value.text == meaning(code)
    assert a.stage == "login"
    assert len(server.logins) == 1


def test_a_wrong_password(server: FakeServer) -> None:
    wrong = Credentials.with_password("T", "u1", "no")
    with client(server, credentials=wrong) as a, pytest.raises(LoginRefused, match="code 9"):
        a.connect(5)


def test_a_plain_password_and_a_dialog(server: FakeServer) -> None:
    server.noops = 2
    plain = Credentials.with_plain_password("T", "u1", "pw1")
    with client(server, credentials=plain) as a:
        a.connect(5)
    assert server.logins[0].plain_password == "pw1"


@pytest.mark.parametrize("stage", ["tls", "signature", "login"])
def test_how_far_it_came_when_the_server_is_silent(server: FakeServer, stage: str) -> None:
    server.silent_at = stage
    with client(server) as a:
        with pytest.raises(TimeoutError, match=f"at stage {stage}"):
            a.connect(0.2)
        assert a.stage == stage
    server.silent_at = ""


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with closing(VpnClient("127.0.0.1", port, "T", "u1", "pw1")) as a:
        with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1:{port}"):
            a.connect(5)
        assert a.stage == "tcp"


def test_all_addresses_of_a_host_are_tried(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_addresses(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        kind = (socket.SOCK_STREAM, 0, "")
        return [
            (socket.AF_INET6, *kind, ("::1", port, 0, 0)),
            (socket.AF_INET, *kind, ("127.0.0.2", 1)),
            (socket.AF_INET, *kind, ("127.0.0.1", port)),
        ]

    monkeypatch.setattr("socket.getaddrinfo", two_addresses)
    with client(server) as a:
        a.connect(5)
        server.close_all()
        drive([a], lambda: a.resumptions == 1)


def test_it_is_no_vpn_server(server: FakeServer) -> None:
    server.page = http.build_error_page(404, "GET", "/")
    with client(server, probe=True) as a, pytest.raises(ProtocolError, match="mark"):
        a.connect(5)


def test_what_cannot_be_the_name_of_a_host() -> None:
    with closing(VpnClient("x" * 100, 443, "T", "u1", "pw1")) as a, pytest.raises(OSError):  # noqa: PT011  # what the resolver says differs
        a.connect(5)
    for wrong in ("", ".h", "h\n"):
        with pytest.raises(ValueError, match="name of a host"):
            VpnClient(wrong, 443, "T", "u1", "pw1")


def test_a_fingerprint(server: FakeServer, certificate: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert(
        certificate.read_text()[certificate.read_text().index("-----BEGIN CERTIFICATE") :]
    )
    right = hashlib.sha256(der).hexdigest()
    with client(server, fingerprint=":".join(right[i : i + 2] for i in range(0, 64, 2))) as a:
        a.connect(5)
    with (
        client(server, fingerprint="00" * 32) as a,
        pytest.raises(ssl.SSLCertVerificationError, match=right),
    ):
        a.connect(5)
    for wrong in ("00", "xy" * 32):
        with pytest.raises(ValueError, match="fingerprint"):
            VpnClient("h", 1, "T", "u", "p", fingerprint=wrong)


def test_a_ca_file_demands_its_signature_and_the_name(
    server: FakeServer, certificate: Path, tmp_path: Path
) -> None:
    with closing(
        VpnClient("localhost", server.port, "T", "u1", "pw1", ca_file=str(certificate))
    ) as a:
        a.connect(5)
    with (
        client(server, ca_file=str(certificate)) as a,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        a.connect(5)
    other = make_certificate(tmp_path, "other")
    with (
        closing(VpnClient("localhost", server.port, "T", "u1", "pw1", ca_file=str(other))) as a,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        a.connect(5)


def test_leaving_says_close_notify(server: FakeServer) -> None:
    with client(server) as a:
        a.connect(5)
        a.send([FRAME])
    eventually(lambda: server.proper_ends)
    assert server.frames == [FRAME]
    assert a.ended
    a.close()
    assert a.handle() == []
    assert a.next_deadline() is None


def test_a_server_out_of_step_is_left_and_the_session_goes_on(server: FakeServer) -> None:
    with client(server) as a:
        a.connect(5)
        server.send_all(blocks.U32.pack(5000))
        drive([a], lambda: a.resumptions == 1)


def test_without_reconnect_the_first_end_is_the_end(server: FakeServer) -> None:
    with client(server, reconnect=False) as a:
        a.connect(5)
        server.close_all()
        with pytest.raises(ConnectionError, match="session is over"):
            a.receive(5)
        assert a.ended


def test_a_silent_server_is_left(server: FakeServer) -> None:
    server.timeout = 0.3
    with client(server, reconnect=False) as a:
        a.connect(5)
        drive([a], lambda: a.ended)
        assert "waited 0.3 s for frames" in str(a.error)


def test_what_is_no_frame_is_not_sent(server: FakeServer) -> None:
    with client(server) as a:
        for wrong in (bytes(13), bytes(1601)):
            with pytest.raises(ValueError, match="no Ethernet frame"):
                a.send([wrong])


def test_fifty_clients_in_one_loop_come_and_go(server: FakeServer) -> None:
    clients = [VpnClient("127.0.0.1", server.port, "T", "u1", "pw1") for _ in range(50)]
    try:
        drive(clients, lambda: all(it.established for it in clients), within=20)
        server.cut_all()
        drive(clients, lambda: all(it.resumptions for it in clients), within=20)
    finally:
        for it in clients:
            it.close()
