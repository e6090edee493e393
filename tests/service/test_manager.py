"""The files of an init system, and programs that only write down what they are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pkvpn.cli import NO_PRIVILEGE, main
from pkvpn.config import EDGE_USER
from pkvpn.service import inits
from pkvpn.service.manager import Manager, ManagerError, call
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
    return inits.systemd(tmp_path / "units", sign=tmp_path)


def test_units_are_written_once_and_removed(manager: Manager) -> None:
    files = manager.files(replace(PLAN, listen=("[::]:443",)))
    assert len(files) == 2
    assert manager.write(files)
    assert not manager.write(files)
    assert manager.instance() == "/run/pkvpn"
    assert manager.foreign() is None
    # Without sockets from now on.
    assert manager.write(manager.files(PLAN))
    assert [path.name for path in manager.installed()] == ["vpnserver.service"]
    assert manager.write({})
    assert not list(manager.places[0].parent.iterdir())
    assert manager.instance() == ""


def test_a_unit_of_another_author_is_seen(manager: Manager) -> None:
    unit = manager.places[0]
    unit.parent.mkdir()
    unit.write_text("[Service]\nExecStart=/opt/vpnserver/vpnserver execsvc\n")
    assert manager.foreign() == unit
    assert manager.instance() == ""


def test_what_systemctl_complains_of_is_the_error(manager: Manager, asked: Path) -> None:
    call(manager.verbs["start"])
    with pytest.raises(ManagerError, match="refuse: no"):
        call(("systemctl", "refuse"))
    call(inits.systemd_of_user().verbs["stop"])
    assert asked.read_text().splitlines() == [
        "--no-ask-password start vpnserver.service",
        "refuse",
        "--user --no-ask-password stop vpnserver.service",
    ]


def test_verbs_go_through_systemd_for_the_installed_instance_only(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inits, "all_inits", lambda: [manager])
    monkeypatch.setattr(inits, "systemd_of_user", lambda: manager)
    assert inits.managing("/run/pkvpn") is None
    manager.write(manager.files(PLAN))
    assert inits.managing("/run/pkvpn") is manager
    assert inits.managing("/run/another") is None
    manager = replace(manager, sign=Path("/nonexistent"))
    assert inits.managing("/run/pkvpn") is None


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
    assert (
        main(["--config", config, "install", "--init", "systemd", "--dry-run", "--kill-is-final"])
        == 0
    )
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
    assert main(["--config", config, "install", "--init", "systemd", "--dry-run", "--manual"]) == 0
    assert "enable" not in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert asked.read_text() == ""


def test_systemd_is_not_asked_to_choose_a_port(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["--config", config, "install", "--init", "systemd", "--dry-run", "--socket-activation"]
        )
        == 1
    )
    assert "choose a port" in capsys.readouterr().err
