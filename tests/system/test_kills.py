"""Nothing is lost, whoever is killed whenever: see `benchmarks.kills` for a thousand of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.system import kills
from tests.system.bed import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

KILLS = 60


def test_kills_at_random_moments_lose_no_frame_and_no_connection(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", kills.CONFIG)
    dice = random.Random(1)
    try:
        service.start()
        with kills.begin(service) as traffic:
            killed = [kills.kill(service, traffic, dice)["killed"] for _ in range(KILLS)]
            lost = kills.losses(traffic)
        assert not any(lost.values()), (lost, killed, service.told())
    finally:
        service.stop()
