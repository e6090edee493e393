"""The table cannot be broken unnoticed; the script takes two seconds, so each run tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_cell_of_the_table_can_be_broken_unnoticed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.watchdog.break_table"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 survive\n")
