"""`pkvpn connect`: a session of our client on a TAP device, until somebody ends it.

Strategy: one poll for the TAP and the client.  A refusal of the first login ends it, since
somebody waits at the terminal; after that the session is kept through whatever happens.
"""

from __future__ import annotations

import argparse
import getpass
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pkvpn.client.machine import Credentials
from pkvpn.client.session import LoginRefused, VpnClient
from pkvpn.client.tap import Tap
from pkvpn.protocol import blocks
from pkvpn.protocol.errors import ProtocolError

_PORT = 443


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--server", required=True, metavar="HOST[:PORT]", help="port 443 if none")
    parser.add_argument("--hub", required=True, help="the hub to log in to")
    parser.add_argument("--user", required=True, help="the user to log in as")
    parser.add_argument(
        "--tap", default="pkvpn0", metavar="NAME", help="the TAP device to make (pkvpn0)"
    )
    parser.add_argument(
        "--password-stdin", action="store_true", help="read the password from standard input"
    )
    parser.add_argument(
        "--plain-password",
        action="store_true",
        help="send the password itself, for users that the server checks with RADIUS and the like",
    )
    parser.add_argument("--anonymous", action="store_true", help="log in without a password")
    parser.add_argument(
        "--fingerprint",
        metavar="SHA256",
        help="accept this certificate of the server only; without this or --ca any is accepted",
    )
    parser.add_argument("--ca", metavar="FILE", help="accept what these CAs have signed (PEM)")


def run(args: argparse.Namespace) -> int:
    """Run the verb.  0: ended by a signal, 1: refused or failed, 2: wrong arguments."""
    try:
        host, port = split_address(args.server)
        client = VpnClient(
            host,
            port,
            args.hub,
            args.user,
            credentials=_ask_credentials(args),
            ca_file=args.ca,
            fingerprint=args.fingerprint,
        )
    except (ValueError, OSError) as error:
        _say(str(error))
        return 2
    try:
        with _signals() as wake:
            return _run(client, args.tap, wake)
    except (OSError, ValueError, ProtocolError, LoginRefused) as error:
        _say(f"failed: {error}")
        return 1
    finally:
        client.close()


def split_address(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, [V6] or [V6]:PORT; raises `ValueError` for anything else."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not an address of a server")
        port = rest[1:]
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isascii() and port.isdigit())):
        raise ValueError(f"{text!r} is not an address of a server")
    number = int(port) if port else _PORT
    if not 1 <= number <= 65535:
        raise ValueError(f"{number} is not a port")
    return host, number


def _ask_credentials(args: argparse.Namespace) -> Credentials:
    if args.anonymous:
        return Credentials.anonymous(args.hub, args.user)
    if args.password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif sys.stdin is None or not sys.stdin.isatty():
        raise ValueError("no terminal to ask for a password; give --password-stdin")
    else:
        password = getpass.getpass(f"Password of {args.user} at {args.server}: ")
    if args.plain_password:
        return Credentials.with_plain_password(args.hub, args.user, password)
    return Credentials.with_password(args.hub, args.user, password)


def _run(client: VpnClient, tap_name: str, wake: int) -> int:
    tap = Tap(tap_name)
    try:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(client.fileno(), select.POLLIN)
        tap_wanted = False
        told = ""
        while True:
            deadline = client.next_deadline()
            wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = dict(poll.poll(wait))
            if wake in ready:
                _say("leaving")
                return 0
            for frame in client.handle():
                tap.write(frame)
            if client.error is not None and not client.logins:
                raise client.error
            if tap.fileno() in ready:
                frames = tap.read(min(blocks.BATCH, client.room))
                client.send(
                    frame for frame in frames if blocks.MIN_FRAME <= len(frame) <= blocks.MAX_FRAME
                )
            # Without room the frames wait in the device's own queue, which knows how to drop.
            if tap_wanted != (client.room > 0):
                tap_wanted = not tap_wanted
                if tap_wanted:
                    poll.register(tap.fileno(), select.POLLIN)
                else:
                    poll.unregister(tap.fileno())
            told = _tell(client, tap_name, told)
    finally:
        tap.close()


def _tell(client: VpnClient, tap_name: str, told: str) -> str:
    """Say what changed; returns what the terminal knows now."""
    if client.established and client.welcome is not None:
        news = f"session {client.welcome.session_name} on {tap_name}"
    elif client.error is not None:
        news = f"connection lost: {client.error}"
    else:
        return told
    if news != told:
        _say(news)
    return news


def _say(text: str) -> None:
    # Parts of it are the server's, which paints no terminal.
    shown = "".join(char if char.isprintable() else "?" for char in text)
    sys.stderr.write(f"pkvpn connect: {shown}\n")
    sys.stderr.flush()


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that becomes readable when INT, TERM or HUP comes."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    old_fd = signal.set_wakeup_fd(writable)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = [(number, signal.signal(number, lambda *_: None)) for number in numbers]
    try:
        yield readable
    finally:
        for number, handler in old:
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_fd)
        os.close(readable)
        os.close(writable)
