"""kill -9 of core, edge or both, a thousand times at random moments: what was lost?

    python -m benchmarks.kills [--kills N]

Two clients of ours send each other a numbered frame every millisecond.  Whoever was killed is
killed again as soon as 0 to 150 ms after all are up, so that young processes die as well, and those
that have not yet told each other everything.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks import common
from tests.system import kills
from tests.system.bed import Service


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--kills", type=int, default=1000, help="how often (1000)")
    args = common.parse(made, {"kills": 20})
    common.lab()
    result = common.Result("kills", args)
    result.columns = ["killed", "kills", "longest silence, median ms", "p95 ms", "max ms"]
    dice = random.Random(args.seed)
    with common.work_directory() as directory:
        service = Service(directory / "service", kills.CONFIG)
        try:
            service.start()
            with kills.begin(service) as traffic:
                found = []
                for number in range(args.kills):
                    found.append(kills.kill(service, traffic, dice))
                    print(f"  {number + 1}/{args.kills} {found[-1]}", flush=True)
                lost, sent = kills.losses(traffic), traffic.look()["sent"]
        finally:
            service.stop()
    result.raw = {"kills": found, "losses": lost, "sent": sent}
    for victims in kills.VICTIMS:
        name = "+".join(victims)
        silences = [one["silence_ms"] for one in found if one["killed"] == name]
        if silences:
            result.row(
                name, len(silences), common.median(silences), common.quantile(silences, 0.95),
                max(silences),
            )  # fmt: skip
    result.note(f"Of {sent} frames: " + ", ".join(f"{n} {what}" for what, n in lost.items()) + ".")
    result.save(plot)


def plot(figure: Any, result: dict[str, Any]) -> None:
    """Longest silences, the shortest first."""
    axes = figure.subplots()
    for victims in kills.VICTIMS:
        name = "+".join(victims)
        silences = sorted(
            one["silence_ms"] for one in result["raw"]["kills"] if one["killed"] == name
        )
        parts = [(at + 1) / len(silences) for at in range(len(silences))]
        axes.plot(silences, parts, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("ms: longest silence after a kill")
    axes.set_ylabel("part of the kills")
    axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
