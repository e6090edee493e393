"""The dress rehearsal of an edge: it goes through, it leaves nothing, and it may fail."""

from __future__ import annotations

import os

import pytest

from pkvpn.edge import rehearsal
from pkvpn.edge.handshake import HandshakeServer
from pkvpn.edge.main import Edge, EdgeSettings
from pkvpn.edge.rehearsal import rehearse
from pkvpn.watchdog.child import Child
from tests.edge.conftest import Pem
from tests.standing_by import standing_by
from tests.support import open_descriptors


class Noted(Edge):
    """Keeps what it did where the test finds it when it is over."""

    def close(self) -> None:
        self.taught = len(self._flows)
        self.conns = sorted(self._peers)
        self.forwarded = self._turn.forwarded
        super().close()


def test_its_successor_adopts_what_an_edge_has_begun(
    pem: Pem, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EdgeSettings(1, max_connections=4)
    source = os.memfd_create("pem", os.MFD_CLOEXEC)
    os.write(source, pem.joined)
    tls = HandshakeServer(source)
    tls.load()
    played: list[Noted] = []

    def make(staged: Child) -> Noted:
        played.append(Noted(staged, settings, tls))
        return played[-1]

    with standing_by("edge-1", "accept", "login", "forward", "hear", "look") as child:
        before = open_descriptors()
        rehearse(child, make)
        first, successor = played
        assert first.taught == successor.taught == 1
        assert successor.conns[:2] == first.conns  # adopted, and one more has come
        assert len(successor.conns) == 3
        assert (first.forwarded, successor.forwarded) == (2, 1)
        del first, successor
        played.clear()
        assert open_descriptors() == before
    tls.close()
    os.close(source)
    assert caplog.records == []


class Deaf:
    """Does nothing at all."""

    def adopt(self) -> None:
        pass

    def turn(self, timeout: float) -> None:
        pass

    def close(self) -> None:
        pass


def test_one_that_fails_is_told_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rehearsal, "_PATIENCE", 0.05)
    with standing_by("edge-1") as child:
        before = open_descriptors()
        rehearse(child, lambda _: Deaf())
        assert open_descriptors() == before
    (told,) = caplog.records
    assert "an edge that stands by has not rehearsed" in told.getMessage()
