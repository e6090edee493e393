"""The dress rehearsal of a core: it goes through, it leaves nothing, and it may fail."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from pkvpn.core import rehearsal
from pkvpn.core.accounts import Accounts
from pkvpn.core.main import Core
from pkvpn.core.rehearsal import rehearse
from pkvpn.core.session import SessionKeys
from pkvpn.core.settings import CoreSettings
from pkvpn.core.store import Store, session_secret
from pkvpn.watchdog.child import Child
from tests.standing_by import standing_by
from tests.support import open_descriptors


class Noted(Core):
    """Keeps what it was where the test finds it when it is over."""

    def close(self) -> None:
        self.told = self.status()
        super().close()


def test_its_successor_knows_whom_a_core_has_let_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path))
    keys = SessionKeys(session_secret(str(tmp_path)))
    played: list[Noted] = []

    def make(staged: Child, accounts: Accounts) -> Noted:
        played.append(Noted(staged, CoreSettings(str(tmp_path)), store, accounts, keys))
        return played[-1]

    with standing_by("core", "switch", "login", "store") as child:
        before = open_descriptors()
        rehearse(child, make)
        first, successor = (core.told for core in played)
        assert (first["sessions"], first["connections"], first["flows"]) == (2, 2, 1)
        assert (successor["sessions"], successor["connections"]) == (2, 3)
        assert successor["flows"] == 2  # both that the edge still knew
        assert first["lost"] == successor["lost"] == {}
        played.clear()
        gc.collect()
        assert open_descriptors() == before
    store.close()
    assert caplog.records == []


class Deaf:
    """Does nothing, but closes what it holds as a core does."""

    def __init__(self, staged: Child) -> None:
        self._held = staged.held("channel:core")

    def begin(self) -> None:
        pass

    def turn(self) -> None:
        pass

    def close(self) -> None:
        for fd in self._held:
            os.close(fd)


def test_one_that_fails_is_told_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rehearsal, "_PATIENCE", 0.05)
    with standing_by("core") as child:
        before = open_descriptors()
        rehearse(child, lambda staged, _accounts: Deaf(staged))
        assert open_descriptors() == before
    (told,) = caplog.records
    assert "a core that stands by has not rehearsed" in told.getMessage()
