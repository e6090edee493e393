"""Who has which key in its memory, in the whole tree: a child inherits all that its parent has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pkvpn.watchdog import procfs
from tests.support import eventually
from tests.system.bed import Service

pytestmark = [pytest.mark.slow, pytest.mark.root]


def test_a_secret_lies_only_where_it_is_used(service: Service) -> None:
    """Also in those who are forked later, and after settings were read again."""
    state = service.directory / "state"
    pem = (state / "server.key").read_bytes()
    private = load_pem_private_key(pem, None)
    assert isinstance(private, EllipticCurvePrivateKey)
    number = private.private_numbers().private_value
    secrets = {
        "edge": [pem[60:120], *(number.to_bytes(32, order) for order in ("big", "little"))],
        "core": [(state / "core/session.key").read_bytes()],
    }
    service.cli("reload")
    before = {name: service.pid(name) for name in service.children()}
    for name in ("core", "edge-1", "canary", "log"):
        service.kill(name)
    eventually(lambda: all(service.pid(name) != pid for name, pid in before.items()), within=20.0)
    eventually(lambda: len(kinds(service)) == 7, within=20.0)  # the two that stand by, too

    def found() -> dict[str, set[str]]:
        holders: dict[str, set[str]] = {}
        for pid, kind in kinds(service).items():
            memory = memory_of(pid)
            for whose, needles in secrets.items():
                if any(needle in memory for needle in needles):
                    holders.setdefault(whose, set()).add(kind)
        return holders

    eventually(lambda: found() == {"edge": {"edge"}, "core": {"core"}}, within=20.0)


def kinds(service: Service) -> dict[int, str]:
    """The processes of the tree: what each of them is."""
    watchdog = service.watchdog("status")["watchdog"]["pid"]
    found = {watchdog: "watchdog"}
    for pid in procfs.children_of(watchdog):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode()
            if ": " in title:
                found[pid] = title.partition(": ")[2].split()[0].partition("-")[0]
    return found


def memory_of(pid: int) -> bytes:
    """All that is its own and has been written to; not what it shares, as the rings."""
    parts = []
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, *_ = line.split()
            if mode == "rw-p":
                begin, end = (int(number, 16) for number in span.split("-"))
                with contextlib.suppress(OSError):
                    parts.append(os.pread(fd, end - begin, begin))
    finally:
        os.close(fd)
    return b"".join(parts)
