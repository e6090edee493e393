import os
from dataclasses import replace
from pathlib import Path

import pytest

from pkvpn import config
from pkvpn.config import Address, ConfigError, load

ROOT = Path(__file__).resolve().parents[2]
NOBODY = {"HOME": "/home/nobody"}


def errors_of(tmp_path: Path, text: str) -> list[str]:
    """What is wrong with a file, without the directory in front."""
    file = tmp_path / "c.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file, environ={}, uid=0)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return [error.removeprefix(f"{tmp_path}/") for error in caught.value.errors]


def test_without_a_file_root_gets_the_directories_of_the_system() -> None:
    settings = load(None, environ={"XDG_STATE_HOME": "/elsewhere"}, uid=0)

    assert settings.mode == "service"
    assert settings.source is None
    assert settings.service.state_dir == Path("/var/lib/pkvpn")
    assert settings.service.runtime_dir == Path("/run/pkvpn")
    assert settings.service.log_file == Path("/var/log/pkvpn/pkvpn.log")
    assert settings.service.listen[0] == Address("0.0.0.0", 443)
    assert {address.port for address in settings.service.listen} == {443, 992, 8888}
    assert {address.host for address in settings.service.listen} == {"0.0.0.0", "::"}


def test_without_a_file_a_user_gets_directories_of_his_own() -> None:
    environ = {"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"}
    settings = load(None, environ=environ, uid=1000)

    assert settings.mode == "user"
    assert settings.service.state_dir == Path("/s/pkvpn")
    assert settings.service.runtime_dir == Path("/r/pkvpn")
    assert settings.service.log_file == Path("/s/pkvpn/pkvpn.log")
    assert settings.control_socket == Path("/r/pkvpn/control.sock")


def test_without_xdg_directories_home_and_tmp_are_used() -> None:
    settings = load(None, environ={**NOBODY, "XDG_RUNTIME_DIR": "relative"}, uid=1000)

    assert settings.service.state_dir == Path("/home/nobody/.local/state/pkvpn")
    assert settings.service.runtime_dir == Path("/tmp/pkvpn-1000")


def test_the_log_follows_a_state_directory_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[service]\nstate_dir = "mine"\n', encoding="utf-8")
    settings = load(tmp_path / "c.toml", environ={}, uid=0)

    assert settings.service.state_dir == tmp_path / "mine"
    assert settings.service.log_file == tmp_path / "mine/pkvpn.log"


def test_paths_count_from_the_directory_of_the_file_and_not_from_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.toml").write_text('[service]\nruntime_dir = "../run"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = load("sub/c.toml", environ={}, uid=0)

    assert settings.source == tmp_path / "sub/c.toml"
    assert settings.service.runtime_dir == tmp_path / "run"


def test_what_show_prints_is_read_back_to_the_same(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        """
        service.state_dir = "with \\"quotes\\" \\\\ \\u007f and ü"
        service.listen = ["127.0.0.1:1", "[::1]:0"]
        [log]
        level = 'debug'
        [watchdog]
        beat_interval = 1
        hang_timeout = 3
        [edge]
        certificate = "c.pem"
        key = "k.pem"
        """,
        encoding="utf-8",
    )
    first = load(file, environ={}, uid=0)
    file.write_text(config.to_toml(first), encoding="utf-8")

    assert load(file, environ={}, uid=0) == first
    assert first.watchdog.hang_timeout == 3.0
    assert first.log.level == "debug"
    assert "\x7f" in str(first.service.state_dir)


def test_all_errors_are_told_at_once_with_line_key_value_and_what_is_allowed(
    tmp_path: Path,
) -> None:
    errors = errors_of(
        tmp_path,
        "[watchdog]\n"
        'hang_timeout = "soon"\n'
        "\n"
        "stop_timeout = nan  # x = y\n"
        "[log]\n"
        'level = "loud"\n'
        "keep = true\n",
    )

    assert errors == [
        (
            'c.toml:2: [watchdog] hang_timeout = "soon": allowed is a number from 0.05 to 600 '
            "(seconds)"
        ),
        "c.toml:4: [watchdog] stop_timeout = nan: allowed is a number from 0.1 to 600 (seconds)",
        'c.toml:6: [log] level = "loud": allowed is one of "debug", "info", "warning", "error"',
        "c.toml:7: [log] keep = true: allowed is a whole number from 1 to 1000",
    ]


def test_an_unknown_key_is_an_error_that_knows_what_was_meant(tmp_path: Path) -> None:
    (error,) = errors_of(tmp_path, "[watchdog]\n\nhang_timout = 2\n")

    assert error.startswith("c.toml:3: [watchdog] hang_timout = 2: there is no such key, ")
    assert "did you mean hang_timeout?" in error


def test_an_unknown_section_is_an_error_that_knows_what_was_meant(tmp_path: Path) -> None:
    first, second = errors_of(tmp_path, "colour = 1\n[servce]\nlisten = []\n")

    assert first.startswith("c.toml:1: colour = 1: there is no such section")
    assert second.startswith("c.toml:2: [servce]: there is no such section, did you mean service?")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("watchdog.backoff_factor = 0\n", 1),
        ("\nwatchdog = { backoff_factor = 0 }\n", 2),
        ("[log]\n[watchdog]\n# backoff_factor = 2\n'backoff_factor' = 0\n", 4),
        ("[watchdog]\nbackoff_factor\t=0\n", 2),
    ],
)
def test_the_line_is_found_however_the_key_is_written(tmp_path: Path, text: str, line: int) -> None:
    assert errors_of(tmp_path, text) == [
        f"c.toml:{line}: [watchdog] backoff_factor = 0: allowed is a number from 1 to 10"
    ]


@pytest.mark.parametrize(
    "address",
    ["443", "0.0.0.0", "host:443", "0.0.0.0:70000", "::1:443", "[0.0.0.0]:443", "1.2.3.4:+1", ":1"],
)
def test_a_wrong_listener_is_named(tmp_path: Path, address: str) -> None:
    (error,) = errors_of(tmp_path, f'[service]\nlisten = ["0.0.0.0:1", "{address}"]\n')

    assert error.startswith("c.toml:2: [service] listen = ")
    assert error.endswith(f'(item 2, "{address}", is not one)')


@pytest.mark.parametrize("value", ["[]", '"0.0.0.0:1"', "[1]", '["0.0.0.0:1", "0.0.0.0:1"]'])
def test_listeners_are_a_list_of_different_addresses(tmp_path: Path, value: str) -> None:
    (error,) = errors_of(tmp_path, f"[service]\nlisten = {value}\n")

    assert "[::]:443" in error


def test_addresses_are_written_as_they_are_read() -> None:
    for text in ("0.0.0.0:443", "[::]:443", "[2001:db8::1]:0"):
        assert str(config.parse_address(text)) == text


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[watchdog]\nhang_timeout = 0.5\n", "hang_timeout = 0.5"),
        ("[watchdog]\nbeat_interval = 0.5\n", "hang_timeout = 1.0"),
        ("[watchdog]\nhang_timeout = 20\n", "start_timeout = 10.0"),
        ("[watchdog]\ndeaf_timeout = 0.9\n", "deaf_timeout = 0.9"),
        ("[watchdog]\nbackoff_first = 9\n", "backoff_cap = 5.0"),
        ('[edge]\nkey = "/k"\n', 'key = "/k"'),
        (f'[service]\nruntime_dir = "/{"x" * 100}"\n', "runtime_dir"),
    ],
)
def test_relations_between_keys_are_checked(tmp_path: Path, text: str, key: str) -> None:
    assert f"] {key}" in errors_of(tmp_path, text)[0]


def test_the_longest_path_of_a_socket_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    room = config.SOCKET_PATH_MAX - len("/control.sock") - 1
    file.write_text(f'[service]\nruntime_dir = "/{"x" * room}"\n', encoding="utf-8")

    assert len(str(load(file, environ={}, uid=0).control_socket)) == config.SOCKET_PATH_MAX
    assert "107" in errors_of(tmp_path, f'[service]\nruntime_dir = "/{"x" * (room + 1)}"\n')[0]


def test_a_file_that_cannot_be_read_or_parsed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load(tmp_path / "nowhere.toml")
    assert errors_of(tmp_path, "[service]\nlisten =\n")[0].startswith("c.toml:2: not valid TOML")
    assert errors_of(tmp_path, "[service\n")[0].startswith("c.toml:1: not valid TOML")
    (tmp_path / "c.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 0"):
        load(tmp_path / "c.toml")


def test_edges_are_one_for_every_two_processors() -> None:
    settings = load(None, environ=NOBODY, uid=1)
    assert [settings.edge_processes(n) for n in (1, 2, 3, 4, 9)] == [1, 1, 1, 2, 4]

    fixed = replace(settings, edge=replace(settings.edge, processes=3))
    assert fixed.edge_processes(1) == 3


def test_a_runtime_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    settings = load(None, environ={**NOBODY, "XDG_RUNTIME_DIR": str(tmp_path)}, uid=1000)
    config.check_runtime_dir(settings)  # one that is not there is fine

    (tmp_path / "pkvpn").mkdir(mode=0o700)
    config.check_runtime_dir(settings)

    (tmp_path / "pkvpn").chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to it"):
        config.check_runtime_dir(settings)

    (tmp_path / "pkvpn").rmdir()
    (tmp_path / "pkvpn").symlink_to("/")
    with pytest.raises(ConfigError, match="is not a directory"):
        config.check_runtime_dir(settings)


def test_directories_are_made_for_their_user_only(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "s"), "XDG_RUNTIME_DIR": str(tmp_path / "r")}
    settings = load(None, environ=environ, uid=1000)
    config.make_directories(settings)
    config.make_directories(settings)

    assert settings.service.state_dir.stat().st_mode & 0o777 == 0o700
    assert settings.service.runtime_dir.stat().st_mode & 0o777 == 0o700

    (tmp_path / "file").touch()
    wrong = replace(settings, service=replace(settings.service, state_dir=tmp_path / "file/x"))
    with pytest.raises(ConfigError, match="file/x: cannot be made"):
        config.make_directories(wrong)


def test_what_belongs_to_the_core_is_moved_to_its_directory(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "s"), "XDG_RUNTIME_DIR": str(tmp_path / "r")}
    settings = load(None, environ=environ, uid=1000)
    state = settings.service.state_dir
    state.mkdir(parents=True)
    for name in ("pkvpn.db", "pkvpn.db-wal", "session.key", "server.key"):
        (state / name).write_text(name)
    config.make_directories(settings)
    assert sorted(path.name for path in state.iterdir()) == ["core", "server.key"]
    assert settings.core_dir.stat().st_mode & 0o777 == 0o700
    for name in ("pkvpn.db", "pkvpn.db-wal", "session.key"):
        assert (settings.core_dir / name).read_text() == name

    (state / "pkvpn.db").write_text("put there by somebody")
    config.make_directories(settings)
    assert (settings.core_dir / "pkvpn.db").read_text() == "pkvpn.db"


def test_a_state_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "s"), "XDG_RUNTIME_DIR": str(tmp_path / "r")}
    settings = load(None, environ=environ, uid=1000)
    config.make_directories(settings)
    state = settings.service.state_dir
    state.chmod(0o777)
    with pytest.raises(ConfigError, match="pkvpn: others may write to it"):
        config.make_directories(settings)
    state.chmod(0o700)
    elsewhere = state.rename(tmp_path / "disk")
    state.symlink_to(elsewhere)
    config.make_directories(settings)


@pytest.mark.root
def test_root_makes_nothing_in_the_state_directory_of_another_user(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "s"), "XDG_RUNTIME_DIR": str(tmp_path / "r")}
    settings = load(None, environ=environ, uid=0)
    settings = replace(
        settings, service=replace(settings.service, state_dir=tmp_path / "s",
                                  runtime_dir=tmp_path / "r", log_file=tmp_path / "s/log")
    )  # fmt: skip
    config.make_directories(settings)
    os.chown(tmp_path / "s", 4711, 4711)
    with pytest.raises(ConfigError, match=r"/s: belongs to user 4711.*state_dir"):
        config.make_directories(settings)


def test_the_documentation_has_the_defaults_of_the_code() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")

    assert text == config.defaults_document(), (
        "make it with: python -m pkvpn config defaults > docs/configuration.md"
    )


def test_every_default_is_allowed_by_its_own_key(tmp_path: Path) -> None:
    first = load(None, environ={}, uid=0)
    (tmp_path / "c.toml").write_text(config.to_toml(first), encoding="utf-8")

    assert replace(load(tmp_path / "c.toml", environ={}, uid=0), source=None) == first


def test_the_example_is_valid() -> None:
    settings = load(ROOT / "examples/pkvpn.toml", environ={}, uid=0)

    assert settings.service == load(None, environ={}, uid=0).service
