"""systemd, as far as an operator's verbs need it.

Strategy: whether a unit of ours is installed, and for which instance, is read from its file; who
is to be asked is `systemctl`, with a limit for each question.  Nothing here is changed before all
that can be refused has been refused.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from pkvpn.service import units

# For what systemd answers from its memory; what starts and stops has the unit's own limits.
_ANSWER_TIMEOUT = 10.0


class ManagerError(Exception):
    """systemd, or the directory of its units, refuses; the text says what."""


class Manager:
    """The system's systemd, or a user's own."""

    def __init__(self, directory: Path, *, user: bool = False, running: Path | None = None) -> None:
        """``running``: what is there as long as the manager runs (sd_booted(3))."""
        self.directory = directory
        self.user = user
        self._running = running or Path("/run/systemd/system")

    @classmethod
    def of_system(cls) -> Manager:
        return cls(Path("/etc/systemd/system"))

    @classmethod
    def of_user(cls) -> Manager:
        config = os.environ.get("XDG_CONFIG_HOME", "")
        home = Path(config) if config.startswith("/") else Path.home() / ".config"
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
        return cls(home / "systemd/user", user=True, running=Path(runtime, "systemd"))

    @property
    def service(self) -> Path:
        return self.directory / units.SERVICE

    @property
    def socket(self) -> Path:
        return self.directory / units.SOCKET

    def runs(self) -> bool:
        return self._running.is_dir()

    def command(self, *words: str) -> list[str]:
        scope = ["--user"] if self.user else []
        return ["systemctl", *scope, "--no-ask-password", *words]

    def call(self, *words: str, timeout: float = _ANSWER_TIMEOUT) -> str:
        """What `systemctl` prints.  Raises `ManagerError` with what it complains of."""
        command = self.command(*words)
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

    def main_pid(self) -> int:
        """The watchdog that it runs; 0: it runs none."""
        text = self.call("show", "--property=MainPID", "--value", units.SERVICE).strip()
        return int(text) if text.isdigit() else 0

    def is_restarting(self) -> bool:
        """Whether the service is being ended to be started anew; False if that is not known."""
        try:
            # JOB UNIT TYPE STATE
            words = self.call("list-jobs", "--no-legend", "--full", units.SERVICE).split()
        except ManagerError:
            return False
        return len(words) > 2 and words[2] in ("restart", "try-restart")

    # -- the files

    def instance(self) -> str:
        """The runtime directory of what is installed, or nothing."""
        return units.instance_of(_read(self.service))

    def foreign(self) -> Path | None:
        """A unit of our name that somebody else wrote."""
        for path in (self.service, self.socket):
            text = _read(path)
            if text and not units.is_ours(text):
                return path
        return None

    def write(self, files: dict[Path, str]) -> bool:
        """Make the units exactly these; True if anything has changed.  Raises `ManagerError`."""
        changed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path, text in files.items():
                if _read(path) != text:
                    changed = True
                    new = path.with_suffix(path.suffix + ".new")
                    new.write_text(text, encoding="utf-8")
                    new.chmod(0o644)
                    new.replace(path)
            for path in {self.service, self.socket} - set(files):
                if path.exists():
                    changed = True
                    path.unlink()
        except OSError as error:
            raise ManagerError(f"{error.filename}: {error.strerror}") from None
        return changed


def managing(runtime_dir: str) -> Manager | None:
    """Whom an operator's verb is to go through: the manager in which this very instance is
    installed for us, if it runs."""
    with contextlib.suppress(OSError, RuntimeError):  # no home
        manager = Manager.of_user() if os.geteuid() else Manager.of_system()
        if manager.instance() == runtime_dir and manager.runs():
            return manager
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
