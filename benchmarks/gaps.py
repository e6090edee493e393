"""What two stock clients notice when something happens to the server's processes.

    python -m benchmarks.gaps [--rounds N] [--actions nothing,kill core,...] [--transfer MBIT]
                              [--idle N] [--quick]

A datagram every millisecond goes from one stock client to the other and back.  At a random moment
of each round something is done: a kill -9 of core, edge or both at once, a SIGSTOP, a restart, a
reload, an upgrade, or nothing at all, which is the yardstick.  The actions take turns in random
order, so that a slow minute of the machine hits all of them.  What is killed was looked up before
the round; the kill itself is one system call.

Beside that, unless --transfer 0, a paced TCP transfer each way, compared by hash.  Not during
SIGSTOPs and hangs: the stock client's own queue is 1,024 frames.  For hangs the children are
wrapped (pkvpn/chaos), and go wrong in the next turn of their own loop.  Then the same kill to
SoftEther's server, with the stock client as it comes and in the form of account that comes back.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.beds import SERVER, connections, echoes, established, stock_bed
from benchmarks.echo import Asker
from benchmarks.idlers import Idlers
from benchmarks.servers import Ours, Wrapped
from pkvpn.chaos import injector
from pkvpn.watchdog.control import ControlError
from tests.system.bed import Bed

# What is done -> part of the rounds.  With a bulk transfer beside it, and without.
LOADED = {
    "nothing": 1.0, "kill core": 1.0, "kill edge": 1.0, "kill both": 0.5,
    "restart edge-1": 0.2, "reload": 0.2, "upgrade": 0.1,
}  # fmt: skip
UNLOADED = {"nothing (no transfer)": 0.2, "stop core": 0.1, "stop edge": 0.1}
# Ways of `injector.WAYS` to go wrong; noticed at once or after `hang_timeout`, 1 s.
HANGS = {
    f"hang {child}: {way}": 0.1
    for child in ("core", "edge")
    for way in ("block", "busy", "gil", "mute", "garbage")
} | {"nothing (wrapped)": 0.1}
ROUND = 1.5
# A stopped child is let alone for `hang_timeout`, 1 s, and then continued.
LONG_ROUND = 3.0
TRANSFER_SECONDS = 20.0
# A figure counts only if so much of what was due was sent.
MIN_SENT = 0.95
SOFTETHER_WAITS = 40.0
# Processes that hold the idle sessions.
IDLERS = 4


# --- what is done --------------------------------------------------------------------------------


def prepare(action: str, server: Ours) -> Callable[[], None]:
    """Look up everything; what is returned does it."""
    pids = server.named_pids()
    core, edge = pids["core"], pids["edge-1"]
    if action.startswith("nothing"):
        return lambda: None
    if action.startswith("hang"):
        child, _, way = action.removeprefix("hang ").partition(": ")
        name = {"edge": "edge-1"}.get(child, child)
        assert isinstance(server, Wrapped)  # the plan of this bed
        return functools.partial(injector.order, str(server.orders), name, way)
    if action.startswith(("kill", "stop")):
        number = signal.SIGKILL if action.startswith("kill") else signal.SIGSTOP
        targets = {"core": [core], "edge": [edge], "both": [core, edge]}[action.split()[1]]
        return functools.partial(_signal_all, targets, number)
    verb, _, name = action.partition(" ")
    arguments = {"name": name} if name else {}

    def order() -> None:
        server.service.watchdog(verb, **arguments)

    return order


def _signal_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def a_round(bed: Bed, asker: Asker, server: Ours, action: str, seconds: float) -> dict[str, Any]:
    """Do it at a random moment of the first half; what the clients saw of it."""
    common.wait_until(server.settled, 20.0, "all children are up")
    do = prepare(action, server)
    before = connections(bed)
    asker.begin(seconds)
    time.sleep(random.uniform(0.1, 0.5) * min(seconds, ROUND))
    failed = ""
    try:
        do()
    except (OSError, ControlError) as error:  # the round goes on, and says so
        failed = f"{type(error).__name__}: {error}"
    found = asker.finish()
    return found | {"failed": failed, "connections_cut": len(before - connections(bed))}


# --- the transfer --------------------------------------------------------------------------------


@contextmanager
def transfers(bed: Bed, mbit: float) -> Iterator[list[dict[str, Any]]]:
    """Paced TCP in both directions for as long as this lasts; the list grows by what came over."""
    done: list[dict[str, Any]] = []
    over = threading.Event()
    threads = [
        threading.Thread(target=_transfer_again, args=(bed, source, mbit, over, done))
        for source in ((0, 1) if mbit else ())
    ]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _transfer_again(
    bed: Bed, source: int, mbit: float, over: threading.Event, done: list[dict[str, Any]]
) -> None:
    port = 5301 + source
    while not over.is_set():
        done.append(_transfer(bed, source, port, mbit))


def _transfer(bed: Bed, source: int, port: int, mbit: float) -> dict[str, Any]:
    """One transfer of 20 s; a thread's exception would be seen by nobody, so it is data too."""
    sender, receiver = bed.clients[source], bed.clients[1 - source]
    size = int(mbit * 1e6 / 8 * TRANSFER_SECONDS)
    module = [sys.executable, "-m", "tests.system.peer"]
    found: dict[str, Any] = {"from": sender.address, "bytes": size, "ok": False}
    programs = [receiver.start(*module, "tcp-receive", receiver.address, str(port))]
    try:
        assert programs[0].stdout is not None
        programs[0].stdout.readline()  # it listens
        words = [receiver.address, str(port), str(size), f"{TRANSFER_SECONDS:g}"]
        programs.append(sender.start(*module, "tcp-send", *words))
        sent, got = (
            json.loads(program.communicate(timeout=TRANSFER_SECONDS + 90)[0])
            for program in reversed(programs)
        )
        found["seconds"] = sent["seconds"]
        found["longest_silence_s"] = got["silence"]
        found["sha256"] = got["sha256"]
        found["ok"] = (sent["sha256"], sent["bytes"]) == (got["sha256"], got["bytes"])
    except (ValueError, subprocess.TimeoutExpired) as error:
        found["error"] = str(error)
    finally:
        for program in programs:
            program.kill()
            program.communicate()
    return found


# --- phases --------------------------------------------------------------------------------------


def phase(
    bed: Bed, server: Ours, plan: dict[str, int], mbit: float, seconds: float
) -> dict[str, Any]:
    """All rounds of a plan in random order."""
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    order = [action for action, count in plan.items() for _ in range(count)]
    random.shuffle(order)
    before = [established(client) for client in bed.clients]
    with echoes(bed) as asker:
        asker.begin(1.0)
        asker.finish()  # the flow is known from here on
        with transfers(bed, mbit) as done:
            time.sleep(1.0 if mbit else 0.0)
            for number, action in enumerate(order):
                found = a_round(bed, asker, server, action, seconds)
                rounds[action].append(found)
                print(f"  {number + 1}/{len(order)} {action}: {json.dumps(found)}", flush=True)
    after = [established(client) for client in bed.clients]
    return {
        "rounds": rounds,
        "transfers": done,
        "established_before": before,
        "established_after": after,
        "restarts": server.restarts(),
    }


def softether(directory: Path, suffix: str, tries: int) -> dict[str, Any]:
    """The core of SoftEther's server killed, once in each bed; its clients may not come back."""
    rounds = []
    for number in range(tries):
        place = directory / f"softether-{number}-{suffix.strip('/')}"
        place.mkdir()
        with (
            stock_bed(place, "softether-tcp", suffix=suffix) as (bed, server),
            echoes(bed) as asker,
        ):
            asker.begin(2.0)
            base = asker.finish()["silence_ms"]
            before = [established(client) for client in bed.clients]
            core, ends = server.core(), connections(bed)
            asker.begin(SOFTETHER_WAITS)
            time.sleep(1.0)
            os.kill(core, signal.SIGKILL)
            found = asker.finish()
            found["base_ms"] = base
            found["connections_cut"] = len(ends - connections(bed))
            found["established_before"] = before
            states = [client.status() for client in bed.clients]
            found["states_after"] = [state.get("Session Status", "gone") for state in states]
            found["established_after"] = [established(client) for client in bed.clients]
            rounds.append(found)
            print(f"  SoftEther{suffix}: {json.dumps(found)}", flush=True)
    return {"rounds": rounds}


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=100, help="kills of core and of edge (100)")
    made.add_argument(
        "--actions", default=",".join((*LOADED, *UNLOADED, *HANGS)), help="what is done"
    )
    made.add_argument("--transfer", type=float, default=100.0, metavar="MBIT",
                      help="paced TCP each way beside it; 0: none (100)")  # fmt: skip
    made.add_argument("--idle", type=int, default=0, metavar="N",
                      help="so many idle sessions of our client beside it (0)")  # fmt: skip
    made.add_argument("--softether", type=int, default=2, help="kills of SoftEther's core (2)")
    args = common.parse(made, {"rounds": 2, "softether": 1})
    if args.quick:
        args.idle, args.rounds = min(args.idle, 100), min(args.rounds, 2)
    actions = args.actions.split(",")
    if unknown := set(actions) - {*LOADED, *UNLOADED, *HANGS}:
        made.error(f"there is no action {', '.join(sorted(unknown))}")
    common.lab()
    result = common.Result("gaps-idle" if args.idle else "gaps", args)
    result.columns = [
        "done to the server", "rounds", "longest silence, median ms", "p95 ms", "max ms",
        "datagrams", "lost", "came twice", "connections cut",
        "sent of those due, %",
    ]  # fmt: skip
    with common.work_directory() as directory:
        name = "with transfers" if args.transfer else "without transfers"
        for kind, phases in (
            (
                "pkvpn",
                ((name, LOADED, args.transfer, ROUND), ("stops", UNLOADED, 0.0, LONG_ROUND)),
            ),
            ("pkvpn-wrapped", (("hangs", HANGS, 0.0, LONG_ROUND),)),
        ):
            plans = [
                (name, planned(parts, actions, args.rounds), mbit, seconds)
                for name, parts, mbit, seconds in phases
            ]
            if any(plan for _, plan, _, _ in plans):
                with stock_bed(directory, kind) as (bed, server), idle(result, args.idle, bed):
                    for name, plan, mbit, seconds in plans:
                        if plan:
                            run_ours(result, name, phase(bed, server, plan, mbit, seconds), mbit)
        if args.softether:
            run_softether(result, args, directory)
    result.save(plot)


def planned(parts: dict[str, float], actions: list[str], rounds: int) -> dict[str, int]:
    """How many rounds of each action."""
    return {
        action: max(1, round(part * rounds)) for action, part in parts.items() if action in actions
    }


@contextmanager
def idle(result: common.Result, sessions: int, bed: Bed) -> Iterator[None]:
    """So many sessions that do nothing, and what became of them."""
    if not sessions:
        yield
        return
    idlers = Idlers(bed.server.beside, SERVER, sessions, IDLERS)
    try:
        yield
        whole, why = idlers.close()
        result.note(
            f"{whole} of {idlers.sessions} idle sessions of our client were never cut"
            + (f"; the others: {'; '.join(why)}." if why else ".")
        )
    finally:
        idlers.kill()


def run_ours(result: common.Result, name: str, found: dict[str, Any], mbit: float) -> None:
    """Tell what a phase has found."""
    result.raw[name] = found
    found["counts"] = {
        action: tabulate(result, action, rounds) for action, rounds in found["rounds"].items()
    }
    sessions = f"{found['established_before']} before, {found['established_after']} after"
    result.note(f"{name}: established sessions of the two clients: {sessions}.")
    if mbit:
        right = sum(one["ok"] for one in found["transfers"])
        result.note(
            f"{name}: {right} of {len(found['transfers'])} transfers of "
            f"{mbit:g} Mbit/s came over whole (SHA-256), both directions at once."
        )
    result.note(f"{name}: restarts of the children so far: {found['restarts']}.")


def tabulate(result: common.Result, action: str, rounds: list[dict[str, Any]]) -> bool:
    """A row of the table; whether its figures count, since enough was sent."""
    silences = [one["silence_ms"] for one in rounds]
    sent, due = sum(one["sent"] for one in rounds), sum(one["due"] for one in rounds)
    result.row(
        action, len(rounds), common.median(silences), common.quantile(silences, 0.95),
        max(silences), sent, sum(one["lost"] for one in rounds),
        sum(one["twice"] for one in rounds), sum(one.get("connections_cut", 0) for one in rounds),
        100 * sent / due,
    )  # fmt: skip
    if sent < MIN_SENT * due:
        result.note(f"{action}: does not count, the machine was too busy to send.")
    if failed := [one["failed"] for one in rounds if one.get("failed")]:
        result.note(f"{action}: failed {len(failed)} times, the first time with {failed[0]}")
    return bool(sent >= MIN_SENT * due)


def run_softether(result: common.Result, args: argparse.Namespace, directory: Path) -> None:
    for suffix, form in (("", "as they come"), ("/tcp", "accounts of the form host/tcp")):
        found = softether(directory, suffix, args.softether)
        name = f"SoftEther: kill core, clients {form}"
        result.raw[name] = found
        tabulate(result, name, found["rounds"])
        for one in found["rounds"]:
            result.note(
                f"{name}: {SOFTETHER_WAITS - 1:g} s after: {', '.join(one['states_after'])}; "
                f"established {one['established_before']} before, {one['established_after']} after."
            )


def plot(figure: Any, result: dict[str, Any]) -> None:
    """The longest silence of each round a dot."""
    axes = figure.subplots()
    spread = random.Random(1)
    rows: dict[str, list[float]] = {}
    for name, found in result["raw"].items():
        groups = found["rounds"] if isinstance(found["rounds"], dict) else {name: found["rounds"]}
        for action, rounds in groups.items():
            rows[action] = [one["silence_ms"] for one in rounds]
    for place, times in enumerate(rows.values()):
        axes.scatter(times, [place + spread.uniform(-0.3, 0.3) for _ in times], s=6, alpha=0.6)
        axes.plot([common.median(times)] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms: longest silence of a round; bar: median")
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
