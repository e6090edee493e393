"""How fast two stock clients are through a server, and what that costs the server.

    python -m benchmarks.throughput [--seconds N] [--rounds N] [--tests up,down,...] [--quick]

One bed, in one run: SoftEther's server as it comes (UDP acceleration), the same with TCP only, and
ours; then ours while its edge is killed every second.  Rounds of all tests, the servers in turn,
so that a slow minute of the machine hits all of them; the median of the rounds counts.

up, down, p4: iperf3 between the clients, client 1 sending, receiving, with 4 streams.  udp: 64-byte
datagrams, the highest rate with less than 0.5 % lost.  echo: a datagram there and back, p50.
CPU is that of all processes of the server, those that died included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import common
from benchmarks.beds import PEER, clients_cpu, echoes, established, serving, stock_bed
from tests.system.bed import Bed

NAMES = {
    "softether": "SoftEther, default",
    "softether-tcp": "SoftEther, TCP only",
    "pkvpn": "pkvpn",
    "pkvpn, edge killed": "pkvpn, edge killed every second",
}
STREAMS: dict[str, list[str]] = {"up": [], "down": ["-R"], "p4": ["-P", "4"]}
# Thousands of datagrams a second that are tried; the search stops after two that lose.
RATES = (20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 240, 280, 320)
MAX_LOST_PERCENT = 0.5


def iperf(bed: Bed, *options: str, seconds: float) -> dict[str, Any]:
    """The "end" of iperf3's report."""
    command = ["iperf3", "-c", PEER, "-J", "-t", f"{seconds:g}", *options]
    done = subprocess.run(
        bed.clients[0].beside(*command), capture_output=True, text=True, check=False,
        timeout=seconds + 30,
    )  # fmt: skip
    report = json.loads(done.stdout)
    if "error" in report:
        raise RuntimeError(f"{' '.join(command)}: {report['error']}")
    end: dict[str, Any] = report["end"]
    return end


def streams(bed: Bed, server: Any, test: str, seconds: float) -> dict[str, float]:
    """One TCP test: Mbit/s, and CPU seconds per GB of the server and of both clients."""
    ours, clients = server.cpu(), clients_cpu(bed)
    received = iperf(bed, *STREAMS[test], seconds=seconds)["sum_received"]
    gigabytes = received["bytes"] / 1e9
    return {
        "mbit": received["bits_per_second"] / 1e6,
        "server_s_per_gb": (server.cpu() - ours) / gigabytes,
        "clients_s_per_gb": (clients_cpu(bed) - clients) / gigabytes,
    }


def datagrams(bed: Bed, seconds: float, rates: tuple[int, ...]) -> dict[str, float]:
    """The highest rate with less than 0.5 % lost, in thousands a second."""
    best, failed = 0.0, 0
    for rate in rates:
        report = iperf(bed, "-u", "-l", "64", "-b", str(rate * 512_000), seconds=seconds)["sum"]
        # iperf3 may send less than it is told to; what it sent counts.
        if report["lost_percent"] < MAX_LOST_PERCENT:
            best, failed = max(best, report["packets"] / report["seconds"] / 1000), 0
        else:
            failed += 1
        if failed == 2:
            break
        time.sleep(0.3)
    return {"kpps": best}


def echo(bed: Bed, seconds: float) -> dict[str, float]:
    """Median of a datagram's way there and back, ms."""
    with echoes(bed) as asker:
        asker.begin(seconds)
        return {"p50_ms": asker.finish()["p50_ms"]}


@contextmanager
def killer(server: Any, every: float) -> Iterator[list[int]]:
    """Kill the edge again and again; the list grows by the pid of each one killed."""
    killed: list[int] = []
    over = threading.Event()

    def work() -> None:
        while not over.wait(every):
            pid = server.named_pids().get("edge-1", 0)
            if pid and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def a_round(
    bed: Bed, server: Any, kind: str, args: argparse.Namespace, tests: list[str]
) -> dict[str, Any]:
    """All tests of one server, once."""
    found: dict[str, Any] = {"killed": 0, "without kills": {}}
    with serving(bed.clients[1], "iperf3", "-s"):
        for test in tests:
            if kind == "pkvpn, edge killed":
                if test not in STREAMS:
                    continue
                # Each beside the same without kills, since a minute later is another machine.
                found["without kills"][test] = streams(bed, server, test, args.seconds)
                time.sleep(1)
                with killer(server, 1.0) as killed:
                    found[test] = streams(bed, server, test, args.seconds)
                found["killed"] += len(killed)
            elif test in STREAMS:
                found[test] = streams(bed, server, test, args.seconds)
            elif test == "udp":
                rates = RATES[:2] if args.quick else RATES
                found[test] = datagrams(bed, min(3.0, args.seconds), rates)
            else:
                found[test] = echo(bed, min(5.0, args.seconds))
            time.sleep(1)
    found["sessions"] = [established(client) for client in bed.clients]
    return found


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--seconds", type=float, default=8.0, help="of each TCP test (8)")
    made.add_argument("--rounds", type=int, default=3, help="of everything (3)")
    made.add_argument("--tests", default="up,down,p4,udp,echo", help="which tests (all)")
    made.add_argument(
        "--servers", default="softether,softether-tcp,pkvpn,killed", help="which servers (all)"
    )
    args = common.parse(made, {"seconds": 2.0, "rounds": 1})
    kinds = [k.replace("killed", "pkvpn, edge killed") for k in args.servers.split(",")]
    tests = args.tests.split(",")
    if unknown := {*kinds} - {*NAMES} | {*tests} - {*STREAMS, "udp", "echo"}:
        made.error(f"there is no server or test {', '.join(sorted(unknown))}")
    common.lab()
    result = common.Result("throughput", args)
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with common.work_directory() as directory:
        for number in range(args.rounds):
            for kind in kinds:
                place = directory / f"{number}-{kind.replace(', ', '-').replace(' ', '-')}"
                place.mkdir()
                with stock_bed(place, kind.partition(",")[0]) as (bed, server):
                    # UDP acceleration begins some seconds after the login.
                    time.sleep(8.0 if kind == "softether" else 2.0)
                    found = a_round(bed, server, kind, args, tests)
                rounds[kind].append(found)
                print(f"  round {number + 1}: {kind}: {json.dumps(found)}", flush=True)
    result.raw = {"rounds": rounds, "medians": medians(rounds)}
    tabulate(result, tests)
    result.save(plot)


def medians(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """By server, test and figure."""
    return {
        kind: {
            test: {figure: common.median([one[test][figure] for one in found]) for figure in value}
            for test, value in found[0].items()
            if test in (*STREAMS, "udp", "echo")
        }
        for kind, found in rounds.items()
    }


def tabulate(result: common.Result, tests: list[str]) -> None:
    found = result.raw["medians"]
    result.columns = ["server", *(f"{t} Mbit/s" for t in STREAMS if t in tests)]
    result.columns += [f"{t} server CPU s/GB" for t in STREAMS if t in tests]
    result.columns += ["64-byte UDP, thousands/s", "echo p50 ms"]
    for kind, values in found.items():
        cells = [
            values[t][figure]
            for figure in ("mbit", "server_s_per_gb")
            for t in STREAMS
            if t in tests
        ]
        udp, way = values.get("udp", {}).get("kpps"), values.get("echo", {}).get("p50_ms")
        result.row(NAMES[kind], *cells, udp, way)
    ours, tcp_tests = found.get("pkvpn"), [t for t in STREAMS if t in tests]
    cost = "server_s_per_gb"
    for other in ("softether", "softether-tcp"):
        if ours is not None and other in found:
            speeds = {t: ours[t]["mbit"] / found[other][t]["mbit"] for t in tcp_tests}
            costs = {t: ours[t][cost] / found[other][t][cost] for t in tcp_tests}
            result.note(
                f"pkvpn against {NAMES[other]}: speed {_ratios(speeds)}; "
                f"CPU per GB {_ratios(costs)}."
            )
    if pairs := result.raw["rounds"].get("pkvpn, edge killed"):
        kept = {
            t: common.median([one[t]["mbit"] / one["without kills"][t]["mbit"] for one in pairs])
            for t in tcp_tests
        }
        kills = sum(one["killed"] for one in pairs)
        result.note(
            f"Speed with {kills} kills, each against the same just before: {_ratios(kept)}."
        )
    for kind, each in result.raw["rounds"].items():
        sessions = sorted({count for one in each for count in one["sessions"]})
        result.note(f"{NAMES[kind]}: established sessions of the clients at the end: {sessions}.")


def _ratios(values: dict[str, float]) -> str:
    return ", ".join(f"{test} {value:.2f}" for test, value in values.items())


def plot(figure: Any, result: dict[str, Any]) -> None:
    """Speed and cost side by side."""
    found = result["raw"]["medians"]
    for axes, what, label in zip(
        figure.subplots(1, 2), ("mbit", "server_s_per_gb"),
        ("Mbit/s", "server's CPU seconds per GB"), strict=True,
    ):  # fmt: skip
        width = 0.8 / len(found)
        for number, (kind, values) in enumerate(found.items()):
            tests = [test for test in values if test in STREAMS]
            places = [place + number * width for place in range(len(tests))]
            axes.bar(places, [values[t][what] for t in tests], width, label=NAMES[kind])
            axes.set_xticks([place + 0.4 - width / 2 for place in range(len(tests))], tests)
        axes.set_title(label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main()
