import os
from collections.abc import Iterator

import pytest

from pkvpn.core.poison import (
    FRAME_DEATHS,
    HUB_DEATHS,
    IN_A_ROW,
    MAX_QUARANTINED,
    QUARANTINE,
    SIZE,
    Guilty,
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


NOBODY = Guilty()


def dies(mark: Mark, at: float, conn: int, number: int = 0, hub: int = 1, user: int = 0) -> Guilty:
    """A core that dies of frames, or of a request, and what the next one finds."""
    if number:
        mark.begin(conn, number)
    else:
        mark.begin(conn, 0, hub, user or conn)
    return mark.judge(at)


def test_a_core_that_died_idle_accuses_nobody(mark: Mark) -> None:
    assert mark.judge(0.0) == NOBODY
    mark.begin(7, 1)
    mark.end()
    assert mark.judge(0.0) == NOBODY


def test_the_second_death_of_the_same_request_is_enough(mark: Mark) -> None:
    assert dies(mark, 0.0, 7, 3) == NOBODY
    assert dies(mark, 100.0, 7, 4) == NOBODY
    assert dies(mark, 1000.0, 7, 4) == Guilty(conn=7)


def test_frames_take_several_deaths_close_to_each_other(mark: Mark) -> None:
    for i in range(FRAME_DEATHS - 1):
        assert dies(mark, float(i), 7) == NOBODY
    assert dies(mark, 5.0, 7) == Guilty(conn=7)
    assert dies(mark, 5.0 + IN_A_ROW + 0.1, 7) == NOBODY


def test_two_connections_in_turn_are_found_as_well(mark: Mark) -> None:
    """Each by its own deaths: of two users none can bring it about that the hub is to blame."""
    found = [dies(mark, float(at), 7 + at % 2) for at in range(2 * FRAME_DEATHS)]
    assert found[-2:] == [Guilty(conn=7), Guilty(conn=8)]
    assert set(found[:-2]) == {NOBODY}


def test_what_several_users_of_a_hub_send_is_the_fault_of_none_of_them(mark: Mark) -> None:
    found = [dies(mark, float(at), 7 + at % 3, hub=5) for at in range(HUB_DEATHS)]
    assert found == [NOBODY] * (HUB_DEATHS - 1) + [Guilty(hub=5)]


def test_when_others_follow_the_first_who_was_kept_out_it_is_the_hub(mark: Mark) -> None:
    for at in range(FRAME_DEATHS):
        found = dies(mark, float(at), 7, hub=5)
    assert found == Guilty(conn=7)
    assert dies(mark, 5.0, 8, hub=5) == NOBODY
    assert dies(mark, 6.0, 8, hub=5) == NOBODY
    assert dies(mark, 7.0, 9, hub=5) == Guilty(hub=5)


def test_several_connections_of_one_user_are_not_several_users(mark: Mark) -> None:
    found = [dies(mark, float(at), 7 + at, hub=5, user=3) for at in range(2 * HUB_DEATHS)]
    assert set(found) == {NOBODY}


@pytest.mark.parametrize("between", ["another hub", "a request", "nothing", "much time"])
def test_a_row_is_of_one_hub_and_of_nothing_else(mark: Mark, between: str) -> None:
    for at in range(HUB_DEATHS - 1):
        assert dies(mark, float(at), 7 + at, hub=5) == NOBODY
    now, hub = 5.0, 5
    match between:
        case "another hub":
            hub = 6
        case "a request":
            assert dies(mark, now, 3, 1) == NOBODY
        case "nothing":
            assert mark.judge(now) == NOBODY  # somebody has killed it
        case "much time":
            now += IN_A_ROW
    assert dies(mark, now, 20, hub=hub) == NOBODY


def test_behind_a_bridge_there_is_nobody_else_to_blame(mark: Mark) -> None:
    found = [dies(mark, float(at), 0, hub=5) for at in range(FRAME_DEATHS)]
    assert found == [NOBODY] * (FRAME_DEATHS - 1) + [Guilty(hub=5)]


def test_a_long_row_has_an_end(mark: Mark) -> None:
    for at in range(100):
        found = dies(mark, float(at), 7, user=1)
    assert found == Guilty(conn=7)


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
    assert mark.judge(0.0) == NOBODY
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
