"""Overload is not failure; see `benchmarks.storm` for two thousand clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system import kills, storm
from tests.system.bed import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CLIENTS = 500


def test_a_storm_of_logins_kills_nobody_and_takes_nothing_from_those_who_are_there(
    tmp_path: Path,
) -> None:
    service = Service(tmp_path / "service", storm.CONFIG)
    try:
        service.start()
        with kills.begin(service) as traffic:
            found = storm.ride_out(service, traffic, CLIENTS)
        del found["seconds"]
        assert found.pop("logged_in") == CLIENTS
        assert found.pop("visits") > 0
        assert found.pop("sent") > 0
        bad = {what: found[what] for what in ("lost", "logins", "cut", "refused", "restarts")}
        assert not any(bad.values()), (found, service.told())
    finally:
        service.stop()
