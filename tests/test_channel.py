"""The messages between edge and core."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn import channel
from pkvpn.channel import ChannelError, Mode

U64 = st.integers(0, 2**64 - 1)
CONN = st.integers(1, 2**64 - 1)
TEXT = st.text(max_size=50).filter(lambda text: text.isprintable())
KEY = st.binary(min_size=12, max_size=12)
TIME = st.floats(0, 1e9)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "u": U64,
    "o": st.integers(0, channel.MAX_NUMBER),
    "v": st.integers(0, 255),
    "d": TIME,
    "f": st.booleans(),
    "m": st.sampled_from(Mode),
    "s": TEXT,
    "b": st.binary(max_size=200),
    "k": KEY,
    "c": CONN,
    "l": st.lists(CONN, min_size=1, max_size=5).map(tuple),
    "n": st.tuples(*[U64] * len(channel.EdgeDrop)),
    "q": st.tuples(*[U64] * len(channel.Refusal)),
    "p": st.lists(st.tuples(CONN, U64), max_size=5).map(tuple),
    "r": st.binary(max_size=200),
}
FROM_EDGE = channel._FROM_EDGE
FROM_CORE = channel._FROM_CORE


def messages(kinds: dict[int, tuple[type[Any], str]]) -> st.SearchStrategy[Any]:
    return st.sampled_from(list(kinds.values())).flatmap(
        lambda row: st.builds(row[0], *(FIELDS[field] for field in row[1]))
    )


def decode(data: bytes) -> Any:
    """Read a message of either direction."""
    return (channel.decode_from_edge if data[0] in FROM_EDGE else channel.decode_from_core)(data)


@given(messages(FROM_EDGE))
def test_what_an_edge_says_is_what_the_core_hears(message: Any) -> None:
    assert channel.decode_from_edge(channel.encode(message)) == message


@given(messages(FROM_CORE))
def test_what_the_core_says_is_what_an_edge_hears(message: Any) -> None:
    assert channel.decode_from_core(channel.encode(message)) == message


@given(messages(FROM_EDGE | FROM_CORE), st.data())
def test_a_message_cut_short_is_an_error_unless_its_last_field_is_the_rest(
    message: Any, data: Any
) -> None:
    encoded = channel.encode(message)
    size = data.draw(st.integers(1, len(encoded) - 1))
    try:
        seen = decode(encoded[:size])
    except ChannelError:
        return
    assert message.blocks.startswith(seen.blocks)


@given(messages(FROM_EDGE | FROM_CORE), st.binary(min_size=1, max_size=3))
def test_a_message_with_a_tail_is_an_error_unless_its_last_field_is_the_rest(
    message: Any, tail: bytes
) -> None:
    if hasattr(message, "blocks"):
        return
    with pytest.raises(ChannelError, match="too many"):
        decode(channel.encode(message) + tail)


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_channel_error(data: bytes) -> None:
    for decode in (channel.decode_from_edge, channel.decode_from_core):
        try:
            decode(data)
        except ChannelError:
            pass


@given(messages(FROM_EDGE | FROM_CORE), st.data())
def test_no_flipped_byte_raises_anything_but_a_channel_error(message: Any, data: Any) -> None:
    encoded = bytearray(channel.encode(message))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    for decode in (channel.decode_from_edge, channel.decode_from_core):
        try:
            decode(bytes(encoded))
        except ChannelError:
            pass


def test_the_layout_of_a_state_is_the_one_that_is_written_above() -> None:
    state = channel.State(2**56 + 5, 3, b"ok", Mode.BLOCKS, "", 2.0, True, b"blob")

    assert channel.encode(state).hex(" ") == (
        "12 01 00 00 00 00 00 00 05 00 00 00 00 00 00 00 03 00 00 00 02 6f 6b"
        " 01 00 00 40 00 00 00 00 00 00 00 01 00 00 00 04 62 6c 6f 62"
    )


def test_each_direction_knows_only_its_own_messages() -> None:
    with pytest.raises(ChannelError, match="kind 17"):
        channel.decode_from_edge(channel.encode(channel.Hello(1, 7)))
    with pytest.raises(ChannelError, match="kind 6"):
        channel.decode_from_core(channel.encode(channel.Adopted(1)))


def test_kinds_are_not_used_twice() -> None:
    assert not FROM_EDGE.keys() & FROM_CORE.keys()


@pytest.mark.parametrize(
    "message",
    [
        channel.Opened(0, "", "", ""),
        channel.Opened(1, "x" * 65536, "", ""),
        channel.Opened(1, "\ud800", "", ""),
        channel.Flow(1, b"short", 2),
        channel.Flow(1, bytes(12), 0),
        channel.Present(((1, 1), (0, 1))),
        channel.FramesOut((), b""),
        channel.FramesOut((1, 0), b""),
        channel.Request(1, 1, bytes(channel.MAX_REQUEST + 1)),
        channel.Request(1, -1, b""),
        channel.Frames(1, bytes(channel.MAX_BLOCKS + 1)),
        channel.Hello(256, 0),
        channel.State(1, 1, bytes(61441), Mode.HTTP, "", 0.0, False, b""),
        channel.State(1, 1, b"", Mode.HTTP, "", 0.0, False, bytes(2049)),
        *(
            channel.State(1, 1, b"", Mode.HTTP, "", timeout, False, b"")
            for timeout in (-1.0, math.inf, math.nan)
        ),
    ],
)
def test_a_message_that_breaks_a_rule_has_no_bytes(message: Any) -> None:
    with pytest.raises(ChannelError):
        channel.encode(message)


def test_the_longest_request_and_the_longest_blocks_fit() -> None:
    assert (
        len(channel.encode(channel.Request(1, 1, bytes(channel.MAX_REQUEST))))
        == channel.MAX_MESSAGE
    )
    assert len(channel.encode(channel.Frames(1, bytes(channel.MAX_BLOCKS)))) == channel.MAX_MESSAGE


def test_unknown_flags_and_modes_are_errors() -> None:
    encoded = channel.encode(channel.State(1, 1, b"", Mode.HTTP, "", 0.0, False, b""))
    for at, value in ((21, 5), (32, 2)):
        bad = bytearray(encoded)
        bad[at] = value
        with pytest.raises(ChannelError, match="unknown"):
            channel.decode_from_core(bytes(bad))


@given(st.lists(st.binary(min_size=1, max_size=70), max_size=9))
def test_blocks_joined_are_split_and_counted_again(frames: list[bytes]) -> None:
    blocks = channel.join_blocks(frames)
    assert channel.split_blocks(blocks) == frames
    assert channel.count_blocks(blocks) == len(frames)


@given(st.lists(st.binary(min_size=1, max_size=70), max_size=9), st.binary(max_size=20))
def test_blocks_are_counted_exactly_if_they_can_be_split(frames: list[bytes], tail: bytes) -> None:
    blocks = channel.join_blocks(frames) + tail
    try:
        count = len(channel.split_blocks(blocks))
    except ChannelError:
        with pytest.raises(ChannelError):
            channel.count_blocks(blocks)
    else:
        assert channel.count_blocks(blocks) == count


@pytest.mark.parametrize("size", [0, 3201, 2**32 - 1])
def test_a_block_of_a_wrong_size_is_an_error(size: int) -> None:
    blocks = size.to_bytes(4, "big") + bytes(min(size, 4000))
    for read in (channel.split_blocks, channel.count_blocks):
        with pytest.raises(ChannelError, match="block of"):
            read(blocks)


def test_a_connection_id_says_its_edge_and_is_never_zero() -> None:
    conn = channel.conn_id(3, 12345.678, 1)
    assert channel.edge_of(conn) == 3
    assert conn == 3 << 56 | 12345678 << 20 | 1


@pytest.mark.parametrize(("edge", "counter"), [(0, 1), (256, 1), (1, 0), (1, 1 << 20)])
def test_there_is_no_id_outside_the_ranges(edge: int, counter: int) -> None:
    with pytest.raises(ChannelError, match=f"edge {edge}, counter {counter}"):
        channel.conn_id(edge, 0.0, counter)
