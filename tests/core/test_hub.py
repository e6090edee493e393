import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkvpn.channel import join_blocks, split_blocks
from pkvpn.core.flows import KnownFlow
from pkvpn.core.hub import MAX_FRAME, Drop, Hub, Port

EVERYBODY = b"\xff" * 6


def mac(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, number])


def frame(destination: bytes, source: bytes, size: int = 60, vlan: int | None = None) -> bytes:
    tag = b"" if vlan is None else struct.pack("!HH", 0x8100, 0xE000 | vlan)
    head = destination + source + tag + b"\x08\x00"
    return head + bytes(max(0, size - len(head)))


def sent(hub: Hub, port: Port, frames: list[bytes], now: float = 0.0) -> dict[str, list[bytes]]:
    """Switch, and return what each port gets."""
    blocks = join_blocks(frames)
    got: dict[str, list[bytes]] = {}
    for run in hub.switch(port, blocks, now)[0]:
        part = split_blocks(blocks[run.start : run.end])
        assert len(part) == run.frames
        for to in run.ports:
            got.setdefault(to.name, []).extend(part)
    return got


def hub_of(count: int, **settings: Any) -> tuple[Hub, list[Port]]:
    hub = Hub("T", **settings)
    return hub, [hub.join(str(i), None, 0.0) for i in range(count)]


def test_a_frame_to_everybody_goes_to_everybody_else() -> None:
    hub, (a, _, _) = hub_of(3)
    one = frame(EVERYBODY, mac(1))
    assert sent(hub, a, [one]) == {"1": [one], "2": [one]}


def test_a_frame_to_a_known_address_goes_there_only() -> None:
    hub, (a, b, _) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2))])
    one = frame(mac(2), mac(1))
    assert sent(hub, a, [one]) == {"1": [one]}


def test_a_frame_to_an_unknown_address_is_flooded() -> None:
    hub, (a, _, _) = hub_of(3)
    assert set(sent(hub, a, [frame(mac(9), mac(1))])) == {"1", "2"}


def test_a_frame_never_goes_back() -> None:
    hub, (a, b) = hub_of(2)
    sent(hub, a, [frame(EVERYBODY, mac(1)), frame(EVERYBODY, mac(3))])
    assert sent(hub, a, [frame(mac(3), mac(1))]) == {}
    assert a.drops == {Drop.SAME_PORT: 1}
    assert b.frames_out == 2


def test_a_run_of_frames_to_one_port_is_one_slice() -> None:
    hub, (a, b, c) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2)), frame(EVERYBODY, mac(3))])
    sent(hub, c, [frame(EVERYBODY, mac(4))])
    frames = [frame(mac(2), mac(1), 60 + i) for i in range(5)] + [frame(mac(3), mac(1))] * 3
    runs, candidates = hub.switch(a, join_blocks([*frames, frame(mac(4), mac(1))]), 0.0)
    assert [(run.ports, run.frames) for run in runs] == [((b,), 8), ((c,), 1)]
    assert candidates == {mac(2) + mac(1): b, mac(3) + mac(1): b, mac(4) + mac(1): c}


def test_an_address_moves_with_its_first_frame() -> None:
    hub, (a, b, c) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2))])
    sent(hub, c, [frame(EVERYBODY, mac(2))])
    assert set(sent(hub, a, [frame(mac(2), mac(1))])) == {"2"}


def test_what_is_no_frame_is_dropped_by_name() -> None:
    hub, (a, b) = hub_of(2)
    good = frame(EVERYBODY, mac(1))
    bad = [
        b"x",
        bytes(13),
        frame(EVERYBODY, mac(1), MAX_FRAME + 1),
        frame(EVERYBODY, mac(1), 3200),
        frame(EVERYBODY, bytes(6)),
        frame(mac(2), EVERYBODY),
        frame(mac(2), b"\x03" + bytes(5)),
        frame(mac(2), mac(2)),
    ]
    for one in bad:
        assert sent(hub, a, [good, one, good]) == {"1": [good, good]}
        assert sent(hub, a, [good, one]) == {"1": [good]}
    assert a.drops == {Drop.SHORT: 4, Drop.OVERSIZE: 4, Drop.BAD_SOURCE: 8}
    assert sent(hub, a, [frame(EVERYBODY, mac(1), MAX_FRAME)]) != {}
    assert b.drops == {}


def test_blocks_that_are_cut_lose_their_end_only() -> None:
    hub, (a, _) = hub_of(2)
    good = frame(EVERYBODY, mac(1))
    blocks = join_blocks([good, good])
    for size in range(65, len(blocks)):
        (run,) = hub.switch(a, blocks[:size], 0.0)[0]
        assert (run.start, run.end) == (0, 64)
    assert set(a.drops) == {Drop.MALFORMED}


def test_a_storm_is_limited_and_unicast_is_not() -> None:
    hub, (a, b) = hub_of(2, storm_frames=10)
    storm = [frame(EVERYBODY, mac(1))] * 50
    assert len(sent(hub, a, storm)["1"]) == 20
    assert a.drops == {Drop.STORM: 30}
    sent(hub, b, [frame(mac(1), mac(2))])
    assert len(sent(hub, a, [frame(mac(2), mac(1))] * 50)["1"]) == 50
    assert len(sent(hub, a, storm, now=1.0)["1"]) == 10
    assert len(sent(hub, a, storm, now=100.0)["1"]) == 20


def test_hubs_do_not_know_each_other() -> None:
    one, (a, b) = hub_of(2)
    other, (c, d) = hub_of(2)
    sent(one, b, [frame(EVERYBODY, mac(2))])
    sent(other, d, [frame(EVERYBODY, mac(2))])
    assert one.switch(a, join_blocks([frame(mac(2), mac(1))]), 0.0)[0][0].ports == (b,)
    assert other.switch(c, join_blocks([frame(mac(2), mac(1))]), 0.0)[0][0].ports == (d,)


def test_an_offline_hub_forwards_nothing() -> None:
    hub, (a, b) = hub_of(2)
    hub.set_online(online=False)
    assert sent(hub, a, [frame(EVERYBODY, mac(1))] * 2) == {}
    assert a.drops == {Drop.OFFLINE: 2}
    hub.set_online(online=True)
    assert sent(hub, a, [frame(EVERYBODY, mac(1))]) != {}
    assert b.frames_out == 1


def test_tags_are_separate_segments() -> None:
    hub, (a, b, c) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2), vlan=5)])
    assert set(sent(hub, a, [frame(mac(2), mac(1), vlan=5)])) == {"1"}
    assert set(sent(hub, a, [frame(mac(2), mac(1), vlan=6)])) == {"1", "2"}
    assert set(sent(hub, a, [frame(mac(2), mac(1))])) == {"1", "2"}
    assert c.frames_out == 3


def test_a_mac_that_is_seen_with_a_tag_makes_no_flow() -> None:
    hub, (a, b, c) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2))])
    sent(hub, a, [frame(EVERYBODY, mac(1))])
    flow = KnownFlow(1, mac(2) + mac(1))
    assert hub.offer_flow(flow, 2, 0.0)
    sent(hub, c, [frame(EVERYBODY, mac(2), vlan=5)])
    assert hub.take_withdrawn() == [flow]
    assert hub.switch(a, join_blocks([frame(mac(2), mac(1))]), 0.0)[1] == {}


def test_the_same_macs_with_and_without_a_tag_are_decided_apart() -> None:
    hub, (a, b, _) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2), vlan=5)])
    tagged, plain = frame(mac(2), mac(1), vlan=5), frame(mac(2), mac(1))
    for frames in ([tagged, plain], [plain, tagged], [tagged, plain, tagged]):
        got = sent(hub, a, frames)
        assert got == {"1": frames, "2": [plain]}
        assert hub.switch(a, join_blocks(frames), 0.0)[1] == {}


def test_a_tagged_frame_behind_a_plain_one_of_the_same_macs_is_looked_at() -> None:
    hub, (a, b, _) = hub_of(3)
    sent(hub, b, [frame(EVERYBODY, mac(2))])
    tagged, plain = frame(mac(2), mac(1), vlan=5), frame(mac(2), mac(1))
    assert sent(hub, a, [plain, frame(EVERYBODY, mac(1)), plain, tagged])["2"][-1] == tagged
    assert hub.switch(a, join_blocks([plain]), 0.0)[1] == {}


def test_a_port_that_leaves_takes_its_addresses_and_flows() -> None:
    hub, (a, b) = hub_of(2)
    sent(hub, b, [frame(EVERYBODY, mac(2))])
    sent(hub, a, [frame(mac(2), mac(1))])
    flow = KnownFlow(1, mac(2) + mac(1))
    hub.offer_flow(flow, 2, 0.0)
    hub.leave(b)
    assert hub.take_withdrawn() == [flow]
    assert sent(hub, a, [frame(mac(2), mac(1))]) == {}


def test_a_flow_that_only_the_edge_sees_keeps_its_source_young() -> None:
    hub, (a, b) = hub_of(2, ageing=100.0)
    sent(hub, b, [frame(EVERYBODY, mac(2))])
    sent(hub, a, [frame(mac(2), mac(1))])
    there, back = KnownFlow(1, mac(2) + mac(1)), KnownFlow(2, mac(1) + mac(2))
    hub.offer_flow(there, 2, 0.0)
    hub.offer_flow(back, 1, 0.0)
    for now in (50.0, 100.0, 150.0, 200.0):
        assert hub.flow_seen(there, a, now)
        assert hub.flow_seen(back, b, now)
        hub.expire(now)
    assert hub.take_withdrawn() == []
    hub.flow_seen(there, a, 290.0)
    hub.expire(301.0)
    assert set(hub.take_withdrawn()) == {there, back}
    assert not hub.flow_seen(there, a, 301.0)


def test_flows_of_an_earlier_core_teach_addresses_again() -> None:
    hub, (a, b) = hub_of(2)
    assert hub.relearn(mac(2) + mac(1), a, 0.0) is None
    assert hub.relearn(mac(1) + mac(2), b, 0.0) is a
    assert hub.relearn(mac(2) + mac(1), a, 0.0) is b
    assert hub.relearn(EVERYBODY + mac(1), a, 0.0) is None
    assert hub.relearn(mac(1) + EVERYBODY, a, 0.0) is None


def test_the_hub_of_the_canary_gives_back_what_it_gets() -> None:
    hub, (a, b) = hub_of(2, reflects=True)
    frames = [frame(EVERYBODY, mac(1)), b"anything"]
    assert sent(hub, a, frames) == {"0": frames}
    assert hub.switch(a, join_blocks(frames)[:-1], 0.0) == ([], {})
    assert (b.frames_out, len(hub.macs)) == (0, 0)


@given(st.binary(max_size=300))
def test_no_bytes_are_too_strange(blocks: bytes) -> None:
    hub, (a, _) = hub_of(2)
    for run in hub.switch(a, blocks, 0.0)[0]:
        split_blocks(blocks[run.start : run.end])
    Hub("canary", reflects=True).switch(a, blocks, 0.0)


class Switching(RuleBasedStateMachine):
    """The switch against a model of one dictionary, with near limits and known flows.

    The model knows where each address was seen last.  A frame of a flow that the book holds does
    not come to the switch: the model says where it must go at that moment.
    """

    AGEING = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub("T", ageing=self.AGEING, storm_frames=1_000_000)
        self.now = 0.0
        self.ports: dict[int, Port] = {}
        self.seen: dict[tuple[bytes, int], tuple[int, float]] = {}
        self.flows: dict[KnownFlow, int] = {}

    def where(self, address: bytes, vlan: int) -> int | None:
        number, at = self.seen.get((address, vlan), (0, -1e9))
        return number if self.now - at <= self.AGEING and number in self.ports else None

    def withdraw(self) -> None:
        for flow in self.hub.take_withdrawn():
            del self.flows[flow]

    @precondition(lambda self: len(self.ports) < 4)
    @rule()
    def join(self) -> None:
        port = self.hub.join("p", None, self.now)
        self.ports[port.number] = port

    @precondition(lambda self: self.ports)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.ports)))
        self.hub.leave(self.ports.pop(number))
        self.seen = {key: value for key, value in self.seen.items() if value[0] != number}
        self.withdraw()

    @precondition(lambda self: self.ports)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.ports)))
        words = data.draw(
            st.lists(
                st.tuples(
                    st.sampled_from([mac(1), mac(2), mac(2), EVERYBODY]),
                    st.sampled_from([mac(1), mac(2), mac(3)]),
                    st.sampled_from([-1, -1, 5]),
                ),
                min_size=1,
                max_size=6,
            )
        )
        frames = [
            frame(to, source, 60 + i, None if vlan < 0 else vlan)
            for i, (to, source, vlan) in enumerate(words)
        ]
        wanted: list[tuple[int, bytes]] = []
        for one, (to, source, vlan) in zip(frames, words, strict=True):
            if to == source:
                continue
            self.seen[source, vlan] = (number, self.now)
            at = None if to == EVERYBODY else self.where(to, vlan)
            targets = set(self.ports) - {number} if at is None else {at} - {number}
            wanted += [(target, one) for target in sorted(targets)]
        blocks = join_blocks(frames)
        runs, candidates = self.hub.switch(self.ports[number], blocks, self.now)
        got = [
            (port.number, one)
            for run in runs
            for one in split_blocks(blocks[run.start : run.end])
            for port in run.ports
        ]
        assert sorted(got) == sorted(wanted)
        self.withdraw()
        for key, port in candidates.items():
            flow = KnownFlow(number, key)
            if self.hub.offer_flow(flow, port.number, self.now):
                self.flows[flow] = port.number
        self.withdraw()

    @rule(step=st.sampled_from([2.0, 5.0, 11.0]))
    def wait(self, step: float) -> None:
        self.now += step
        self.hub.expire(self.now)
        self.withdraw()

    @precondition(lambda self: self.flows)
    @rule(data=st.data())
    def flow_is_used(self, data: st.DataObject) -> None:
        flow = data.draw(st.sampled_from(sorted(self.flows)))
        assert self.hub.flow_seen(flow, self.ports[flow.conn], self.now)
        self.seen[flow.key[6:], -1] = (flow.conn, self.now)
        self.withdraw()

    @invariant()
    def flows_go_where_the_switch_would_send(self) -> None:
        for flow, to_port in self.flows.items():
            assert flow in self.hub.flows
            for address, port in ((flow.key[:6], to_port), (flow.key[6:], flow.conn)):
                assert self.where(address, -1) == port
                assert self.where(address, 5) is None

    @invariant()
    def the_book_is_what_was_taught(self) -> None:
        assert len(self.hub.flows) == len(self.flows)


TestSwitching = Switching.TestCase
TestSwitching.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
