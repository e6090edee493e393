from pkvpn.core.flows import MAX_FLOWS_OF_CONNECTION, UNUSED_TIMEOUT, FlowBook, KnownFlow

A, B, C = (bytes([2, 0, 0, 0, 0, i]) for i in (1, 2, 3))
AB = KnownFlow(1, B + A)
BA = KnownFlow(2, A + B)
CA = KnownFlow(3, A + C)


def book() -> FlowBook:
    flows = FlowBook()
    assert flows.offer(AB, 2, 0.0)
    assert flows.offer(BA, 1, 0.0)
    assert flows.offer(CA, 1, 0.0)
    return flows


def test_a_flow_is_taught_once_and_again_when_it_goes_elsewhere() -> None:
    flows = book()
    assert not flows.offer(AB, 2, 1.0)
    assert flows.offer(AB, 9, 1.0)
    assert flows.of_connection(1) == [(AB, 9)]


def test_a_mac_takes_the_flows_from_and_to_it() -> None:
    flows = book()
    assert set(flows.forget_mac(B)) == {AB, BA}
    assert flows.forget_mac(B) == []
    assert len(flows) == 1


def test_a_connection_takes_the_flows_from_and_to_it() -> None:
    flows = book()
    assert set(flows.forget_connection(1)) == {AB, BA, CA}
    assert len(flows) == 0


def test_a_flow_that_nobody_uses_ends() -> None:
    flows = book()
    assert flows.seen(AB, UNUSED_TIMEOUT)
    assert not flows.seen(KnownFlow(7, A + B), 0.0)
    assert set(flows.expire(UNUSED_TIMEOUT + 0.1)) == {BA, CA}
    assert AB in flows


def test_one_connection_has_a_limit() -> None:
    flows = FlowBook()
    for i in range(MAX_FLOWS_OF_CONNECTION):
        assert flows.offer(KnownFlow(1, i.to_bytes(12, "big")), 2, 0.0)
    assert not flows.offer(KnownFlow(1, b"\xff" * 12), 2, 0.0)
    assert flows.offer(KnownFlow(2, b"\xff" * 12), 1, 0.0)
    assert len(flows.forget_all()) == MAX_FLOWS_OF_CONNECTION + 1
    assert flows.forget_all() == []
