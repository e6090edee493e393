"""A ring gives back what was put in, at the same positions, wherever it lies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.edge.rings import Ring


@given(
    st.integers(0, 2**40),
    st.lists(st.tuples(st.sampled_from(["append", "put", "take", "rewind"]), st.integers(0, 20))),
)
def test_what_was_put_in_is_there_until_it_is_taken(
    start: int, steps: list[tuple[str, int]]
) -> None:
    ring = Ring(memoryview(bytearray(16)), start, start, start)
    held = b""
    number = 0
    for what, wish in steps:
        if what == "take":
            size = min(wish, len(held))
            ring.start += size
            held = held[size:]
        elif what == "rewind":
            ring.rewind()
        else:
            room = len(ring.free()) if what == "put" else ring.room()
            data = bytes((number + i) % 256 for i in range(min(wish, room)))
            number += len(data)
            if what == "put":
                ring.free()[: len(data)] = data
                ring.put(len(data))
            else:
                ring.append(data)
            held += data
        assert bytes(ring.view(ring.start, len(held))) == held
        assert held.startswith(bytes(ring.first_piece()))
        assert bool(ring.first_piece()) == bool(held)
        assert ring.room() == 16 - len(held)
        assert bool(ring.free()) == bool(ring.room())
        # A successor finds the same bytes from the numbers alone.
        again = Ring(ring.memory, ring.start, ring.end, ring.base)
        assert bytes(again.view(again.start, len(held))) == held


def test_an_empty_ring_goes_on_at_the_first_byte_of_its_memory() -> None:
    memory = bytearray(16)
    ring = Ring(memoryview(memory), 5, 5, 5)
    ring.append(b"abc")
    ring.start = 7
    ring.rewind()  # something is in it: nothing changes
    ring.append(b"d")
    assert memory.startswith(b"abcd")
    ring.start = ring.end
    ring.rewind()
    ring.append(b"X")
    assert memory.startswith(b"Xbcd")


@pytest.mark.parametrize(("start", "end", "base"), [(9, 8, 9), (0, 17, 0), (4, 8, 5)])
def test_numbers_that_make_no_ring_are_refused(start: int, end: int, base: int) -> None:
    with pytest.raises(ValueError, match="no ring of 16"):
        Ring(memoryview(bytearray(16)), start, end, base)


@given(
    st.lists(st.tuples(st.sampled_from(["append", "take", "rewind", "spare"]), st.integers(0, 20))),
    st.integers(0, 8),
)
def test_what_is_given_back_held_nothing_and_nothing_else_is_touched(
    steps: list[tuple[str, int]], kept: int
) -> None:
    memory = bytearray(16)
    ring = Ring(memoryview(memory), 100, 100, 100)
    held = b""
    for number, (what, wish) in enumerate(steps, 1):
        if what == "append":
            data = bytes([number % 255 + 1]) * min(wish, ring.room())
            ring.append(data)
            held += data
        elif what == "take":
            size = min(wish, len(held))
            ring.start += size
            held = held[size:]
        elif what == "rewind":
            ring.rewind()
        else:
            for begin, end in ring.spare(kept):
                memory[begin:end] = bytes(end - begin)
            left = sum(map(bool, memory[kept:]))
            assert left <= len(held)
        assert bytes(ring.view(ring.start, len(held))) == held
