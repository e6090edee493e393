"""The child's end, between two ends of our own: what it hears and says when things coincide."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pkvpn.watchdog.child import Birth, Child
from pkvpn.watchdog.lifeline import Kind, LifelineDecoder, Order, Said, encode_order


class Ends:
    """A child of no tree; what was said, and what its signal handlers leave for it."""

    def __init__(self, child: Child, up: int, down: int, wake: tuple[int, int]) -> None:
        self.child = child
        self._up = up
        self._down = down
        self._wake_read, self._wake = wake
        self._decoder = LifelineDecoder(0)
        self._orders = 0

    def order(self, order: Order) -> None:
        self._orders += 1
        os.write(self._down, encode_order(order, self._orders))

    def signal(self) -> None:
        """What C code does when a TERM comes; the handler in Python runs later."""
        os.write(self._wake, bytes([signal.SIGTERM]))

    def run_handler(self) -> None:
        self.child._on_term(signal.SIGTERM, None)

    def asked(self) -> int:
        """How often it has said that somebody asked for the end."""
        try:
            frames = self._decoder.feed(os.read(self._up, 65536))
        except BlockingIOError:
            return 0
        return sum(isinstance(frame, Said) and frame.kind is Kind.ASKED for frame in frames)

    def left(self) -> bytes:
        """What the watchdog would find in the pipe of its signals."""
        try:
            return os.read(self._wake_read, 100)
        except BlockingIOError:
            return b""


@contextmanager
def a_child() -> Iterator[Ends]:
    pipes = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(3)]
    (up_read, up), (down, down_write), wake = pipes
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    birth = Birth(
        name="one", incarnation=1, title="", comm="", watchdog_pid=0, beat_interval=0.05,
        target=lambda _: None, settings=None, duties=(), oom_score_adj=0, log_level=0,
        up=up, down=down, gifts=theirs.detach(), stacks=-1, wake=wake, log=-1, lock=-1,
    )  # fmt: skip
    child = Child(birth)
    try:
        yield Ends(child, up_read, down_write, wake)
    finally:
        os.close(child.fileno())
        child._gifts.close()
        ours.close()
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)


def test_a_term_that_is_read_with_the_order_to_make_way_is_passed_on() -> None:
    with a_child() as ends:
        ends.signal()
        ends.order(Order.YIELD)
        assert ends.child.receive() == ["yield"]
        ends.run_handler()
        # It may end now, without another turn.
        assert ends.asked() or ends.left()


def test_a_term_to_one_that_makes_way_is_passed_on_until_the_end_is_ordered() -> None:
    with a_child() as ends:
        ends.order(Order.YIELD)
        ends.child.receive()
        ends.signal()
        ends.run_handler()
        ends.child.turn(1e9)
        assert ends.asked() == 1
        # Nothing is left that would wake it again and again.
        ends.child.receive()
        assert ends.left() == b""
        ends.order(Order.STOP)
        ends.child.receive()
        assert (ends.child.stopping, ends.child.yielding) == (True, False)
        ends.child.turn(2e9)
        assert ends.asked() == 0


def test_a_term_that_cannot_be_passed_on_is_left_for_the_watchdog() -> None:
    with a_child() as ends:
        for moment in range(1000):  # nobody reads
            ends.child.hurry()
            ends.child.turn(float(moment))
        ends.signal()
        ends.child.receive()
        ends.run_handler()
        assert ends.left() == bytes([signal.SIGTERM])
