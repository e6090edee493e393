"""The command line without a service: what is understood, refused, and with which code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pkvpn import __version__
from pkvpn.cli import BAD_ARGUMENTS, NOT_CONFIGURED, NOT_RUNNING, OK, complain, main

# fmt: off
VERBS = [
    "start", "stop", "restart", "reload", "status", "tree", "kill", "upgrade", "events", "crashes",
    "execsvc", "config", "connect", "hub", "user", "session", "mac", "bridge",
]
# fmt: on


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "c.toml"
    file.write_text(
        '[service]\nlisten = ["127.0.0.1:0"]\nstate_dir = "state"\nruntime_dir = "run"\n',
        encoding="utf-8",
    )
    return str(file)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])

    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"/{verb}", "--help"])

    assert ended.value.code == 0
    assert f"vpnserver {verb}" in capsys.readouterr().out


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"pkvpn {__version__}\n"

    assert main([]) == BAD_ARGUMENTS
    assert "VERB" in capsys.readouterr().err


def test_an_unknown_verb_or_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strat"]) == BAD_ARGUMENTS
    assert "'strat'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["stop", "--now"])
    assert ended.value.code == BAD_ARGUMENTS


def test_what_a_child_says_paints_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    complain("core: \x1b[2Jgone\x07\nstopped \u202e")
    assert capsys.readouterr().err == "vpnserver: core: ?[2Jgone?\nvpnserver: stopped ?\n"


def test_the_verb_may_have_a_slash(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", config, "/stop"]) == OK
    assert main([f"--config={config}", "/STOP"]) == OK
    assert capsys.readouterr().out == "The service is not running.\n" * 2


def test_the_configuration_may_come_from_the_environment(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKVPN_CONFIG", config)
    assert main(["config", "show"]) == OK
    assert 'listen = ["127.0.0.1:0"]' in capsys.readouterr().out

    # What is typed counts more.
    assert main(["--config", "/nowhere.toml", "config", "show"]) == NOT_CONFIGURED
    assert "/nowhere.toml: cannot be read" in capsys.readouterr().err


def test_a_wrong_configuration_is_told_whole_and_has_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[service]\nport = 1\n[log]\nkeep = 0\n", encoding="utf-8")

    assert main(["--config", str(file), "start"]) == NOT_CONFIGURED
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert main(["--config", str(file), "status"]) == 4


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("status", 3),
        ("tree", NOT_RUNNING),
        ("stop", OK),
        ("kill", OK),
        ("try-restart", OK),
        ("reload", NOT_RUNNING),
        ("force-reload", NOT_RUNNING),
        ("upgrade", NOT_RUNNING),
        ("session list", NOT_RUNNING),
        ("mac list T", NOT_RUNNING),
        ("events", OK),
        ("crashes list", OK),
        ("crashes show last", 1),
        ("hub show T", 1),
    ],
)
def test_codes_while_nothing_runs(line: str, code: int, config: str) -> None:
    assert main(["--config", config, *line.split()]) == code


def test_status_of_nothing_has_the_keys_of_a_real_one(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config, "status", "--json"]) == 3
    status = json.loads(capsys.readouterr().out)

    assert status["state"] == "down"
    assert status["mode"] in ("service", "user")
    assert (status["children"], status["listeners"], status["sessions"]) == ([], [], None)


def test_accounts_are_kept_while_nothing_runs(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(line: str, typed: str = "") -> str:
        read, write = os.pipe()
        os.write(write, typed.encode())
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert main(["--config", config, *line.split()]) == OK
        return capsys.readouterr().out

    run("hub add T --max-sessions 5")
    run("user add t u1 --password-stdin", typed="pw1\n")
    run("user add T guest --auth anonymous")
    (hub,) = json.loads(run("hub list --json"))
    assert (hub["name"], hub["max_sessions"], hub["users"]) == ("T", 5, 2)
    assert [user["auth"] for user in json.loads(run("user list T --json"))] == [
        "anonymous",
        "password",
    ]
    run("user passwd T u1 --password-stdin", typed="pw2\n")
    run("user delete T u1")
    assert "u1" not in run("user list T")
    run("hub set T --offline")
    assert "online: no" in run("hub show T")
    run("hub delete T")
    assert run("hub list") == ""


def test_a_password_is_never_asked_for_without_a_terminal(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["--config", config, "user", "add", "T", "u"]) == BAD_ARGUMENTS
    assert "--password-stdin" in capsys.readouterr().err


def program(*line: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-m", "pkvpn", *line], capture_output=True, text=True, check=False
    )


def test_status_loads_nothing_heavy(config: str) -> None:
    done = program("--config", config, "status", flags=("-X", "importtime"))
    loaded = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}

    assert done.returncode == 3
    assert {"pkvpn.config", "pkvpn.watchdog.control"} <= loaded  # it did look
    heavy = "asyncio colorlog cryptography dill logging multiprocess multiprocessing psutil rich "
    heavy += "setproctitle sqlite3 ssl subprocess"
    assert not loaded & set(heavy.split())


def test_closed_standard_streams_and_a_reader_that_is_gone_make_no_traceback(config: str) -> None:
    command = f"'{sys.executable}' -m pkvpn --config '{config}' status"
    closed = subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], check=False)
    assert closed.returncode == 3

    read, write = os.pipe()
    os.close(read)
    try:
        gone = subprocess.run(
            [sys.executable, "-m", "pkvpn", "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert b"Traceback" not in gone.stderr
    finally:
        os.close(write)
