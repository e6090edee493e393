"""The VPN server on Windows: one child that is core and edge, and the tree around it.

Strategy: the core is that of every system; its one edge shares its loop.  Settings in, a `TreeSpec`
out.  What outlives the child are the listening sockets and, in a file, what the core was working
on when it died.
"""

from __future__ import annotations

import datetime as dt
import os
import selectors
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkvpn.config import Address
from pkvpn.core.main import Core, open_mark
from pkvpn.core.session import SessionKeys
from pkvpn.core.settings import CoreSettings
from pkvpn.core.store import Store, StoreError, session_secret
from pkvpn.edge import certificate
from pkvpn.watchdog.spec import ChildSpec, HeldSpec, TreeSpec
from pkvpn.windows.child import Child
from pkvpn.windows.control import Server
from pkvpn.windows.edge import Edge, EdgeSettings, LocalLink

TITLE = "vpnserver"
_BACKLOG = 512
_MARK_NAME = "core-mark"


@dataclass(frozen=True)
class ServerSettings:
    """``state_dir``: database, secrets and, under "admin", the way for operators."""

    state_dir: str
    core: CoreSettings
    edge: EdgeSettings

    @property
    def admin_dir(self) -> str:
        return os.path.join(self.state_dir, "admin")


def main(child: Child, settings: ServerSettings) -> None:
    """Be the server until asked to stop.

    Held: "listen".  Duties: "accept", "login", "forward" of the edge, "switch", "store" of the core
    (its logins are the edge's).
    """
    try:
        store = Store(settings.core.state_dir)
        keys = SessionKeys(session_secret(settings.core.state_dir))
        accounts = store.load()
    except StoreError as error:
        raise SystemExit(str(error)) from error
    fd = os.open(os.path.join(settings.state_dir, _MARK_NAME), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        marks = open_mark(fd)
    finally:
        os.close(fd)
    link = LocalLink()
    core = Core(child, settings.core, store, accounts, keys, [link], marks)  # type: ignore[arg-type]
    with selectors.DefaultSelector() as selector:
        # An order wakes the loop; the core takes it.
        selector.register(child, selectors.EVENT_READ)
        edge = Edge(child.held("listen"), link, settings.edge, selector)
        accept, login, forward = (child.duty(name) for name in ("accept", "login", "forward"))

        def turn() -> None:
            now = time.monotonic()
            wait = 0.0 if link.has_news else child.turn(now)
            edge.serve(selector.select(wait), time.monotonic())
            core.turn(0.0)
            edge.hear()
            accept.done, forward.done = edge.accepted, edge.forwarded
            login.done = max(login.done, edge.answered)
            login.waiting_since = next(iter(edge.asked.values()), 0.0)

        try:
            core.live(lambda at, answer: Server(settings.admin_dir, at, answer), turn)
        finally:
            edge.close()


class Service:
    """Opens what is held, and knows what was refused."""

    def __init__(self, state_dir: str, addresses: tuple[Address, ...]) -> None:
        self._state_dir = state_dir
        self._addresses = addresses
        self._listening: list[Address] = []
        self._refused: dict[Address, str] = {}

    def tree(self) -> TreeSpec:
        """Makes the directories and, at the first time, the certificate.  Raises OSError."""
        state = Path(self._state_dir)
        for directory in (state, state / "core", state / "admin"):
            directory.mkdir(parents=True, exist_ok=True)
        cert, key = state / "server.crt", state / "server.key"
        certificate.ensure(cert, key, socket.gethostname(), dt.datetime.now(dt.UTC))
        # What a core before was working on counts for its successors, not for another service.
        (state / _MARK_NAME).unlink(missing_ok=True)
        settings = ServerSettings(
            str(state), CoreSettings(str(state / "core")), EdgeSettings(str(cert), str(key))
        )
        server = ChildSpec(
            "server", main, settings, held=("listen",), hang_timeout=2.0,
            duties=("accept", "login", "forward", "switch", "store"),
        )  # fmt: skip
        return TreeSpec(
            name="pkvpn", children=(server,), runtime_dir=str(state), state_dir=str(state),
            held=(HeldSpec("listen", self._listen, key=self._addresses),),
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """As on other systems: each address with its state."""
        served = [
            {"address": one.host, "port": one.port, "state": "listening", "error": None}
            for one in self._listening
        ]
        return {
            "listeners": served
            + [
                {"address": one.host, "port": one.port, "state": "refused", "error": why}
                for one, why in self._refused.items()
            ]
        }

    def _listen(self) -> list[int]:
        """All that the system gives.  Raises OSError if that is nothing."""
        descriptors = []
        for address in self._addresses:
            try:
                descriptors.append(_open(address))
                self._listening.append(address)
            except OSError as error:
                self._refused[address] = error.strerror or str(error)
        if not descriptors:
            reasons = "; ".join(f"{one}: {why}" for one, why in self._refused.items())
            raise OSError(f"no address to listen on: {reasons}")
        return descriptors


def _open(address: Address) -> int:
    """Ours alone: with SO_REUSEADDR Windows lets anybody take a port that is in use."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        exclusive: int | None = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        if exclusive is not None:
            sock.setsockopt(socket.SOL_SOCKET, exclusive, 1)
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock.detach()
