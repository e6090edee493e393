"""Two thousand clients log in at the same moment: does anybody notice who is there already?

    python -m benchmarks.storm [--clients N] [--rounds N]

Two clients of ours send each other a numbered frame every millisecond; meanwhile so many others,
in one process, begin to log in all at once, each a whole client that tries again by itself.  The
canary visits every half second.  Nobody of the tree is to be replaced: who is busy has not failed.
"""

from __future__ import annotations

from typing import Any

from benchmarks import common
from tests.system import kills, storm
from tests.system.bed import Service


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--clients", type=int, default=2000, help="at once (2000)")
    made.add_argument("--rounds", type=int, default=5, help="storms (5)")
    args = common.parse(made, {"clients": 100, "rounds": 1})
    common.lab()
    result = common.Result("storm", args)
    result.columns = [
        "clients", "logged in", "of them tried again", "half are in, s", "all are in, s",
        "frames of those who were there", "lost", "longest silence, ms",
        "visits of the canary", "failed", "children replaced",
    ]  # fmt: skip
    found = []
    for _ in range(args.rounds):
        with common.work_directory() as directory:
            service = Service(directory / "service", storm.CONFIG)
            try:
                service.start()
                with kills.begin(service) as traffic:
                    one = storm.ride_out(service, traffic, args.clients)
            finally:
                service.stop()
        found.append(one)
        result.row(
            args.clients, one["logged_in"], one["tried_again"], common.median(one["seconds"]),
            max(one["seconds"], default=None), one["sent"], one["lost"], 1e3 * one["silence"],
            one["visits"], one["visits_failed"], one["restarts"],
        )  # fmt: skip
    result.raw = {"storms": found}
    cut = sum(one["logins"] + one["cut"] for one in found)
    refused = sum(one["refused"] for one in found)
    result.note(
        f"Of those who were there {cut} connections were cut; of those who only knocked, fifty a"
        f" second, {refused} were refused."
    )
    result.save(plot)


def plot(figure: Any, result: dict[str, Any]) -> None:
    """How many are in, over time."""
    axes = figure.subplots()
    for number, one in enumerate(result["raw"]["storms"]):
        seconds = one["seconds"]
        axes.step(seconds, range(1, len(seconds) + 1), where="post", label=f"storm {number + 1}")
    axes.set_xlabel("seconds since all have begun")
    axes.set_ylabel("clients that are logged in")
    axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
