"""What is counted of numbered frames."""

from __future__ import annotations

import random

from pkvpn.chaos.ledger import Ledger, decode, encode

LEFT, RIGHT = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"


def with_sent(count: int) -> Ledger:
    ledger = Ledger()
    assert [ledger.next_number() for _ in range(count)] == list(range(count))
    return ledger


def test_a_frame_carries_its_number_and_others_are_none_of_ours() -> None:
    frame = encode(RIGHT, LEFT, 2**40)
    assert (frame[:6], frame[6:12], len(frame)) == (RIGHT, LEFT, 60)
    assert decode(frame) == 2**40
    assert decode(frame[:-1]) is None
    assert decode(frame.replace(b"\x88\xb5", b"\x08\x00")) is None


def test_what_is_jumped_over_is_lost_until_it_comes() -> None:
    ledger = with_sent(6)
    for number in (0, 3, 1):
        ledger.arrive(number, 1.0)
    found = ledger.account(1.0)
    assert (found.sent, found.arrived, found.lost, found.reordered) == (6, 3, 1, 1)
    assert ledger.on_the_way == 2
    ledger.give_up()
    assert (ledger.account(1.0).lost, ledger.on_the_way) == (3, 0)


def test_what_comes_twice_is_counted_and_ends_no_silence() -> None:
    ledger = with_sent(3)
    ledger.arrive(0, 1.0)
    ledger.arrive(0, 1.5)
    ledger.arrive(1, 2.0)
    found = ledger.account(2.0)
    assert (found.arrived, found.twice, found.lost, found.silence) == (2, 1, 0, 1.0)


def test_a_silence_that_lasts_counts_and_a_new_window_forgets_what_was() -> None:
    ledger = with_sent(3)
    assert ledger.account(9.0).silence == 0.0  # nothing has come yet
    ledger.arrive(0, 10.0)
    assert ledger.account(10.5).silence == 0.5
    ledger.arrive(1, 12.0)
    ledger.begin(12.5)
    assert ledger.account(12.5).silence == 0.5
    ledger.arrive(2, 12.75)
    assert ledger.account(12.75).silence == 0.75


def test_whatever_the_order_everything_is_counted_once() -> None:
    rng = random.Random(1)
    for _ in range(200):
        count = rng.randrange(1, 40)
        numbers = [n for n in range(count) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        rng.shuffle(numbers)
        ledger = with_sent(count)
        for number in numbers:
            ledger.arrive(number, 0.0)
        ledger.give_up()
        found = ledger.account(0.0)
        assert found.arrived == len(set(numbers))
        assert found.lost == count - len(set(numbers))
        assert found.twice == len(numbers) - len(set(numbers))
