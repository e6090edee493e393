"""The checkpoint is whole at every instant, and trusts nothing that it reads."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.channel import MAX_BLOB, EdgeDrop, Mode, Refusal
from pkvpn.edge import checkpoint
from pkvpn.edge.checkpoint import (
    SAVED_FLOWS,
    VERSION,
    Checkpoint,
    CheckpointError,
    Cold,
    Hot,
    Identity,
    Slot,
    checkpoint_size,
    slots_that_fit,
)

IDENTITY = Identity(7, 99, 12.5, 0x1302, "192.0.2.1:5", "192.0.2.2:443", "TLSv1.3 own X")
HOT = Hot(1000, 3, 900, 17, 5, 2000, 4, 1900)
COLD = Cold(b"r" * 48, b"w" * 32, 2, Mode.BLOCKS, 20.0, "", b"blob")


def fresh(slots: int = 3) -> tuple[bytearray, Checkpoint]:
    memory = bytearray(checkpoint_size(slots, 256, 512))
    return memory, Checkpoint.make(memoryview(memory), slots, 256, 512)


def left(memory: bytes | bytearray | memoryview) -> list[Slot]:
    """The slots that a successor finds."""
    checkpoint = Checkpoint(memoryview(memory))
    found, _ = checkpoint.left()
    return [checkpoint.slot(index) for index in found.values()]


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
    (found,) = left(memory)
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
            (found,) = left(bytearray(memory))
            assert found.load() == (IDENTITY, hot, cold)
            cold = new
        hot = hot._replace(out_sequence=number)
        slot.save(hot)
        (found,) = left(bytearray(memory))
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
        (found,) = left(torn)
        assert found.load() == (IDENTITY, HOT, COLD)


def test_a_slot_goes_on_with_the_copies_its_predecessor_left() -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    slot.save(HOT._replace(skip=1))
    hot, cold = HOT._replace(skip=1), COLD
    for generation in range(5):
        (found,) = left(memory)
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
    assert left(memory) == []
    assert ours.take() is not None


def test_a_slot_is_never_given_twice() -> None:
    _, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    with pytest.raises(AssertionError):
        slot.create(IDENTITY, HOT, COLD)


def test_connections_in_which_something_waits_come_first_and_busy_ones_second() -> None:
    memory, ours = fresh(5)
    for conn, dirty, busy in (
        (1, False, False), (2, False, True), (3, True, False), (4, False, False), (5, True, True)
    ):  # fmt: skip
        slot = ours.take()
        assert slot is not None
        slot.create(IDENTITY._replace(conn=conn), HOT, COLD)
        slot.set_dirty(dirty)
        slot.set_busy(busy)
    ours = Checkpoint(memoryview(memory))
    found, first = ours.left()
    assert first == [3, 5, 2]
    assert {conn: ours.slot(index).load()[0].conn for conn, index in found.items()} == {
        conn: conn for conn in (1, 2, 3, 4, 5)
    }


def test_the_directory_says_who_is_there_and_which_state_was_the_last() -> None:
    memory, ours = fresh(3)
    slots = [ours.take() for _ in range(2)]
    for conn, slot in enumerate(slots, 7):
        assert slot is not None
        slot.create(IDENTITY._replace(conn=conn), HOT, COLD)
    one, two = slots
    assert one is not None
    assert two is not None
    one.save_cold(COLD._replace(number=3))
    assert ours.directory() == [(7, 2), (8, 2)]  # not in force yet
    one.save(HOT)
    assert ours.directory() == [(7, 3), (8, 2)]
    ours.give_back(two)
    assert Checkpoint(memoryview(memory)).directory() == [(7, 3)]


@pytest.mark.parametrize("conn", [0, 7])
def test_a_slot_whose_name_makes_no_sense_is_given_back(conn: int) -> None:
    memory, ours = fresh(2)
    for name in (7, 8):
        slot = ours.take()
        assert slot is not None
        slot.create(IDENTITY._replace(conn=name), HOT, COLD)
    struct.pack_into("=Q", memory, checkpoint._directory_at(2) + 16, conn)
    ours = Checkpoint(memoryview(memory))
    assert ours.left() == ({7: 0}, [7])
    assert ours.take() is not None


def test_the_epoch_outlives_an_edge() -> None:
    memory, ours = fresh()
    assert ours.epoch == 0
    ours.epoch = 2**63 + 5
    assert Checkpoint(memoryview(memory)).epoch == 2**63 + 5


# --- flows --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("ABCD"), st.one_of(st.none(), st.integers(1, 2**64 - 1))),
        max_size=30,
    )
)
def test_what_is_kept_of_flows_is_what_was_put_and_not_removed(
    steps: list[tuple[str, int | None]],
) -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    known: dict[bytes, int] = {}
    for number, (letter, to) in enumerate(steps):
        key = letter.encode() * 12
        if to is None:
            slot.flows.remove(key)
            known.pop(key, None)
        else:
            slot.flows.put(key, to)
            known[key] = to
        if number % 7 == 6:
            (slot,) = left(memory)
            assert dict(slot.flows.load()) == known
    (slot,) = left(memory)
    assert dict(slot.flows.load()) == known


def test_a_flow_is_kept_whole_or_not_at_all() -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    slot.flows.put(b"k" * 12, 7)
    before = bytes(memory)
    slot.flows.put(b"k" * 12, 2**64 - 1)
    changed = [at for at in range(len(memory)) if memory[at] != before[at]]
    assert changed
    # Killed while the new one is written: the place counts for nothing.
    torn = bytearray(before)
    torn[checkpoint._slots_at(1) + checkpoint._FLOWS_AT] = 0
    for at in changed:
        torn[at] = memory[at]
        (found,) = left(torn)
        assert found.flows.load() == []


def test_more_flows_than_there_are_places_are_not_kept() -> None:
    memory, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    for number in range(SAVED_FLOWS + 5):
        slot.flows.put(number.to_bytes(12, "big"), 7)
    (found,) = left(memory)
    assert len(found.flows.load()) == SAVED_FLOWS
    found.flows.remove(bytes(12))
    found.flows.put(b"x" * 12, 8)
    (found,) = left(memory)
    assert (b"x" * 12, 8) in found.flows.load()


def test_flows_go_with_their_connection() -> None:
    _, ours = fresh(1)
    slot = ours.take()
    assert slot is not None
    slot.create(IDENTITY, HOT, COLD)
    slot.flows.put(b"k" * 12, 7)
    ours.give_back(slot)
    again = ours.take()
    assert again is not None
    again.create(IDENTITY, HOT, COLD)
    assert again.flows.load() == []


# --- poison -------------------------------------------------------------------------------------


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


def test_memory_of_another_version_is_refused() -> None:
    memory, _ = fresh()
    struct.pack_into("=I", memory, 8, VERSION + 1)
    with pytest.raises(CheckpointError, match=f"version {VERSION + 1}, this edge knows {VERSION}"):
        Checkpoint(memoryview(memory))


@given(st.integers(1, 200), st.integers(0, 4096))
def test_as_many_slots_fit_as_there_is_memory_for(slots: int, more: int) -> None:
    size = checkpoint_size(slots, 4096, 8192)
    fit = slots_that_fit(size + more, 4096, 8192)
    assert fit >= slots
    assert checkpoint_size(fit, 4096, 8192) <= size + more < checkpoint_size(fit + 1, 4096, 8192)


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
    memory[at : at + checkpoint.SLOT_SIZE] = random.Random(seed).randbytes(checkpoint.SLOT_SIZE)
    try:
        slot.flows.load()
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
