"""A tree for the tests, run by the Python of Windows: one child misbehaves on request."""

import faulthandler
import json
import os
import select
import socket
import sys
import time
from typing import Any

import psutil

from pkvpn.watchdog.policy import RestartPolicy
from pkvpn.watchdog.spec import ChildSpec, HeldSpec, TreeSpec
from pkvpn.windows.child import Child
from pkvpn.windows.control import ask
from pkvpn.windows.supervisor import run_tree


def idle(child: Child) -> None:
    """Is there, and says in a file when it ends as it was asked."""
    child.ready()
    while not child.stopping:
        child.wait()
    with open(os.environ["PKVPN_TEST_ENDS"], "a", encoding="ascii") as file:
        file.write(f"{child.name}\n")


def echo(child: Child) -> None:
    """Answers each client with its own pid and does what it says."""
    (listener,) = [socket.socket(fileno=fd) for fd in child.held("listen")]
    listener.setblocking(False)
    served = child.duty("serve")
    child.ready()
    while not child.stopping:
        wait = child.turn(time.monotonic())
        readable, _, _ = select.select([listener.fileno(), child.fileno()], [], [], wait)
        if child.fileno() in readable:
            child.receive()
        if listener.fileno() in readable:
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(True)
                wish = connection.recv(100)
                connection.send(str(os.getpid()).encode())
            served.done += 1
            if wish == b"hang":
                time.sleep(1000)
            elif wish == b"exit":
                os._exit(3)
            elif wish == b"wild":
                faulthandler._raise_exception(0xC0000005)  # type: ignore[attr-defined]
    with open(os.environ["PKVPN_TEST_ENDS"], "a", encoding="ascii") as file:
        file.write(f"{child.name}\n")


def _listen() -> list[int]:
    return [socket.create_server(("127.0.0.1", int(os.environ["PKVPN_TEST_PORT"]))).detach()]


def spec(directory: str) -> TreeSpec:
    policy = RestartPolicy(first=0.01, healthy_after=0.1)
    return TreeSpec(
        name="test",
        children=(
            ChildSpec("first", idle, policy=policy),
            ChildSpec(
                "echo", echo, policy=policy, held=("listen",), duties=("serve",), hang_timeout=1.5
            ),
            ChildSpec("last", idle, policy=policy),
        ),
        runtime_dir=directory,
        state_dir=directory,
        held=(HeldSpec("listen", _listen),),
    )


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    verb, directory = sys.argv[1:]
    if verb == "run":
        sys.exit(run_tree(spec(directory), tell=_tell))
    if verb == "list":
        # What the list of processes calls them; `psutil.Process.name` fails under Wine.
        for process in psutil.process_iter():
            try:
                print(process.pid, process.cmdline()[0], flush=True)
            except (psutil.Error, IndexError):
                continue
    elif verb == "kill":
        psutil.Process(int(directory)).kill()
    else:
        name, _, child = verb.partition(":")
        print(json.dumps(ask(directory, name, {"name": child} if child else {})), flush=True)
