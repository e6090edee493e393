"""`config`: what is in effect, and what could be set."""

import argparse

from pkvpn.cli import OK, Command
from pkvpn.config import defaults_document, load, to_toml


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("show", "defaults"),
        help="show: the effective configuration as TOML; defaults: every key as Markdown",
    )


def _run(args: argparse.Namespace) -> int:
    text = to_toml(load(args.config)) if args.what == "show" else defaults_document()
    print(text, end="")
    return OK


COMMANDS = {"config": Command(_arguments, _run)}
