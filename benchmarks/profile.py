"""Where the time of the server goes: kernel, interpreter, ciphers, handshakes.

    python -m benchmarks.profile [--seconds N] [--quick]

`perf` samples the processes of our server while two stock clients transfer (iperf3, one stream),
and while clients log in and leave again and again; a sample counts for the library that it hit.
Then one edge alone with a known flow: the functions it is in (`edge_forward.py`).

Needs `perf` (Debian: linux-perf) beside what the other benchmarks need.  Its samples come from the
CPU clock, so it works in virtual machines too.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common, edge_forward
from benchmarks.beds import serving, stock_bed
from benchmarks.logins import rate
from benchmarks.servers import Ours
from benchmarks.throughput import streams

# What the name of a library begins with, and what it does for us.
PLACES = {
    "[kernel": "kernel: TCP, UNIX sockets, epoll, scheduling",
    "[": "kernel: TCP, UNIX sockets, epoll, scheduling",
    "_rust.": "records: AES-GCM and its binding (cryptography)",
    "libcrypto": "handshakes: OpenSSL",
    "libssl": "handshakes: OpenSSL",
    "_ssl.": "handshakes: OpenSSL",
    "libpython": "interpreter",
    "python": "interpreter",
    "libc.": "C library: memory, copies",
    "libc-": "C library: memory, copies",
}
COPIES = "kernel: copies to and from user space"
REST = "the rest"
# In names of kernel functions that copy.
_COPYING = ("copy_to_iter", "copy_from_iter", "copy_user", "rep_movs", "csum_and_copy")

_HERTZ = 997  # no multiple of a clock's


@contextmanager
def perf(pids: dict[str, int], directory: Path) -> Iterator[dict[str, Any]]:
    """Sample these processes for as long as this lasts; afterwards the shares of each by place."""
    programs = {
        name: subprocess.Popen(
            ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(_HERTZ), "-p", str(pid),
             "-o", str(directory / f"{name}.data"), "--", "sleep", "3600"]
        )
        for name, pid in pids.items()
    }  # fmt: skip
    shares: dict[str, Any] = {}
    try:
        for name, program in programs.items():
            begun = partial(_samples, program.pid)
            common.wait_until(begun, 30.0, f"perf record of {name}")
        yield shares
        for program in programs.values():
            program.send_signal(signal.SIGINT)
        for name, program in programs.items():
            program.wait(60)
            shares[name] = _shares(directory / f"{name}.data")
    finally:
        for program in programs.values():
            program.kill()
            program.wait()


def _samples(pid: int) -> bool:
    """Has this perf begun?  It starts its own child just then."""
    return any(common.command_line(child).startswith("sleep") for child in common.children(pid))


def _shares(path: Path) -> dict[str, float]:
    """Part of the samples by place."""
    command = ["perf", "report", "-q", "--stdio", "--no-children", "-g", "none", "-t", ";"]
    command += ["-F", "sample,dso,symbol", "-i", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(";")]
        if len(fields) >= 3 and fields[0].isdigit():
            counts[_place(fields[1], fields[2])] += int(fields[0])
    total = sum(counts.values())
    if not total:
        raise RuntimeError(f"{path.name}: perf saw nothing")
    return {place: count / total for place, count in counts.most_common()}


def _place(library: str, function: str) -> str:
    if library.startswith("[") and any(word in function for word in _COPYING):
        return COPIES
    return next((what for start, what in PLACES.items() if library.startswith(start)), REST)


def transfer(directory: Path, seconds: float) -> dict[str, Any]:
    """One TCP stream between two stock clients."""
    with stock_bed(directory, "pkvpn") as (bed, server), serving(bed.clients[1], "iperf3", "-s"):
        pids = {name: pid for name, pid in server.named_pids().items() if name == "edge-1"}
        with perf(pids, directory) as shares:
            before = server.cpu_by_process()
            found: dict[str, Any] = streams(bed, server, "up", seconds)
            spent = {name: now - before[name] for name, now in server.cpu_by_process().items()}
    part = spent["edge-1"] / sum(spent.values())
    return {**found, "edge_s_per_gb": found["server_s_per_gb"] * part, "shares": shares["edge-1"]}


def logins(directory: Path, seconds: float) -> dict[str, Any]:
    """Clients that log in and leave."""
    server = Ours(directory)
    server.start()
    try:
        time.sleep(1.0)
        pids = {name: pid for name, pid in server.named_pids().items() if name != "canary"}
        with perf(pids, directory) as shares:
            found = rate(server, 8, seconds)
    finally:
        server.stop()
    return {**found, "shares": shares}


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--seconds", type=float, default=10.0, help="of each part (10)")
    args = common.parse(made, {"seconds": 2.0})
    if shutil.which("perf") is None:
        sys.exit("this benchmark needs perf (Debian: linux-perf)")
    common.lab()
    result = common.Result("profile", args)
    with common.work_directory() as directory:
        for name, measure in (("transfer", transfer), ("logins", logins)):
            place = directory / name
            place.mkdir()
            result.raw[name] = measure(place, args.seconds)
            print(f"  {name}: {json.dumps(result.raw[name])}", flush=True)
    result.raw["functions"] = edge_forward.measure(args.seconds)
    tabulate(result)
    result.save(plot)


def tabulate(result: common.Result) -> None:
    moved, came = result.raw["transfer"], result.raw["logins"]
    names = list(came["shares"])
    result.columns = ["where", "a transfer: edge-1, %", "s/GB"]
    result.columns += [f"a login: {name}, CPU ms" for name in names]
    places = Counter(moved["shares"])
    for name in names:
        places.update(came["shares"][name])
    for place, _ in places.most_common():
        share = moved["shares"].get(place, 0.0)
        spent = [
            came["shares"][name].get(place, 0.0) * came["cpu_ms_by_process"][name] for name in names
        ]
        result.row(place, 100 * share, share * moved["edge_s_per_gb"], *spent)
    result.row("all", 100.0, moved["edge_s_per_gb"], *(came["cpu_ms_by_process"][n] for n in names))
    result.note(
        f"The transfer: {moved['mbit']:.0f} Mbit/s at {moved['server_s_per_gb']:.2f} s of CPU per "
        f"GB for all processes of the server; {came['per_second']:.0f} logins a second."
    )
    samples = result.raw["functions"]["samples"]
    total = sum(samples.values())
    most = [f"`{name}` {100 * count / total:.0f} %" for name, count in list(samples.items())[:12]]
    result.note(
        f"One edge with a known flow, by function with all it calls in C: {', '.join(most)}."
    )


def plot(figure: Any, result: dict[str, Any]) -> None:
    """The shares as bars: of a transfer, and of each process in logins."""
    raw = result["raw"]
    columns = {"edge-1, a transfer": raw["transfer"]["shares"]}
    columns |= {f"{name}, logins": shares for name, shares in raw["logins"]["shares"].items()}
    axes = figure.subplots()
    bottoms = [0.0] * len(columns)
    for place in dict.fromkeys(place for shares in columns.values() for place in shares):
        heights = [100 * shares.get(place, 0.0) for shares in columns.values()]
        axes.bar(list(columns), heights, bottom=bottoms, label=place)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("% of its CPU time")
    axes.tick_params("x", rotation=20)
    figure.legend(loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main()
