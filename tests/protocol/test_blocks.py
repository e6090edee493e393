"""The data phase: vectors, limits, and any cut of any stream."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn.protocol import blocks
from pkvpn.protocol.blocks import BlockDecoder
from pkvpn.protocol.errors import ProtocolError

ARP = bytes.fromhex(
    "ffffffffffff 020000000001 0806 0001080006040001020000000001 0a010101 000000000000 0a010102"
)
SMALL = bytes(range(14))
ONE = bytes.fromhex("00000001 0000002a") + ARP
TWO = bytes.fromhex("00000002 0000002a") + ARP + bytes.fromhex("0000000e") + SMALL
ALIVE = bytes.fromhex("ffffffff 00000003 616263")


def test_vectors() -> None:
    assert blocks.encode_batch([ARP]) == ONE
    assert blocks.encode_batch([ARP, SMALL]) == TWO
    assert blocks.encode_keep_alive(b"abc") == ALIVE
    decoder = BlockDecoder()
    assert decoder.feed(ONE) == [ARP]
    assert decoder.feed(TWO) == [ARP, SMALL]
    assert decoder.feed(ALIVE) == []
    assert (decoder.keep_alives, decoder.units) == (1, 4)


@pytest.mark.parametrize("tail", [b"", b"\0", ONE[:-1]])
def test_whole_byte_by_byte_and_with_a_tail(tail: bytes) -> None:
    stream = ONE + ALIVE + TWO + bytes(4) + ALIVE + ONE
    frames = [ARP, ARP, SMALL, ARP]
    assert BlockDecoder().feed(stream + tail) == frames
    decoder = BlockDecoder()
    got = [frame for byte in stream + tail for frame in decoder.feed(bytes([byte]))]
    assert got == frames
    assert (decoder.keep_alives, decoder.units) == (2, 7)


def block(size: int) -> bytes:
    return blocks.U32.pack(1) + blocks.U32.pack(size) + bytes(size)


@pytest.mark.parametrize(
    ("size", "passed", "runts", "oversized"),
    [
        (0, 0, 1, 0),
        (13, 0, 1, 0),
        (14, 1, 0, 0),
        (1514, 1, 0, 0),
        (1600, 1, 0, 0),
        (1601, 0, 0, 1),
        (3200, 0, 0, 1),
    ],
)
def test_sizes(size: int, passed: int, runts: int, oversized: int) -> None:
    decoder = BlockDecoder()
    assert len(decoder.feed(block(size))) == passed
    assert (decoder.runts, decoder.oversized) == (runts, oversized)
    assert decoder.feed(ONE) == [ARP]


@pytest.mark.parametrize("size", [0, 1, 511, 512])
def test_keep_alives_of_all_sizes(size: int) -> None:
    decoder = BlockDecoder()
    assert decoder.feed(blocks.encode_keep_alive(bytes(size)) + ONE) == [ARP]
    assert decoder.keep_alives == 1


@pytest.mark.parametrize(
    "stream",
    [
        blocks.U32.pack(1) + blocks.U32.pack(3201),
        blocks.U32.pack(blocks.KEEP_ALIVE) + blocks.U32.pack(513),
        blocks.U32.pack(4097),
        blocks.U32.pack(0xFFFFFFFE),
    ],
)
def test_a_stream_out_of_step_is_refused_at_its_announcement(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        BlockDecoder().feed(stream)


def test_the_largest_batch() -> None:
    frames = [SMALL] * blocks.MAX_COUNT
    assert BlockDecoder().feed(blocks.encode_batch(frames)) == frames


def test_many_frames_travel_in_batches_of_128() -> None:
    frames = [bytes([i % 256]) * 20 for i in range(300)]
    batches = list(blocks.encode_batches(frames))
    assert [int.from_bytes(batch[:4], "big") for batch in batches] == [128, 128, 44]
    assert BlockDecoder().feed(b"".join(batches)) == frames
    assert list(blocks.encode_batches([])) == []


def test_what_is_no_frame_is_not_encoded() -> None:
    for frames in ([], [bytes(13)], [bytes(1601)], [SMALL] * 4097):
        with pytest.raises(ValueError, match="frame"):
            blocks.encode_batch(frames)
    with pytest.raises(ValueError, match="keep-alive"):
        blocks.encode_keep_alive(bytes(513))


units: st.SearchStrategy[tuple[bytes, list[bytes]]] = st.one_of(
    st.lists(st.binary(min_size=14, max_size=40), min_size=1, max_size=3).map(
        lambda frames: (blocks.encode_batch(frames), frames)
    ),
    st.binary(max_size=20).map(lambda payload: (blocks.encode_keep_alive(payload), [])),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(units, max_size=5), st.lists(st.integers(1, 50), min_size=1, max_size=10))
def test_no_cut_changes_what_is_read(
    parts: list[tuple[bytes, list[bytes]]], cuts: list[int]
) -> None:
    stream = b"".join(raw for raw, _ in parts)
    decoder, got, at, turn = BlockDecoder(), [], 0, 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        got += decoder.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert got == [frame for _, frames in parts for frame in frames]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=8), st.sampled_from([ONE, ALIVE, bytes(4)]))))
def test_only_a_protocol_error_leaves_the_decoder(parts: list[bytes]) -> None:
    decoder = BlockDecoder()
    try:
        for part in parts:
            for frame in decoder.feed(part):
                assert 14 <= len(frame) <= 1600
    except ProtocolError:
        pass
