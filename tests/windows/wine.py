"""The Python of Windows, as `scripts/windows` has set it up."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# A start of the prefix' own services is part of the first one.
_TIMEOUT = 40.0


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "WINEPREFIX": f"{os.environ['PKVPN_WINDOWS']}/prefix",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree=;mshtml=;bcryptprimitives=n",
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def windows_path(path: Path) -> str:
    return f"Z:{path}"


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    """A process of that Python; its streams are pipes, since Wine loses what goes to a file."""
    program = f"{os.environ['PKVPN_WINDOWS']}/program/vpnserver.exe"
    return subprocess.Popen(
        ["wine", program, "-u", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(more),
        cwd=ROOT,
    )


def run(*arguments: str, **more: str) -> str:
    """What it prints; `AssertionError` with its errors if it fails."""
    process = start(*arguments, **more)
    out, errors = process.communicate(timeout=_TIMEOUT)
    assert process.returncode == 0, errors
    return out


@functools.cache
def why_not() -> str:
    """What is missing to run it, or nothing."""
    if "PKVPN_WINDOWS" not in os.environ:
        return "PKVPN_WINDOWS does not say where `scripts/windows` has set it up"
    try:
        said = run("-c", "import sys, pkvpn; print(sys.platform)")
    except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
        return f"the Python of Windows does not start: {error}"
    return "" if said.strip() == "win32" else f"it says {said!r}"
