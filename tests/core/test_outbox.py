from hypothesis import given
from hypothesis import strategies as st

from pkvpn.channel import MAX_MESSAGE, FramesOut, decode_from_core, join_blocks, split_blocks
from pkvpn.core.outbox import MAX_CONNS, PER_CONNECTION, Outbox

FRAME = join_blocks([bytes(1000)])


def drained(outbox: Outbox) -> list[FramesOut]:
    messages = []
    while outbox:
        data = outbox.first()
        assert len(data) <= MAX_MESSAGE
        message = decode_from_core(data)
        assert isinstance(message, FramesOut)
        messages.append(message)
        outbox.sent()
    return messages


def test_what_follows_each_other_to_the_same_connections_is_one_message() -> None:
    outbox = Outbox()
    for conns in ((1,), (1,), (1, 2), (1,)):
        assert outbox.put(conns, FRAME) == []
    assert [(m.conns, len(m.blocks) // 1004) for m in drained(outbox)] == [
        ((1,), 2),
        ((1, 2), 1),
        ((1,), 1),
    ]


def test_a_message_that_was_encoded_does_not_grow() -> None:
    outbox = Outbox()
    outbox.put((1,), FRAME)
    first = outbox.first()
    outbox.put((1,), FRAME)
    assert outbox.first() == first
    assert len(drained(outbox)) == 2


def test_a_connection_that_takes_nothing_loses_its_own_frames_only() -> None:
    outbox = Outbox()
    fit = PER_CONNECTION // len(FRAME)
    assert [outbox.put((1,), FRAME) for _ in range(fit)] == [[]] * fit
    assert outbox.put((1,), FRAME) == [1]
    assert outbox.put((2, 1), FRAME) == [1]
    messages = drained(outbox)
    assert sum(len(m.blocks) for m in messages if m.conns == (1,)) == fit * len(FRAME)
    assert messages[-1].conns == (2,)
    assert outbox.put((1,), FRAME) == []


def test_a_flood_to_very_many_is_several_messages() -> None:
    outbox = Outbox()
    conns = tuple(range(1, 2 * MAX_CONNS + 10))
    outbox.put(conns, FRAME)
    assert tuple(conn for m in drained(outbox) for conn in m.conns) == conns


@given(st.lists(st.integers(14, 1600), min_size=1, max_size=300), st.integers(1, 700))
def test_blocks_are_cut_between_frames(sizes: list[int], count: int) -> None:
    frames = [bytes([i % 256]) * size for i, size in enumerate(sizes)]
    outbox = Outbox()
    conns = tuple(range(1, count + 1))
    outbox.put(conns, join_blocks(frames))
    got: dict[int, list[bytes]] = {conn: [] for conn in conns}
    for message in drained(outbox):
        for conn in message.conns:
            got[conn] += split_blocks(bytes(message.blocks))
    assert all(received == frames for received in got.values())
