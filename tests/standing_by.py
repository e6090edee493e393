"""A child that stands by, in the process of a test."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pkvpn.watchdog.child import Birth, Child


@contextmanager
def standing_by(name: str, *duties: str) -> Iterator[Child]:
    """It holds nothing, and nobody hears what it says."""
    pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(3)]
    (_, up), (down, _), wake = pipes
    null = os.open(os.devnull, os.O_RDWR)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = Child(
        Birth(
            name=name, incarnation=2, title="test", comm="test", watchdog_pid=os.getppid(),
            beat_interval=0.2, target=lambda _: None, settings=None, duties=duties,
            oom_score_adj=0, log_level=0, up=up, down=down, gifts=theirs.detach(), stacks=null,
            wake=wake, log=null, lock=null, standby=True,
        )
    )  # fmt: skip
    try:
        yield child
    finally:
        child._epoll.close()
        child._gifts.close()
        ours.close()
        for fd in (null, *(fd for pipe in pipes for fd in pipe)):
            os.close(fd)
