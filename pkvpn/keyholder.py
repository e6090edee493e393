"""Certificate and private key for the edges, which may open no files.

Strategy: they lie in a memory file that the watchdog holds and does not read: every child would
inherit what was ever in its memory.  A process of its own, which does nothing else and lives for
milliseconds, makes them if there are none, checks that they fit and copies them.  The edges get a
descriptor from which they can be read; the file has a mode that lets no other user open it.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pkvpn.edge import certificate
from pkvpn.edge.certificate import CertificateError
from pkvpn.watchdog import sandbox
from pkvpn.watchdog.confinement import NO_CORE
from pkvpn.watchdog.spec import HeldSpec

_log = logging.getLogger("pkvpn.app")

# At the start, which may have to import what makes a certificate; and while others wait for us.
_PATIENCE, _SHORT_PATIENCE = 10.0, 1.0


class KeyHolder:
    """Knows the memory file, and what it is copied from."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """``tell``: whoever waits for the start."""
        self._tell = tell
        self._fd = -1  # not ours to close

    def held(self, files: tuple[Path, Path]) -> HeldSpec:
        """What is to be held for certificate and key; copied anew if it is held already.

        What is wrong with new files is logged, and the old ones stay.
        """
        if self._fd >= 0:
            try:
                self._fill(files, _SHORT_PATIENCE)
            except CertificateError as error:
                _log.error("the certificate in use stays: %s", error)
        return HeldSpec("certificate", lambda: [self._open(files)], adopt=self._adopt)

    def _open(self, files: tuple[Path, Path]) -> int:
        """Raises CertificateError, OSError."""
        made = os.memfd_create("certificate", os.MFD_CLOEXEC)
        try:
            os.fchmod(made, 0o600)
            self._fd = os.open(f"/proc/self/fd/{made}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(made)
        try:
            self._fill(files, _PATIENCE)
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise
        return self._fd

    def _adopt(self, descriptors: list[int]) -> None:
        (self._fd,) = descriptors

    def _fill(self, files: tuple[Path, Path], patience: float) -> None:
        """Raises CertificateError."""
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
            if not pid:
                _be_the_copier(self._fd, files, write)
            os.close(write)
            write = -1
            poller = select.poll()
            poller.register(read, select.POLLIN)
            said = os.read(read, 65536) if poller.poll(patience * 1000) else b""
            os.kill(pid, signal.SIGKILL)  # nobody has reaped it yet
            if said:
                os.waitpid(pid, 0)
            # Else it hangs on a disk, and perhaps for ever: the watchdog reaps whoever ends.
        finally:
            for fd in (read, write):
                if fd >= 0:
                    os.close(fd)
        if not said:
            raise CertificateError(_named(files, f"not read within {patience:g} s"))
        answer = json.loads(said)
        if answer["wrong"]:
            raise CertificateError(answer["wrong"])
        if answer["made"]:
            self._tell({"progress": f"made a certificate, SHA-256 {answer['made']}"})
            _log.info("made a certificate, SHA-256 %s", answer["made"])


def _be_the_copier(source: int, files: tuple[Path, Path], write: int) -> None:
    """In a process of its own; never returns."""
    answer = {"wrong": "", "made": ""}
    try:
        sandbox.limit(*NO_CORE)
        answer["made"] = _copy(source, files)
    except CertificateError as error:
        answer["wrong"] = str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it was, the watchdog hears of it
        answer["wrong"] = _named(files, str(error) or type(error).__name__)
    finally:
        os.write(write, json.dumps(answer).encode())
        os._exit(0)


def _named(files: tuple[Path, Path], why: str) -> str:
    return f"certificate {files[0]} with key {files[1]}: {why}"


def _copy(source: int, files: tuple[Path, Path]) -> str:
    """The fingerprint, if they were made.  Raises CertificateError, OSError, ValueError."""
    made = certificate.ensure(*files, socket.gethostname() or "vpnserver", dt.datetime.now(dt.UTC))
    certificate.load(*files)
    pem = certificate.joined(*files)
    fd = os.open(f"/proc/self/fd/{source}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, os.pwrite(fd, pem, 0))
    finally:
        os.close(fd)
    return made
