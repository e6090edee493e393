"""The VPN server on Windows, seen by clients on another system."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from pkvpn.client.session import LoginRefused, VpnClient
from tests.support import eventually
from tests.windows import wine

pytestmark = [pytest.mark.windows, pytest.mark.slow]

A, B = b"\x02aaaaa", b"\x02bbbbb"
TO_ALL = b"\xff" * 6 + A + b"\x88\xb5" + bytes(46)
TO_A = A + B + b"\x88\xb5" + bytes(46)
TO_B = B + A + b"\x88\xb5" + bytes(46)


def pkvpn(directory: Path) -> tuple[str, ...]:
    """The beginning of a command line."""
    return "-m", "pkvpn.windows", "--directory", wine.windows_path(directory)


class Server:
    """One that serves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = wine.start(*pkvpn(directory), "/run", f"127.0.0.1:{self.port}")
        assert self.process.stdout is not None
        self.told = json.loads(self.process.stdout.readline())

    def ask(self, *words: str) -> Any:
        return json.loads(wine.run(*pkvpn(self.directory), *words))

    def child(self) -> dict[str, Any]:
        (child,) = self.ask("/status")["children"]
        assert isinstance(child, dict)
        return child

    def client(self, user: str, password: str = "pw") -> closing[VpnClient]:
        return closing(VpnClient("127.0.0.1", self.port, "office", user, password))

    def close(self) -> None:
        try:
            self.ask("/end")
            assert self.process.wait(15) == 0
        finally:
            self.process.kill()
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        assert server.told.get("ready"), server.told
        server.ask("/admin", "hub.add", '{"name": "office"}')
        for name in ("ann", "bob"):
            words = {"hub": "office", "name": name, "auth": "password", "password": "pw"}
            server.ask("/admin", "user.add", json.dumps(words))
        yield server
    finally:
        server.close()


def test_frames_go_both_ways_and_sessions_survive_a_kill_by_their_keys(server: Server) -> None:
    with ExitStack() as stack:
        ann, bob = (stack.enter_context(server.client(name)) for name in ("ann", "bob"))
        ann.connect(10)
        bob.connect(10)

        def speak() -> None:
            ann.send([TO_ALL])
            assert TO_ALL in bob.receive(2)
            for _ in range(3):  # the first by the core, the others by known flows
                bob.send([TO_A])
                assert TO_A in ann.receive(2)
                ann.send([TO_B])
                assert TO_B in bob.receive(2)

        speak()
        assert len(server.ask("/admin", "session.list")) == 2
        before = server.child()
        assert before["duties"]["forward"]["done"] > 0
        wine.run("-m", "tests.windows.tree", "kill", str(before["pid"]))

        def back() -> bool:
            for client in (ann, bob):
                client.receive(0.05)
            return bool(ann.resumptions and bob.resumptions and ann.established)

        eventually(back, within=20)
        speak()
        assert (ann.logins, bob.logins) == (1, 1)
        after = server.child()
        assert after["restarts"] == before["restarts"] + 1
        assert after["pid"] != before["pid"]


def test_who_has_another_password_is_refused_and_garbage_costs_nobody(server: Server) -> None:
    with server.client("ann", "wrong") as client, pytest.raises(LoginRefused):
        client.connect(10)
    with socket.create_connection(("127.0.0.1", server.port), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while stranger.recv(4096):
            pass
    before = server.child()
    with server.client("ann") as client:
        client.connect(10)
    assert server.child()["pid"] == before["pid"]


def test_ports_that_are_refused_are_named_and_the_others_serve(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        process = wine.start(
            *pkvpn(tmp_path), "/run", *(f"127.0.0.1:{port}" for port in ports),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            states = {one["port"]: one["state"] for one in told["listeners"]}
            wine.run(*pkvpn(tmp_path), "/end")
            process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert states == {ports[0]: "refused", ports[1]: "listening"}
    assert process.returncode == 0
