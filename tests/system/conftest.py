"""Beds and services for the tests of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.bed import PASSWORDS, Bed, Service

# Whoever is silent for 5 s is gone, so that a test of silence takes seconds; and clients that
# come back do so within that time.
STOCK_CONFIG = 'listen = ["10.99.0.1:443"]\n[edge]\nidle_timeout = 5\n'

LOOPBACK_CONFIG = 'listen = ["127.0.0.1:0"]\n'


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """A server with the hub T, and both stock clients logged in."""
    made = Bed(tmp_path_factory.mktemp("bed"), STOCK_CONFIG)
    try:
        made.service.start()
        made.service.add_hub("T", **PASSWORDS)
        made.connect(443, "T")
        yield made
    finally:
        made.close()


@pytest.fixture
def service_config() -> str:
    """The configuration of `service`; a module may have its own."""
    return LOOPBACK_CONFIG


@pytest.fixture
def service(tmp_path: Path, service_config: str) -> Iterator[Service]:
    """A server on the loopback with the hub T and two users, for clients of our own."""
    made = Service(tmp_path / "service", service_config)
    try:
        made.start()
        made.add_hub("T", u1="pw1", u2="pw2")
        yield made
    finally:
        made.stop()
