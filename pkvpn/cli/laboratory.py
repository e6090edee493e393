"""`demo` and `chaos`: what the service bears, shown on trees of their own."""

import argparse
import contextlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from pkvpn import __version__
from pkvpn.cli import BAD_ARGUMENTS, FAILED, OK, Command, Refusal, complain

# A soak without --minutes.
_SOAK_MINUTES = 30.0


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="N", help="how long (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="only the figures, as JSON")


def _demo(args: argparse.Namespace) -> int:
    from pkvpn.chaos.demo import run

    if not 1.0 <= args.seconds <= 86400.0:
        raise Refusal(f"--seconds {args.seconds:g}: allowed is 1 to 86400", BAD_ARGUMENTS)
    return run(args.seconds, as_json=args.json)


def _chaos_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="show the catalogue and make nothing")
    parser.add_argument(
        "--only", metavar="ID,...", default="", help="these faults; * and ? stand for what they do"
    )
    parser.add_argument(
        "--soak", action="store_true", help="random ones on top of each other, again and again"
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, metavar="N",
        help=f"begin no fault after so long (default: no limit; with --soak {_SOAK_MINUTES:g})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="of moments and mixtures")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR",
        help="where chaos.json and chaos.svg are written (default: here)",
    )  # fmt: skip


def _chaos(args: argparse.Namespace) -> int:
    from pkvpn.chaos.faults import chosen

    if not 0.0 <= args.minutes <= 10080.0:
        raise Refusal(f"--minutes {args.minutes:g}: allowed is 0 to 10080", BAD_ARGUMENTS)
    try:
        faults = chosen(pattern for pattern in args.only.split(",") if pattern)
    except ValueError as error:
        raise Refusal(str(error), BAD_ARGUMENTS) from None
    if args.list:
        return _list(faults)
    if not args.out.is_dir():
        raise Refusal(f"--out {args.out}: is not a directory", BAD_ARGUMENTS)

    from pkvpn.chaos import paper
    from pkvpn.chaos.laboratory import Finding, Plan, run
    from pkvpn.chaos.own_tree import TreeError
    from pkvpn.chaos.traffic import TrafficError

    seed = random.randrange(1 << 32) if args.seed is None else args.seed  # noqa: S311 - told below
    minutes = args.minutes or (_SOAK_MINUTES if args.soak else 0.0)
    print(f"A tree of its own, seed {seed}.\n{paper.heading()}", flush=True)

    def tell(number: int, found: Finding) -> None:
        total = "" if args.soak else f"/{len(faults)}"
        print(f"\r{number:>4}{total} {paper.line(found)}", flush=True)

    began = time.time()
    try:
        findings = run(Plan(faults, seed, minutes, soak=args.soak), tell)
    except (TreeError, TrafficError, OSError) as error:
        raise Refusal(f"the laboratory could not be set up: {error}") from None
    print(f"\n{paper.summary(findings)}")
    facts: dict[str, Any] = {
        "version": __version__,
        "seed": seed,
        "soak": args.soak,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
    }
    for name, text in (
        ("chaos.json", json.dumps(paper.as_json(findings, **facts), indent=1) + "\n"),
        ("chaos.svg", paper.plot(findings)),
    ):
        path = args.out / name
        try:
            path.write_text(text, encoding="utf-8")
            print(path)
        except OSError as error:
            complain(f"{path}: not written: {error.strerror}")
    return FAILED if any(found.violations for found in findings) else OK


def _list(faults: "list[Any]") -> int:
    from pkvpn.chaos.faults import NOT_MADE
    from pkvpn.chaos.laboratory import missing_needs

    missing = missing_needs(faults)
    group = ""
    with contextlib.suppress(BrokenPipeError):
        for fault in faults:
            if fault.group != group:
                group = fault.group
                print(f"{group}:")
            print(f"  {fault.id:27} {fault.what}")
            said = ", ".join(fault.expects) or "nothing"
            print(f"  {'':27}   promised: {fault.promise.name.lower()}; the journal says: {said}")
            if fault.id in missing:
                print(f"  {'':27}   SKIPPED here: {missing[fault.id]}")
        print("not made:")
        for one in NOT_MADE:
            print(f"  {one.id:27} {one.what}\n  {'':27}   {one.why}")
        sys.stdout.flush()
    return OK


COMMANDS = {
    "demo": Command(_demo_arguments, _demo),
    "chaos": Command(_chaos_arguments, _chaos),
}
