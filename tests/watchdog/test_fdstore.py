"""What the service manager hands over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from pkvpn.config import Address
from pkvpn.listeners import Listeners
from pkvpn.watchdog import fdstore
from tests.system.bed import ROOT

TAKE = """
import json, os
from pkvpn.watchdog import fdstore
found = fdstore.take_inherited(os.environ, int(os.environ.pop("ME", os.getpid())))
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps([found, left, [os.get_inheritable(fd) for fds in found.values() for fd in fds]]))
"""


def taken(**environ: str) -> list[object]:
    """What a process takes that gets two descriptors from number 3 on."""
    script = 'exec 3</dev/null 4</dev/null; LISTEN_PID=$$ exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", TAKE],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def test_descriptors_come_by_their_names_and_are_said_once() -> None:
    two = {"listen": [3], "x": [4]}
    assert taken(LISTEN_FDS="2", LISTEN_FDNAMES="listen:x") == [two, [], [False, False]]
    assert taken(LISTEN_FDS="2", LISTEN_FDNAMES="x:x")[0] == {"x": [3, 4]}
    assert taken(LISTEN_FDS="2")[0] == {"unknown": [3, 4]}


def test_what_is_meant_for_another_process_is_not_taken() -> None:
    assert taken(LISTEN_FDS="2", LISTEN_FDNAMES="a:b", ME="1") == [{}, [], []]
    assert fdstore.take_inherited({}, 1) == {}


def test_listeners_go_on_with_sockets_that_are_there_and_open_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        known = Address("127.0.0.1", theirs.getsockname()[1])
        listeners = Listeners()
        addresses = (known, Address("127.0.0.1", 0))
        listeners.adopt((known,), [theirs.fileno()])
        opened = listeners.open(addresses)
        try:
            assert os.path.sameopenfile(opened[0], theirs.fileno())
            assert not os.get_blocking(opened[0])
            assert [one["state"] for one in listeners.status()] == ["listening"] * 2
        finally:
            for fd in opened:
                os.close(fd)
