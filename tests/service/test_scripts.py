"""The files of the other init systems, read by those who will read them where they are here."""

from __future__ import annotations

import plistlib
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pkvpn.service import scripts, units
from pkvpn.service.units import Plan
from tests.service.test_units import PLAN

ALL = (scripts.lsb, scripts.openrc, scripts.run, scripts.freebsd, scripts.launchd)
ODD = 'it\'s $HOME, "quoted" & {more}'


@pytest.fixture
def odd(tmp_path: Path) -> Plan:
    """A program in a directory of an odd name, which prints what it is told, one a line."""
    program = tmp_path / ODD / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    program.chmod(0o755)
    return replace(PLAN, command=(str(program), "-m", ODD), environment={"PYTHONPATH": ODD})


@pytest.mark.parametrize("text", ALL)
def test_each_is_known_as_ours(text: Callable[[Plan], str], odd: Plan) -> None:
    assert units.is_ours(text(odd))
    assert units.instance_of(text(odd)) == "/run/pkvpn"


@pytest.mark.parametrize("text", ALL[:4])
def test_a_shell_reads_each_script(text: Callable[[Plan], str], odd: Plan) -> None:
    for shell in (["sh"], ["bash", "--posix"]):
        done = subprocess.run([*shell, "-n"], input=text(odd), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
@pytest.mark.parametrize(
    ("text", "argument", "verb"), [(scripts.lsb, "start", "start"), (scripts.run, "", "execsvc")]
)
def test_a_script_calls_the_program_whatever_it_is_called(
    text: Callable[[Plan], str], argument: str, verb: str, odd: Plan, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text(text(odd))
    line = ["sh", str(script), *([argument] if argument else [])]
    # From a directory in which somebody may have left a package of our name.
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["/", ODD, "-m", ODD, verb], done


def test_openrc_splits_what_the_shell_would(odd: Plan, tmp_path: Path) -> None:
    script = tmp_path / "script"
    split = 'eval "set -- $command_args"; printf "%s\\n" "$command" "$@"\n'
    script.write_text(scripts.openrc(odd) + split)
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [odd.command[0], "-m", ODD, "execsvc"], done


def test_launchd_is_told_the_same(odd: Plan) -> None:
    told = plistlib.loads(scripts.launchd(odd).encode())
    assert told["ProgramArguments"] == [*odd.command, "execsvc"]
    assert told["EnvironmentVariables"] == {"PYTHONPATH": ODD}
    assert told["RunAtLoad"]
    assert told["KeepAlive"] == {"SuccessfulExit": False}
    told = plistlib.loads(scripts.launchd(replace(odd, manual=True)).encode())
    assert (told["RunAtLoad"], told["KeepAlive"]) == (False, False)


def test_an_lsb_script_without_its_program_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(scripts.lsb(replace(PLAN, command=("/nonexistent/python", "-m", "pkvpn"))))
    for action, code in (("start", 5), ("status", 4), ("explode", 2)):
        done = subprocess.run(["sh", str(script), action], capture_output=True, text=True)
        assert done.returncode == code, done
