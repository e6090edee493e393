"""`events` and `crashes`: what is on disk, readable whether the service runs or not."""

import argparse
import json
from collections import Counter
from typing import Any

from pkvpn.cli import OK, Command, Refusal
from pkvpn.cli.text import table
from pkvpn.config import load


def _events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", type=_count, default=50, metavar="N", help="the last N (default: 50)")
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until ^C")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _events(args: argparse.Namespace) -> int:
    from pkvpn.watchdog.journal import follow, read_entries, render

    directory = str(load(args.config).service.state_dir)

    def show(entry: dict[str, Any]) -> None:
        print(json.dumps(entry) if args.json else render(entry), flush=args.follow)

    for entry in read_entries(directory, args.n):
        show(entry)
    if args.follow:
        for entry in follow(directory):
            show(entry)
    return OK


def _crashes_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", required=True, metavar="list|show")
    listing = verbs.add_parser("list", help="one line for each report, the newest first")
    listing.add_argument("--json", action="store_true", help="a JSON array")
    showing = verbs.add_parser("show", help="one whole report")
    showing.add_argument("id", metavar="ID", help="its id, the beginning of it, or `last`")
    showing.add_argument("--json", action="store_true", help="the report as it was stored")


def _crashes(args: argparse.Namespace) -> int:
    from pkvpn.watchdog.report import ReportError

    try:
        return _list_or_show(args, str(load(args.config).crashes_dir))
    except ReportError as error:
        raise Refusal(str(error)) from None


def _list_or_show(args: argparse.Namespace, directory: str) -> int:
    from pkvpn.watchdog import report

    if args.what == "list":
        found = report.list_reports(directory)
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            same = Counter(one.get("fingerprint") for one in found)
            rows: list[tuple[str, ...]] = [
                ("ID", "CHILD", "PID", "CLASS", "UPTIME", "SAME", "STOOD IN")
            ]
            rows += [_row(one, same[one.get("fingerprint")]) for one in found]
            print("\n".join(table(rows)))
        return OK
    one = report.load_report(directory, args.id)
    print(json.dumps(one, indent=2) if args.json else report.render(one))
    return OK


def _row(report: dict[str, Any], same: int) -> tuple[str, ...]:
    """``same``: how many reports have its fingerprint."""
    from pkvpn.watchdog.report import standing_line

    if "error" in report:
        return report["id"], "-", "-", report["error"], "-", "-", "-"
    uptime = report["uptime"]
    return (
        report["id"],
        report["child"],
        str(report["pid"]),
        report["class"],
        "-" if uptime is None else f"{uptime:.1f}s",
        str(same) if report.get("fingerprint") else "-",
        standing_line(report["stacks"]) or "-",
    )


COMMANDS = {
    "events": Command(_events_arguments, _events),
    "crashes": Command(_crashes_arguments, _crashes),
}
