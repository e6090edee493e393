"""Who is cut off when a server is changed, or loses the process that serves: side by side.

    python -m benchmarks.reloads [--rounds N] [--softether N] [--quick]

Three kinds of long-lived connections, each with something said on it every millisecond:

- the tunnel of two stock clients, through pkvpn and through SoftEther's own server;
- the tunnel of two clients of ours, through pkvpn;
- TLS connections through HAProxy and nginx, the yardstick for connections that survive a reload.
  They serve from one worker as pkvpn does from one edge, and are started again as by systemd:
  HAProxy ends with its worker.

In each round something is done at a random moment: a reload, an upgrade, a kill -9 of what holds
the connections.  SoftEther's server has no reload; its core is killed, with the stock client as it
comes and in the form of account that comes back.
"""

from __future__ import annotations

import datetime as dt
import functools
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.beds import echoes, stock_bed
from benchmarks.echo import Asker
from benchmarks.gaps import ROUND, SOFTETHER_WAITS, a_round, prepare, softether
from benchmarks.servers import Ours, kill_quietly
from pkvpn.chaos.traffic import HUB, PASSWORD, USERS, Traffic
from pkvpn.edge import certificate
from pkvpn.watchdog.control import ControlError

# With part of the rounds each.
OURS = {
    "nothing": 1.0, "reload": 1.0, "upgrade": 0.5, "restart edge-1": 1.0,
    "kill edge": 1.0, "kill core": 1.0, "kill both": 1.0,
}  # fmt: skip
PROXIED = ("nothing", "reload", "kill worker")
BACKEND, PROXY = 7001, 7443
# An upgrade tries the new code first, and replaces the children one by one.
UPGRADE_ROUND = 6.0


# --- the proxies ---------------------------------------------------------------------------------


# As systemd starts again what its unit says is to be started again, 0.1 s after its end.
AGAIN = ("sh", "-c", 'while :; do "$@"; sleep 0.1; done', "sh")


class Proxy:
    """A proxy with one worker that takes TLS and passes it on."""

    def __init__(self, name: str, command: list[str], reload: signal.Signals) -> None:
        self.name = name
        self._reload = reload
        self._process = subprocess.Popen(
            [*AGAIN, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _master(self) -> int:
        return max(common.children(self._process.pid), default=0)

    def workers(self) -> list[int]:
        """Those of before a reload, which still have their connections, as well."""
        master = self._master()
        return common.children(master) if master else []

    def act(self, what: str) -> Callable[[], None]:
        """Look up everything; what is returned does it."""
        if what == "nothing":
            return lambda: None
        if what == "reload":
            return functools.partial(os.kill, self._master(), self._reload)
        return functools.partial(_kill_all, self.workers())

    def close(self) -> None:
        below = common.descendants(self._process.pid)
        self._process.kill()  # first, so that it starts nothing again
        self._process.wait()
        for pid in below:
            kill_quietly(pid, signal.SIGKILL)


def _kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


HAPROXY = f"""
global
    maxconn 1000
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen all
    bind 127.0.0.1:{PROXY} ssl crt {{directory}}/both.pem
    server echo 127.0.0.1:{BACKEND}
"""
NGINX = f"""
load_module modules/ngx_stream_module.so;
worker_processes 1;
pid {{directory}}/nginx.pid;
error_log {{directory}}/nginx.log;
events {{{{ worker_connections 1000; }}}}
stream {{{{
    server {{{{
        listen 127.0.0.1:{PROXY} ssl;
        ssl_certificate {{directory}}/server.crt;
        ssl_certificate_key {{directory}}/server.key;
        proxy_pass 127.0.0.1:{BACKEND};
        proxy_timeout 1h;
    }}}}
}}}}
"""


@contextmanager
def proxy(directory: Path, name: str) -> Iterator[Proxy]:
    """HAProxy or nginx, with a certificate of its own."""
    place = directory / name
    place.mkdir()
    cert, key = place / "server.crt", place / "server.key"
    certificate.ensure(cert, key, "localhost", dt.datetime.now(dt.UTC))
    (place / "both.pem").write_text(cert.read_text() + key.read_text())
    config = place / "config"
    if name == "HAProxy":
        config.write_text(HAPROXY.format(directory=place))
        words, number = ["haproxy", "-W", "-f", str(config)], signal.SIGUSR2
    else:
        config.write_text(NGINX.format(directory=place))
        # Its modules are looked for beside the prefix of its installation.
        words = ["nginx", "-p", "/usr/share/nginx/", "-c", str(config), "-g", "daemon off;"]
        number = signal.SIGHUP
    found = Proxy(name, words, number)
    try:
        common.wait_until(found.workers, 10.0, f"a worker of {name}")
        time.sleep(0.5)
        yield found
    finally:
        found.close()


def run_proxy(result: common.Result, directory: Path, name: str, rounds: int) -> None:
    words = [sys.executable, "-m", "benchmarks.streams"]
    with proxy(directory, name) as found:
        asker = Asker([*words, "ask", str(PROXY)])
        try:
            asker.begin(0.5)
            asker.finish()
            for what in PROXIED:
                raw = []
                for _ in range(rounds):
                    time.sleep(0.5)
                    common.wait_until(found.workers, 10.0, f"a worker of {name}")
                    do = found.act(what)
                    asker.begin(ROUND)
                    time.sleep(random.uniform(0.1, 0.5) * ROUND)
                    do()
                    raw.append(asker.finish() | {"sessions": 1})
                tabulate(result, name, "TLS connection", what, raw)
        finally:
            asker.close()


# --- tunnels -------------------------------------------------------------------------------------


def run_stock(result: common.Result, directory: Path, rounds: int) -> None:
    with stock_bed(directory, "pkvpn") as (bed, server), echoes(bed) as asker:
        asker.begin(1.0)
        asker.finish()
        for what, part in OURS.items():
            raw = []
            for _ in range(max(1, round(part * rounds))):
                before = [client.established_sessions() for client in bed.clients]
                found = a_round(bed, asker, server, what, _seconds(what))
                after = [client.established_sessions() for client in bed.clients]
                found["sessions_lost"] = sum(map(operator.ne, before, after))
                raw.append(found | {"sessions": 2})
            tabulate(result, "pkvpn", "stock client's tunnel", what, raw)


def run_own(result: common.Result, directory: Path, rounds: int) -> None:
    """On the loopback, as the proxies are."""
    place = directory / "own"
    place.mkdir()
    server = Ours(place)
    server.start()
    try:
        server.service.add_hub(HUB, **dict.fromkeys(USERS, PASSWORD))
        with Traffic(443) as traffic:
            for what, part in OURS.items():
                count = max(1, round(part * rounds))
                raw = [_own_round(traffic, server, what) for _ in range(count)]
                tabulate(result, "pkvpn", "our client's tunnel", what, raw)
    finally:
        server.stop()


def _own_round(traffic: Traffic, server: Ours, what: str) -> dict[str, Any]:
    common.wait_until(server.settled, 20.0, "all children are up")
    do = prepare(what, server)
    before = traffic.begin()
    time.sleep(random.uniform(0.1, 0.5) * ROUND)
    failed = ""
    try:
        do()
    except (OSError, ControlError) as error:
        failed = f"{type(error).__name__}: {error}"
    time.sleep(_seconds(what) - 0.3 * ROUND)
    after = traffic.finish()
    return {
        "silence_ms": round(1e3 * after["silence"], 3),
        "own_silence_ms": round(1e3 * after["own_silence"], 3),
        "sent": after["sent"] - before["sent"],
        "lost": after["lost"] - before["lost"],
        "twice": after["twice"] - before["twice"],
        "connections_cut": after["resumptions"] - before["resumptions"],
        "sessions_lost": after["logins"] - before["logins"],
        "sessions": 2,
        "failed": failed,
    }


def _seconds(what: str) -> float:
    return UPGRADE_ROUND if what == "upgrade" else ROUND


def run_softether(result: common.Result, directory: Path, tries: int) -> None:
    for suffix, form in (("", "as it comes"), ("/tcp", "account host/tcp")):
        raw = []
        for one in softether(directory, suffix, tries)["rounds"]:
            lost = sum(map(operator.ne, one["established_before"], one["established_after"]))
            # A client may have a session again and still hear nothing of the other.
            heard = one["silence_ms"] < 1e3 * (SOFTETHER_WAITS - 1.5)
            raw.append(
                one
                | {
                    "sessions": 2,
                    "sessions_lost": lost,
                    "back_ms": one["silence_ms"] if heard else None,
                }
            )
        tabulate(result, "SoftEther", f"stock client's tunnel, {form}", "kill core", raw)
    result.note(
        f"SoftEther's clients were waited for {SOFTETHER_WAITS - 1:g} s; where one did not hear "
        "the other again in that time, the last column has no figure."
    )


# --- the table -----------------------------------------------------------------------------------


def tabulate(
    result: common.Result, server: str, connection: str, what: str, raw: list[dict[str, Any]]
) -> None:
    """One row: what was cut counts, how long it was silent, and after how long it was back."""
    silences = [one["silence_ms"] for one in raw]
    cut = sum(one["connections_cut"] for one in raw)
    back = [back_ms(one) for one in raw]
    known = [one for one in back if one is not None]
    result.raw[f"{server}, {connection}: {what}"] = raw
    result.row(
        server, connection, what, len(raw), sum(one["sessions"] for one in raw), cut,
        sum(one.get("sessions_lost", one["connections_cut"]) for one in raw),
        sum(one["lost"] for one in raw), common.median(silences), max(silences),
        max(known) / 1e3 if len(known) == len(back) else None,
    )  # fmt: skip
    if failed := [one["failed"] for one in raw if one.get("failed")]:
        result.note(f"{server}, {what}: failed {len(failed)} times, first with {failed[0]}")


def back_ms(one: dict[str, Any]) -> float | None:
    """After how long both heard each other again; None: not as long as they were looked at."""
    back: float | None = one.get("back_ms", one["silence_ms"])
    return back if one["connections_cut"] else one["silence_ms"]


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=20, help="of each thing that is done (20)")
    made.add_argument("--softether", type=int, default=3, help="kills of SoftEther's core (3)")
    args = common.parse(made, {"rounds": 2, "softether": 1})
    if missing := [name for name in ("haproxy", "nginx") if shutil.which(name) is None]:
        sys.exit(f"not installed: {', '.join(missing)} (Debian: haproxy nginx libnginx-mod-stream)")
    common.lab()
    result = common.Result("reloads", args)
    result.columns = [
        "server", "connection", "what is done", "rounds", "connections", "cut", "sessions lost",
        "lost on the way", "longest silence, median ms", "max ms", "all back after s, max",
    ]  # fmt: skip
    with common.work_directory() as directory:
        backend = (sys.executable, "-m", "benchmarks.streams", "answer", str(BACKEND))
        with subprocess.Popen(backend, cwd=common.ROOT) as echo:
            try:
                time.sleep(0.5)
                for name in ("HAProxy", "nginx"):
                    run_proxy(result, directory, name, args.rounds)
            finally:
                echo.kill()
        run_own(result, directory, args.rounds)
        run_stock(result, directory, args.rounds)
        if args.softether:
            run_softether(result, directory, args.softether)
    result.save(plot)


def plot(figure: Any, result: dict[str, Any]) -> None:
    """The longest silence of each round a dot; a cross where a connection was cut."""
    axes = figure.subplots()
    spread = random.Random(1)
    names = list(result["raw"])
    for place, name in enumerate(names):
        for marker, colour, cut in (("o", "tab:blue", False), ("x", "tab:red", True)):
            times = [
                one["silence_ms"]
                for one in result["raw"][name]
                if bool(one["connections_cut"]) is cut
            ]
            axes.scatter(
                times, [place + spread.uniform(-0.25, 0.25) for _ in times],
                s=10, marker=marker, color=colour, alpha=0.7,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms: longest silence of a round; red cross: the connection was cut")
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
