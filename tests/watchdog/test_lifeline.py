"""What is said on the lifeline comes through whole, or is recognised as garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.watchdog.lifeline import (
    FRAME_SIZE,
    MAX_DUTIES,
    MAX_TEXT,
    CorruptLifeline,
    Kind,
    LifelineDecoder,
    Order,
    OrderDecoder,
    Said,
    encode_beat,
    encode_order,
    encode_said,
)
from pkvpn.watchdog.verdict import Beat

STREAM = (
    encode_beat(1, 0.5, [(3, 0.0), (2**63, 12.25)])
    + encode_said(Kind.SAY, 1, "binding 443 \N{BULLET} loading")
    + encode_said(Kind.READY, 1)
)
HEARD = [
    Beat(1, 0.5, ((3, 0.0), (2**63, 12.25))),
    Said(Kind.SAY, "binding 443 \N{BULLET} loading"),
    Said(Kind.READY, ""),
]


def test_frames_have_one_size_that_a_pipe_takes_whole() -> None:
    assert len(STREAM) == 3 * FRAME_SIZE
    assert FRAME_SIZE <= 512  # _POSIX_PIPE_BUF, everywhere
    assert len(encode_beat(1, 0.0, [(0, 0.0)] * MAX_DUTIES)) == FRAME_SIZE


@pytest.mark.parametrize("step", [1, 7, FRAME_SIZE, len(STREAM)])
def test_frames_are_heard_whole_however_they_are_cut(step: int) -> None:
    decoder = LifelineDecoder(duties=2)
    heard = [
        one for at in range(0, len(STREAM), step) for one in decoder.feed(STREAM[at : at + step])
    ]
    assert heard == HEARD


def test_a_tail_waits_for_its_rest() -> None:
    decoder = LifelineDecoder(duties=2)
    assert decoder.feed(STREAM + STREAM[:100]) == HEARD
    assert decoder.feed(STREAM[100:]) == HEARD


def test_a_longer_text_is_cut() -> None:
    (said,) = LifelineDecoder(0).feed(encode_said(Kind.SAY, 1, "x" * 1000))
    assert said == Said(Kind.SAY, "x" * MAX_TEXT)


@pytest.mark.parametrize("at", range(0, FRAME_SIZE, 5))
def test_one_wrong_byte_anywhere_is_corrupt(at: int) -> None:
    frame = bytearray(STREAM[:FRAME_SIZE])
    frame[at] ^= 0x41
    with pytest.raises(CorruptLifeline):
        LifelineDecoder(duties=2).feed(bytes(frame))


@given(st.lists(st.binary(max_size=600), max_size=6))
def test_whatever_comes_only_corrupt_lifeline_leaves(pieces: list[bytes]) -> None:
    decoder = LifelineDecoder(duties=3)
    try:
        for piece in pieces:
            assert decoder.feed(piece) == []
    except CorruptLifeline:
        pass


@pytest.mark.parametrize("step", [1, 3, 8, 100])
def test_orders_come_through_however_they_are_cut_and_unknown_ones_are_passed_over(
    step: int,
) -> None:
    stream = encode_order(Order.RELOAD, 1) + b"pk\x01\xff\0\0\0\2" + encode_order(Order.STOP, 3)
    decoder = OrderDecoder()
    heard = [
        one for at in range(0, len(stream), step) for one in decoder.feed(stream[at : at + step])
    ]
    assert heard == [Order.RELOAD, Order.STOP]
