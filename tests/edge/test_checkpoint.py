"""The checkpoint is whole at every instant, and trusts nothing that it reads."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.channel import MAX_BLOB, EdgeDrop, Mode, Refusal
from pkvpn.edge import checkpoint
from pkvpn.edge.checkpoint import Checkpoint, CheckpointError, Cold, Hot, Identity, checkpoint_size

IDENTITY = Identity(7, 99, 12.5, 0x1302, "192.0.2.1:5", "192.0.2.2:443", "TLSv1.3 own X")
HOT = Hot(1000, 3, 900, 17, 5, 2000, 4, 1900)
COLD = Cold(b"r" * 48, b"w" * 32, 2, Mode.BLOCKS, 20.0, "", b"blob")


def fresh(slots: int = 3) -> tuple[bytearray, Checkpoint]:
    memory = bytearray(checkpoint_size(slots, 256, 512))
    return memory, Checkpoint.make(memoryview(memory), slots, 256, 512)


def test_a_successor_finds_what_is_in_force() -> None:
    memory, ours = fresh()
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    slot.save_counts(*range(4 + len(EdgeDrop)))
    drops, refusals = tuple(range(len(EdgeDrop))), tuple(range(100, 100 + len(Refusal)))
    ours.save_totals(drops, refusals)
    theirs = Checkpoint(memoryview(memory))
    assert theirs.load_totals() == (drops, refusals)
    (found,) = theirs.left()
    assert found.load() == (IDENTITY, HOT, COLD)
    assert found.load_counts() == tuple(range(4 + len(EdgeDrop)))
    rx, tx = found.rings(1100, 1950, HOT)
    assert (rx.start, rx.end, rx.base, rx.size) == (1000, 1100, 900, 256)
    assert (tx.start, tx.end, tx.base, tx.size) == (1950, 2000, 1900, 512)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2**60))))
def test_nothing_counts_before_the_switch(steps: list[tuple[bool, int]]) -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    hot, cold = HOT, COLD
    for change_cold, number in steps:
        if change_cold:
            new = cold._replace(number=number, write_secret=bytes([number % 256]) * 48)
            slot.save_cold(new)
            # Killed here: the state of before, whole.
            (found,) = Checkpoint(memoryview(bytearray(memory))).left()
            assert found.load() == (IDENTITY, hot, cold)
            cold = new
        hot = hot._replace(out_sequence=number)
        slot.save(hot)
        (found,) = Checkpoint(memoryview(bytearray(memory))).left()
        assert found.load() == (IDENTITY, hot, cold)


def test_half_a_write_to_the_copy_that_is_not_in_force_harms_nothing() -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    before = bytes(memory)
    slot.save_cold(COLD._replace(number=3))
    slot.save(HOT._replace(skip=1))
    # Each byte that a save changes, except the switch, may be changed alone.
    switch = checkpoint.HEADER_SIZE
    changed = [at for at in range(len(memory)) if memory[at] != before[at] and at != switch]
    assert changed
    for at in changed:
        torn = bytearray(before)
        torn[at] = memory[at]
        (found,) = Checkpoint(memoryview(torn)).left()
        assert found.load() == (IDENTITY, HOT, COLD)


def test_a_slot_goes_on_with_the_copies_its_predecessor_left() -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    slot.save(HOT._replace(skip=1))
    hot, cold = HOT._replace(skip=1), COLD
    for generation in range(5):
        (found,) = Checkpoint(memoryview(memory)).left()
        assert found.load() == (IDENTITY, hot, cold)
        hot, cold = HOT._replace(skip=generation), COLD._replace(number=generation)
        found.save_cold(cold)
        found.save(hot)


def test_slots_are_given_out_once_and_come_back_empty() -> None:
    memory, ours = fresh(2)
    one, two = ours.take(), ours.take()
    assert one is not None
    assert two is not None
    assert ours.take() is None
    one.create(IDENTITY, HOT, COLD)
    two.create(IDENTITY._replace(conn=8), HOT, COLD)
    assert b"r" * 48 in memory
    ours.give_back(one)
    ours.give_back(two)
    # The keys are gone with the connection.
    assert b"r" * 48 not in memory
    assert Checkpoint(memoryview(memory)).left() == []
    assert ours.take() is not None


def test_a_slot_is_never_given_twice() -> None:
    _, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    with pytest.raises(AssertionError):
        slot.create(IDENTITY, HOT, COLD)


def test_connections_in_which_something_waits_come_first() -> None:
    memory, ours = fresh(3)
    for conn, dirty in ((1, False), (2, True), (3, False)):
        slot = ours.take()
        assert slot is not None
        slot.create(IDENTITY._replace(conn=conn), HOT, COLD)
        slot.set_dirty(dirty)
    left = Checkpoint(memoryview(memory)).left()
    assert [slot.load()[0].conn for slot in left] == [2, 1, 3]


def test_the_second_death_at_the_same_mark_is_poison() -> None:
    memory, ours = fresh()
    assert ours.poisoned() == 0
    ours.mark(7, 100)
    assert Checkpoint(memoryview(memory)).poisoned() == 0
    ours.mark(7, 100)
    assert Checkpoint(memoryview(memory)).poisoned() == 7


@pytest.mark.parametrize("second", [(7, 101), (8, 100), (0, 0)])
def test_a_death_elsewhere_is_no_poison(second: tuple[int, int]) -> None:
    memory, ours = fresh()
    ours.mark(7, 100)
    ours.poisoned()
    ours.mark(*second)
    assert Checkpoint(memoryview(memory)).poisoned() == 0


def test_texts_and_blobs_at_their_limits_are_kept_or_cut() -> None:
    _, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(
        IDENTITY._replace(tls="x" * 500),
        HOT,
        COLD._replace(blob=b"\0" * MAX_BLOB, close="é" * 500, read_secret=b"\0" * 48),
    )
    identity, _, cold = slot.load()
    assert identity.tls == "x" * 127
    assert cold.blob == b"\0" * MAX_BLOB
    assert cold.read_secret == b"\0" * 48
    assert cold.close.startswith("é" * 127)


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_memory_that_holds_nothing_is_refused(size: int) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint(memoryview(bytearray(size)))


def test_memory_that_is_too_small_for_its_slots_is_refused() -> None:
    memory, _ = fresh()
    with pytest.raises(CheckpointError, match="too few for 3 slots"):
        Checkpoint(memoryview(memory)[:-1])


@given(st.integers(), st.integers(0, 255))
def test_noise_in_a_slot_raises_nothing_but_a_checkpoint_error(seed: int, switch: int) -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    memory[checkpoint.HEADER_SIZE] = switch
    at = checkpoint._slots_at(1)
    memory[at : at + 8192] = random.Random(seed).randbytes(8192)
    try:
        _, hot, _ = slot.load()
        slot.rings(hot.in_position, hot.out_end, hot)
    except CheckpointError:
        pass


@pytest.mark.parametrize(
    ("received", "sent"), [(999, 2000), (1257, 2000), (1000, 2001), (1000, 1487)]
)
def test_positions_outside_the_rings_are_refused(received: int, sent: int) -> None:
    _, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    with pytest.raises(CheckpointError, match="slot 0"):
        slot.rings(received, sent, HOT)
