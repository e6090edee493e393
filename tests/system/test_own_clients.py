"""The whole tree on the loopback, with clients of our own and with those who are none."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import resource
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn.client.session import LoginRefused, VpnClient, client_context
from pkvpn.edge import certificate
from pkvpn.watchdog.control import ControlError
from tests.support import eventually
from tests.system.bed import Service

pytestmark = pytest.mark.slow

MAC1, MAC2 = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"
BROADCAST = b"\xff" * 6


def frame(destination: bytes, source: bytes, payload: bytes) -> bytes:
    return destination + source + b"\x88\xb5" + payload


@contextlib.contextmanager
def logged_in(service: Service, *users: str, **more: Any) -> Iterator[list[VpnClient]]:
    """Clients, each of which is served by nobody but `together`."""
    with contextlib.ExitStack() as stack:
        clients = []
        for user in users:
            client = VpnClient(
                "127.0.0.1", service.port(), "T", user, user.replace("u", "pw"), **more
            )
            stack.callback(client.close)
            client.connect()
            clients.append(client)
        yield clients


def together(clients: list[VpnClient], condition: Callable[[], object]) -> dict[int, list[bytes]]:
    """Let all clients do what they have to until the condition holds; what each has received."""
    got: dict[int, list[bytes]] = {index: [] for index in range(len(clients))}

    def turn() -> object:
        for index, client in enumerate(clients):
            got[index] += client.handle()
        return condition()

    eventually(turn, within=15.0)
    return got


def exchange(one: VpnClient, two: VpnClient, payload: bytes) -> None:
    """A frame each way, until both have come: whoever is new has to be learnt first."""
    seen: set[int] = set()
    there, back = frame(MAC2, MAC1, payload), frame(MAC1, MAC2, payload)

    def turn() -> bool:
        one.send([there])
        two.send([back])
        time.sleep(0.02)
        if there in two.handle():
            seen.add(2)
        if back in one.handle():
            seen.add(1)
        return seen == {1, 2}

    eventually(turn, within=15.0)


def learn_flows(service: Service, one: VpnClient, two: VpnClient) -> None:
    """Until frames both ways do not pass the core any more."""

    def known() -> bool:
        exchange(one, two, b"learn")
        return bool(service.ask("hub.show", name="T")["flows"] == 2)

    eventually(known)


def refusal(service: Service, hub: str, user: str, password: str, host: str = "127.0.0.1") -> int:
    """The code a login is refused with; 0: it is not."""
    client = VpnClient(host, service.port(), hub, user, password, reconnect=False)
    try:
        client.connect()
    except LoginRefused as refused:
        return refused.code
    finally:
        client.close()
    return 0


def restarts(service: Service) -> dict[str, int]:
    return {name: child["restarts"] for name, child in service.children().items()}


@pytest.fixture
def no_child_dies(service: Service) -> Iterator[None]:
    before = restarts(service)
    yield
    assert restarts(service) == before, service.told()


# --- what is acknowledged is on disk ----------------------------------------


def test_what_is_acknowledged_outlives_the_death_of_everything(service: Service) -> None:
    for number in range(3):
        hub = f"H{number}"
        service.cli("hub", "add", hub)
        service.cli("user", "add", hub, "someone", "--password-stdin", stdin="secret\n")
        service.kill_everything()
        service.start()
        assert hub in [one["name"] for one in service.json("hub", "list")]
        assert refusal(service, hub, "someone", "secret") == 0
    certificate = (service.directory / "state/server.crt").read_bytes()
    service.stop()
    service.start()
    assert (service.directory / "state/server.crt").read_bytes() == certificate


def test_verbs_are_the_same_while_nothing_runs(service: Service) -> None:
    service.stop()
    service.cli("hub", "add", "LATER")
    service.cli("user", "add", "LATER", "u9", "--password-stdin", stdin="pw9\n")
    assert service.json("user", "list", "LATER") == [{"name": "u9", "auth": "password"}]
    service.start()
    assert refusal(service, "later", "U9", "pw9") == 0


# --- who is there ----------------------------------------


def test_session_list_and_mac_list_show_who_is_there(service: Service) -> None:
    with logged_in(service, "u1", "u2") as (one, two):
        exchange(one, two, b"hello")
        by_user = {session["user"]: session for session in service.json("session", "list")}
        assert set(by_user) == {"u1", "u2"}
        for session in by_user.values():
            assert session["hub"] == "T"
            assert session["tls"].split()[0] == "TLSv1.3"
            assert session["records"] == "own"
            assert session["peer"].startswith("127.0.0.1:")
        macs = {entry["mac"]: entry["port"] for entry in service.json("mac", "list", "T")}
        assert macs == {
            MAC1.hex(":"): by_user["u1"]["name"],
            MAC2.hex(":"): by_user["u2"]["name"],
        }
        assert service.json("status")["sessions"] == 2
    # They left, but whoever has the key may still come back.
    eventually(lambda: all(not one["connections"] for one in service.json("session", "list")))


def test_frames_of_known_flows_are_counted_as_well(service: Service) -> None:
    with logged_in(service, "u1", "u2") as (one, two):
        learn_flows(service, one, two)
        before = service.sessions("T", "u1")[0]["frames_in"]
        for _ in range(10):
            one.send([frame(MAC2, MAC1, bytes(500))] * 100)
            time.sleep(0.01)
        got: list[bytes] = []

        def all_there() -> bool:
            one.handle()
            got.extend(two.handle())
            return len(got) >= 1000

        eventually(all_there)
        eventually(lambda: service.sessions("T", "u1")[0]["frames_in"] >= before + 1000)


def test_hubs_do_not_hear_each_other(service: Service) -> None:
    service.ask("hub.add", name="OTHER")
    service.ask("user.add", hub="OTHER", name="u1", password="pw1")
    with logged_in(service, "u1", "u2") as (one, two):
        stranger = VpnClient("127.0.0.1", service.port(), "OTHER", "u1", "pw1")
        try:
            stranger.connect()
            one.send([frame(BROADCAST, MAC1, b"to all")])
            exchange(one, two, b"and to two")
            assert stranger.receive(0.3) == []
        finally:
            stranger.close()


# --- frames that are none ----------------------------------------


def send_raw(client: VpnClient, *raw: bytes) -> None:
    """A batch of blocks as they are: `VpnClient.send` would refuse them."""
    assert client._stream is not None
    parts = [struct.pack("!I", len(raw))]
    for block in raw:
        parts += struct.pack("!I", len(block)), block
    client._stream.output += b"".join(parts)
    client._write(time.monotonic())


@pytest.mark.parametrize("known_flow", [False, True], ids=["unknown", "known flow"])
def test_jumbo_frames_are_dropped_by_name(
    service: Service, no_child_dies: None, known_flow: bool
) -> None:
    with logged_in(service, "u1", "u2") as (one, two):
        if known_flow:
            learn_flows(service, one, two)
        largest, jumbo, hugest = (frame(MAC2, MAC1, bytes(n - 14)) for n in (1600, 1601, 3200))
        send_raw(one, jumbo, largest, hugest)

        got = together([one, two], lambda: service.sessions("T", "u1")[0]["drops"])
        assert service.sessions("T", "u1")[0]["drops"] == {"oversize": 2}
        assert service.json("hub", "show", "T")["drops"]["oversize"] >= 2
        assert service.json("status")["core"]["drops"]["oversize"] >= 2
        assert got[1].count(largest) == 1
        assert two._stream is not None
        assert two._stream._decoder.oversized == 0
        assert (one.logins, one.resumptions) == (1, 0)
    # The edge says by name what it drops, now and then.
    log = service.directory / "state/pkvpn.log"
    eventually(lambda: "dropped: 2 oversize" in log.read_text(), within=15.0)


def test_what_is_larger_than_a_jumbo_ends_the_connection_of_its_sender(
    service: Service, no_child_dies: None
) -> None:
    with logged_in(service, "u1", "u2") as (one, two):
        send_raw(one, frame(MAC2, MAC1, bytes(3201 - 14)))
        together([one, two], lambda: one.resumptions)
        assert (one.logins, two.logins, two.resumptions) == (1, 1, 0)
        exchange(one, two, b"goes on")


# --- operators ----------------------------------------


def test_a_kick_ends_the_session_and_its_key(service: Service) -> None:
    with logged_in(service, "u1", "u2") as (one, two):
        (session,) = service.sessions("T", "u1")
        service.cli("session", "kick", "T", session["name"])
        together([one, two], lambda: isinstance(one.error, LoginRefused))
        assert isinstance(one.error, LoginRefused)
        assert one.error.code == 13
        assert service.sessions("T", "u1") == []
        assert two.established
        with pytest.raises(ControlError, match="has no session"):
            service.ask("session.kick", hub="T", name=session["name"])


def test_a_user_that_is_deleted_is_out_at_once_and_stays_out(service: Service) -> None:
    with logged_in(service, "u1", "u2") as (one, two):
        service.cli("user", "delete", "T", "u1")
        together([one, two], lambda: isinstance(one.error, LoginRefused))
        assert isinstance(one.error, LoginRefused)
        assert one.error.code == 13
        assert two.established
    assert refusal(service, "T", "u1", "pw1") == 9


def test_a_key_that_was_kicked_is_worth_nothing_to_the_next_core(service: Service) -> None:
    with logged_in(service, "u1") as (one,):
        (session,) = service.sessions("T", "u1")
        service.ask("session.kick", hub="T", name=session["name"])
        service.kill("core")
        together([one], lambda: isinstance(one.error, LoginRefused))
        assert isinstance(one.error, LoginRefused)
        assert one.error.code == 13


def test_a_hub_goes_offline_and_online(service: Service) -> None:
    with logged_in(service, "u1") as (one,):
        service.cli("hub", "set", "T", "--offline")
        together([one], lambda: not one.established)
        assert service.sessions("T") == []
        assert refusal(service, "T", "u1", "pw1") == 10
        service.cli("hub", "set", "T", "--online")
        assert refusal(service, "T", "u1", "pw1") == 0


def test_a_hub_has_room_for_so_many(service: Service) -> None:
    service.cli("hub", "set", "T", "--max-sessions", "1")
    with logged_in(service, "u1"):
        assert refusal(service, "T", "u2", "pw2") == 105


def test_failures_from_one_address_are_limited_and_the_canary_is_not(service: Service) -> None:
    service.configure('listen = ["127.0.0.1:0", "[::1]:0"]\n[canary]\ninterval = 0.2\n')
    service.stop()
    service.start()
    before = restarts(service)
    codes = [refusal(service, "T", "u1", "wrong") for _ in range(25)]
    assert codes[:20] == [9] * 20
    assert 105 in codes[20:]
    assert set(codes) == {9, 105}

    port = service.watchdog("status")["listeners"][1]["port"]
    client = VpnClient("::1", port, "T", "u2", "pw2", reconnect=False)
    try:
        client.connect()  # another address has its own account
    finally:
        client.close()
    eventually(lambda: refusal(service, "T", "u1", "pw1") == 0, within=15.0, every=0.2)
    assert restarts(service) == before
    assert service.ask("status")["refused_logins"].keys() == {"9", "105"}


# --- those who are no clients ----------------------------------------


def tls(service: Service) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", service.port()), 10.0)
    return client_context().wrap_socket(plain, server_hostname="vpn.example")


def until_end(sock: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            got += data
    return got


def test_a_browser_is_answered_and_a_scanner_learns_nothing(
    service: Service, no_child_dies: None
) -> None:
    with tls(service) as browser:
        for request, status in (
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"403"),
            (b"GET /<b> HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
            (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", b"501"),
            (b"GET /api/ HTTP/1.1\r\nHost: x\r\n\r\n", b"401"),
            (b"POST /vpnsvc/vpn.cgi HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", b"404"),
        ):
            browser.sendall(request)
            answer = browser.recv(65536)
            assert answer.split()[:2] == [b"HTTP/1.1", status]
            assert b"pkvpn" not in answer.lower()
            assert b"9C37197CA7C2428388C2E6E59B829B30" not in answer
    for rubbish in (b"x\r\n\r\n", os.urandom(4000), b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000):
        with tls(service) as scanner:
            with contextlib.suppress(ConnectionError):  # it is out before all is sent
                scanner.sendall(rubbish)
            assert until_end(scanner) == b""
    for rubbish in (
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4000),
        b"\x16\x03\x01\xff\xff" + bytes(9),
    ):
        with socket.create_connection(("127.0.0.1", service.port()), 10.0) as plain:
            with contextlib.suppress(ConnectionError):
                plain.sendall(rubbish)
            assert b"HTTP" not in until_end(plain)
    assert refusal(service, "T", "u1", "pw1") == 0


def connections(service: Service) -> int:
    """How many sockets the edge has open, as the system sees it."""
    directory = Path(f"/proc/{service.pid('edge-1')}/fd")
    names = []
    for entry in directory.iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(entry))
    return sum(name.startswith("socket:") for name in names)


def test_slow_ones_hold_nobody_up_and_are_out_in_time(service: Service) -> None:
    service.configure('listen = ["127.0.0.1:0"]\n[edge]\nlogin_timeout = 4\n')
    service.stop()
    service.start()
    idle = connections(service)
    before = restarts(service)
    slow: list[socket.socket] = []
    try:
        for number in range(200):
            sock = socket.create_connection(("127.0.0.1", service.port()), 10.0)
            slow.append(sock)
            if number % 2:  # half of them have a TLS connection and write a line for ever
                slow[-1] = sock = client_context().wrap_socket(sock, server_hostname="x")
                sock.send(b"GET / HTTP/1.1\r\n")
            sock.setblocking(False)
        began = time.monotonic()
        stop = threading.Event()

        def dribble() -> None:
            while not stop.wait(0.2):
                for sock in slow:
                    with contextlib.suppress(OSError):
                        sock.send(b"a")

        dribbler = threading.Thread(target=dribble)
        dribbler.start()
        try:
            with logged_in(service, "u1", "u2") as (one, two):
                exchange(one, two, b"meanwhile")
            assert time.monotonic() - began < 3.0
            eventually(lambda: connections(service) <= idle + 2, within=15.0)
        finally:
            stop.set()
            dribbler.join()
    finally:
        for sock in slow:
            sock.close()
    assert restarts(service) == before, service.told()


# --- children ----------------------------------------


def test_an_edge_that_does_not_accept_any_more_is_found_and_replaced(service: Service) -> None:
    """Its limit of open files is lowered under it: it beats, it forwards, and lets nobody in."""
    with logged_in(service, "u1", "u2") as (one, two):
        exchange(one, two, b"before")
        deaf = service.pid("edge-1")
        resource.prlimit(deaf, resource.RLIMIT_NOFILE, (1, 1))

        together([one, two], lambda: service.pid("edge-1") != deaf)
        exchange(one, two, b"after")
        assert [(c.logins, c.resumptions) for c in (one, two)] == [(1, 0), (1, 0)]
    assert refusal(service, "T", "u1", "pw1") == 0
    assert "deaf" in service.cli("events")


def test_a_full_edge_is_not_replaced_for_being_full(service: Service) -> None:
    """The canary gets in all the same; who else waits is served when there is a place."""
    service.configure(
        'listen = ["127.0.0.1:0"]\n[edge]\nconnections_max = 2\nlogin_timeout = 60\n'
        "[watchdog]\ndeaf_timeout = 1\n[canary]\ninterval = 0.2\ntimeout = 2\n"
    )
    service.stop()
    service.start()
    before = restarts(service)
    with contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(
                socket.create_connection(
                    ("127.0.0.1", service.port()), 10.0, source_address=("127.0.0.9", 0)
                )
            )
            for _ in range(40)
        ]
        visits = canary_visits(service)
        eventually(lambda: canary_visits(service) > visits + 5, within=30.0)
        assert restarts(service) == before, service.told()
        for stranger in strangers[:-1]:
            stranger.close()
        with client_context().wrap_socket(strangers[-1], server_hostname="x") as last:
            last.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert last.recv(65536).startswith(b"HTTP/1.1 403")
        eventually(lambda: refusal(service, "T", "u1", "pw1") == 0)
    assert restarts(service) == before, service.told()


def canary_visits(service: Service) -> int:
    return int(service.children()["canary"]["duties"]["reach-core"]["done"])


@pytest.mark.parametrize("victims", [["core"], ["edge-1"], ["core", "edge-1"]], ids="+".join)
def test_a_client_with_tls_1_2_goes_on(service: Service, victims: list[str]) -> None:
    """OpenSSL keeps its records, so it comes back by its session key if an edge dies."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = VpnClient("127.0.0.1", service.port(), "T", "u1", "pw1")
    client._tls_context = context
    with contextlib.closing(client), logged_in(service, "u2") as (two,):
        client.connect()
        assert service.sessions("T", "u1")[0]["tls"].startswith("TLSv1.2 ")
        assert service.sessions("T", "u1")[0]["records"] == "openssl"
        exchange(client, two, b"before")
        service.kill(*victims)
        exchange(client, two, b"after")
        assert client.logins == 1
        assert client.resumptions == int("edge-1" in victims)
        assert (two.logins, two.resumptions) == (1, 0)


def test_a_reload_says_whom_a_new_certificate_concerns(service: Service) -> None:
    state = service.directory / "state"

    def shown(user: str) -> str:
        (session,) = service.sessions("T", user)
        return f"{session['certificate']}"

    with logged_in(service, "u1") as (old,):
        name = service.sessions("T", "u1")[0]["name"]
        assert "another certificate" not in service.cli("reload")
        (state / "server.crt").unlink()
        certificate.ensure(state / "server.crt", state / "server.key", "x", dt.datetime.now(dt.UTC))
        assert service.cli("reload") == (
            "The configuration has been read again.\n"
            "1 sessions have connections that were shown another certificate. SoftEther's client"
            " ends such a session when it makes one more connection, and logs in again:"
            f" T/{name}\n"
        )

        def is_shown() -> bool:
            with logged_in(service, "u2"):
                return shown("u2") != shown("u1")

        eventually(is_shown)  # the order reaches an edge a moment later
        with logged_in(service, "u2"):
            assert f": T/{name}\n" in service.cli("reload")
        assert old.established
        (state / "server.key").write_text("no key")
        done = subprocess.run(service._line("reload"), capture_output=True, text=True, check=True)
        assert "the certificate in use stays" in done.stderr


def test_nothing_is_left_by_a_stop(service: Service) -> None:
    pids = [child["pid"] for child in service.children().values()]
    service.stop()
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_a_silent_client_is_cut_off_and_comes_back(service: Service) -> None:
    service.configure('listen = ["127.0.0.1:0"]\n[edge]\nidle_timeout = 5\n')
    service.stop()
    service.start()
    with logged_in(service, "u1", "u2") as (one, two):
        began = time.monotonic()
        eventually(
            lambda: two.handle() or service.sessions("T", "u1")[0]["connections"] == 0, within=15.0
        )
        assert 4.0 < time.monotonic() - began < 9.0
        together([one, two], lambda: one.resumptions)
        exchange(one, two, b"goes on")
        assert (one.logins, two.logins, two.resumptions) == (1, 1, 0)
