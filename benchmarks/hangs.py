"""How long a hang is noticed by nobody, and how long nobody serves because of it.

    python -m benchmarks.hangs [--rounds N] [--seed N] [--quick]

A child of the real tree, with its default deadlines, goes wrong at a random moment: its loop waits
for a lock, spins in Python, stays in C code that keeps the GIL, stops itself again and again, or
beats on and does nothing else.  The product has no way to be told so; its children are wrapped
(pkvpn/chaos), and the order lies in a file which the loop itself looks for, so the hang begins
when that file is gone.

Two clocks run from there: until another incarnation is up, as the watchdog tells, and until the
next answer over TCP, TLS and through the core after it, as a client sees it.  The first is what is
promised: within the deadline plus 150 ms.  For a loop that beats on and accepts nothing the
deadline is the canary's interval plus its time-out.  Nothing is promised for `stop`: who is stopped
is first continued, and replaced when it is stopped again; that is one more deadline.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import common
from benchmarks.respawn import context, probe
from pkvpn.chaos.injector import order
from pkvpn.config import Canary, Watchdog
from pkvpn.watchdog.report import list_reports
from tests.system.bed import ChaoticService

PORT = 443
# What a hang may cost on top of its deadline, s: the look, the stacks, the kill, the successor.
ON_TOP = 0.15
# Way of `injector.WAYS` -> what it is.
HANGS = {
    "block": "waits for a lock",
    "busy": "busy in Python",
    "gil": "busy in C, keeps the GIL",
    "stop": "SIGSTOP, again and again",
    "stop-reading": "beats, serves nobody",
}
GIVE_UP = 40.0


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=10, help="of each hang and child (10)")
    args = common.parse(made, {"rounds": 1})
    common.lab()
    result = common.Result("hangs", args)
    result.columns = [
        "who", "hang", "rounds", "judged as", "replaced after, median s", "max s", "deadline s",
        "later than deadline + 150 ms", "served after, median s", "max, s",
    ]  # fmt: skip
    with common.work_directory() as directory:
        service = ChaoticService(directory / "pkvpn", f'listen = ["127.0.0.1:{PORT}"]\n')
        service.start()
        try:
            for name in ("edge-1", "core"):
                for way in HANGS:
                    add(result, service, name, way, deadline(way), args.rounds)
        finally:
            service.stop()
    result.note(
        "A hang begins at a random moment after a healthy answer. `Replaced` is when the watchdog "
        f"tells of another incarnation, asked every 2 ms; {1e3 * ON_TOP:.0f} ms are for looking, "
        "stacks, kill and successor. `Served` is the first whole answer of TCP, TLS and core to "
        "a client that dials since the hang."
    )
    result.save(plot)


def deadline(way: str) -> float:
    """Seconds after which it is to be noticed at the latest."""
    if way == "stop-reading":
        return Canary().interval + Canary().timeout
    rounds = 2 if way == "stop" else 1  # it is continued first
    return rounds * Watchdog().hang_timeout


def add(
    result: common.Result,
    service: ChaoticService,
    name: str,
    way: str,
    limit: float,
    rounds: int,
) -> None:
    """Have one child hang in one way again and again, and put it into the table."""
    replaced, served = [], []
    for _ in range(rounds):
        one = once(service, name, way)
        replaced.append(one[0])
        served.append(one[1])
    classes = judged(service, name, rounds)
    late = sum(not seconds <= limit + ON_TOP for seconds in replaced)
    result.raw[f"{name}: {way}"] = {
        "replaced_s": replaced, "served_s": served, "classes": classes, "deadline_s": limit
    }  # fmt: skip
    result.row(
        name, HANGS[way], rounds, ", ".join(sorted(set(classes))), common.median(replaced),
        common.quantile(replaced, 1.0), limit, late, common.median(served),
        common.quantile(served, 1.0),
    )  # fmt: skip


def once(service: ChaoticService, name: str, way: str) -> tuple[float, float]:
    """Seconds until another incarnation is up, and until an answer came."""
    common.wait_until(service.is_whole, GIVE_UP, "the tree is whole")
    time.sleep(random.uniform(1.2, 2.2))
    tls = context()
    probe(PORT, tls, GIVE_UP)
    before = service.restarts()[name]
    orders = service.orders / name
    order(str(service.orders), name, way)
    common.wait_until(lambda: not orders.exists(), 5.0, f"{name} obeys", every=0.0005)
    began = time.monotonic()

    def is_up() -> bool:
        child = service.children()[name]
        return bool(child["restarts"] > before and child["state"] == "up")

    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(probe, PORT, tls, GIVE_UP)
        common.wait_until(is_up, GIVE_UP, f"{name} is replaced", every=0.002)
        replaced = time.monotonic() - began
        return replaced, answer.result()[0] - began


def judged(service: ChaoticService, name: str, rounds: int) -> list[str]:
    """What the newest crash reports of a child say."""
    folder = str(service.directory / "state" / "crashes")

    def found() -> list[str]:
        reports = [one for one in list_reports(folder) if one["child"] == name]
        return [str(one["class"]) for one in reports[:rounds]]

    classes: list[str] = common.wait_until(
        lambda: len(found()) == rounds and found(), 5.0, f"{rounds} reports of {name}"
    )
    return classes


def plot(figure: Any, result: dict[str, Any]) -> None:
    """Each hang a dot, its deadline a line."""
    axes = figure.subplots()
    spread = random.Random(1)
    names = list(result["raw"])
    for place, name in enumerate(names):
        found = result["raw"][name]
        at = [place + spread.uniform(-0.25, 0.25) for _ in found["replaced_s"]]
        axes.scatter(found["replaced_s"], at, s=6, alpha=0.7, color="tab:blue")
        axes.plot([found["deadline_s"] + ON_TOP] * 2, [place - 0.4, place + 0.4], color="black")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("s from the hang to another incarnation that is up; bar: deadline + 150 ms")
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
