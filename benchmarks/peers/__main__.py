"""The same faults under other supervisors, each set up at its best.

    benchmarks/peers/setup                              fetches them, once
    python -m benchmarks.peers [--rounds N] [--only NAME,...] [--quick]

The supervised service is the same small program for all but gunicorn, which has its own worker
around the same imports, and SoftEther and pkvpn, which are themselves.  Measured for each:

crash to served: kill -9 at a random moment 1.1 to 2 s after the last one, a client that dials
every millisecond; refused: its attempts that were.  SIGSTOP, spin and spin in C (which keeps the
GIL): the time until somebody answers again, of 6 s; who has not noticed twice is not asked again.
False kills: service and supervisor stopped together for 3 s, then continued, the supervisor first;
was the healthy service replaced?  Orphan: does the service serve on 2 s after a kill -9 of its
supervisor?  Idle CPU: supervisor and all below it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common, respawn
from benchmarks.servers import Ours, SoftEther, kill_quietly

PEERS = Path(os.environ.get("PKVPN_PEERS", "/var/tmp/pkvpn-peers"))
SERVICE = str(Path(__file__).parent / "service.py")
PORT = 7100
BEAT_PORT = 7200
WATCH = 6.0
PAUSE = 3.0


# --- who is compared -----------------------------------------------------------------------------


class Peer(ABC):
    """A supervisor with its service."""

    name: str
    settings: str

    @abstractmethod
    def start(self) -> None:
        """Start it; returns when the service answers."""

    @abstractmethod
    def stop(self) -> None:
        """End everything."""

    @abstractmethod
    def ask(self) -> int:
        """One request; the pid that answered, 0 if the answer does not say. OSError: no answer."""

    @abstractmethod
    def service(self) -> int:
        """The pid that serves; 0 if there is none."""

    @abstractmethod
    def supervisor(self) -> int:
        """The pid that watches."""

    can_spin = True


class Small(Peer):
    """The small service under a supervisor that is one command."""

    def __init__(
        self, name: str, settings: str, directory: Path, command: Callable[[Path], list[str]]
    ) -> None:
        self.name = name
        self.settings = settings
        self._directory = directory
        self._command = command
        self._program: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        place = Path(tempfile.mkdtemp(dir=self._directory))
        place.chmod(0o755)
        folders = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
        libraries = ":".join(str(PEERS / "root" / folder) for folder in folders)
        paths = f"{PEERS}/root/usr/bin:{PEERS}/root/bin:{os.environ['PATH']}"
        with (place / "output").open("wb") as output:
            self._program = subprocess.Popen(
                self._command(place), cwd=place, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
                env={**os.environ, "LD_LIBRARY_PATH": libraries, "PATH": paths},
            )  # fmt: skip
        try:
            common.wait_until(self.ask, 15.0, f"{self.name} serves")
        except TimeoutError as error:
            said = (place / "output").read_text(errors="replace")[-2000:]
            self.stop()
            raise RuntimeError(f"{error}: {said}") from None

    def stop(self) -> None:
        assert self._program is not None
        below = common.descendants(self._program.pid)
        # The supervisor first, so that nothing new is started; an orphan is looked for by port.
        self._program.kill()
        self._program.wait()
        for pid in below:
            kill_quietly(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                kill_quietly(self.ask(), signal.SIGKILL)
            except OSError:
                return
            time.sleep(0.05)

    def ask(self) -> int:
        with socket.create_connection(("127.0.0.1", PORT), 1.0) as sock:
            sock.settimeout(WATCH)
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while data := sock.recv(4096):
                answer += data
        if not answer.rpartition(b"\n")[2].isdigit():
            raise ConnectionResetError(f"no answer: {answer!r}")
        return int(answer.rpartition(b"\n")[2])

    def service(self) -> int:
        return self.ask()

    def supervisor(self) -> int:
        assert self._program is not None
        return self._program.pid


class Stock(Peer):
    """SoftEther's execsvc around its own core."""

    name = "SoftEther execsvc"
    settings = "as it comes; over TLS"
    can_spin = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: SoftEther | None = None

    def start(self) -> None:
        self._server = SoftEther(Path(tempfile.mkdtemp(dir=self._directory)))
        self._server.start()

    def stop(self) -> None:
        # Its stop command waits for a process that may be gone, and kills by name.
        for pid in common.all_pids():
            if "vpnserver execsvc" in common.command_line(pid):
                kill_quietly(pid, signal.SIGKILL)
        assert self._server is not None
        self._server.stop()

    def ask(self) -> int:
        respawn.ask(443, respawn.context())
        return 0

    def service(self) -> int:
        assert self._server is not None
        return self._server.core()

    def supervisor(self) -> int:
        assert self._server is not None
        return self._server.pids()[0]


class VpnTree(Peer):
    """pkvpn itself: the edge is what is killed, the answer comes from the core."""

    name = "pkvpn (the VPN server)"
    settings = "defaults; its edge, over TLS and through the core"
    can_spin = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server: Ours | None = None
        self._pids: dict[str, int] = {}

    def start(self) -> None:
        self._server = Ours(Path(tempfile.mkdtemp(dir=self._directory)))
        self._server.start()
        self._pids = self._server.named_pids()

    def stop(self) -> None:
        for pid in common.all_pids():
            if common.command_line(pid).startswith("vpnserver execsvc"):
                kill_quietly(pid, signal.SIGKILL)

    def ask(self) -> int:
        respawn.ask(443, respawn.context())
        return 0

    def service(self) -> int:
        assert self._server is not None
        try:
            self._pids = self._server.named_pids()
        except OSError:
            return self._pids["edge-1"] if common.alive(self._pids["edge-1"]) else 0
        return self._pids.get("edge-1", 0)

    def supervisor(self) -> int:
        return self._pids["watchdog"]


def write(path: Path, text: str, mode: int = 0o644) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def peers(directory: Path) -> list[Peer]:
    """All of them, with the settings that are printed beside the figures."""
    python, program = sys.executable, f"{sys.executable} {SERVICE} {PORT}"
    venv = PEERS / "venv/bin"

    def supervisord(place: Path) -> list[str]:
        text = (
            "[supervisord]\nnodaemon=true\nuser=root\n"
            f"[program:service]\ncommand={program}\nautorestart=true\nstartsecs=0\n"
        )
        return [str(venv / "supervisord"), "-c", write(place / "supervisord.conf", text)]

    def circus(place: Path) -> list[str]:
        text = (
            "[circus]\ncheck_delay = 0.05\n"
            "endpoint = tcp://127.0.0.1:7300\npubsub_endpoint = tcp://127.0.0.1:7301\n"
            f"[watcher:service]\ncmd = {program} --fd $(circus.sockets.door) --beat {BEAT_PORT}\n"
            "use_sockets = True\nstop_signal = KILL\n"
            f"[socket:door]\nhost = 127.0.0.1\nport = {PORT}\n"
            "[plugin:watchdog]\nuse = circus.plugins.watchdog.WatchDog\n"
            f"ip = 127.0.0.1\nport = {BEAT_PORT}\nloop_rate = 0.1\nmax_count = 3\n"
            "watchers_regex = service\nmsg_regex = ^(?P<pid>.*);(?P<timestamp>.*)$\n"
        )
        return [str(venv / "circusd"), write(place / "circus.ini", text)]

    def gunicorn(_place: Path) -> list[str]:
        return [
            str(venv / "gunicorn"), "--preload", "--workers", "1", "--timeout", "1",
            "--bind", f"127.0.0.1:{PORT}", "--chdir", str(Path(SERVICE).parent),
            "service:application",
        ]  # fmt: skip

    def runit(place: Path) -> list[str]:
        write(place / "service/run", f"#!/bin/sh\nexec {program}\n", 0o755)
        return ["runsv", str(place / "service")]

    def s6(place: Path) -> list[str]:
        write(place / "service/run", f"#!/bin/sh\nexec {program} --notify 3\n", 0o755)
        write(place / "service/notification-fd", "3\n")
        return ["s6-supervise", str(place / "service")]

    def fork_loop(_place: Path) -> list[str]:
        return [python, SERVICE, str(PORT), "--fork-loop"]

    def tree(place: Path) -> list[str]:
        return [python, SERVICE, str(PORT), "--tree", str(place)]

    small = (
        ("pkvpn.watchdog", "defaults: beat 0.2 s, hang 1 s", tree),
        ("floor: preloaded fork loop", "no watching at all", fork_loop),
        ("supervisord", "autorestart=true, startsecs=0; it has no hang detection", supervisord),
        (
            "circus",
            "check_delay 0.05, its own socket, WatchDog 0.1 s x 3, beat 0.05 s, KILL",
            circus,
        ),
        ("gunicorn", "sync, 1 worker, preload, timeout 1 s (its smallest)", gunicorn),
        ("runit", "runsv", runit),
        ("s6", "s6-supervise with notification-fd", s6),
    )
    found: list[Peer] = [VpnTree(directory)]
    found += [Small(name, settings, directory, command) for name, settings, command in small]
    return [*found, Stock(directory)]


# --- what is done to them ------------------------------------------------------------------------


def until_served(peer: Peer, old: int, within: float) -> tuple[float, int]:
    """(seconds until somebody else than ``old`` answers or nan, refused attempts)."""
    began, refused = time.monotonic(), 0
    while (at := time.monotonic()) - began < within:
        try:
            if peer.ask() != old:
                return time.monotonic() - began, refused
        except ConnectionRefusedError:
            refused += 1
        except OSError:
            pass
        time.sleep(max(0.0, at + 0.001 - time.monotonic()))
    return float("nan"), refused


def crashes(peer: Peer, rounds: int) -> dict[str, Any]:
    took, refused = [], 0
    for _ in range(rounds):
        time.sleep(random.uniform(1.1, 2.0))
        pid = common.wait_until(peer.service, 10.0, f"{peer.name} serves")
        os.kill(pid, signal.SIGKILL)
        seconds, attempts = until_served(peer, pid, 10.0)
        took.append(1e3 * seconds)
        refused += attempts
    return {"took_ms": took, "refused": refused / rounds}


def hangs(peer: Peer, number: int, rounds: int) -> list[float]:
    """Seconds until somebody answers again, nan for those that nobody noticed."""
    took = []
    for _ in range(rounds):
        time.sleep(random.uniform(1.1, 2.0))
        pid = common.wait_until(peer.service, 10.0, f"{peer.name} serves")
        os.kill(pid, number)
        began = time.monotonic()
        seconds = float("nan")
        while time.monotonic() - began < WATCH:
            # Whoever it is: a stopped service that was continued serves as well as a new one.
            if answers(peer, began + WATCH):
                seconds = time.monotonic() - began
                break
        took.append(seconds)
        if seconds != seconds:  # noqa: PLR0124 - nobody noticed: make it well again
            kill_quietly(pid, signal.SIGKILL)
            until_served(peer, pid, 10.0)
            if len(took) == 2 and took[0] != took[0]:  # nor the first time
                break
    return took


def answers(peer: Peer, until: float) -> bool:
    """One request in a process of its own: it may never be answered."""

    def work() -> None:
        try:
            peer.ask()
        except OSError:
            os._exit(1)

    pid = common.fork(work)
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                time.sleep(0.001)
            return status == 0
        time.sleep(0.002)
    common.end([pid])
    return False


def pauses(peer: Peer, rounds: int) -> int:
    """How often a healthy service is replaced after everything stood still."""
    replaced = 0
    for _ in range(rounds):
        time.sleep(1.5)
        before = common.wait_until(peer.service, 10.0, f"{peer.name} serves")
        everybody = [peer.supervisor(), *common.descendants(peer.supervisor())]
        for pid in everybody:
            kill_quietly(pid, signal.SIGSTOP)
        time.sleep(PAUSE)
        for pid in everybody:
            kill_quietly(pid, signal.SIGCONT)
        time.sleep(2.5)
        replaced += common.wait_until(peer.service, 10.0, f"{peer.name} serves") != before
    return replaced


def orphans(peer: Peer, rounds: int) -> int:
    """How often the service lives on 2 s after its supervisor was killed."""
    left = 0
    for _ in range(rounds):
        peer.start()
        try:
            time.sleep(1.0)
            service = common.wait_until(peer.service, 10.0, f"{peer.name} serves")
            os.kill(peer.supervisor(), signal.SIGKILL)
            time.sleep(2.0)
            left += common.alive(service)
        finally:
            peer.stop()
    return left


def idle(peer: Peer, seconds: float) -> float:
    """CPU of the supervisor and all below it, % of one core."""
    everybody = [peer.supervisor(), *common.descendants(peer.supervisor())]
    before, began = sum(common.schedstat(pid)[0] for pid in everybody), time.monotonic()
    time.sleep(seconds)
    after = sum(common.schedstat(pid)[0] for pid in everybody if common.alive(pid))
    return 100 * (after - before) / (time.monotonic() - began)


def measure(peer: Peer, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"settings": peer.settings}
    few = max(1, args.rounds // 5)
    peer.start()
    try:
        time.sleep(1.0)
        found["idle_percent"] = idle(peer, args.seconds)
        found["crash"] = crashes(peer, args.rounds)
        found["stop_s"] = hangs(peer, signal.SIGSTOP, few)
        for what, number in (("spin_s", signal.SIGUSR1), ("spin_in_c_s", signal.SIGUSR2)):
            found[what] = hangs(peer, number, few) if peer.can_spin else None
        found["replaced_after_pause"] = pauses(peer, few)
    finally:
        peer.stop()
    found["orphans"] = orphans(peer, few)
    found["few"] = few
    return found


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=15, help="crashes; a fifth of the rest (15)")
    made.add_argument("--seconds", type=float, default=20.0, help="of idling (20)")
    made.add_argument("--only", default="", help="names, or their beginnings, with commas")
    args = common.parse(made, {"rounds": 2, "seconds": 2.0})
    common.lab()
    if not (PEERS / "venv/bin/supervisord").exists():
        print(f"other supervisors are left out: {PEERS} is not there, run benchmarks/peers/setup")
    result = common.Result("peers", args)
    result.columns = [
        "supervisor", "crash to served, median ms", "max ms", "refused a crash",
        "SIGSTOP noticed, s", "spin noticed, s", "spin in C noticed, s",
        "killed after a pause of all", "orphans",
        "idle CPU, %",
    ]  # fmt: skip
    wanted = tuple(args.only.split(","))
    with common.work_directory() as directory:
        for peer in peers(directory):
            if peer.name.startswith(wanted):
                run(result, peer, args)
    result.save(plot)


def run(result: common.Result, peer: Peer, args: argparse.Namespace) -> None:
    try:
        found = measure(peer, args)
    except (OSError, RuntimeError, AssertionError) as error:  # the others are still of interest
        result.note(f"{peer.name}: not measured: {type(error).__name__}: {error}"[:500])
        return
    result.raw[peer.name] = found
    print(f"  {peer.name}: {json.dumps(found)}", flush=True)
    took, few = found["crash"]["took_ms"], found["few"]
    result.row(
        peer.name, common.median(took), max(took), found["crash"]["refused"],
        noticed(found["stop_s"]), noticed(found["spin_s"]), noticed(found["spin_in_c_s"]),
        f"{found['replaced_after_pause']}/{few}", f"{found['orphans']}/{few}",
        found["idle_percent"],
    )  # fmt: skip
    result.note(f"{peer.name}: {peer.settings}.")


def noticed(took: list[float] | None) -> str:
    """Median of those that were, and how many."""
    if took is None:
        return "-"
    seen = [seconds for seconds in took if seconds == seconds]  # noqa: PLR0124 - without nan
    if not seen:
        return f"not in {WATCH:g} s"
    return f"{common.median(seen):.2f} ({len(seen)}/{len(took)})"


def plot(figure: Any, result: dict[str, Any]) -> None:
    """Time from crash to service."""
    axes = figure.subplots()
    names = list(result["raw"])
    for place, name in enumerate(names):
        crash = result["raw"][name]["crash"]
        times = [took for took in crash["took_ms"] if took is not None]
        axes.scatter(times, [place] * len(times), s=8, alpha=0.6)
        axes.plot([common.median(times)] * 2, [place - 0.35, place + 0.35], color="black")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms from kill -9 to the first answer of the next; bar: median")
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
