"""Holds what pkvpn runs on to the list in audited.toml: nothing unknown, nothing too old.

Strategy: no network, so it says the same on each machine and in each run.  It finds every package
that pkvpn needs, by what the installed ones say of themselves, and the libraries inside the
interpreter.  It fails for one that nobody has entered, for one that is older than the list allows,
for an entry that nobody needs any more, and for a bound in setup.py below the list's, which would
let others install what we do not.  Of an advisory that nobody has entered it knows nothing:
`reviewed` tells when somebody has last looked.
"""

from __future__ import annotations

import re
import sqlite3
import ssl
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests/audited.toml"

_BOUND = re.compile(r'"([A-Za-z0-9._-]+)>=([0-9.]+)"')


def main() -> int:
    audited = tomllib.loads(LIST.read_text(encoding="utf-8"))
    bounds = bounds_of((ROOT / "setup.py").read_text(encoding="utf-8"))
    packages = {name: metadata.version(name) for name in sorted(needed(bounds))}
    libraries = {"openssl": ssl.OPENSSL_VERSION.split()[1], "sqlite": sqlite3.sqlite_version}
    wrong = [
        *compare(packages, audited["packages"]),
        *compare(libraries, audited["libraries"]),
        *too_low(bounds, audited["packages"]),
    ]
    for line in wrong:
        sys.stderr.write(f"audit: {line}\n")
    found = ", ".join(f"{name} {version}" for name, version in {**packages, **libraries}.items())
    sys.stdout.write(f"Dependencies, last reviewed {audited['reviewed']}: {found}\n")
    return 1 if wrong else 0


def bounds_of(setup: str) -> dict[str, str]:
    """What setup.py wants at run time, with the oldest version of each."""
    text = setup.partition("install_requires")[2].partition("extras_require")[0]
    return {canonicalize_name(name): bound for name, bound in _BOUND.findall(text)}


def needed(names: Iterable[str]) -> set[str]:
    """These and all that they need on this machine."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for text in metadata.requires(name) or []:
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(canonicalize_name(requirement.name))
    return found


def compare(found: Mapping[str, str], listed: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with these versions."""
    for name, version in found.items():
        if name not in listed:
            yield f"{name} {version}: nobody has looked at it; enter it in {LIST.name}"
        elif Version(version) < Version(listed[name]["oldest"]):
            yield f"{name} {version} is before {listed[name]['oldest']}: {listed[name]['since']}"
    for name in sorted(set(listed) - set(found)):
        yield f"{name} is in {LIST.name}, and nobody needs it"


def too_low(bounds: Mapping[str, str], listed: Mapping[str, Any]) -> Iterator[str]:
    """Where others may install what the list does not allow."""
    for name, bound in bounds.items():
        if name in listed and Version(bound) < Version(listed[name]["oldest"]):
            yield f"{name}: setup.py allows {bound}, the list nothing before its oldest"


if __name__ == "__main__":
    sys.exit(main())
