"""SoftEther's own clients, as Debian has them, through a server of ours.

All tests of this file share one bed; each leaves both clients logged in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest

from tests.support import eventually
from tests.system.bed import Bed, Host, StockClient, run

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.netns, pytest.mark.softether]

MEGABYTES_100 = 100_000_000

# Where the tests listen on the virtual segment, one after the other.
PORT = 7000


def peer(host: Host, *words: object) -> subprocess.Popen[str]:
    return host.start("/usr/bin/env", "python3", "-m", "tests.system.peer", *map(str, words))


def said(program: subprocess.Popen[str]) -> dict[str, Any]:
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line, f"{program.args!r}: ended with {program.wait(5)} and said nothing"
    result = json.loads(line)
    assert isinstance(result, dict)
    return result


@contextlib.contextmanager
def running(*programs: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()
            assert program.stdout is not None
            program.stdout.close()


class Transfer:
    """Bytes from one client to the other: so many, in not less than so many seconds."""

    def __init__(self, sender: Host, receiver: StockClient, size: int, seconds: float = 0) -> None:
        self._size = size
        self._receiver_host = receiver
        self._stack = contextlib.ExitStack()
        self._receiver = peer(receiver, "tcp-receive", receiver.address, PORT)
        self._stack.enter_context(running(self._receiver))
        assert said(self._receiver) == {"listening": True}
        self._before = receiver.received(receiver.adapter)
        self._sender = peer(sender, "tcp-send", receiver.address, PORT, size, seconds)
        self._stack.enter_context(running(self._sender))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_part(self, part: float) -> None:
        """Until that part of it has come."""
        enough = self._before + part * self._size
        host = self._receiver_host
        eventually(lambda: host.received(host.adapter) >= enough, within=30.0)

    def wait_end(self) -> float:
        """All came as it was sent; returns the longest silence at the receiver, in seconds."""
        sent, came = said(self._sender), said(self._receiver)
        assert (sent["bytes"], sent["sha256"]) == (came["bytes"], came["sha256"])
        assert sent["bytes"] == self._size
        return float(came["silence"])


def ping(host: Host, address: str) -> None:
    """It answers, if it had to be looked for as well."""
    eventually(lambda: host.run("ping", "-c", "1", "-W", "1", address), within=15.0)


@pytest.fixture(autouse=True)
def both_are_well(bed: Bed) -> Iterator[None]:
    """Before and after each test; what the service said is printed when one fails."""
    yield
    for client in bed.clients:
        client.wait_established()


@pytest.fixture
def same_sessions(bed: Bed) -> Iterator[None]:
    """Neither client has to log in again while the test does what it does."""
    before = [client.established_sessions() for client in bed.clients]
    yield
    after = [client.established_sessions() for client in bed.clients]
    assert after == before, bed.service.told()


# --- there, and something passes ------------------------------------------------------------------


def test_both_are_logged_in_and_their_records_are_our_own(bed: Bed) -> None:
    for client in bed.clients:
        status = client.status()
        assert status["Server Product Name"] == "pkvpn"
        assert status["Number of Established Sessions"] == "1 Times"
        (session,) = bed.service.sessions("T", client.user)
        assert session["tls"].split()[0] == "TLSv1.3"
        assert session["records"] == "own"
        assert session["name"] == status["Session Name"]
    told = bed.service.json("status")
    assert told["core"]["records"]["own"] >= 2
    sessions = {one["session"]: one["records"] for one in told["connections"]}
    for client in bed.clients:
        assert sessions[client.status()["Session Name"]] == "own"


def test_arp_and_ping(bed: Bed, same_sessions: None) -> None:
    one, two = bed.clients
    one.run("ip", "neigh", "flush", "dev", one.adapter)
    ping(one, two.address)
    (neighbour,) = json.loads(one.run("ip", "-j", "neigh", "show", two.address))
    mac = two.device(two.adapter)["address"]
    assert neighbour["lladdr"] == mac

    learnt = {entry["mac"]: entry for entry in bed.service.json("mac", "list", "T")}
    assert learnt[mac]["port"] == two.status()["Session Name"]


def test_100_megabytes_arrive_as_they_were_sent(bed: Bed, same_sessions: None) -> None:
    one, two = bed.clients
    for sender, receiver in ((one, two), (two, one)):
        with Transfer(sender, receiver, MEGABYTES_100) as transfer:
            transfer.wait_end()


def test_datagrams_of_all_sizes_come_back(bed: Bed, same_sessions: None) -> None:
    one, two = bed.clients
    echo = peer(two, "udp-echo", two.address, PORT)
    with running(echo):
        assert said(echo) == {"listening": True}
        sender = peer(one, "udp-send", two.address, PORT, 2000)
        with running(sender):
            assert said(sender) == {"same": 2000, "other": 0, "lost": 0}


def test_a_broadcast_reaches_the_other(bed: Bed, same_sessions: None) -> None:
    one, two = bed.clients
    echo = peer(two, "udp-echo", "0.0.0.0", PORT)
    with running(echo):
        assert said(echo) == {"listening": True}
        sender = peer(one, "broadcast", "10.77.0.255", PORT)
        with running(sender):
            assert said(sender) == {"answer": "who is there?", "sender": two.address}


# --- silence --------------------------------------------------------------------------------------


def test_idle_clients_stay_by_keep_alives(bed: Bed, same_sessions: None) -> None:
    one, two = bed.clients
    names = [client.status()["Session Name"] for client in bed.clients]
    for client in bed.clients:
        client.run("ip", "link", "set", client.adapter, "down")  # or IPv6 breaks the silence
    time.sleep(12)  # twice the time-out, and some
    for client in bed.clients:
        client.run("ip", "link", "set", client.adapter, "up")
    assert [client.status()["Session Name"] for client in bed.clients] == names
    ping(one, two.address)


def test_a_client_that_falls_silent_is_cut_off_and_comes_back(bed: Bed) -> None:
    one, two = bed.clients
    before = one.established_sessions()
    (session,) = bed.service.sessions("T", "u1")
    with stopped(*one.pids()):
        eventually(lambda: not bed.service.sessions("T", "u1"), within=25.0, every=0.1)
    eventually(lambda: one.established_sessions() == before + 1, within=40.0, every=0.2)
    one.wait_established()
    (new,) = bed.service.sessions("T", "u1")
    assert new["name"] != session["name"]
    ping(one, two.address)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


# --- leaving, and not being let in ----------------------------------------------------------------


def test_disconnect_and_reconnect(bed: Bed) -> None:
    one, two = bed.clients
    one.command(f"AccountDisconnect {one.account}")
    # Its connection is gone at once; its session waits for it, and not for ever.
    eventually(lambda: all(not s["connections"] for s in bed.service.sessions("T", "u1")))
    eventually(lambda: not bed.service.sessions("T", "u1"), within=15.0)

    one.command(f"AccountConnect {one.account}")
    one.wait_established()
    ping(one, two.address)
    ping(two, one.address)


@pytest.fixture
def other(bed: Bed) -> Iterator[Callable[..., str]]:
    """Make the first client's second account, on an adapter of its own, and have it connect."""
    one = bed.clients[0]
    one.command("NicCreate other")

    def connect(hub: str, user: str, *how: str) -> str:
        one.add_account("other", "10.99.0.1:443", hub, user, "other")
        one.command("AccountRetrySet other /NUM:0 /INTERVAL:5")
        for line in how:
            one.command(line)
        one.command("AccountConnect other")
        return "other"

    yield connect
    for line in ("AccountDisconnect other", "AccountDelete other"):
        with contextlib.suppress(AssertionError):  # it is not connected, or was never made
            one.command(line)
    one.command("NicDelete other")


STANDARD = "AccountPasswordSet other /PASSWORD:{} /TYPE:standard"


@pytest.mark.parametrize(
    ("hub", "password", "code"), [("T", "wrong", 9), ("NOSUCH", "pw1", 8)], ids=["password", "hub"]
)
def test_a_refusal_has_its_reason_in_the_clients_log(
    bed: Bed, other: Callable[..., str], hub: str, password: str, code: int
) -> None:
    one = bed.clients[0]
    before = len(one.log())
    other(hub, "u1", STANDARD.format(password))

    def codes() -> list[str]:
        ours = [line for line in one.log()[before:].splitlines() if '"other"' in line]
        return re.findall(r"code:? (\d+)", "\n".join(ours), re.IGNORECASE)

    assert set(eventually(codes, within=15.0, every=0.1)) == {str(code)}
    # Of its other account it knows nothing.
    one.wait_established()


def test_a_plain_password_is_enough(bed: Bed, other: Callable[..., str]) -> None:
    account = other("T", "u2", "AccountPasswordSet other /PASSWORD:pw2 /TYPE:radius")
    bed.clients[0].wait_established(account)
    assert len(bed.service.sessions("T", "u2")) == 2


def test_an_anonymous_user_needs_no_password(bed: Bed, other: Callable[..., str]) -> None:
    bed.service.ask("user.add", hub="T", name="guest", auth="anonymous")
    account = other("T", "guest", "AccountAnonymousSet other")
    bed.clients[0].wait_established(account)
    bed.service.ask("user.delete", hub="T", name="guest")
    # 13, then a login that is refused; it was told to try once.
    eventually(lambda: not bed.service.sessions("T", "guest"))


def test_a_certificate_proves_who_it_is(
    bed: Bed, other: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("certificate")
    certificate, key = directory / "u.crt", directory / "u.key"
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30",
        "-subj", "/CN=u3", "-keyout", str(key), "-out", str(certificate),
    )  # fmt: skip
    bed.service.ask("user.add", hub="T", name="u3", certificate=certificate.read_text())
    account = other("T", "u3", f"AccountCertSet other /LOADCERT:{certificate} /LOADKEY:{key}")
    bed.clients[0].wait_established(account)
    (session,) = bed.service.sessions("T", "u3")
    assert session["connections"] == 1


@pytest.mark.parametrize("half", ["no", "yes"])
def test_several_connections_of_one_session(bed: Bed, other: Callable[..., str], half: str) -> None:
    one, two = bed.clients
    bed.service.ask("user.add", hub="T", name="many", password="pw")
    try:
        account = other(
            "T", "many", STANDARD.format("pw"),
            f"AccountDetailSet other /MAXTCP:4 /INTERVAL:1 /TTL:0 /HALF:{half} /BRIDGE:no "
            "/MONITOR:no /NOTRACK:no /NOQOS:no /DISABLEUDP:yes",
        )  # fmt: skip
        one.wait_established(account)

        def session() -> dict[str, Any]:
            (found,) = bed.service.sessions("T", "many")
            assert found["connections"] == 4
            return dict(found)

        found = eventually(session, within=20.0, every=0.1)
        assert (found["max_connections"], found["half_duplex"]) == (4, half == "yes")
        assert found["records"] == "own"
        status = one.status(account)
        assert status["Number of TCP Connections"] == "4"

        # From the adapter of this session, not over the first one.
        one.run("ip", "link", "set", one.adapter, "down")
        one.run("ip", "addr", "add", "10.77.0.9/24", "dev", "vpn_other")
        one.run("ip", "link", "set", "vpn_other", "up")
        ping(one, two.address)
        with Transfer(one, two, MEGABYTES_100 // 5) as transfer:
            transfer.wait_end()
        assert one.status(account)["Number of Established Sessions"] == "1 Times"
    finally:
        one.run("ip", "link", "set", one.adapter, "up")
        bed.service.ask("user.delete", hub="T", name="many")


# --- children die, and nobody notices -------------------------------------------------------------


@pytest.mark.parametrize("victims", [["core"], ["edge-1"], ["core", "edge-1"]], ids="+".join)
def test_kill_during_a_transfer(bed: Bed, same_sessions: None, victims: list[str]) -> None:
    one, two = bed.clients
    ping(one, two.address)
    with Transfer(one, two, MEGABYTES_100, seconds=4.0) as transfer:
        for part in (0.2, 0.5, 0.8):
            transfer.wait_part(part)
            bed.service.kill(*victims)
        transfer.wait_end()
    ping(two, one.address)


def test_known_flows_go_on_while_there_is_no_core(bed: Bed, same_sessions: None) -> None:
    """Its second death in a row is followed by a delay, which is made 5 s here."""
    one, two = bed.clients
    service = bed.service
    text = service.config.read_text()
    service.config.write_text(
        text + "[watchdog]\nbackoff_first = 5\nbackoff_jitter = 0\nhealthy_after = 3600\n"
    )
    try:
        service.cli("reload")
        eventually(service.is_whole, within=20.0)
        service.kill("core")
        ping(one, two.address)
        with Transfer(one, two, MEGABYTES_100, seconds=10.0) as transfer:
            transfer.wait_part(0.1)
            began = time.monotonic()
            os.kill(service.pid("core"), signal.SIGKILL)
            eventually(lambda: service.children()["core"]["state"] == "backoff")
            transfer.wait_part(0.3)
            assert service.children()["core"]["state"] == "backoff"
            service.pid("core")
            assert time.monotonic() - began > 4.5
            # Far from the 5 s; a busy machine makes pauses of its own.
            assert transfer.wait_end() < 3.0
        ping(two, one.address)
    finally:
        service.config.write_text(text)
        service.cli("reload")
        eventually(service.is_whole, within=20.0)


# --- a hub joined to the machine ------------------------------------------------------------------


@pytest.fixture
def no_bridge(bed: Bed) -> Iterator[None]:
    """Whatever becomes of the test."""
    yield
    for bridge in bed.service.json("bridge", "list"):
        bed.service.cli("bridge", "delete", bridge["device"])


@pytest.fixture
def inside(bed: Bed) -> Iterator[Host]:
    """A host on the Linux bridge "inside" of the server, which the hub is joined to."""
    host = Host()
    try:
        bed.server.run("ip", "link", "add", "inside", "type", "bridge")
        bed.server.run("ip", "link", "set", "inside", "up")
        bed.server.run(
            "ip", "link", "add", "port9", "type", "veth",
            "peer", "name", "eth0", "netns", str(host.pid),
        )  # fmt: skip
        bed.server.run("ip", "link", "set", "port9", "master", "inside", "up")
        host.run("ip", "addr", "add", "10.77.0.50/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        yield host
    finally:
        host.close()
        bed.server.run("ip", "link", "del", "inside")


def test_a_host_behind_the_bridge_and_a_client_reach_each_other(
    bed: Bed, inside: Host, no_bridge: None, same_sessions: None
) -> None:
    one = bed.clients[0]
    service = bed.service
    added = service.json("bridge", "add", "T", "hubtap", "--linux-bridge", "inside")
    assert added == {"device": "hubtap", "hub": "T", "linux_bridge": "inside", "state": "open"}
    ping(inside, one.address)
    ping(one, "10.77.0.50")
    bed.server.run("ip", "addr", "add", "192.0.2.1/24", "dev", "hubtap")

    def facts() -> dict[str, Any]:
        device = bed.server.device("hubtap")
        kept = {key: device[key] for key in ("ifindex", "address", "master", "flags")}
        return kept | {"addresses": [one["local"] for one in device["addr_info"]]}

    before = facts()
    assert before["master"] == "inside"
    with Transfer(inside, one, MEGABYTES_100 // 5, seconds=4.0) as transfer:
        for part, victims in ((0.2, ["core"]), (0.4, ["edge-1"]), (0.6, ["core", "edge-1"])):
            transfer.wait_part(part)
            service.kill(*victims)
            assert facts() == before
        transfer.wait_end()
    service.cli("reload")
    assert facts() == before
    ping(one, "10.77.0.50")
    learnt = {entry["port"] for entry in service.json("mac", "list", "T")}
    assert "bridge hubtap" in learnt

    service.cli("bridge", "delete", "hubtap")
    assert service.json("bridge", "list") == []
    eventually(lambda: "hubtap" not in bed.server.run("ip", "link"))


def test_a_bridge_that_the_system_refuses_is_refused_with_the_cause(
    bed: Bed, no_bridge: None
) -> None:
    for words, cause in (
        (("lo",), "lo: .* no TAP"),
        (("hubtap", "--linux-bridge", "nosuch"), "hubtap .*nosuch"),
    ):
        with pytest.raises(AssertionError, match=cause):
            bed.service.cli("bridge", "add", "T", *words)
    assert bed.service.json("bridge", "list") == []
    assert "hubtap" not in bed.server.run("ip", "link")


def test_a_bridge_is_there_again_after_the_service_was(bed: Bed, no_bridge: None) -> None:
    """Stopped, deleted under it, refused at the start: the rest serves; then it is given."""
    service, one = bed.service, bed.clients[0]
    service.stop()
    assert "state" not in service.json("bridge", "add", "T", "hubtap", "--linux-bridge", "later")
    service.start()
    (bridge,) = service.json("bridge", "list")
    assert re.match("refused: bridge hubtap: .*later", bridge["state"])
    bed.server.run("ip", "link", "add", "later", "type", "bridge")
    bed.server.run("ip", "link", "set", "later", "up")
    try:
        service.cli("reload")
        eventually(lambda: service.json("bridge", "list")[0]["state"] == "open")
        bed.server.run("ip", "addr", "add", "10.77.0.60/24", "dev", "later")
        one.wait_established()
        ping(one, "10.77.0.60")
        service.cli("bridge", "delete", "hubtap")
    finally:
        bed.server.run("ip", "link", "del", "later")
