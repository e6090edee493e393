"""The control socket answers lines, refuses strangers' lines, and never waits."""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn.watchdog.control import (
    MAX_CONNECTIONS,
    MAX_LINE,
    ControlError,
    ControlServer,
    ask,
    listen,
)


def answer(verb: str, args: dict[str, Any]) -> Any:
    if verb == "echo":
        return args
    if verb == "large":
        return "x" * int(args["size"])
    raise ControlError(f"unknown verb {verb!r}")


class Serving:
    """A control server turning in a thread, as it would in the watchdog's loop."""

    def __init__(self, path: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.server = ControlServer(listen(path), self.selector, answer)
        self.wake_read, self.wake_write = socket.socketpair()
        self.selector.register(self.wake_read, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self.turn)
        self.thread.start()

    def turn(self) -> None:
        while True:
            for key, mask in self.selector.select():
                if not self.server.handle(key, mask):
                    return

    def close(self) -> None:
        self.wake_write.send(b"x")
        self.thread.join()
        self.server.close()
        self.selector.close()
        self.wake_read.close()
        self.wake_write.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "control.sock")
    serving = Serving(path)
    yield path
    serving.close()


def raw(path: str, data: bytes) -> list[dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := sock.recv(MAX_LINE):
            received += chunk
    return [json.loads(line) for line in received.splitlines()]


def test_an_answer_and_a_refusal(path: str) -> None:
    assert ask(path, "echo", {"name": "edge-1"}) == {"name": "edge-1"}
    with pytest.raises(ControlError, match="unknown verb 'dance'"):
        ask(path, "dance")


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b'"x"', b"\xff", b'{"do": 1}', b'{"do": "echo", "args": []x', b"[" * 9999],
)
def test_a_line_that_is_no_request_is_answered_with_what_one_is(path: str, line: bytes) -> None:
    (answered,) = raw(path, line + b"\n")
    assert answered == {"ok": False, "error": 'a request is {"do": VERB, "args": {...}}'}


def test_several_lines_in_one_go_are_answered_in_order(path: str) -> None:
    lines = b"".join(
        json.dumps({"do": "echo", "args": {"n": n}}).encode() + b"\n" for n in range(3)
    )
    assert [one["result"]["n"] for one in raw(path, lines)] == [0, 1, 2]


def test_a_line_without_an_end_is_refused_at_the_limit(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(b"x" * (MAX_LINE + 1))
        assert b"at most" in sock.recv(MAX_LINE)
        assert sock.recv(1) == b""


def test_an_answer_over_the_limit_is_replaced_by_an_error_that_says_so(path: str) -> None:
    assert ask(path, "large", {"size": 1000}) == "x" * 1000
    with pytest.raises(ControlError, match="the answer to large is over"):
        ask(path, "large", {"size": MAX_LINE})


def test_one_who_asks_and_never_reads_is_cut_off_and_the_others_are_served(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as greedy:
        greedy.connect(path)
        greedy.setblocking(False)
        request = json.dumps({"do": "large", "args": {"size": 60000}}).encode() + b"\n"
        try:
            for _ in range(1000):
                greedy.sendall(request)
        except OSError:
            pass
        assert ask(path, "echo", {"still": "served"}) == {"still": "served"}


def test_nobody_there_is_an_error_that_can_be_told_from_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask(str(tmp_path / "nothing.sock"), "status")


def test_one_who_does_not_answer_is_given_up_at_the_limit(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        with pytest.raises(TimeoutError):
            ask(str(tmp_path / "silent.sock"), "status", timeout=0.05)


def test_a_path_where_no_socket_can_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"absent/control\.sock"):
        listen(str(tmp_path / "absent" / "control.sock"))


@pytest.mark.root
def test_another_user_is_refused_by_what_the_kernel_says_of_him() -> None:
    name = f"\0pkvpn-test-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(name)
    listener.listen()
    selector = selectors.DefaultSelector()
    server = ControlServer(listener.detach(), selector, lambda _verb, _args: "secret")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            ask(name, "status")
        except ControlError as error:
            code = 0 if str(error) == "user 65534 may not control a service of user 0" else 2
        finally:
            os._exit(code)
    for key, mask in selector.select(5.0):
        assert server.handle(key, mask)
    server.close()
    selector.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_bug_behind_a_verb_is_an_answer_and_who_forgets_to_hang_up_makes_room(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "control.sock")
    selector = selectors.DefaultSelector()
    server = ControlServer(listen(path), selector, lambda verb, _args: {"": 0}[verb])
    idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(MAX_CONNECTIONS)]
    for one in idle:
        one.connect(path)
        for key, mask in selector.select(5.0):
            assert server.handle(key, mask)
    asking = threading.Thread(target=lambda: said.append(_refusal(path, "status")))
    said: list[str] = []
    asking.start()
    while asking.is_alive():
        for key, mask in selector.select(0.01):
            assert server.handle(key, mask)
    asking.join()
    assert said == ["status failed: KeyError: 'status'"]
    assert idle[0].recv(1) == b""
    for one in idle:
        one.close()
    server.close()
    selector.close()


def _refusal(path: str, verb: str) -> str:
    try:
        return f"answered {ask(path, verb)}"
    except ControlError as error:
        return str(error)
