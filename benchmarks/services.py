"""What clients notice of the service's manager, and of kills under it: the longest silences.

    python -m benchmarks.services [--rounds N] [--quick]

In a machine that boots systemd, with two stock clients on cables of their own and an echo between
them each millisecond, beside them two clients of ours with one each two milliseconds.  In each
round every deed of the tests once, but the freeze, whose length is ours to choose; each is over
when the service is whole again.
"""

from __future__ import annotations

import contextlib

from benchmarks import common
from tests.boot.machine import Machine
from tests.boot.test_sessions import DEEDS, add_users, do, stock_visiting, visiting


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=20, help="how often each is done (20)")
    args = common.parse(made, {"rounds": 1})
    result = common.Result("services", args)
    result.columns = [
        "deed", "times", "stock: longest silence, median s", "max", "ours: median s", "max",
    ]  # fmt: skip
    silences: dict[str, list[tuple[float, float]]] = {
        deed: [] for deed in DEEDS if deed != "freeze"
    }
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(contextlib.closing(Machine()))
        machine.boot()
        machine.vpnserver("install")
        add_users(machine)
        stock, clients = stack.enter_context(stock_visiting(machine))
        ours = stack.enter_context(visiting(machine))
        stock.silence(), ours.silence()
        for _ in range(args.rounds):
            for deed, found in silences.items():
                do(machine, deed)
                found.append((stock.silence(), ours.silence()))
        sessions = [client.established_sessions() for client in clients]
        of_stock, of_ours = stock.end(), ours.end()
    for deed, found in silences.items():
        result.raw[deed] = found
        columns = list(zip(*found, strict=True))
        cells = [cell for column in columns for cell in (common.median(column), max(column))]
        result.row(deed, args.rounds, *cells)
    result.raw["stock"], result.raw["ours"] = of_stock, of_ours
    result.note(
        f"Echoes lost: {of_ours['lost']} of {of_ours['sent']} of ours, {of_stock['lost']} of"
        f" {of_stock['sent']} of the stock clients, which drop what is more than about a thousand"
        " frames at once."
    )
    result.note(f"Logins of the stock clients: {sessions[0]} and {sessions[1]}.")
    result.save()


if __name__ == "__main__":
    main()
