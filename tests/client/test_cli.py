"""The verb `connect`."""

from __future__ import annotations

import argparse
import io

import pytest

from pkvpn.client import cli


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(["--hub", "T", "--user", "u1", *words])


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("h", ("h", 443)),
        ("h:5555", ("h", 5555)),
        ("10.0.0.1:992", ("10.0.0.1", 992)),
        ("[fd00::1]:992", ("fd00::1", 992)),
        ("[fd00::1]", ("fd00::1", 443)),
        ("fd00::1", ("fd00::1", 443)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert cli.split_address(text) == address


@pytest.mark.parametrize("text", ["", ":443", "h:x", "h:0", "h:65536", "[::1", "[::1]443", "[]"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|port"):
        cli.split_address(text)


@pytest.mark.parametrize(
    "words",
    [
        ["--server", "h:x"],
        ["--server", "h", "--fingerprint", "no"],
        ["--server", "h", "--ca", "/does/not/exist"],
    ],
)
def test_wrong_arguments_end_with_2(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    assert cli.run(arguments(*words, "--password-stdin")) == 2
    assert "pkvpn connect: " in capsys.readouterr().err


def test_without_a_terminal_nobody_is_asked_for_a_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for nobody in (io.StringIO(""), None):
        monkeypatch.setattr("sys.stdin", nobody)
        assert cli.run(arguments("--server", "h")) == 2
        assert "give --password-stdin" in capsys.readouterr().err


def test_a_tap_name_that_cannot_be_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments("--server", "h", "--anonymous", "--tap", "a/b")) == 1
    assert "'a/b'" in capsys.readouterr().err
