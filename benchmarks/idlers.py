"""Sessions of our own client that do nothing but stay.

    python -m benchmarks.idlers HOST PORT USER SESSIONS

Logs in so many, says `ready`, keeps them alive until its input ends, and says how many were never
cut.  `Idlers` runs some of these programs.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import ROOT
from benchmarks.servers import HUB
from pkvpn.client.session import VpnClient

# How often it looks which of its clients wants to be called.
LOOK_EVERY = 0.25
# One processor does all TLS handshakes of a server with one edge; this is far beyond.
LOGIN_TIMEOUT = 60.0


def stay(host: str, port: int, number: int, sessions: int) -> None:
    clients = []
    try:
        for _ in range(sessions):
            client = VpnClient(host, port, HUB, f"u{number}", f"pw{number}")
            client.connect(LOGIN_TIMEOUT)
            clients.append(client)
        os.nice(10)  # keep-alives have seconds of time; what is measured beside them has none
        print("ready", flush=True)
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        by_fd = {client.fileno(): client for client in clients}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while sys.stdin.fileno() not in (ready := dict(poll.poll(LOOK_EVERY * 1000))):
            now = time.monotonic()
            for fd, client in by_fd.items():
                deadline = client.next_deadline()
                if fd in ready or (deadline is not None and deadline <= now):
                    client.handle()
        cut = [c for c in clients if not c.established or c.logins > 1 or c.resumptions]
        why = sorted({reason(client) for client in cut})
        print(json.dumps({"whole": len(clients) - len(cut), "why": why[:5]}), flush=True)
    finally:
        for client in clients:
            client.close()


def reason(client: VpnClient) -> str:
    """What became of a session."""
    state = "established again" if client.established else f"at stage {client.stage}"
    return f"{state}, {client.logins} logins, {client.resumptions} resumptions, {client.error!r}"


class Idlers:
    """So many sessions from some processes."""

    def __init__(
        self, enter: Callable[..., list[str]], host: str, sessions: int, processes: int
    ) -> None:
        """Returns when all are logged in.  ``enter`` makes of a command one for another host."""
        self.sessions = sessions // processes * processes
        self._programs = [
            subprocess.Popen(
                enter(
                    sys.executable, "-m", "benchmarks.idlers",
                    host, "443", str(number % 2 + 1), str(sessions // processes),
                ),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for number in range(processes)
        ]  # fmt: skip
        try:
            for program in self._programs:
                if self._line(program) != "ready\n":
                    raise RuntimeError("idle sessions did not log in; the error stands above")
        except BaseException:
            self.kill()
            raise

    @staticmethod
    def _line(program: subprocess.Popen[str]) -> str:
        assert program.stdout is not None
        return program.stdout.readline()

    def close(self) -> tuple[int, list[str]]:
        """End them; how many were never cut, and why the others were."""
        whole: int = 0
        why: set[str] = set()
        for program in self._programs:
            assert program.stdin is not None
            program.stdin.close()
        for program in self._programs:
            line = self._line(program)
            found: dict[str, Any] = (
                json.loads(line) if line else {"whole": 0, "why": ["its process ended"]}
            )
            whole += found["whole"]
            why.update(found["why"])
        self.kill(after=60.0)
        return whole, sorted(why)

    def kill(self, after: float = 0.0) -> None:
        """End them whatever they do."""
        for program in self._programs:
            try:
                program.wait(after)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
            for file in (program.stdin, program.stdout):
                assert file is not None
                file.close()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    stay(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
