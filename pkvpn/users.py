"""The system users as which core and edges run in Service Mode, and what belongs to them.

Strategy: users are found by name and made by `install` only.  The core's directory, and what lies
in it, is handed over at each start to whomever the core runs as now: root's tools may have made
files in it while the service was stopped.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pkvpn.watchdog.confinement import User

_TIMEOUT = 30.0

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_libc = ctypes.CDLL(None, use_errno=True)


class UserError(OSError):
    """A user that is not there or cannot be made; names it and why."""


def find_user(name: str) -> User | None:
    """Raises UserError for root, whose rights nobody is to be given in this way."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return None
    if found.pw_uid == 0:
        raise UserError(f"user {name} is root; core and edges run as users without rights")
    return User(name, found.pw_uid, found.pw_gid)


def commands_to_make(names: Iterable[str]) -> list[list[str]]:
    """How those that are missing are made, each with a group of its own; the name comes last.

    They have no home, no shell and no password.
    """
    return [_command(name) for name in names if find_user(name) is None]


def make_users(names: Iterable[str]) -> list[str]:
    """Make those that are missing; returns their names.  Needs root.  Raises UserError."""
    made = []
    for command in commands_to_make(names):
        name = command[-1]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"user {name}: {' '.join(command)}: {error}") from None
        if done.returncode:
            why = done.stderr.strip() or f"exit code {done.returncode}"
            raise UserError(f"user {name}: {' '.join(command)}: {why}")
        made.append(name)
    return made


def _command(name: str) -> list[str]:
    """As this system makes one: shadow (most), or busybox (Alpine)."""
    if shutil.which("adduser") and not shutil.which("useradd"):
        return ["adduser", "-S", "-D", "-H", "-h", "/nonexistent", "-s", "/sbin/nologin", name]
    return [
        "useradd", "--system", "--user-group", "--no-create-home",
        "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", name,
    ]  # fmt: skip


def hand_over(directory: Path, user: User | None) -> None:
    """Give the directory, and the files in it, to ``user`` (None: to root).

    To be called as root.  Whoever owned it before may have put there what it likes: only plain
    files that have no other name are given away, and no link is followed.  Raises OSError.
    """
    uid, gid = (user.uid, user.gid) if user is not None else (0, 0)
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(top):
            try:
                fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            except FileNotFoundError:
                continue
            try:
                found = os.fstat(fd)
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid != uid:
                    os.chown(f"/proc/self/fd/{fd}", uid, gid)
            finally:
                os.close(fd)
        os.fchown(top, uid, gid)
    finally:
        os.close(top)


def let_through(directory: Path, user: User | None) -> None:
    """Let ``user`` pass to what lies below, and see nothing.  Raises OSError."""
    # For everybody, and with root's group: of a directory that it finds otherwise systemd takes all
    # that is in it back, at each command of the unit, also at a reload.
    if user is not None:
        os.chown(directory, -1, 0)
        os.chmod(directory, 0o711)  # noqa: S103 - what lies in it is for its owners


@contextmanager
def acting_as_owner(directory: Path) -> Iterator[None]:
    """Touch files with the rights of whoever owns this directory, if that is not us.

    For what lies where he could have put links in our way.  Of a process of one thread.  Raises
    OSError.
    """
    try:
        owner = directory.stat(follow_symlinks=False)
    except FileNotFoundError:
        owner = None
    if owner is None or os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    gid, dumpable = os.getegid(), _prctl(_PR_GET_DUMPABLE, 0)
    os.setegid(owner.st_gid)
    try:
        os.seteuid(owner.st_uid)
        try:
            yield
        finally:
            os.seteuid(0)
    finally:
        os.setegid(gid)
        # The kernel takes it away with each change.
        _prctl(_PR_SET_DUMPABLE, dumpable)


def _prctl(option: int, value: int) -> int:
    return int(_libc.prctl(option, value, 0, 0, 0))
