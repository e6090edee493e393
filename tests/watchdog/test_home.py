"""What becomes of a tree whose runtime directory is taken away from under it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from pkvpn.watchdog import control, instance
from pkvpn.watchdog.spec import HeldSpec
from tests.support import eventually
from tests.watchdog.running import child, running, spec_in

pytestmark = pytest.mark.slow


def test_a_directory_that_is_cleared_is_made_again(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, child("one"), child("two"))
    with running(tmp_path, spec) as tree:
        for _ in range(2):
            shutil.rmtree(tree.runtime_dir)
            eventually(lambda: tree.status()["state"] == "up")
            assert tree.runtime_dir.stat().st_mode & 0o777 == 0o700
            assert instance.watchdog_pid(str(tree.runtime_dir / "lock")) == tree.pid
            pid_file = instance.read_pid_file(str(tree.runtime_dir / "pid"))
            assert pid_file is not None
            assert pid_file.pid == tree.pid
        restored = eventually(lambda: tree.journal("runtime-directory-restored"))
        assert {name for entry in restored for name in entry["names"]} == {
            "control.sock", "lock", "pid"
        }  # fmt: skip
        # A second one does not start beside it.
        with running(tmp_path, spec, wait=False) as second:
            assert second.last_word() == {"already": tree.pid}
            assert second.wait_end() == 0
            second.runtime_dir = tmp_path / "nobody's"
        # Children of before and after the change end with it.
        tree.signal(signal.SIGKILL, "two")
        tree.up("two", after=0)
        tree.ask("stop")
        assert tree.wait_end() == 0
        assert tree.holders() == []


def test_a_socket_that_is_removed_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "run" / "door"
    door = HeldSpec("door", lambda: [control.listen(str(path))], name_in_runtime_dir="door")
    spec = spec_in(tmp_path, child("one", held=("door",)), child("two"), held=(door,))
    with running(tmp_path, spec) as tree:
        before = tree.pid_of("one"), tree.pid_of("two")
        path.unlink()
        # Whoever serves on it has to have the new one.
        assert tree.up("one", after=0)["pid"] != before[0]
        assert tree.pid_of("two") == before[1]
        assert path.is_socket()


def test_one_that_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    with running(tmp_path, spec_in(tmp_path, child("one"))) as tree:
        away = tmp_path / "away"
        os.rename(tree.runtime_dir, away)
        tree.runtime_dir.write_text("in the way")
        eventually(lambda: tree.journal("runtime-directory-lost"))
        tree.runtime_dir.unlink()
        eventually(lambda: tree.status()["state"] == "up", within=20.0)
