"""The files of units, and a `systemctl` that only writes down what it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkvpn.cli import NO_PRIVILEGE, main
from pkvpn.config import EDGE_USER
from pkvpn.service import manager as manager_module
from pkvpn.service import units
from pkvpn.service.manager import Manager, ManagerError
from pkvpn.users import find_user
from tests.service.test_units import PLAN


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a fake `systemctl` leaves its arguments."""
    program, log = tmp_path / "bin/systemctl", tmp_path / "asked"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *refuse*) echo no >&2; exit 1;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    log.touch()
    return log


@pytest.fixture
def manager(tmp_path: Path) -> Manager:
    return Manager(tmp_path / "units", running=tmp_path)


def test_units_are_written_once_and_removed(manager: Manager) -> None:
    files = {manager.service: units.service_unit(PLAN), manager.socket: units.socket_unit(PLAN)}
    assert manager.write(files)
    assert not manager.write(files)
    assert manager.instance() == "/run/pkvpn"
    assert manager.foreign() is None
    # Without sockets from now on.
    assert manager.write({manager.service: units.service_unit(PLAN)})
    assert [path.name for path in manager.directory.iterdir()] == ["vpnserver.service"]
    assert manager.write({})
    assert not list(manager.directory.iterdir())
    assert manager.instance() == ""


def test_a_unit_of_another_author_is_seen(manager: Manager) -> None:
    manager.directory.mkdir()
    manager.service.write_text("[Service]\nExecStart=/opt/vpnserver/vpnserver execsvc\n")
    assert manager.foreign() == manager.service
    assert manager.instance() == ""


def test_what_systemctl_complains_of_is_the_error(manager: Manager, asked: Path) -> None:
    manager.call("start", "one")
    with pytest.raises(ManagerError, match="refuse: no"):
        manager.call("refuse")
    user = Manager(manager.directory, user=True)
    user.call("start", "two")
    assert asked.read_text().splitlines() == [
        "--no-ask-password start one",
        "--no-ask-password refuse",
        "--user --no-ask-password start two",
    ]


def test_verbs_go_through_systemd_for_the_installed_instance_only(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manager, "of_system", classmethod(lambda _: manager))
    monkeypatch.setattr(Manager, "of_user", classmethod(lambda _: manager))
    assert manager_module.managing("/run/pkvpn") is None
    manager.write({manager.service: units.service_unit(PLAN)})
    assert manager_module.managing("/run/pkvpn") is manager
    assert manager_module.managing("/run/another") is None
    monkeypatch.setattr(manager, "_running", Path("/nonexistent"))
    assert manager_module.managing("/run/pkvpn") is None


# --- the verbs


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.toml"
    path.write_text(
        '[service]\nlisten = ["127.0.0.1:0"]\nstate_dir = "state"\nruntime_dir = "run"\n'
    )
    return str(path)


def test_without_authority_nothing_is_changed_and_user_mode_is_named(
    config: str, tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("os.geteuid", lambda: 65534)
    before = sorted(tmp_path.iterdir())
    for verb in ("install", "uninstall"):
        assert main(["--config", config, verb]) == NO_PRIVILEGE
        assert "User Mode" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert asked.read_text() == ""


def test_a_dry_run_prints_files_and_commands_and_does_nothing(
    config: str, tmp_path: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["--config", config, "install", "--dry-run", "--kill-is-final"]) == 0
    said = capsys.readouterr().out
    assert "RestartPreventExitStatus=SIGKILL" in said
    assert f"ReadWritePaths={tmp_path / 'state'}" in said
    if find_user(EDGE_USER) is None:
        assert f"--shell /usr/sbin/nologin {EDGE_USER}\n" in said
    assert said.endswith(
        "systemctl --no-ask-password daemon-reload\n"
        "systemctl --no-ask-password enable vpnserver.service\n"
        "systemctl --no-ask-password start vpnserver.service\n"
    )
    assert main(["--config", config, "install", "--dry-run", "--manual"]) == 0
    assert "enable" not in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert asked.read_text() == ""


def test_systemd_is_not_asked_to_choose_a_port(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config, "install", "--dry-run", "--socket-activation"]) == 1
    assert "choose a port" in capsys.readouterr().err
