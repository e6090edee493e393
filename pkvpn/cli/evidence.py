"""`events` and `crashes`: what is on disk, readable whether the service runs or not."""

import argparse
import json
from typing import Any

from pkvpn.cli import OK, Command, Refusal
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

    directory = str(load(args.config).journal_dir)

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
    listing = verbs.add_parser("list", help="one line for each report, the newest last")
    listing.add_argument("--json", action="store_true", help="a JSON array")
    showing = verbs.add_parser("show", help="one whole report")
    showing.add_argument("id", metavar="ID", help="as `crashes list` names it")
    showing.add_argument("--json", action="store_true", help="the report as it was stored")


def _crashes(args: argparse.Namespace) -> int:
    from pkvpn.watchdog import report

    directory = str(load(args.config).crashes_dir)
    if args.what == "list":
        found = report.list_reports(directory)
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            for entry in found:
                print(report.render_line(entry))
        return OK
    try:
        one = report.load_report(directory, args.id)
    except (KeyError, ValueError, OSError):
        raise Refusal(f"there is no crash report {args.id!r} in {directory}") from None
    print(json.dumps(one, indent=2) if args.json else report.render(one))
    return OK


COMMANDS = {
    "events": Command(_events_arguments, _events),
    "crashes": Command(_crashes_arguments, _crashes),
}
