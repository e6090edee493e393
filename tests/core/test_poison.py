import os
from collections.abc import Iterator

import pytest

from pkvpn.core.poison import (
    FRAME_DEATHS,
    IN_A_ROW,
    MAX_QUARANTINED,
    QUARANTINE,
    SIZE,
    Mark,
    Quarantine,
)


@pytest.fixture
def mark() -> Iterator[Mark]:
    fd = os.memfd_create("mark")
    os.ftruncate(fd, SIZE)
    mark = Mark(fd)
    os.close(fd)
    yield mark
    mark.close()


def test_a_core_that_died_idle_accuses_nobody(mark: Mark) -> None:
    assert mark.judge(0.0) == 0
    mark.begin(7, 1)
    mark.end()
    assert mark.judge(0.0) == 0


def test_the_second_death_of_the_same_request_is_enough(mark: Mark) -> None:
    mark.begin(7, 3)
    assert mark.judge(0.0) == 0
    mark.begin(7, 4)
    assert mark.judge(100.0) == 0
    mark.begin(7, 4)
    assert mark.judge(1000.0) == 7


def test_frames_take_several_deaths_close_to_each_other(mark: Mark) -> None:
    for i in range(FRAME_DEATHS - 1):
        mark.begin(7, 0)
        assert mark.judge(float(i)) == 0
    mark.begin(7, 0)
    assert mark.judge(5.0) == 7
    mark.begin(7, 0)
    assert mark.judge(5.0 + IN_A_ROW + 0.1) == 0


def test_who_is_kept_out_is_known_to_the_next_core_and_not_for_ever() -> None:
    fd = os.memfd_create("mark")
    os.ftruncate(fd, SIZE)
    first = Quarantine(fd)
    first.put("T/u1", "why", 100.0)
    second = Quarantine(fd)
    assert second.entries(200.0) == [{"name": "t/u1", "why": "why", "left": QUARANTINE - 100.0}]
    assert second.holds("t/U1", 200.0)
    assert not second.holds("T/u2", 200.0)
    assert not second.holds("T/u1", 100.0 + QUARANTINE)
    assert second.lift("t/u1")
    assert not second.lift("t/u1")
    third = Quarantine(fd)
    assert third.entries(200.0) == []
    # What a stranger may choose of a name has a bound.
    for number in range(1000):
        third.put(f"{number}" + "\U0001f600" * 1000, "x" * 1000, 300.0)
    fourth = Quarantine(fd)
    assert fourth.entries(301.0) == third.entries(301.0)
    assert 5 < len(fourth.entries(301.0)) <= MAX_QUARANTINED
    # Its marks are others'.
    mark = Mark(fd)
    assert mark.judge(0.0) == 0
    for one in (first, second, third, fourth, mark):
        one.close()
    os.close(fd)


@pytest.mark.parametrize("garbage", [b"\xff", b"{", b"1", b"[1]", b'[["a", "x", 1]]', b"[" * 9000])
def test_who_is_kept_out_is_forgotten_where_a_core_has_scribbled(garbage: bytes) -> None:
    fd = os.memfd_create("mark")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, len(garbage).to_bytes(4, "little") + garbage, 8192)
    quarantine = Quarantine(fd)
    os.close(fd)
    assert quarantine.entries(0.0) == []
    quarantine.put("T/u1", "why", 0.0)
    assert quarantine.holds("T/u1", 1.0)
    quarantine.close()
