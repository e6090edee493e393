"""A whole core in its own process, with a scripted edge at its channel."""

import fcntl
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn.channel import (
    ALL_FLOWS,
    MAX_NUMBER,
    POISONED,
    VERSION,
    Adopted,
    Closed,
    Counts,
    EdgeDrop,
    Flow,
    FlowSeen,
    Frames,
    FramesOut,
    Hello,
    Mode,
    Opened,
    Present,
    Refusal,
    Replay,
    Replayed,
    Request,
    State,
    Totals,
    Unflow,
    join_blocks,
)
from pkvpn.core import main as core
from pkvpn.core.control import Control
from pkvpn.core.hub import Hub
from pkvpn.core.login import LoginDesk
from pkvpn.core.poison import FRAME_DEATHS, HUB_DEATHS
from pkvpn.watchdog.control import ControlError
from tests.core.desk import PROBE, SIGNATURE, additional, login, pack_of, read
from tests.core.fake_child import Edge, Tree
from tests.core.test_hub import EVERYBODY, frame, mac
from tests.support import eventually

pytestmark = pytest.mark.slow

A, B = mac(1), mac(2)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    tree = Tree(tmp_path)
    tree.add_accounts()
    yield tree
    tree.close()


@pytest.fixture
def edge(tree: Tree) -> Edge:
    tree.start()
    edge = tree.edges[0]
    edge.begin()
    return edge


def two_clients(edge: Edge) -> tuple[State, State]:
    """Logged in, and each knows the other: the flows both ways are taught."""
    one, _ = edge.log_in(1)
    two, _ = edge.log_in(2, "u2", "pw2")
    edge.send(one.conn, frame(EVERYBODY, A))
    assert edge.receive() == ((two.conn,), [frame(EVERYBODY, A)])
    edge.send(two.conn, frame(A, B))
    assert edge.receive() == ((one.conn,), [frame(A, B)])
    assert edge.hear(Flow) == Flow(two.conn, A + B, one.conn)
    edge.send(one.conn, frame(B, A))
    assert edge.receive() == ((two.conn,), [frame(B, A)])
    assert edge.hear(Flow) == Flow(one.conn, B + A, two.conn)
    return one, two


def respawn(tree: Tree, edge: Edge) -> int:
    """Kill the core and start another; the epoch of its Hello."""
    tree.end_core()
    tree.start()
    return edge.hear(Hello).epoch


def error_of(state: State) -> int:
    return pack_of(state.reply).get_int("error")


# --- logins


def test_a_stock_client_logs_in(edge: Edge) -> None:
    conn = edge.open(1)
    probe = edge.request(conn, 1, PROBE)
    assert read(probe.reply).status == 200
    hello = edge.request(conn, 2, SIGNATURE)
    assert (hello.mode, hello.timeout, hello.key_update) == (Mode.HTTP, 0.0, False)
    random = pack_of(hello.reply).get_data("random")
    welcome = edge.request(conn, 3, login(random=random))
    assert (welcome.mode, welcome.timeout, welcome.close) == (Mode.BLOCKS, 60.0, "")
    assert welcome.key_update
    assert pack_of(welcome.reply).get_str("session_name") == "SID-U1-1"


def test_every_connection_has_a_random_of_its_own(edge: Edge) -> None:
    assert len({edge.greet(i)[2] for i in range(1, 5)}) == 4


def test_a_wrong_password_is_told_and_the_connection_stays(edge: Edge) -> None:
    conn, _, random = edge.greet(1)
    refused = edge.request(conn, 2, login(password="no", random=random))
    assert (error_of(refused), refused.mode) == (9, Mode.HTTP)
    assert edge.request(conn, 3, login(random=random)).mode is Mode.BLOCKS


def test_what_is_no_request_closes_the_connection(edge: Edge) -> None:
    conn = edge.open(1)
    state = edge.request(conn, 1, b"?")
    assert (state.mode, state.reply) == (Mode.CLOSING, b"")
    assert state.close != ""


def test_frames_of_those_who_are_there_do_not_wait_for_a_storm_of_logins(
    tree: Tree, edge: Edge
) -> None:
    one, two = two_clients(edge)
    waiting = [edge.open(counter) for counter in range(10, 60)]
    eventually(lambda: tree.ask("status")["connections"] == 2 + len(waiting))
    tree.send_signal(signal.SIGSTOP)
    edge.say(*(Request(conn, 1, SIGNATURE) for conn in waiting), Closed(one.conn, "it left"))
    edge.send(two.conn, frame(EVERYBODY, B))
    tree.send_signal(signal.SIGCONT)
    # It arrives because the end of its receiver is behind the storm.
    assert edge.receive() == ((one.conn,), [frame(EVERYBODY, B)])
    for _ in waiting:
        assert edge.hear(State).reply


def test_what_is_no_message_costs_the_edge_nothing_but_itself(tree: Tree, edge: Edge) -> None:
    for sock in (edge.control, edge.frames):
        for garbage in (b"", b"\xff", b"\x02" + bytes(65535), bytes(65600)):
            sock.send(garbage)
    edge.log_in(1)
    assert tree.ask("status")["incarnation"] == 1


def test_a_request_that_comes_again_gets_the_same_answer(edge: Edge) -> None:
    state, _ = edge.log_in(1)
    edge.say(Request(state.conn, 2, login()))
    assert edge.hear(State) == state


def test_half_duplex_connections_have_their_modes(edge: Edge) -> None:
    first, welcome = edge.log_in(1, max_connection=4, half_connection=True)
    assert first.mode is Mode.BLOCKS_IN
    modes = []
    for counter in (2, 3, 4):
        conn, _, _ = edge.greet(counter)
        modes.append(edge.request(conn, 2, additional(welcome.session_key)).mode)
    assert modes == [Mode.BLOCKS_OUT, Mode.BLOCKS_OUT, Mode.BLOCKS_IN]
    other, _ = edge.log_in(9, "u2", "pw2")
    edge.send(other.conn, frame(EVERYBODY, B))
    assert edge.receive()[0][0] in (edge.conn(2), edge.conn(3))


def test_the_canary_hears_itself(tree: Tree, edge: Edge) -> None:
    state, _ = edge.log_in(1, "canary", tree.canary.hex(), ".canary")
    edge.send(state.conn, b"any frame will do")
    assert edge.receive() == ((state.conn,), [b"any frame will do"])
    assert tree.ask("status")["sessions"] == 0
    assert tree.ask("session.list") == []
    edge.say(Closed(state.conn, "it left"))
    eventually(lambda: tree.ask("status")["connections"] == 0)


# --- frames and flows


def test_frames_find_their_way_and_flows_are_taught(tree: Tree, edge: Edge) -> None:
    one, two = two_clients(edge)
    drops = tuple(3 if why is EdgeDrop.SLOW_CLIENT else 0 for why in EdgeDrop)
    edge.say(Counts(one.conn, 10, 1000, 20, 2000, drops))
    refusals = tuple(7 if why is Refusal.HANDSHAKE else 0 for why in Refusal)
    edge.say(Totals(drops, refusals))
    edge.send(one.conn, frame(B, A, size=1700))
    both = {"slow client": 3, "oversize": 1}
    listed = eventually(lambda: [s for s in tree.ask("session.list") if s["drops"] == both])
    assert (listed[0]["frames_in"], listed[0]["bytes_out"]) == (10, 2000)
    assert tree.ask("hub.show", name="T")["drops"] == both
    status = eventually(lambda: (told := tree.ask("status"))["refused"] and told)
    assert (status["drops"], status["refused"]) == (both, {"failed handshakes": 7})
    assert status["records"] == {"own": 2}
    (first, second) = tree.ask("connection.list")
    assert (first["records"], first["session"]) == ("own", "SID-U1-1")
    assert tree.ask("connection.list", after=first["id"]) == [second]
    assert {entry["mac"] for entry in tree.ask("mac.list", hub="T")} == {A.hex(":"), B.hex(":")}
    assert tree.ask("hub.show", name="t")["flows"] == 2
    edge.say(Closed(two.conn, "end of file"))
    assert edge.hear(Unflow) == Unflow(two.conn, ALL_FLOWS)
    # What a client had dropped does not go with it.
    tree.ask("session.kick", hub="T", name="SID-U1-1")
    shown = tree.ask("hub.show", name="T")
    assert (shown["drops"], shown["frames_in"]) == (both, 10)


def test_a_mac_that_moves_takes_its_flows_with_it(edge: Edge) -> None:
    one, two = two_clients(edge)
    three, _ = edge.log_in(3, "anon", "")
    edge.send(three.conn, frame(EVERYBODY, B))
    assert {edge.hear(Unflow), edge.hear(Unflow)} == {
        Unflow(one.conn, B + A),
        Unflow(two.conn, A + B),
    }


def test_edges_forward_to_each_other_without_flows(tmp_path: Path) -> None:
    tree = Tree(tmp_path, edges=2)
    try:
        tree.add_accounts()
        tree.start()
        first, second = tree.edges
        for edge in tree.edges:
            edge.begin()
        one, _ = first.log_in(1)
        two, _ = second.log_in(1, "u2", "pw2")
        first.send(one.conn, frame(EVERYBODY, A))
        assert second.receive() == ((two.conn,), [frame(EVERYBODY, A)])
        second.send(two.conn, frame(A, B))
        assert first.receive() == ((one.conn,), [frame(A, B)])
        assert tree.ask("status")["flows"] == 0
        assert first.silent()
        assert second.silent()
    finally:
        tree.close()


def test_an_edge_that_reads_no_frames_still_hears_a_kick(tree: Tree, edge: Edge) -> None:
    one, _ = edge.log_in(1)
    two, welcome = edge.log_in(2, "u2", "pw2")
    for _ in range(100):
        edge.send(one.conn, *[frame(EVERYBODY, A, 1500)] * 40)
    eventually(lambda: tree.ask("hub.show", name="T")["drops"].get("queue full", 0) > 0, within=20)
    tree.ask("session.kick", hub="T", name=welcome.session_name)
    assert edge.hear(State).conn == two.conn


def test_a_bridge_is_a_port_like_any_other(tree: Tree) -> None:
    tap = tree.add_tap("tap0")
    tree.start()
    edge = tree.edges[0]
    edge.begin()
    with tap:
        assert tree.ask("bridge.add", hub="T", device="tap0")["state"] == "open"
        one, _ = edge.log_in(1)
        edge.send(one.conn, frame(EVERYBODY, A))
        assert tap.recv(2000) == frame(EVERYBODY, A)
        tap.send(frame(A, B))
        assert edge.receive() == ((one.conn,), [frame(A, B)])
        edge.send(one.conn, frame(B, A))
        assert tap.recv(2000) == frame(B, A)
        respawn(tree, edge)
        edge.replay(0)
        assert tree.ask("bridge.list")[0]["state"] == "open"
        tree.ask("bridge.delete", device="tap0")
        assert tree.ask("bridge.list") == []


# --- operators


def test_a_kick_closes_and_holds_in_every_later_core(tree: Tree, edge: Edge) -> None:
    _, _ = two_clients(edge)
    listed = tree.ask("session.list", hub="t")
    assert [one["name"] for one in listed] == ["SID-U1-1", "SID-U2-2"]
    assert tree.ask("session.kick", hub="T", name="sid-u1-1")["kicked"] == ["SID-U1-1"]
    assert edge.hear(Unflow) == Unflow(edge.conn(1), ALL_FLOWS)
    kicked = edge.hear(State)
    assert (kicked.conn, kicked.mode, kicked.close) == (edge.conn(1), Mode.CLOSING, "kicked")
    with pytest.raises(ControlError, match="no session 'SID-U1-1'"):
        tree.ask("session.kick", hub="T", name="SID-U1-1")


def test_the_key_of_a_kicked_session_is_answered_with_13(tree: Tree, edge: Edge) -> None:
    state, welcome = edge.log_in(1)
    tree.ask("session.kick", hub="T", name=welcome.session_name)
    assert edge.hear(State).conn == state.conn
    conn, greeted, _ = edge.greet(2)
    assert error_of(edge.request(conn, 2, additional(welcome.session_key))) == 13
    epoch = respawn(tree, edge)
    # The close was sent and not applied: the new core sees the session as it was.
    edge.replay(epoch, state, greeted)
    closing = edge.hear(State)
    assert (closing.conn, closing.number, closing.mode) == (state.conn, 3, Mode.CLOSING)
    assert error_of(edge.request(conn, 2, additional(welcome.session_key))) == 13


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("user.delete", {"hub": "T", "name": "u1"}),
        ("user.passwd", {"hub": "T", "name": "u1", "password": "other"}),
        ("hub.set", {"name": "T", "online": False}),
        ("hub.delete", {"name": "T"}),
    ],
)
def test_a_change_of_accounts_is_in_force_at_once(
    tree: Tree, edge: Edge, verb: str, args: dict[str, object]
) -> None:
    state, _ = edge.log_in(1)
    tree.ask(verb, **args)
    closing = edge.hear(State)
    assert (closing.conn, closing.mode) == (state.conn, Mode.CLOSING)


def test_a_new_user_logs_in_at_once_and_after_a_kill(tree: Tree, edge: Edge) -> None:
    tree.ask("hub.add", name="New")
    tree.ask("user.add", hub="new", name="neo", password="secret")
    edge.replay(respawn(tree, edge))
    assert edge.log_in(1, "neo", "secret", "NEW")[0].mode is Mode.BLOCKS


def test_refusals_reach_the_operator(tree: Tree, edge: Edge) -> None:
    with pytest.raises(ControlError, match="there is no hub 'no'"):
        tree.ask("user.list", hub="no")


# --- what survives a core


def test_sessions_and_flows_survive_a_core(tree: Tree, edge: Edge) -> None:
    one, two = two_clients(edge)
    epoch = respawn(tree, edge)
    edge.replay(epoch, one, two, flows=((one.conn, B + A), (two.conn, A + B)))
    taught = {edge.hear(Flow), edge.hear(Flow)}
    assert taught == {Flow(one.conn, B + A, two.conn), Flow(two.conn, A + B, one.conn)}
    assert [s["name"] for s in tree.ask("session.list")] == ["SID-U1-1", "SID-U2-2"]
    edge.send(one.conn, frame(B, A))
    assert edge.receive() == ((two.conn,), [frame(B, A)])
    assert edge.log_in(3)[1].session_name == "SID-U1-3"


@pytest.mark.parametrize("sender_first", [True, False])
def test_frames_that_come_before_the_replay_are_not_lost(
    tree: Tree, edge: Edge, sender_first: bool
) -> None:
    one, two = two_clients(edge)
    tree.end_core()
    edge.send(one.conn, frame(EVERYBODY, A))
    tree.start()
    edge.send(one.conn, frame(EVERYBODY, A))
    epoch = edge.hear(Hello).epoch
    edge.replay(epoch, *((one, two) if sender_first else (two, one)))
    assert edge.receive() == ((two.conn,), [frame(EVERYBODY, A)] * 2)


def test_a_login_goes_on_in_the_next_core(tree: Tree, edge: Edge) -> None:
    conn, greeted, random = edge.greet(1)
    tree.end_core()
    request = Request(conn, 2, login(random=random))
    edge.say(request)
    tree.start()
    epoch = edge.hear(Hello).epoch
    edge.replay(epoch, greeted)
    edge.say(request)
    state = edge.hear(State)
    assert (state.number, state.mode) == (2, Mode.BLOCKS)
    assert edge.hear(State) == state


def test_a_session_without_connections_comes_back_by_its_key(tree: Tree, edge: Edge) -> None:
    _, welcome = edge.log_in(1)
    epoch = respawn(tree, edge)
    edge.replay(epoch)
    conn, _, _ = edge.greet(2)
    state = edge.request(conn, 2, additional(welcome.session_key))
    assert (error_of(state), state.mode, state.key_update) == (0, Mode.BLOCKS, True)
    assert tree.ask("session.list")[0]["name"] == welcome.session_name


def test_a_state_that_cannot_be_read_ends_one_connection(tree: Tree, edge: Edge) -> None:
    one, two = two_clients(edge)
    epoch = respawn(tree, edge)
    edge.replay(epoch, one._replace(blob=b"\xffnonsense"), two)
    closing = edge.hear(State)
    assert (closing.conn, closing.mode) == (one.conn, Mode.CLOSING)
    assert [s["name"] for s in tree.ask("session.list")] == ["SID-U2-2"]


def test_a_core_serves_after_a_while_without_a_silent_edge(tmp_path: Path) -> None:
    tree = Tree(tmp_path, edges=2, replay_timeout=0.3)
    try:
        tree.add_accounts()
        tree.start()
        edge = tree.edges[0]
        edge.begin()
        assert edge.log_in(1)[0].mode is Mode.BLOCKS
        assert tree.ask("status")["loading"] is True
    finally:
        tree.close()


# --- what survives an edge


def test_a_new_edge_gets_again_what_it_has_lost(tree: Tree, edge: Edge) -> None:
    one, two = two_clients(edge)
    three, _ = edge.log_in(3, "anon", "")
    conn, greeted, random = edge.greet(4)
    welcome = edge.request(conn, 2, login(random=random))
    edge.say(Adopted(VERSION))
    epoch = edge.hear(Hello).epoch
    # It has not applied the welcome, and three is gone.
    edge.replay(epoch, one, two, greeted)
    assert edge.hear(State) == welcome
    taught = {edge.hear(Flow), edge.hear(Flow)}
    assert taught == {Flow(one.conn, B + A, two.conn), Flow(two.conn, A + B, one.conn)}
    orphan = next(s for s in tree.ask("session.list") if s["user"] == "anon")
    assert orphan["connections"] == 0
    assert three.conn not in {one.conn, two.conn}


def test_an_edge_whose_predecessor_told_all_names_only_who_is_there(tree: Tree, edge: Edge) -> None:
    one, two = two_clients(edge)
    edge.log_in(3, "anon", "")
    edge.say(Adopted(VERSION))
    epoch = edge.hear(Hello).epoch
    # It has not seen the last State of one, and has nothing of a third; nobody is replayed.
    edge.say(Present(((one.conn, one.number - 1), (two.conn, two.number))), Replayed(epoch))
    assert edge.hear(State) == one
    flows = {(edge.hear(Flow).conn) for _ in range(2)}
    assert flows == {one.conn, two.conn}
    edge.send(one.conn, frame(EVERYBODY, A))
    assert edge.receive() == ((two.conn,), [frame(EVERYBODY, A)])
    orphan = next(s for s in tree.ask("session.list") if s["user"] == "anon")
    assert orphan["connections"] == 0


def test_an_edge_of_another_version_is_not_heeded_until_it_is_replaced(edge: Edge) -> None:
    one, two = two_clients(edge)
    edge.say(Adopted(VERSION + 1))
    edge.say(Closed(one.conn, "in another language"))
    edge.say(Adopted(VERSION))
    epoch = edge.hear(Hello).epoch
    edge.say(Present(((one.conn, one.number), (two.conn, two.number))), Replayed(epoch))
    assert {edge.hear(Flow).conn for _ in range(2)} == {one.conn, two.conn}


def test_a_flow_that_does_not_hold_is_withdrawn_when_an_edge_names_it(edge: Edge) -> None:
    one, _ = two_clients(edge)
    assert edge.silent()
    key = mac(9) + A
    edge.say(FlowSeen(one.conn, key))
    assert edge.hear(Unflow) == Unflow(one.conn, key)


# --- what goes wrong


def test_bytes_that_are_no_message_are_ignored(edge: Edge) -> None:
    for data in (b"x", b"\x02", os.urandom(100)):
        edge.control.send(data)
        edge.frames.send(data)
    edge.say(Replayed(1), Closed(edge.conn(77), "never seen"), Request(edge.conn(78), 1, b""))
    assert edge.log_in(1)[0].mode is Mode.BLOCKS


def test_a_request_that_kills_two_cores_is_not_given_to_a_third(tree: Tree, edge: Edge) -> None:
    def die(*_args: object) -> None:
        os._exit(9)

    def poison() -> None:
        LoginDesk.answer = die  # type: ignore[method-assign, assignment]

    conn, greeted, _ = edge.greet(1)
    tree.end_core()
    for _ in range(2):
        tree.start(poison)
        edge.replay(edge.hear(Hello).epoch, greeted)
        edge.say(Request(conn, 2, b"the one"))
        assert tree.wait(tree.pid) == 9
        tree.pid = 0
    tree.start(poison)
    edge.replay(edge.hear(Hello).epoch, greeted)
    edge.say(Request(conn, 2, b"the one"))
    state = edge.hear(State)
    assert (state.conn, state.mode) == (conn, Mode.CLOSING)
    # Nor is what comes from the same address, until somebody says so.
    assert edge.request(edge.open(2), 1, SIGNATURE).close == "in quarantine"
    (kept_out,) = tree.ask("quarantine.list")
    assert (kept_out["name"], kept_out["why"]) == ("192.0.2.1", "cores died of a request")
    tree.end_core()
    tree.start()
    edge.replay(edge.hear(Hello).epoch)
    assert edge.request(edge.open(3), 1, SIGNATURE).close == "in quarantine"
    tree.ask("quarantine.lift", name="192.0.2.1")
    edge.log_in(4)
    assert tree.ask("status")["quarantine"] == 0


def test_whose_frames_kill_cores_is_kept_out_and_nobody_else(tree: Tree, edge: Edge) -> None:
    def die(*_args: object) -> None:
        os._exit(9)

    def poison() -> None:
        Hub.switch = die  # type: ignore[method-assign, assignment]

    state, welcome = edge.log_in(1)
    tree.end_core()
    for _ in range(FRAME_DEATHS):
        tree.start(poison)
        edge.replay(edge.hear(Hello).epoch, state)
        edge.send(state.conn, frame(B, A))
        assert tree.wait(tree.pid) == 9
        tree.pid = 0
    tree.start()
    edge.replay(edge.hear(Hello).epoch, state)
    closed = edge.hear(State)
    assert (closed.conn, closed.close) == (state.conn, "cores died of it")
    assert [one["name"] for one in tree.ask("quarantine.list")] == ["t/u1"]
    conn, _, random = edge.greet(2)
    assert error_of(edge.request(conn, 2, login(random=random))) == 105
    conn, _, _ = edge.greet(3)
    assert error_of(edge.request(conn, 2, additional(welcome.session_key))) == 13
    edge.log_in(4, "u2", "pw2")
    tree.ask("quarantine.lift", name="T/u1")
    edge.log_in(5)


def test_frames_of_a_hub_that_kill_whoever_sends_them_are_kept_out_and_nobody_is(
    tree: Tree, edge: Edge
) -> None:
    """As where what its members have taught it is what kills: all their sessions stay."""

    def die(*_args: object) -> None:
        os._exit(9)

    def poison() -> None:
        switch = Hub.switch

        def switch_or_die(self: Hub, *args: Any) -> Any:
            return die() if self.name == "T" else switch(self, *args)

        Hub.switch = switch_or_die  # type: ignore[method-assign, assignment]

    tree.ask("user.add", hub="T", name="u3", auth="password", password="pw3")
    tree.ask("hub.add", name="OTHER")
    for name in ("v1", "v2"):
        tree.ask("user.add", hub="OTHER", name=name, auth="password", password="pw")
    members = [edge.log_in(number, f"u{number}", f"pw{number}")[0] for number in (1, 2, 3)]
    others = [edge.log_in(number, f"v{number - 3}", "pw", "OTHER")[0] for number in (4, 5)]
    everybody = [*members, *others]
    tree.end_core()
    for number in range(HUB_DEATHS):
        tree.start(poison)
        edge.replay(edge.hear(Hello).epoch, *everybody)
        edge.send(members[number % 3].conn, frame(EVERYBODY, A))
        assert tree.wait(tree.pid) == 9
        tree.pid = 0
    tree.start(poison)
    edge.replay(edge.hear(Hello).epoch, *everybody)
    for member in members:
        edge.send(member.conn, frame(EVERYBODY, A))
    edge.send(others[0].conn, frame(EVERYBODY, B))
    assert edge.receive() == ((others[1].conn,), [frame(EVERYBODY, B)])
    (kept_out,) = tree.ask("quarantine.list")
    assert kept_out["name"] == "t/"
    assert kept_out["why"] == "cores died of its frames, whoever sent them"
    status = tree.ask("status")
    assert (status["sessions"], status["quarantine"]) == (5, 1)
    assert status["lost"] == {"frames of hubs in quarantine": 3}
    # Nor do they pass the next core, until somebody says so.
    tree.end_core()
    tree.start()
    edge.replay(edge.hear(Hello).epoch, *everybody)
    edge.send(members[0].conn, frame(EVERYBODY, A))
    eventually(lambda: tree.ask("status")["lost"])
    tree.ask("quarantine.lift", name="T/")
    edge.send(members[0].conn, frame(EVERYBODY, A))
    assert edge.receive() == (tuple(one.conn for one in members[1:]), [frame(EVERYBODY, A)])
    assert edge.silent()


def test_what_a_bridge_brings_and_cores_die_of_is_kept_out(tree: Tree) -> None:
    def poison() -> None:
        Hub.switch = lambda *_args: os._exit(9)  # type: ignore[method-assign]

    device = tree.add_tap("tap0")
    try:
        tree.start()
        edge = tree.edges[0]
        edge.begin()
        tree.ask("bridge.add", hub="T", device="tap0")
        member, _ = edge.log_in(1)
        tree.end_core()
        for _ in range(FRAME_DEATHS):
            tree.start(poison)
            edge.replay(edge.hear(Hello).epoch, member)
            device.send(frame(EVERYBODY, B))
            assert tree.wait(tree.pid) == 9
            tree.pid = 0
        tree.start(poison)
        edge.replay(edge.hear(Hello).epoch, member)
        device.send(frame(EVERYBODY, B))
        eventually(lambda: tree.ask("status")["lost"] == {"frames of hubs in quarantine": 1})
        assert [one["name"] for one in tree.ask("quarantine.list")] == ["t/"]
        assert tree.ask("status")["sessions"] == 1
    finally:
        device.close()


def test_what_kills_edges_puts_its_user_into_quarantine(tree: Tree, edge: Edge) -> None:
    state, _ = edge.log_in(1)
    edge.say(Closed(state.conn, POISONED))
    eventually(lambda: tree.ask("quarantine.list")[0]["name"] == "t/u1")
    canary, _ = edge.log_in(2, "canary", tree.canary.hex(), ".canary")
    edge.say(Closed(canary.conn, POISONED))
    eventually(lambda: tree.ask("status")["connections"] == 0)
    assert tree.ask("status")["quarantine"] == 1


def test_a_core_whose_store_thread_dies_dies_of_the_same(
    tree: Tree, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_control: Control) -> None:
        raise ZeroDivisionError

    def break_refresh() -> None:
        Control.refresh = fail  # type: ignore[method-assign, assignment]

    tree.start(break_refresh)
    tree.edges[0].begin()
    assert tree.wait(tree.pid) == 1
    tree.pid = 0
    # Whoever reads the report sees where it stood.
    assert "in fail\n    raise ZeroDivisionError" in capfd.readouterr().err


def test_a_bug_in_a_login_costs_one_connection(tree: Tree) -> None:
    def fail(*_args: object) -> None:
        raise ZeroDivisionError

    def break_additional() -> None:
        LoginDesk._add_connection = fail  # type: ignore[method-assign, assignment]

    tree.start(break_additional)
    edge = tree.edges[0]
    edge.begin()
    conn, _, _ = edge.greet(1)
    assert edge.request(conn, 2, additional(bytes(20))).mode is Mode.CLOSING
    assert edge.log_in(2)[0].mode is Mode.BLOCKS


def test_an_edge_has_no_say_in_connections_of_another(tmp_path: Path) -> None:
    tree = Tree(tmp_path, edges=2)
    try:
        tree.add_accounts()
        tree.start()
        good, bad = tree.edges
        good.begin()
        bad.begin()
        state, _ = good.log_in(1)
        other, _ = bad.log_in(1, "u2", "pw2")
        bad.say(Closed(state.conn, "not mine"), Frames(state.conn, join_blocks([frame(B, A)])))
        bad.say(Request(good.conn(9), 1, SIGNATURE), Opened(good.conn(9), "x:1", "y:1", "z"))
        bad.send(other.conn, frame(EVERYBODY, B))
        assert good.receive() == ((state.conn,), [frame(EVERYBODY, B)])
        assert tree.ask("session.list", hub="T")[0]["connections"] == 1
        assert tree.ask("status")["connections"] == 2
    finally:
        tree.close()


def test_no_edge_can_count_a_core_to_death(edge: Edge) -> None:
    conn = edge.conn(1)
    for number in (MAX_NUMBER + 1, (1 << 64) - 1):
        edge.say(Replay(conn, number, Mode.HTTP, "x:1", "y:1", "z", b"no state"))
    edge.say(Opened(conn, "x:1", "y:1", "z"), Request(conn, (1 << 64) - 1, SIGNATURE))
    edge.say(Closed(conn, "it left"))
    assert edge.log_in(2)


def test_no_edge_can_fill_the_memory_of_a_core(tree: Tree) -> None:
    tree.start(lambda: setattr(core, "_MAX_CONNECTIONS", 3))
    (edge,) = tree.edges
    edge.begin()
    for counter in range(1, 9):
        edge.open(counter)
    eventually(lambda: tree.ask("status")["lost"] == {"connections beyond all limits": 5})
    edge.say(Present(tuple((edge.conn(counter), 1) for counter in range(20, 30))))
    edge.say(*(Closed(edge.conn(counter), "it left") for counter in range(1, 9)))
    edge.log_in(9)
    edge.say(Closed(edge.conn(9), "it left"))
    for counter in range(10, 13):
        edge.log_in(counter)


@pytest.mark.parametrize("kind", ["pipe", "sealed"])
def test_a_core_does_not_die_of_what_the_one_before_gave(tree: Tree, kind: str) -> None:
    os.close(tree.given.pop(b"core mark"))
    if kind == "pipe":
        tree.given[b"core mark"], write = os.pipe()
        os.close(write)
    else:
        memory = os.memfd_create("mark", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        tree.given[b"core mark"] = memory
    tree.may_give = True
    tree.start()
    edge = tree.edges[0]
    edge.begin()
    assert edge.log_in(1)


def test_a_stop_ends_the_core_in_peace(tree: Tree, edge: Edge) -> None:
    edge.log_in(1)
    assert tree.end_core(signal.SIGTERM) == 0


def test_a_core_without_a_usable_database_says_why(tree: Tree) -> None:
    database = sqlite3.connect(Path(tree.state_dir) / "pkvpn.db")
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(AssertionError, match="schema version 9"):
        tree.start()
    tree.wait(tree.pid)
    tree.pid = 0


def test_a_flood_is_heard_by_everybody_else(edge: Edge) -> None:
    states = [edge.log_in(i, "anon", "")[0] for i in range(1, 5)]
    edge.send(states[0].conn, frame(EVERYBODY, A))
    message = edge.hear(FramesOut)
    assert set(message.conns) == {state.conn for state in states[1:]}
