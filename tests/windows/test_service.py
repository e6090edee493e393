"""The service of Windows, as far as Wine's service manager goes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import eventually
from tests.windows import wine
from tests.windows.test_server import pkvpn

pytestmark = [pytest.mark.windows, pytest.mark.slow]


def serves(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


@pytest.fixture
def session() -> Iterator[None]:
    """Wine's service manager is started by the first process and keeps the streams of that: one of
    its own, or the first one of the test would seem to go on as long as the service does."""
    process = wine.start("-c", "print('here'); input()")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "here"
    yield
    process.communicate("\n", timeout=30)


@pytest.mark.usefixtures("session")
def test_it_is_installed_started_stopped_and_removed_and_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = pkvpn(tmp_path)
    address = f"127.0.0.1:{port}"
    try:
        assert "Installed" in wine.run(*command, "/install", "--manual", address)
        assert not serves(port)
        assert "Started" in wine.run(*command, "/start")
        assert serves(port)
        status = json.loads(wine.run(*command, "/status"))
        assert status["state"] == "up"
        assert "Stopped" in wine.run(*command, "/stop")
        assert not serves(port)
        events = [
            json.loads(line)
            for line in (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert events[-1]["event"] == "ended"
        assert "Started" in wine.run(*command, "/install", address)  # automatic now
        assert serves(port)
    finally:
        wine.run(*command, "/uninstall")
    eventually(lambda: not serves(port))
    with pytest.raises(AssertionError, match="not installed"):
        wine.run(*command, "/start")
