"""The Debian package on a machine without pkvpn, and new versions of it, by dpkg and by pip.

Strategy: it is built once, as `scripts/deb` does it; what newer versions differ in is their number.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.machine import Machine
from tests.boot.test_service_mode import wait_whole
from tests.boot.test_sessions import add_users, visiting
from tests.system.bed import ROOT, run

pytestmark = [pytest.mark.boot, pytest.mark.slow, pytest.mark.timeout(500)]

BUILD_TIMEOUT = 200.0
HOME = "usr/lib/pkvpn"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("dpkg-deb") is None or sys.version_info[:2] != (3, 11):
        pytest.skip("a package for Debian 12 takes dpkg-deb and Python 3.11")
    directory = tmp_path_factory.mktemp("deb")
    done = subprocess.run(
        [ROOT / "scripts/deb", directory], env={**os.environ, "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def renumber(package: Path, version: str) -> Path:
    """The same as a newer version."""
    root = package.parent / version
    run("dpkg-deb", "--raw-extract", str(package), str(root))
    control = root / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", control.read_text()))
    (code,) = root.glob(f"{HOME}/lib/*/site-packages/pkvpn/__init__.py")
    set_version(code, version)
    made = package.with_name(f"{version}.deb")
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(made))
    return made


def wheel(directory: Path, version: str) -> Path:
    """The same as a wheel."""
    source = directory / version
    source.mkdir()
    shutil.copytree(ROOT / "pkvpn", source / "pkvpn")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    set_version(source / "pkvpn/__init__.py", version)
    run(
        *(sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps"),
        *("--wheel-dir", str(directory), str(source)),
        timeout=BUILD_TIMEOUT,
    )
    (made,) = directory.glob(f"*-{version}-*.whl")
    return made


def set_version(code: Path, version: str) -> None:
    text = code.read_text()
    code.write_text(re.sub(r"(?m)^__version__ = .*$", f'__version__ = "{version}"', text))


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with contextlib.closing(Machine()) as made:
        # Nothing of the checkout.
        made.program = [*ALONE, "vpnserver"]
        made.boot()
        yield made


ALONE = ("env", "--unset=PYTHONPATH")


def test_sessions_outlive_new_versions_of_the_package(
    machine: Machine, package: Path, tmp_path: Path
) -> None:
    def version() -> tuple[str, int]:
        """Of the program that runs, and how many images of the watchdog there have been."""
        status = json.loads(machine.vpnserver("status", "--json").stdout)
        return status["version"], status["watchdog"]["image"]

    machine.do(*ALONE, "dpkg", "--install", machine.put(package))
    pid = wait_whole(machine)
    assert machine.do("systemctl", "is-enabled", "vpnserver").stdout == "enabled\n"
    add_users(machine)
    with visiting(machine) as visit:
        newer = machine.put(renumber(package, "90.1"))
        machine.do(*ALONE, "dpkg", "--install", newer)
        assert wait_whole(machine) == pid
        assert version() == ("90.1", 2)
        newest = machine.put(wheel(tmp_path, "90.2"))
        pip = (sys.executable, "-m", "pip", "--python", f"/{HOME}/bin/python3")
        machine.do(*ALONE, *pip, "install", "--no-deps", "--no-index", newest)
        machine.vpnserver("upgrade")
        assert wait_whole(machine) == pid
        assert version() == ("90.2", 3)
        told = visit.end()
    assert told["clients"] == [{"logins": 1, "resumptions": 0}] * 2, machine.journal()
    assert told["lost"] == 0, machine.journal()


def test_a_package_that_is_removed_leaves_the_accounts_and_one_that_is_purged_nothing(
    machine: Machine, package: Path
) -> None:
    machine.do(*ALONE, "dpkg", "--install", machine.put(package))
    machine.do(*ALONE, "dpkg", "--remove", "pkvpn")
    assert machine.show("LoadState") == "not-found"
    assert machine.do("ls", f"/{HOME}", check=False).returncode
    assert machine.do("ls", "/var/lib/pkvpn/core/pkvpn.db").stdout
    machine.do(*ALONE, "dpkg", "--purge", "pkvpn")
    assert machine.do("ls", "/var/lib/pkvpn", check=False).returncode
