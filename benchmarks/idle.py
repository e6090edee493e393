"""What an idle tree costs, and how long `start`, `status` and `stop` take.

    python -m benchmarks.idle [--seconds N] [--rounds N] [--quick]

CPU is the scheduler's own count over all threads of all processes of the tree, canary included,
while nobody is connected; memory is private memory (USS), which no other process shares.  The
times are those of the whole command, interpreter start included, as an operator feels them.
SoftEther's server, idle beside it, is measured over the same seconds.

Beside them what an operator of supervisord and circus waits for, with one small service (those of
benchmarks/peers, if they are there): a start counts until the service answers.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.peers.__main__ import PEERS, PORT, SERVICE, write
from benchmarks.servers import Ours, SoftEther

STATUS_ROUNDS = 10


# What the beats of five processes cost on this machine whatever is done in them: one process that
# wakes up at the moments of the beats and goes back to sleep.
BARE = """
import select, time
nothing = select.epoll()
while True:
    nothing.poll(0.2 - time.monotonic() % 0.2)
"""


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--seconds", type=float, default=60.0, help="of idling (60)")
    made.add_argument("--rounds", type=int, default=10, help="of start and stop (10)")
    args = common.parse(made, {"seconds": 3.0, "rounds": 2})
    common.lab()
    result = common.Result("idle", args)
    result.columns = ["what", "pkvpn", "SoftEther", "supervisord", "circus"]
    with common.work_directory() as directory:
        commands(result, args, directory)
        idle(result, args, directory)
    result.note(
        "Interpreter: the same Python doing nothing but importing argparse, json and socket; it is "
        "inside each time of pkvpn. SoftEther's `start` returns before its server can be asked."
    )
    result.note(
        "supervisord and circus: `start` is until their small service answers, `status` is "
        "supervisorctl's and circusctl's. systemctl is not beside them: it asks the systemd that "
        "booted the machine, and in namespaces of its own there is none."
    )
    result.save(plot)


def commands(result: common.Result, args: argparse.Namespace, directory: Path) -> None:
    """How long the operator waits."""
    ours = Ours(directory)
    times: dict[str, list[float]] = {"start": [], "status": [], "stop": []}
    stock: dict[str, list[float]] = {"start": [], "stop": []}
    ours.start()  # makes the certificate and the database, once
    ours.stop()
    for number in range(args.rounds):
        times["start"].append(ours.start())
        for _ in range(STATUS_ROUNDS):
            began = time.monotonic()
            ours.service.cli("status")
            times["status"].append(time.monotonic() - began)
        times["stop"].append(ours.stop())
        place = directory / f"round-{number}"
        place.mkdir()
        softether = SoftEther(place)
        stock["start"].append(softether.start())
        stock["stop"].append(softether.stop())
    bare = []
    for _ in range(STATUS_ROUNDS):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import argparse, json, socket"], check=True)
        bare.append(time.monotonic() - began)
    columns = {"pkvpn": times, "SoftEther": stock, **others(args.rounds, directory)}
    result.raw["commands"] = {**columns, "interpreter": bare}
    for verb in times:
        row(result, f"`{verb}`, ms (median)",
            *(1e3 * common.median(found[verb]) if verb in found else None
              for found in columns.values()))  # fmt: skip
    row(result, "interpreter alone, ms (median)", 1e3 * common.median(bare))


def row(result: common.Result, *cells: Any) -> None:
    """A line, with nothing in the columns that are left."""
    result.row(*cells, *[None] * (len(result.columns) - len(cells)))


def others(rounds: int, directory: Path) -> dict[str, dict[str, list[float]]]:
    """Name of a supervisor -> verb -> seconds; nothing of those that are not there."""
    found: dict[str, dict[str, list[float]]] = {"supervisord": {}, "circus": {}}
    service = f"{sys.executable} {SERVICE} {PORT}"
    for name in found:
        place = directory / name
        bin_ = PEERS / "venv/bin"
        if name == "supervisord":
            text = (
                f"[unix_http_server]\nfile={place}/socket\n"
                f"[supervisord]\nuser=root\nlogfile={place}/log\npidfile={place}/pid\n"
                "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = "
                "supervisor.rpcinterface:make_main_rpcinterface\n"
                f"[supervisorctl]\nserverurl=unix://{place}/socket\n"
                f"[program:service]\ncommand={service}\nstartsecs=0\n"
            )
            config = write(place / "supervisord.conf", text)
            start, ask = ["supervisord", "-c", config], ["supervisorctl", "-c", config]
            end = "shutdown"
        else:
            endpoint = "tcp://127.0.0.1:7300"
            text = (
                f"[circus]\nendpoint = {endpoint}\npubsub_endpoint = tcp://127.0.0.1:7301\n"
                f"[watcher:service]\ncmd = {service}\n"
            )
            config = write(place / "circus.ini", text)
            start = ["circusd", "--daemon", "--log-output", f"{place}/log", config]
            ask, end = ["circusctl", "--endpoint", endpoint], "quit"
        if not (bin_ / start[0]).exists():
            continue
        found[name] = {"start": [], "status": []}
        for _ in range(rounds):
            began = time.monotonic()
            run(bin_, *start)
            common.wait_until(answers, 20.0, f"{name} serves", every=0.001)
            found[name]["start"].append(time.monotonic() - began)
            for _ in range(STATUS_ROUNDS):
                began = time.monotonic()
                run(bin_, *ask, "status")
                found[name]["status"].append(time.monotonic() - began)
            run(bin_, *ask, end)
            common.wait_until(lambda: not answers(), 20.0, f"{name} has ended")
            time.sleep(0.5)  # the supervisor itself, after its service
    return found


def run(folder: Path, *words: str) -> None:
    # What it starts keeps its output, and nobody would see the end of a pipe.
    subprocess.run([folder / words[0], *words[1:]], check=True, timeout=30, cwd="/",
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip


def answers() -> bool:
    """Does the small service take a connection?"""
    with socket.socket() as sock:
        # Not from the service's own address: sooner or later it would be from its port, too.
        sock.bind(("127.0.0.2", 0))
        return sock.connect_ex(("127.0.0.1", PORT)) == 0


def idle(result: common.Result, args: argparse.Namespace, directory: Path) -> None:
    """What it costs while nobody is connected."""
    ours, softether = Ours(directory / "idle"), SoftEther(directory)
    # Other ports, so that both can run at once.
    ours.service.configure('listen = ["127.0.0.1:18888"]\n')
    ours.start()
    softether.start()
    bare = subprocess.Popen([sys.executable, "-c", BARE])
    try:
        time.sleep(min(5.0, args.seconds))  # what a start leaves to do is done
        named = ours.named_pids()
        for pid in common.descendants(named["watchdog"]):
            if pid not in named.values():  # a successor that was forked ahead
                named[common.command_line(pid).partition(": ")[2]] = pid
        wakers = {"one": bare.pid}
        theirs = {f"process {i + 1}": pid for i, pid in enumerate(softether.pids())}
        before = {
            pid: common.schedstat(pid) for pid in (*named.values(), *theirs.values(), bare.pid)
        }
        began = time.monotonic()
        time.sleep(args.seconds)
        wall = time.monotonic() - began
        found: dict[str, dict[str, dict[str, Any]]] = {
            server: {
                name: {
                    "cpu_percent": 100 * (common.schedstat(pid)[0] - before[pid][0]) / wall,
                    "wakeups_per_s": (common.schedstat(pid)[1] - before[pid][1]) / wall,
                    "mib": common.memory(pid),
                }
                for name, pid in pids.items()
            }
            for server, pids in (("pkvpn", named), ("SoftEther", theirs), ("bare", wakers))
        }
        assert ours.named_pids().items() <= named.items(), (
            "a child was replaced while nothing happened"
        )
    finally:
        bare.kill()
        bare.wait()
        softether.stop()
        ours.stop()
    result.raw["idle"] = found

    def total(server: str, what: str) -> float:
        return sum(float(process[what]) for process in found[server].values())

    def memory(server: str, name: str) -> float:
        return float(found[server][name]["mib"]["uss"])

    for what, unit in (
        ("cpu_percent", "CPU, % of one core"),
        ("wakeups_per_s", "wake-ups a second"),
    ):
        row(result, f"idle: {unit}", total("pkvpn", what), total("SoftEther", what))
        for name, process in found["pkvpn"].items():
            row(result, f"idle: {unit}: {name}", process[what])
    row(result, "idle: CPU, % of one core, of five bare ones that wake as often",
        5 * found["bare"]["one"]["cpu_percent"])  # fmt: skip
    row(result, "idle: private memory of the watchdog, MiB",
        memory("pkvpn", "watchdog"), memory("SoftEther", "process 1"))  # fmt: skip
    for name in named:
        if name != "watchdog":
            row(result, f"idle: private memory of {name}, MiB", memory("pkvpn", name))
    row(result, "idle: private memory of all, MiB",
        *(sum(memory(s, n) for n in found[s]) for s in ("pkvpn", "SoftEther")))  # fmt: skip


def plot(figure: Any, result: dict[str, Any]) -> None:
    """CPU and private memory by process."""
    for axes, what, label in zip(
        figure.subplots(1, 2), ("cpu_percent", "uss"), ("% of one core", "private MiB"), strict=True
    ):
        for place, (server, processes) in enumerate(result["raw"]["idle"].items()):
            bottom = 0.0
            for name, process in processes.items():
                value = process["mib"][what] if what == "uss" else process[what]
                axes.bar(server, value, bottom=bottom, label=None if place else name)
                bottom += value
        axes.set_ylabel(f"idle: {label}")
    axes.legend()


if __name__ == "__main__":
    main()
