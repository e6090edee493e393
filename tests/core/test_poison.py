import os
from collections.abc import Iterator

import pytest

from pkvpn.core.poison import FRAME_DEATHS, IN_A_ROW, SIZE, Mark


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
