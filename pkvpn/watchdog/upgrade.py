"""Going over to new code without letting go of anything.

Strategy: the watchdog replaces its own image (exec) and keeps its pid, its children, and every
descriptor it holds; a table of them goes along in a memfd.  Three things keep a bad upgrade
from being the end:

- The new code is tried first, in a process of its own; only if that exits with 0 is it used.
- What is exec'ed is not the new code but a launcher of the *old* one, which lies with a copy of
  the whole package in another memfd, made when this image started.  The launcher imports the
  new code and lets it resume; if anything is raised before the new code has *committed*, the
  launcher exec's once more, and the old code resumes from the same table.
- After it has committed, the children are replaced one by one.  If one does not come up with
  the new code, the old code is resumed in the same way, and brings its children back.

Only the package itself is in the copy, not what it depends on: an upgrade that also replaces
libraries incompatibly is found by the trial, not undone by the copy.
"""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import zipfile
from typing import Any, NoReturn

from pkvpn.watchdog.child import set_death_signal
from pkvpn.watchdog.spec import Upgrade

# Of the table that goes from one image to the next.  An image that does not know it refuses,
# and the old one goes on.
VERSION = 3

# A watchdog that fails goes on as a new image so often; then it is the end.
FALLS = 3
FALLS_PERIOD = 60.0
_FALLS = "PKVPN_FALLS"

_LAUNCHER = '''\
"""Resume with the new code, or else with the code that lies in here."""
import os, sys, traceback
table, main, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
committed = False
archive = sys.path.pop(0)
use_old = table.startswith("-")
if use_old:
    sys.path.insert(0, archive)
try:
    module, _, name = main.partition(":")
    __import__(module)
    code = getattr(sys.modules[module], name)([*arguments, "--resume-fd", table.lstrip("-")])
except BaseException as error:
    if committed or use_old:
        raise
    os.environ["PKVPN_UPGRADE_FAILED"] = traceback.format_exc(limit=-3)[-2000:]
else:
    if committed or use_old:
        sys.exit(code)
    os.environ["PKVPN_UPGRADE_FAILED"] = f"the new code ended with {code} before it had resumed"
os.execv(sys.executable, [sys.executable, archive, "-" + table, main, *arguments])
'''


class UpgradeError(Exception):
    """The table of the old image cannot be gone on with."""


class Trial:
    """The program on disk, being tried beside us.  ``pidfd`` is readable when it has ended."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._said = os.memfd_create("trial", os.MFD_CLOEXEC)
        try:
            # It does not outlive us either.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                preexec_fn=functools.partial(set_death_signal, os.getpid()),  # noqa: PLW1509 - single-threaded
            )
        except OSError:
            os.close(self._said)
            raise
        self.pid = self._process.pid
        self._killed_for = ""
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self, why: str) -> None:
        """To be called when it takes too long; `end` says so."""
        self._killed_for = why
        self._process.kill()

    def end(self) -> str:
        """To be called when it has ended; returns why not, or nothing."""
        code = self._process.wait()
        said = os.pread(self._said, 4096, max(0, os.fstat(self._said).st_size - 2000))
        os.close(self.pidfd)
        os.close(self._said)
        if self._killed_for:
            return f"the new code {self._killed_for}"
        if code == 0:
            return ""
        return f"the new code ended with {code}: {said.decode(errors='replace').strip()}"


def is_copy(package: str) -> bool:
    """Whether this very image runs from a copy."""
    return str(sys.modules[package].__path__[0]).startswith("/proc/self/fd/")


def copy_package(package: str) -> int:
    """Return a memfd with the package's modules and a launcher, as a program Python can run.

    Where this very image runs from such a copy, the copy is the one to go on with.
    """
    root = sys.modules[package].__path__[0]
    if is_copy(package):
        return int(root.split("/")[4])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("__main__.py", _LAUNCHER)
        for directory, names, files in os.walk(root):
            names[:] = [name for name in names if name != "__pycache__"]
            for name in files:
                path = os.path.join(directory, name)
                archive.write(path, os.path.join(package, os.path.relpath(path, root)))
    fd = os.memfd_create(f"code-{package}", os.MFD_CLOEXEC)
    os.write(fd, buffer.getbuffer())
    return fd


def write_table(table: dict[str, Any]) -> int:
    fd = os.memfd_create("table", os.MFD_CLOEXEC)
    os.write(fd, json.dumps({"version": VERSION, **table}).encode())
    return fd


def read_table(fd: int) -> dict[str, Any]:
    """Read what the old image wrote.  Raises `UpgradeError` naming a version we do not know."""
    table: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    if table.get("version") != VERSION:
        raise UpgradeError(f"a table of version {table.get('version')}, and we know {VERSION}")
    return table


def commit() -> None:
    """To be called when the new image has all in hand: from now on its end is the end."""
    vars(sys.modules["__main__"])["committed"] = True


def failure() -> str:
    """Why the new code did not resume, if this image is the old one again."""
    return os.environ.pop("PKVPN_UPGRADE_FAILED", "")


def may_fall(now: float) -> bool:
    """Whether an image that has failed may be followed by another: `FALLS` times in
    `FALLS_PERIOD` seconds.  Counted in the environment, which the next image inherits."""
    known = [float(word) for word in os.environ.get(_FALLS, "").split()]
    falls = [at for at in known if at > now - FALLS_PERIOD]
    os.environ[_FALLS] = " ".join(map(str, [*falls, now]))
    return len(falls) < FALLS


def exec_image(
    plan: Upgrade, archive: int, table: int, descriptors: set[int], *, old: bool = False
) -> NoReturn:
    """Replace this image; ``descriptors`` stay open.  Raises `OSError` if that fails, and then
    nothing has changed."""
    kept = {archive, table, *descriptors}
    for fd in kept:
        os.set_inheritable(fd, True)
    program = [sys.executable, f"/proc/self/fd/{archive}", f"{'-' if old else ''}{table}"]
    try:
        os.execv(sys.executable, [*program, plan.main, *plan.arguments])
    except OSError:
        for fd in kept:
            os.set_inheritable(fd, False)
        os.close(table)
        raise
