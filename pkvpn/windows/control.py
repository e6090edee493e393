"""The control connection on Windows: the lines of `pkvpn.watchdog.control`, over a local port.

Strategy: Python has no unix sockets there, so whoever may read a file in the runtime directory,
which names the port and a secret, may ask: each request carries the secret.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
from collections.abc import Callable
from typing import Any

from pkvpn.watchdog.control import ControlError, ControlServer, exchange

_NAME = "control.json"
_BACKLOG = 32


class Server(ControlServer):
    """Answers whoever knows the secret in the file that it writes."""

    def __init__(
        self,
        directory: str,
        selector: selectors.BaseSelector,
        answer: Callable[[str, dict[str, Any]], Any],
    ) -> None:
        secret = secrets.token_hex(32)

        def answer_who_knows(verb: str, args: dict[str, Any]) -> Any:
            if not hmac.compare_digest(str(args.pop("secret", "")).encode(), secret.encode()):
                raise ControlError("the secret of the control file is missing or wrong")
            return answer(verb, args)

        listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        port = listener.getsockname()[1]
        super().__init__(listener.detach(), selector, answer_who_knows)
        self._path = os.path.join(directory, _NAME)
        written = f"{self._path}.new"
        with open(written, "w", encoding="ascii") as file:
            json.dump({"pid": os.getpid(), "port": port, "secret": secret}, file)
        os.replace(written, self._path)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _why_not(self, sock: socket.socket) -> str:
        return ""  # the secret says it

    def _open_reserve(self) -> int:
        return -1  # there is no such limit


def ask(
    directory: str, verb: str, args: dict[str, Any] | None = None, timeout: float = 5.0
) -> Any:  # JSON
    """Ask ``verb`` of the watchdog with this runtime directory and return its result.

    Raises `ControlError` if it refuses, `TimeoutError` if it takes longer than ``timeout``
    seconds, `OSError` if nobody is there.
    """
    with open(os.path.join(directory, _NAME), encoding="ascii") as file:
        known = json.load(file)
    address = ("127.0.0.1", known["port"])
    with socket.create_connection(address, timeout) as connection:
        return exchange(
            connection, "the watchdog", verb, {**(args or {}), "secret": known["secret"]}, timeout
        )
