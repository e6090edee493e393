"""Certificate and key in memory: made, copied anew, kept where new ones are of no use."""

from __future__ import annotations

import datetime as dt
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkvpn import keyholder
from pkvpn.edge import certificate
from pkvpn.edge.certificate import CertificateError
from pkvpn.keyholder import KeyHolder


class Holder:
    """A holder, what it told, and what is held."""

    def __init__(self, directory: Path) -> None:
        self.files = directory / "server.crt", directory / "server.key"
        self.told: list[dict[str, Any]] = []
        self.fd = -1
        self._holder = KeyHolder(self.told.append)

    def open(self) -> None:
        (self.fd,) = self._holder.held(self.files).open()

    def reload(self) -> None:
        self._holder.held(self.files)

    def text(self) -> bytes:
        return os.pread(self.fd, 1 << 20, 0)

    def make(self) -> None:
        for path in self.files:
            path.unlink(missing_ok=True)
        certificate.ensure(*self.files, "localhost", dt.datetime.now(dt.UTC))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    made = Holder(tmp_path)
    yield made
    if made.fd >= 0:
        os.close(made.fd)


def test_the_first_start_makes_a_certificate_and_tells_of_it(holder: Holder) -> None:
    holder.open()
    assert holder.text() == certificate.joined(*holder.files)
    assert holder.told == [
        {"progress": f"made a certificate, SHA-256 {certificate.load(*holder.files)}"}
    ]


def test_nobody_else_opens_the_memory_and_nobody_writes_by_the_descriptor(holder: Holder) -> None:
    holder.make()
    holder.open()
    assert holder.told == []
    assert stat.S_IMODE(os.fstat(holder.fd).st_mode) == 0o600
    with pytest.raises(OSError, match="Bad file"):
        os.write(holder.fd, b"x")


def test_new_files_are_taken_and_bad_ones_leave_what_was_there(
    holder: Holder, caplog: pytest.LogCaptureFixture
) -> None:
    holder.make()
    holder.open()
    first = holder.text()
    holder.make()
    holder.reload()
    second = holder.text()
    assert second == certificate.joined(*holder.files) != first
    holder.files[1].write_text("no key")
    holder.reload()
    assert holder.text() == second
    assert "the certificate in use stays" in caplog.text
    assert str(holder.files[1]) in caplog.text


def test_files_that_are_of_no_use_end_a_start_and_are_named(holder: Holder) -> None:
    holder.make()
    holder.files[1].write_text("no key")
    with pytest.raises(CertificateError, match=r"server\.crt with key .*server\.key"):
        holder.open()


def test_a_disk_that_does_not_answer_is_given_up(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    holder.make()
    holder.open()
    before = holder.text()
    holder.files[1].unlink()
    os.mkfifo(holder.files[1])  # whoever opens it waits
    monkeypatch.setattr(keyholder, "_SHORT_PATIENCE", 0.05)
    holder.reload()
    os.wait()  # as the watchdog does
    assert "not read within 0.05 s" in caplog.text
    assert holder.text() == before
