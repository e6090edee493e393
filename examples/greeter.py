"""A daemon built on pkvpn.watchdog: greets whoever connects, and cannot be killed one by one.

    python examples/greeter.py /tmp/greeter 7777 &
    ps auxf                              # greeter, with `greeter: log` and `greeter: door` below
    nc -N 127.0.0.1 7777 </dev/null      # hello from incarnation 1
    kill -9 PID-OF-THE-DOOR              # connect again: hello from incarnation 2
    kill -TERM PID-OF-ANY                # the whole tree ends

The listening socket is opened once, by the watchdog, so no connection is refused while a door
is being replaced.
"""

from __future__ import annotations

import select
import socket
import sys
import time

from pkvpn.watchdog import Child, ChildSpec, HeldSpec, TreeSpec, run_tree


def open_door(port: int) -> list[int]:
    """Called once, in the watchdog."""
    return [socket.create_server(("127.0.0.1", port)).detach()]


def door(child: Child) -> None:
    """Called in each incarnation of the child."""
    listener = socket.socket(fileno=child.held("door")[0])
    listener.setblocking(False)
    greeted = child.duty("greet")
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(child.fileno(), select.POLLIN)
    child.ready()
    while not child.stopping:
        until_beat = child.turn(time.monotonic())
        events = dict(poller.poll(until_beat * 1000))
        if listener.fileno() in events:
            guest, _ = listener.accept()
            with guest:
                guest.sendall(f"hello from incarnation {child.incarnation}\n".encode())
            greeted.done += 1
        child.receive()


if __name__ == "__main__":
    directory = sys.argv[1]
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 7777
    spec = TreeSpec(
        name="greeter",
        children=(ChildSpec("door", door, held=("door",), duties=("greet",)),),
        runtime_dir=f"{directory}/run",
        state_dir=f"{directory}/state",
        held=(HeldSpec("door", lambda: open_door(port)),),
    )
    sys.exit(run_tree(spec))
