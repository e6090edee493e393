"""What an operator types.

Strategy: this module splits the line into global options, verb and the verb's own arguments.
Only the module of that verb is imported and only its parser is built, and a verb imports what is
heavy inside itself: `status` has 0.2 s for everything, and an operator in trouble has a machine
that is short of memory.

A verb's module has `COMMANDS`, from the verb to a `Command`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pkvpn import __version__
from pkvpn.cli.text import printable

# Exit codes of the Linux Standard Base for init scripts.
OK = 0
FAILED = 1
BAD_ARGUMENTS = 2
NO_PRIVILEGE = 4
NOT_CONFIGURED = 6
NOT_RUNNING = 7


class Command(NamedTuple):
    """How a verb reads its arguments, and what it does; `run` returns the exit code."""

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Refusal(Exception):
    """A verb cannot be done: the sentence for the operator, and the exit code."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


class _Verb(NamedTuple):
    module: str
    help: str


_VERBS: Mapping[str, _Verb] = {
    "start": _Verb("service", "start the service and wait until it serves"),
    "stop": _Verb("service", "end the service and wait until its last process is gone"),
    "restart": _Verb("service", "stop, then start; or replace one child, by its NAME"),
    "try-restart": _Verb("service", "restart, if it runs"),
    "reload": _Verb("service", "read the configuration file again"),
    "force-reload": _Verb("service", "the same; what init scripts call it"),
    "upgrade": _Verb("service", "go on with the program that is installed now; nobody is cut off"),
    "kill": _Verb("force", "end every process of the service by force, hung or not"),
    "status": _Verb("status", "how the service and each of its processes are"),
    "health": _Verb("status", "exit code 0 if it serves, else 1: for who asks again and again"),
    "tree": _Verb("status", "the processes of the service, as `ps auxf` prints them"),
    "events": _Verb("evidence", "what happened: starts, deaths, verdicts, stops"),
    "crashes": _Verb("evidence", "crash reports, listed or one shown"),
    "hub": _Verb("admin", "add, list, show and delete virtual hubs"),
    "user": _Verb("admin", "add, list and delete users, set their passwords"),
    "session": _Verb("admin", "list sessions, end one"),
    "mac": _Verb("admin", "list the MAC addresses of a hub"),
    "quarantine": _Verb("admin", "who is kept out after deaths of the core or an edge"),
    "bridge": _Verb("admin", "add, list and delete local bridges"),
    "install": _Verb("install", "put the service into the machine's init system, and start it"),
    "uninstall": _Verb("install", "end the service and take it out again; accounts are left"),
    "connect": _Verb("connect", "log in to a server as a client"),
    "config": _Verb("configuration", "show the effective configuration, or all defaults"),
    "demo": _Verb("laboratory", "kill a server of its own again and again, and show what is lost"),
    "chaos": _Verb("laboratory", "make every fault that can be made on a server of its own"),
    "execstop": _Verb("service", "what systemd calls before it ends the service"),
    "execsvc": _Verb("service", "the service itself, in this process; `start` launches it"),
}


def main(argv: list[str] | None = None) -> int:
    """Do what the line says and return the exit code."""
    _fill_standard_streams()
    line = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(line)
        # Here and not at the interpreter's end, where a reader that is gone makes a traceback.
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell says it
    return code


def _dispatch(line: list[str]) -> int:
    before, verb, rest = _split(line)
    options = _global_parser().parse_args(before)
    if verb is None:
        _global_parser().print_help(sys.stderr)
        return BAD_ARGUMENTS
    # The manual writes some verbs with a slash: vpnserver /stop.
    name = verb.removeprefix("/").lower()
    if name not in _VERBS:
        complain(f"there is no verb {verb!r}; `vpnserver --help` lists them")
        return BAD_ARGUMENTS
    command = _command(name)
    parser = argparse.ArgumentParser(
        prog=f"vpnserver {name}", description=_VERBS[name].help, allow_abbrev=False
    )
    command.arguments(parser)
    arguments = parser.parse_args(rest)
    arguments.config = options.config or os.environ.get("PKVPN_CONFIG") or None
    arguments.verb = name
    from pkvpn.config import ConfigError

    try:
        return command.run(arguments)
    except Refusal as refusal:
        complain(str(refusal))
        return refusal.code
    except ConfigError as error:
        for sentence in error.errors:
            complain(sentence)
        # "status" has codes of its own, in which 6 means nothing and 4 is "cannot be known".
        return 4 if name == "status" else NOT_CONFIGURED


def _command(name: str) -> Command:
    commands: Mapping[str, Command] = importlib.import_module(
        f"pkvpn.cli.{_VERBS[name].module}"
    ).COMMANDS
    return commands[name]


def _split(line: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Return what stands before the verb, the verb, and what stands after it."""
    index = 0
    while index < len(line) and line[index].startswith("-"):
        index += 2 if line[index] == "--config" else 1
    if index >= len(line):
        return line, None, []
    return line[:index], line[index], line[index + 1 :]


def _global_parser() -> argparse.ArgumentParser:
    width = max(map(len, _VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.help}" for name, verb in _VERBS.items())
    parser = argparse.ArgumentParser(
        prog="vpnserver",
        usage="vpnserver [--config FILE] VERB [ARGUMENTS]",
        description="A VPN server whose process tree heals itself.",
        epilog=f"verbs (also with a slash, as in /stop):\n{verbs}\n\n"
        "`vpnserver VERB --help` tells about one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="configuration (TOML); else the one in PKVPN_CONFIG"
    )
    parser.add_argument("--version", action="version", version=f"pkvpn {__version__}")
    return parser


def complain(text: str) -> None:
    """Tell the operator on standard error what did not go as wished.

    Parts of it may come from a child or from the network, which paint no terminal.
    """
    if sys.stderr is not None:
        for line in text.splitlines():
            print(f"vpnserver: {printable(line)}", file=sys.stderr)


def _fill_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed.

    Else the first pipe or socket gets number 1 and somebody prints into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
