"""The init system of a machine, as far as an operator's verbs need it.

Strategy: whether files of ours are installed, and for which instance, is read from the files; who
is to be asked is the init system's own program, with a limit for each question.  What differs
between init systems are paths, texts and command lines, which is what a `Manager` is made of;
`inits.py` has one for each.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pkvpn.service import units
from pkvpn.service.units import Plan

# For what is answered from memory; what starts and stops has limits of its own.
_ANSWER_TIMEOUT = 10.0

Command = tuple[str, ...]


class ManagerError(Exception):
    """The init system, or the directory of its files, refuses; the text says what."""


@dataclass(frozen=True)
class Manager:
    """One init system.

    ``sign``: the path that is there while it runs.  ``places``: all files that it may be given, the
    one it is known by first.  ``verbs``: the command line of each of start, stop, kill, restart and
    reload that an operator's verb is to go through; one that is not there we do ourselves.
    ``begin`` and ``start`` follow the files of an install; ``end`` comes before their removal, and
    ``forget`` after.  ``shows`` prints ``up`` if it runs the service now.
    """

    name: str
    sign: Path
    places: tuple[Path, ...]
    files: Callable[[Plan], dict[Path, str]]
    begin: Callable[[Plan], tuple[Command, ...]]
    start: tuple[Command, ...]
    end: tuple[Command, ...]
    forget: tuple[Command, ...] = ()
    verbs: Mapping[str, Command] = field(default_factory=dict)
    shows: Command = ()
    up: str = ""
    journal: str = "the log file"  # where the reason of a failure may be
    # Until it has noticed new files by itself, its program refuses.
    notices_within: float = 0.0

    def runs(self) -> bool:
        return self.sign.exists()

    def runs_it(self) -> bool:
        """Whether it runs the service.  Raises `ManagerError`."""
        return bool(self.shows) and re.search(self.up, call(self.shows)) is not None

    # -- the files

    def installed(self) -> list[Path]:
        return [path for path in self.places if path.exists()]

    def instance(self) -> str:
        """The runtime directory of what is installed, or nothing."""
        return units.instance_of(_read(self.places[0]))

    def foreign(self) -> Path | None:
        """A file of our name that somebody else wrote."""
        for path in self.places:
            text = _read(path)
            if text and not units.is_ours(text):
                return path
        return None

    def write(self, files: Mapping[Path, str]) -> bool:
        """Make the files exactly these; True if anything has changed.  Raises `ManagerError`."""
        changed = False
        try:
            for path, text in files.items():
                if not path.exists() or _read(path) != text:
                    changed = True
                    path.parent.mkdir(parents=True, exist_ok=True)
                    new = path.with_name(path.name + ".new")
                    new.write_text(text, encoding="utf-8")
                    new.chmod(0o755 if text.startswith("#!") else 0o644)
                    new.replace(path)
            for path in set(self.installed()) - set(files):
                changed = True
                path.unlink()
        except OSError as error:
            raise ManagerError(f"{error.filename}: {error.strerror}") from None
        return changed


def call(command: Command, timeout: float = _ANSWER_TIMEOUT) -> str:
    """What it prints.  Raises `ManagerError` with what it complains of."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ManagerError(f"{' '.join(command)}: no answer within {timeout:g} s") from None
    except OSError as error:
        raise ManagerError(f"{' '.join(command)}: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise ManagerError(f"{' '.join(command)}: {said}")
    return done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
