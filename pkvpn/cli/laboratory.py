"""`demo`: a tree of its own, beside the operator's, that shows what the service bears."""

import argparse

from pkvpn.cli import BAD_ARGUMENTS, Command, Refusal


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


COMMANDS = {"demo": Command(_demo_arguments, _demo)}
