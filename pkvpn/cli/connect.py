"""`connect`: our own client; it needs neither the service nor its configuration."""

import argparse

from pkvpn.cli import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    from pkvpn.client.cli import add_arguments

    add_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    from pkvpn.client.cli import run

    return run(args)


COMMANDS = {"connect": Command(_arguments, _run)}
