"""The text of the units."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pkvpn import app
from pkvpn.service import units

PLAN = units.Plan(
    command=("/usr/bin/python3", "-m", "pkvpn"),
    environment={},
    runtime_dir="/run/pkvpn",
    state_dir="/var/lib/pkvpn",
    log_dir="/var/log/pkvpn",
    listen=(),
    descriptors=12100,
    start_timeout=45.0,
    stop_timeout=39.0,
)


def settings(text: str) -> dict[str, list[str]]:
    """Every assignment of a unit."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_systemd_is_told_what_the_manual_and_the_watchdog_promise() -> None:
    unit = settings(units.service_unit(PLAN))
    assert unit["Description"] == ["PacketiX VPN Server"]
    assert unit["ExecStart"] == ["/usr/bin/python3 -m pkvpn execsvc"]
    assert unit["ExecReload"] == ["/usr/bin/python3 -m pkvpn reload --direct"]
    for key, value in {
        "Type": "notify",
        "NotifyAccess": "main",
        "KillMode": "mixed",
        "Restart": "on-failure",
        "RestartSec": "0",
        "StartLimitIntervalSec": "0",
        "TimeoutStartSec": "45",
        "TimeoutStopSec": "39",
        "LimitCORE": "0",
        "WantedBy": "multi-user.target",
    }.items():
        assert unit[key] == [value], key
    assert "RestartPreventExitStatus" not in unit


def test_a_kill_that_is_to_be_final_is_not_followed_by_a_start() -> None:
    unit = settings(units.service_unit(replace(PLAN, kill_is_final=True)))
    assert unit["RestartPreventExitStatus"] == ["SIGKILL"]


def test_directories_of_systemd_are_its_and_the_others_are_opened() -> None:
    unit = settings(units.service_unit(replace(PLAN, state_dir="/srv/my vpn", log_dir="/srv/log")))
    assert unit["RuntimeDirectory"] == ["pkvpn"]
    assert unit["RuntimeDirectoryMode"] == ["0700"]
    assert "StateDirectory" not in unit
    assert unit["ReadWritePaths"] == ['"/srv/my vpn"', "/srv/log"]


def test_a_program_that_lies_in_a_temporary_directory_sees_it() -> None:
    assert settings(units.service_unit(PLAN))["PrivateTmp"] == ["yes"]
    tried = replace(PLAN, command=("/tmp/checkout/bin/python", "-m", "pkvpn"))
    found = settings(units.service_unit(tried))
    assert "PrivateTmp" not in found
    assert "/tmp/ /var/tmp/" in found["ReadWritePaths"]
    assert "PrivateTmp" not in settings(
        units.service_unit(replace(PLAN, state_dir="/var/tmp/state"))
    )


def test_a_users_unit_asks_for_nothing_that_takes_rights() -> None:
    unit = settings(units.service_unit(replace(PLAN, user=True)))
    assert unit["WantedBy"] == ["default.target"]
    assert not {"CapabilityBoundingSet", "ProtectSystem", "StateDirectory"} & set(unit)


def test_the_unit_leaves_the_watchdog_what_it_keeps() -> None:
    kept = {f"CAP_{name.upper()}" for name in app._WATCHDOG_KEEPS}
    unit = settings(units.service_unit(PLAN))
    assert {*unit["CapabilityBoundingSet"][0].split()} == kept


def test_sockets_of_systemd_are_needed_before_the_service() -> None:
    plan = replace(PLAN, listen=("0.0.0.0:443", "[::]:443"))
    service, sockets = settings(units.service_unit(plan)), settings(units.socket_unit(plan))
    assert service["Requires"] == ["vpnserver.socket"]
    assert "vpnserver.socket" in service["After"]
    assert sockets["ListenStream"] == ["0.0.0.0:443", "[::]:443"]
    assert sockets["FileDescriptorName"] == ["listen"]
    assert sockets["BindIPv6Only"] == ["ipv6-only"]


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/opt/100%/x", "/opt/100%%/x"),
        ("/opt/a b", '"/opt/a b"'),
        ('/opt/"q"\\', '"/opt/\\"q\\"\\\\"'),
        ("/opt/$HOME", '"/opt/$$HOME"'),
        ("", '""'),
    ],
)
def test_a_word_is_what_it_was(word: str, written: str) -> None:
    text = units.service_unit(replace(PLAN, command=("/p", "--config", word)))
    assert settings(text)["ExecStart"] == [f"/p --config {written} execsvc"]


def test_ours_is_known_by_its_first_lines() -> None:
    text = units.service_unit(PLAN)
    assert units.is_ours(text)
    assert units.instance_of(text) == "/run/pkvpn"
    assert not units.is_ours("[Unit]\n" + text)
    assert units.instance_of("[Unit]\n" + text) == ""
