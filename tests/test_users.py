"""The users of Service Mode, and what is handed over to them."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from pkvpn.app import prepare_directories
from pkvpn.cli import main
from pkvpn.config import load
from pkvpn.core.store import StoreError, read_bridges
from pkvpn.users import UserError, acting_as_owner, find_user, hand_over, let_through, make_users
from pkvpn.watchdog.confinement import User

SOMEBODY = User("somebody", 4711, 4712)


def test_a_user_is_found_by_name_and_root_is_none() -> None:
    nobody = find_user("nobody")
    assert nobody is not None
    assert (nobody.name, nobody.uid > 0) == ("nobody", True)
    assert find_user("no-such-user-here") is None
    with pytest.raises(UserError, match="root is root"):
        find_user("root")


def test_users_that_are_there_are_not_made_and_others_by_the_tool_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "useradd"
    tool.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/told\n[ "$8" != bad-user ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert make_users(("nobody", "good-user")) == ["good-user"]
    told = (tmp_path / "told").read_text()
    assert told.startswith("--system ")
    assert told.endswith(" good-user\n")
    tool.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"user bad-user: useradd .*: no room"):
        make_users(("bad-user",))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"useradd .*: .*No such file"):
        make_users(("bad-user",))


@pytest.mark.root
def test_only_plain_files_of_one_name_are_handed_over(tmp_path: Path) -> None:
    """Whoever had the directory may have put there a way to somebody else's file."""
    core, secret = tmp_path / "core", tmp_path / "secret"
    core.mkdir()
    secret.touch()
    (core / "pkvpn.db").touch()
    (core / "symbolic").symlink_to(secret)
    (core / "hard").hardlink_to(secret)
    hand_over(core, SOMEBODY)

    def owner(path: Path) -> tuple[int, int]:
        found = path.lstat()
        return found.st_uid, found.st_gid

    assert owner(core) == owner(core / "pkvpn.db") == (4711, 4712)
    assert owner(secret) == owner(core / "hard") == owner(core / "symbolic") == (0, 0)
    hand_over(core, None)
    assert owner(core) == owner(core / "pkvpn.db") == (0, 0)
    (tmp_path / "link").symlink_to(core)
    with pytest.raises(OSError, match="link"):
        hand_over(tmp_path / "link", SOMEBODY)


@pytest.mark.root
def test_somebody_is_let_through_and_sees_nothing(tmp_path: Path) -> None:
    let_through(tmp_path, SOMEBODY)
    found = tmp_path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0, 0o711)
    tmp_path.chmod(0o700)
    let_through(tmp_path, None)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.root
def test_a_link_in_the_way_of_the_database_leads_root_nowhere(tmp_path: Path) -> None:
    """As a core that was taken over could lay it for the watchdog, which reads the bridges."""
    for directory in tmp_path, *list(tmp_path.parents)[:2]:
        directory.chmod(0o755)
    core, precious = tmp_path / "core", tmp_path / "precious"
    core.mkdir()
    precious.touch(0o600)
    (core / "pkvpn.db").symlink_to(precious)
    hand_over(core, SOMEBODY)
    with acting_as_owner(core), pytest.raises(StoreError):
        read_bridges(str(core))
    assert not precious.read_bytes()
    assert (os.geteuid(), os.getegid()) == (0, 0)
    (core / "pkvpn.db").unlink()
    with acting_as_owner(core):
        assert read_bridges(str(core)) == []
    with acting_as_owner(tmp_path), acting_as_owner(tmp_path / "none"):
        assert os.geteuid() == 0


@pytest.mark.root
def test_an_operator_follows_no_link_of_the_core() -> None:
    """While the service is stopped root's command opens the database itself."""
    directory = Path(tempfile.mkdtemp(prefix="pkvpn-users-"))
    try:
        directory.chmod(0o711)
        config, core, prey = directory / "c.toml", directory / "state/core", directory / "prey"
        config.write_text(
            '[service]\nstate_dir = "state"\nruntime_dir = "run"\ncore_user = "nobody"\n'
        )
        settings = load(config)
        prepare_directories(settings)
        assert main(["--config", str(config), "hub", "add", "T"]) == 0
        nobody = find_user("nobody")
        assert nobody is not None
        assert (core / "pkvpn.db").stat().st_uid == nobody.uid
        prey.mkdir(0o700)
        (core / "pkvpn.db").unlink()
        (core / "pkvpn.db").symlink_to(prey / "passwd")
        assert main(["--config", str(config), "hub", "add", "T"]) != 0
        assert list(prey.iterdir()) == []
    finally:
        shutil.rmtree(directory)
