"""Logins per second and what one costs; a thousand sessions that do nothing.

    python -m benchmarks.logins [--seconds N] [--rounds N] [--sessions N] [--quick]

The generators are processes that log in and leave, one connection after the other, against our
server and SoftEther's in turn: TCP, TLS handshake, login with a password, welcome, end
(`dialler.py`).  CPU is that of all processes of the server, by process where it is ours.  The
generators share the processors with it, so their own cost a login stands beside it: the rate is
about (processors) / (server + generator).

Then so many sessions at once: time until all are logged in, memory of the server (PSS: what is
shared is counted once) by session, threads, and CPU while they only send keep-alives.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.dialler import Dialler
from benchmarks.idlers import Idlers
from benchmarks.servers import HUB, Ours, Server, SoftEther

HOST, PORT = "127.0.0.1", 443


# --- the generators ------------------------------------------------------------------------------


class Generators:
    """Processes that each run ``work(number, say)``; what they say is JSON, an object a line."""

    def __init__(self, count: int, work: Callable[[int, Callable[[Any], None]], None]) -> None:
        self._said: list[Any] = []
        self._pids = []
        for number in range(count):
            reading, writing = os.pipe()

            def program(number: int = number, writing: int = writing) -> None:
                def say(what: Any) -> None:
                    os.write(writing, json.dumps(what).encode() + b"\n")

                work(number, say)

            self._pids.append(common.fork(program))
            os.close(writing)
            self._said.append(os.fdopen(reading, encoding="utf-8"))

    def hear(self) -> list[Any]:
        """The next line of each."""
        lines = [said.readline() for said in self._said]
        if not all(lines):
            raise RuntimeError("a generator ended before its time; its error stands above")
        return [json.loads(line) for line in lines]

    def wait(self) -> None:
        """Reap them."""
        for pid, said in zip(self._pids, self._said, strict=True):
            os.waitpid(pid, 0)
            said.close()

    def kill(self) -> None:
        """End them whatever they do."""
        common.end(self._pids)
        for said in self._said:
            said.close()


def log_in_again(seconds: float) -> Callable[[int, Callable[[Any], None]], None]:
    """Log in and leave, again and again."""

    def work(number: int, say: Callable[[Any], None]) -> None:
        dialler = Dialler(HOST, PORT, HUB, f"u{number % 2 + 1}", f"pw{number % 2 + 1}")
        took: list[float] = []
        failed: list[str] = []
        until, cpu = time.monotonic() + seconds, time.process_time()
        while (began := time.monotonic()) < until:
            try:
                dialler.log_in(10.0)
                took.append(time.monotonic() - began)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is no login
                failed.append(f"{type(error).__name__}: {error}")
        cpu = time.process_time() - cpu
        say({"took": took, "failed": failed[:3], "failures": len(failed), "cpu": cpu})

    return work


# --- what is measured ----------------------------------------------------------------------------


def rate(server: Server, generators: int, seconds: float) -> dict[str, Any]:
    """Logins a second, CPU ms of the server for each."""
    parts = server.cpu_by_process()
    before, began = server.cpu(), time.monotonic()
    group = Generators(generators, log_in_again(seconds))
    try:
        said = group.hear()
        wall = time.monotonic() - began
        cpu = server.cpu() - before
        parts = {name: now - parts[name] for name, now in server.cpu_by_process().items()}
        group.wait()
    except BaseException:
        group.kill()
        raise
    took = [one for each in said for one in each["took"]]
    if not took:
        raise RuntimeError(f"{server.name}: no login succeeded: {said[0]['failed']}")
    return {
        "per_second": len(took) / wall,
        "cpu_ms": 1e3 * cpu / len(took),
        "cpu_ms_by_process": {name: 1e3 * spent / len(took) for name, spent in parts.items()},
        "generators_cpu_ms": 1e3 * sum(each["cpu"] for each in said) / len(took),
        "p50_ms": 1e3 * common.median(took),
        "failures": sum(each["failures"] for each in said),
        "failed": [text for each in said for text in each["failed"]][:3],
    }


def idle_sessions(server: Server, generators: int, sessions: int, seconds: float) -> dict[str, Any]:
    """So many sessions at once."""
    pids = server.pids()
    empty, empty_uss = (sum(common.memory(pid)[what] for pid in pids) for what in ("pss", "uss"))
    began, cpu = time.monotonic(), server.cpu()
    idlers = Idlers(lambda *command: list(command), HOST, sessions, generators)
    try:
        took, login_cpu = time.monotonic() - began, server.cpu() - cpu
        time.sleep(min(5.0, seconds))
        full, full_uss = (sum(common.memory(pid)[what] for pid in pids) for what in ("pss", "uss"))
        threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
        cpu, began = server.cpu(), time.monotonic()
        time.sleep(seconds)
        busy = (server.cpu() - cpu) / (time.monotonic() - began)
        established, why = idlers.close()
    except BaseException:
        idlers.kill()
        raise
    assert server.pids() == pids, "a process of the server was replaced"
    return {
        "sessions": idlers.sessions,
        "established_at_end": established,
        "why_not": why,
        "login_all_s": took,
        "login_cpu_s": login_cpu,
        "pss_per_session_kib": 1024 * (full - empty) / (idlers.sessions),
        "uss_per_session_kib": 1024 * (full_uss - empty_uss) / (idlers.sessions),
        "pss_mib": full,
        "threads": threads,
        "cpu_percent": 100 * busy,
    }


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--seconds", type=float, default=10.0, help="of logging in, a round (10)")
    made.add_argument("--rounds", type=int, default=3, help="of logging in (3)")
    made.add_argument("--generators", type=int, default=8, help="processes of clients (8)")
    made.add_argument("--sessions", type=int, default=1000, help="idle ones at once (1000)")
    made.add_argument("--idle", type=float, default=30.0, help="seconds of idling (30)")
    args = common.parse(made, {"seconds": 2.0, "rounds": 1, "sessions": 100, "idle": 3.0})
    common.lab()
    result = common.Result("logins", args)
    with common.work_directory() as directory:
        measure(result, args, directory)
    tabulate(result)
    result.save(plot)


def measure(result: common.Result, args: argparse.Namespace, directory: Path) -> None:
    result.raw = {"logins": {"pkvpn": [], "SoftEther": []}, "sessions": {}}
    for number in range(args.rounds + 1):
        place = directory / str(number)
        place.mkdir()
        for server in (Ours(place), SoftEther(place)):
            server.start()
            try:
                time.sleep(1.0)
                if number < args.rounds:
                    found = rate(server, args.generators, args.seconds)
                    result.raw["logins"][server.name].append(found)
                else:
                    found = idle_sessions(server, args.generators, args.sessions, args.idle)
                    result.raw["sessions"][server.name] = found
                print(f"  {server.name}: {json.dumps(found)}", flush=True)
            finally:
                server.stop()


def tabulate(result: common.Result) -> None:
    result.columns = ["what", "pkvpn", "SoftEther"]
    logins, sessions = result.raw["logins"], result.raw["sessions"]
    for key, label in (
        ("per_second", "logins a second"), ("cpu_ms", "server's CPU ms a login"),
        ("generators_cpu_ms", "generators' CPU ms a login"), ("p50_ms", "a login, ms (median)"),
    ):  # fmt: skip
        cells = [common.median([one[key] for one in logins[s]]) for s in ("pkvpn", "SoftEther")]
        result.row(label, *cells)
    for name in logins["pkvpn"][0]["cpu_ms_by_process"]:
        spent = common.median([one["cpu_ms_by_process"][name] for one in logins["pkvpn"]])
        result.row(f"server's CPU ms a login: {name}", spent, None)
    for key, label in (
        ("sessions", "idle sessions"), ("established_at_end", "of them never cut until the end"),
        ("login_all_s", "time to log all in, s"),
        ("pss_per_session_kib", "memory a session, KiB (PSS)"),
        ("uss_per_session_kib", "private memory a session, KiB (USS)"),
        ("pss_mib", "memory of the server then, MiB (PSS)"),
        ("threads", "threads of the server"), ("cpu_percent", "CPU while idle, % of one core"),
    ):  # fmt: skip
        result.row(label, *(sessions[server][key] for server in ("pkvpn", "SoftEther")))
    ratio = common.median([one["per_second"] for one in logins["pkvpn"]]) / common.median(
        [one["per_second"] for one in logins["SoftEther"]]
    )
    result.note(f"pkvpn takes {ratio:.2f} times as many logins a second as SoftEther.")
    failures = {server: sum(one["failures"] for one in found) for server, found in logins.items()}
    result.note(f"Logins that failed: {failures}.")


def plot(figure: Any, result: dict[str, Any]) -> None:
    """Rate, cost and memory side by side."""
    logins, sessions = result["raw"]["logins"], result["raw"]["sessions"]
    columns: dict[str, list[float]] = {
        "logins a second": [common.median([o["per_second"] for o in logins[s]]) for s in logins],
        "server's CPU ms a login": [
            common.median([o["cpu_ms"] for o in logins[s]]) for s in logins
        ],
        "KiB a session": [sessions[s]["pss_per_session_kib"] for s in logins],
    }
    for axes, (label, values) in zip(figure.subplots(1, 3), columns.items(), strict=True):
        axes.bar_label(axes.bar(list(logins), values), fmt="%.3g")
        axes.set_title(label)


if __name__ == "__main__":
    main()
