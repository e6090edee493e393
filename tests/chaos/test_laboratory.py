"""A handful of faults on a real tree; and that a promise that is not held is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pkvpn.chaos import laboratory
from pkvpn.chaos.faults import FAULTS
from pkvpn.chaos.laboratory import Laboratory
from tests.chaos.leftovers import leftovers

pytestmark = pytest.mark.slow


def chaos(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pkvpn", "chaos", "--out", str(place), *words],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip


def test_a_handful_of_faults_is_seen_healed_and_written_down(tmp_path: Path) -> None:
    wanted = [
        "kill-core", "kill-edge", "mute-core", "rubbish", "restart-canary", "term-core",
        "start-without-stdio",
    ]  # fmt: skip
    done = chaos(tmp_path, "--only", ",".join(wanted), "--seed", "1")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    written = json.loads((tmp_path / "chaos.json").read_text())
    found = {one["id"]: one for one in written["findings"]}
    assert set(found) == set(wanted)
    assert found["kill-core"]["seen"] == ["core dead"]
    assert found["mute-core"]["seen"] == ["core mute"]
    for one in found.values():
        assert one["violations"] == []
        assert one["heal_ms"] > 0.0
        if one["promise"] == "WHOLE":
            assert (one["lost"], one["sessions_lost"], one["refused"]) == (0, 0, 0)
            assert one["frames"] > 100
    assert "kill-core" in (tmp_path / "chaos.svg").read_text()
    assert "everything held" in done.stdout


def test_faults_on_top_of_each_other_are_survived_as_well(tmp_path: Path) -> None:
    words = ("--soak", "--minutes", "0.1", "--seed", "3")
    done = chaos(tmp_path, "--only", "kill-*e,kill-c*y,garbage-*,raise-*,reload", *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    findings = json.loads((tmp_path / "chaos.json").read_text())["findings"]
    assert sum(one["id"].count("+") + 1 for one in findings) > len(findings) > 0


def test_a_promise_that_is_not_held_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laboratory, "SEE_TIMEOUT", 1.0)
    fault = FAULTS["kill-core"]
    with Laboratory(1) as bed:
        assert bed.make([fault]).violations == []
        # It was to be the canary: the cause is not told, and the core died without need.
        wrong = bed.make([replace(fault, expects=("canary dead",))])
        assert wrong.violations == [
            "the journal does not say canary dead", "nobody asked for 'core dead'",
        ]  # fmt: skip
        # Connections do not outlive a watchdog, and nobody said that the tree would end.
        ended = bed.make([replace(FAULTS["rubbish"], deed="everything_killed", args=())])
        said = "; ".join(ended.violations)
        for what in ("connections were refused", "2 connections were cut", "frames were lost"):
            assert what in said
        assert bed.make([fault]).violations == []


def test_an_edge_that_does_nothing_is_found_by_a_canary_that_is_new() -> None:
    """One that has never been answered is not up, and yet the only one who can tell."""
    with Laboratory(1) as bed:
        found = bed.make([FAULTS["stop-reading-edge"], FAULTS["kill-canary"]])
        assert found.violations == []
        assert "edge-1 deaf" in found.seen


def test_an_account_that_is_forgotten_is_found() -> None:
    with Laboratory(1) as bed:
        assert bed.make_account()
        bed.tree.ask("user.delete", hub="CHAOS", name="a1")
        assert bed.make([FAULTS["kill-canary"]]).violations == ["acknowledged and gone: a1"]


def test_an_interruption_lets_the_fault_end_and_leaves_nothing(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "pkvpn", "chaos", "--out", str(tmp_path), "--only", "reload,kill-*"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    while "kill-core " not in program.stdout.readline():
        assert program.poll() is None
    os.kill(program.pid, signal.SIGINT)
    said, complained = program.communicate(timeout=60)
    assert program.returncode == 0, said
    assert complained.strip() == "ending after this fault"
    assert 1 <= len(json.loads((tmp_path / "chaos.json").read_text())["findings"]) < 10
    assert not leftovers(program.pid)


def test_the_list_names_every_fault_and_why_others_are_not_made() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pkvpn", "chaos", "--list"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in (*FAULTS, "windows", "clock-steps"):
        assert f"  {name} " in done.stdout, name


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--only", "no-such"), "no fault fits 'no-such'"),
        (("--minutes", "-1"), "--minutes -1: allowed is 0 to 10080"),
        (("--out", "/nowhere"), "--out /nowhere: is not a directory"),
    ],
)
def test_what_cannot_be_done_is_refused(words: tuple[str, ...], complaint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pkvpn", "chaos", *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert complaint in done.stderr
