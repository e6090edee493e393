"""What thousands of connections cost in systemd's keeping: it compares each new one with all.

    python -m benchmarks.fdstore [--descriptors N] [--step N] [--quick]

A service of nothing else, in a machine that boots systemd, hands over sockets, so many at a time,
and waits until all are taken (BARRIER=1); then all of them end.  Times, and what process 1 spends.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import select
import socket
import sys
import time
from pathlib import Path

from benchmarks import common
from tests.boot.machine import Machine


def send(manager: socket.socket, text: str, *fds: int) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    manager.sendmsg([text.encode()], rights)


def wait_taken(manager: socket.socket) -> None:
    """Until everything that was sent before has been read."""
    ours, theirs = os.pipe()
    send(manager, "BARRIER=1", theirs)
    os.close(theirs)
    poll = select.poll()
    poll.register(ours, 0)
    poll.poll()
    os.close(ours)


def service(descriptors: int, step: int) -> None:
    """What runs in the machine: a line of JSON for each step, and one for the end of all."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * descriptors, 4 * descriptors))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(os.environ["NOTIFY_SOCKET"])
        send(manager, "READY=1")
        pairs: list[tuple[socket.socket, socket.socket]] = []
        while len(pairs) < descriptors:
            before = time.monotonic(), common.cpu_seconds(1)
            for _ in range(step):
                pairs.append(socket.socketpair())
                send(manager, "FDSTORE=1\nFDNAME=g", pairs[-1][0].fileno())
            wait_taken(manager)
            _say(len(pairs), before)
        before = time.monotonic(), common.cpu_seconds(1)
        for one, _ in pairs:
            one.shutdown(socket.SHUT_RDWR)
        wait_taken(manager)
        _say(0, before)


def _say(kept: int, before: tuple[float, float]) -> None:
    wall, cpu = time.monotonic() - before[0], common.cpu_seconds(1) - before[1]
    print(json.dumps([kept, wall, cpu]), flush=True)


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--descriptors", type=int, default=4000, help="in all (4,000)")
    made.add_argument("--step", type=int, default=500, help="measured together (500)")
    args = common.parse(made, {"descriptors": 400, "step": 200})
    result = common.Result("fdstore", args)
    result.columns = ["kept", "in s", "processor of systemd, s", "each, ms"]
    root = Path(__file__).resolve().parents[1]
    words = f"from benchmarks.fdstore import service; service({args.descriptors}, {args.step})"
    with contextlib.closing(Machine()) as machine:
        machine.boot()
        said = machine.do(
            *("systemd-run", "--wait", "--pipe", "--quiet", f"--setenv=PYTHONPATH={root}"),
            *("-p", "Type=notify", "-p", "NotifyAccess=all"),
            *("-p", f"FileDescriptorStoreMax={args.descriptors}"),
            *("-p", f"LimitNOFILE={4 * args.descriptors}", sys.executable, "-c", words),
            timeout=500.0,
        ).stdout
    *steps, end = map(json.loads, said.splitlines())
    result.raw["steps"], result.raw["end"] = steps, end
    for kept, wall, cpu in steps:
        result.row(kept, wall, cpu, 1000 * cpu / args.step)
    result.note(
        f"{args.descriptors} take {sum(wall for _, wall, _ in steps):.1f} s in all; that all of"
        f" them have ended is noticed within {end[1]:.2f} s."
    )
    result.save()


if __name__ == "__main__":
    main()
