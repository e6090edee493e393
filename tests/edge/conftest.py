"""What the edge's tests share."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pkvpn.edge import certificate
from pkvpn.edge.handshake import KeyLog


class Pem(NamedTuple):
    """A certificate and its key."""

    cert: Path
    key: Path

    @property
    def joined(self) -> bytes:
        """As an edge reads them."""
        return certificate.joined(self.cert, self.key)


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Pem:
    """A certificate that lives as long as the run: making one takes 50 ms."""
    folder = tmp_path_factory.mktemp("certificate")
    files = Pem(folder / "cert.pem", folder / "key.pem")
    certificate.ensure(*files, "vpn.example", dt.datetime(2026, 11, 23, tzinfo=dt.UTC))
    return files


@pytest.fixture
def key_log() -> Iterator[KeyLog]:
    log = KeyLog()
    yield log
    log.close()
