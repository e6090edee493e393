"""`hub`, `user`, `session`, `mac`, `bridge`, `quarantine`: what the database has, and who is there.

Strategy: one table says which verbs there are and what each takes; it is the parser and the
request in one.  While the service runs, its core is asked, so that a change takes effect at once;
while it does not, the same code of the core answers from the database.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pkvpn.cli import BAD_ARGUMENTS, NOT_RUNNING, OK, Command, Refusal
from pkvpn.cli.runtime import is_running, load_settings
from pkvpn.cli.text import printable, table
from pkvpn.config import Settings, make_directories
from pkvpn.watchdog.control import ControlError, ask

# A core that is just being replaced answers when it is back; what is asked waits in its socket.
_CORE_TIMEOUT = 10.0

# A reload replaces children, which may take their time to end.
_RELOAD_TIMEOUT = 30.0
_LOOK_EVERY = 0.05

Ask = Callable[[str, dict[str, Any]], Any]


class _Verb(NamedTuple):
    """One verb: its positional arguments, its options, its sentence.

    `pages` are the keys of an item after which the next part of a long list is asked for.
    """

    help: str
    positional: tuple[str, ...] = ()
    options: Callable[[argparse.ArgumentParser], None] | None = None
    pages: tuple[str, ...] = ()


def _hub_options(parser: argparse.ArgumentParser) -> None:
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--online", action="store_true", default=None, help="users may log in")
    state.add_argument("--offline", dest="online", action="store_false", help="nobody may log in")
    parser.add_argument("--max-sessions", type=int, metavar="N", help="0: no limit")
    parser.add_argument(
        "--storm-frames",
        type=int,
        metavar="N",
        help="flooded frames a second that a session may send; 0: the server's default",
    )


def _password_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--password-stdin",
        action="store_true",
        help="read the password from standard input instead of asking for it",
    )


def _user_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--auth",
        choices=("password", "certificate", "anonymous"),
        default="password",
        help="how the user proves who it is (default: password)",
    )
    parser.add_argument("--certificate", metavar="FILE", help="the user's certificate (PEM)")
    _password_option(parser)


def _hub_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hub", metavar="HUB", help="of this hub only")


def _bridge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--linux-bridge", metavar="BRIDGE", help="put the device into this bridge of the system"
    )


_VERBS: Mapping[str, Mapping[str, _Verb]] = {
    "hub": {
        "add": _Verb("make a hub", ("name",), _hub_options),
        "set": _Verb("change a hub", ("name",), _hub_options),
        "list": _Verb("all hubs", pages=("name",)),
        "show": _Verb("one hub", ("name",)),
        "delete": _Verb("delete a hub with its users", ("name",)),
    },
    "user": {
        "add": _Verb("make a user", ("hub", "name"), _user_options),
        "passwd": _Verb(
            "set a password; ends the user's sessions", ("hub", "name"), _password_option
        ),
        "list": _Verb("the users of a hub", ("hub",), pages=("name",)),
        "delete": _Verb("delete a user; ends its sessions", ("hub", "name")),
    },
    "session": {
        "list": _Verb("who is there", (), _hub_filter, pages=("hub", "name")),
        "kick": _Verb("end a session", ("hub", "name")),
    },
    "mac": {
        "list": _Verb("the MAC addresses a hub has learnt", ("hub",), pages=("mac", "vlan")),
    },
    "quarantine": {
        "list": _Verb("users, addresses and hubs that are kept out, since what they sent killed"),
        "lift": _Verb("let one of them in again: HUB/USER, an address, or HUB/", ("name",)),
    },
    "bridge": {
        "add": _Verb("join a hub to a TAP device", ("hub", "device"), _bridge_options),
        "list": _Verb("all bridges"),
        "delete": _Verb("delete a bridge", ("device",)),
    },
}

# What only a running core knows.
_LIVE = ("session", "mac", "quarantine")

# What belongs to the command line and not to the request.
_OWN = frozenset({"verb", "config", "what", "json", "password_stdin"})


def _arguments(noun: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join(_VERBS[noun]))
        for name, verb in _VERBS[noun].items():
            one = verbs.add_parser(name, help=verb.help, description=verb.help)
            for argument in verb.positional:
                one.add_argument(argument, metavar=argument.upper())
            if verb.options is not None:
                verb.options(one)
            one.add_argument("--json", action="store_true", help="the answer as JSON")

    return add


def _run(args: argparse.Namespace) -> int:
    settings = load_settings(args.config)
    verb = _VERBS[args.verb][args.what]
    request = {
        key: value for key, value in vars(args).items() if key not in _OWN and value is not None
    }
    if "password_stdin" in args:
        _add_proof(request, args)
    with _who_answers(settings, args.verb) as ask_core:
        answer = _all_pages(ask_core, f"{args.verb}.{args.what}", request, verb.pages)
        if args.verb == "bridge" and args.what != "list" and is_running(settings):
            answer = _change_devices(settings, ask_core, args.what, args.device)
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        for line in _human(answer):
            print(line)
    return OK


def _change_devices(settings: Settings, ask_core: Ask, what: str, device: str) -> Any:
    """Have the watchdog open or close the device of a bridge; return what has come of it.

    A bridge whose device the system refuses is not kept.
    """
    try:
        ask(str(settings.control_socket), "reload", timeout=_RELOAD_TIMEOUT)
    except (OSError, ControlError) as error:
        raise Refusal(f"bridge {device}: {what}: done, for the next start: {error}") from None
    if what == "delete":
        return {"deleted": device}
    # The core that answered may be the one from before the reload.
    deadline = time.monotonic() + _CORE_TIMEOUT
    while True:
        try:
            (bridge,) = [one for one in ask_core("bridge.list", {}) if one["device"] == device]
        except Refusal as refusal:  # it ends with the question half read
            bridge = {"state": str(refusal)}
        if bridge["state"] == "open":
            return bridge
        if bridge["state"].startswith("refused") or time.monotonic() > deadline:
            ask_core("bridge.delete", {"device": device})
            raise Refusal(bridge["state"])
        time.sleep(_LOOK_EVERY)


def _add_proof(request: dict[str, Any], args: argparse.Namespace) -> None:
    """Put the password or the certificate into the request."""
    auth = request.get("auth", "password")
    if ("certificate" in request) != (auth == "certificate"):
        raise Refusal("--certificate FILE and --auth certificate belong together", BAD_ARGUMENTS)
    if auth == "certificate":
        try:
            request["certificate"] = Path(request["certificate"]).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"{request['certificate']} cannot be read as PEM: {error}") from None
    elif auth == "password":
        request["password"] = _password(args.name, from_stdin=args.password_stdin)


def _password(name: str, *, from_stdin: bool) -> str:
    """Read a password; never from the command line, which everybody on the machine can see."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if sys.stdin is None or not sys.stdin.isatty():
        raise Refusal("no terminal to ask for a password; give --password-stdin", BAD_ARGUMENTS)
    import getpass

    password = getpass.getpass(f"Password for {printable(name)}: ")
    if getpass.getpass("Once more: ") != password:
        raise Refusal("the two passwords differ; nothing was changed")
    return password


@contextmanager
def _who_answers(settings: Settings, noun: str) -> Iterator[Ask]:
    """Yield what answers requests: the running core, or its code on the database."""
    if is_running(settings):
        yield lambda verb, args: _ask_core(settings, verb, args)
        return
    if noun in _LIVE:
        raise Refusal(f"the service is not running, so it has no {noun}s", NOT_RUNNING)
    from pkvpn.core.control import Control, Refused
    from pkvpn.core.store import Store, StoreError
    from pkvpn.users import acting_as_owner

    make_directories(settings)
    try:
        # The core may have put a link where its database was.
        with acting_as_owner(settings.core_dir), closing(Store(str(settings.core_dir))) as store:
            yield Control(store).answer
    except (Refused, StoreError) as error:
        raise Refusal(str(error)) from None


def _ask_core(settings: Settings, verb: str, args: dict[str, Any]) -> Any:
    try:
        return ask(str(settings.admin_socket), verb, args, timeout=_CORE_TIMEOUT)
    except ControlError as error:
        raise Refusal(str(error)) from None
    except OSError as error:
        raise Refusal(f"the core does not answer: {error}; look at `status`") from None


def _all_pages(ask_core: Ask, verb: str, request: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """Ask until a list is complete: one answer holds only so much."""
    answer = page = ask_core(verb, request)
    while keys and page:
        last = ["" if page[-1][key] is None else str(page[-1][key]) for key in keys]
        page = ask_core(verb, {**request, "after": "\0".join(last)})
        answer = answer + page
    return answer


def _human(answer: Any) -> Iterator[str]:
    if isinstance(answer, list):
        keys = list(dict.fromkeys(key for item in answer for key in item))
        if answer:
            rows = [[key.upper().replace("_", " ") for key in keys]]
            rows += [[_text(item.get(key)) for key in keys] for item in answer]
            yield from table(rows)
    else:
        for key, value in answer.items():
            yield f"{key.replace('_', ' ')}: {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{_text(count)} {_text(name)}" for name, count in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "-"
    return "-" if value is None or value == "" else printable(str(value))


COMMANDS = {noun: Command(_arguments(noun), _run) for noun in _VERBS}
