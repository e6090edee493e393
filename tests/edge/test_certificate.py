"""The certificate is made once and kept."""

import datetime as dt
import stat
import subprocess
from pathlib import Path

import pytest

from pkvpn.edge import certificate
from pkvpn.edge.certificate import CertificateError

NOW = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)


def test_the_first_start_makes_a_certificate_and_later_ones_keep_it(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    fingerprint = certificate.ensure(cert, key, "vpn.example", NOW)

    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(cert.stat().st_mode) == 0o644
    assert certificate.ensure(cert, key, "other.example", NOW) == ""
    assert certificate.load(cert, key) == fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cert.pem", "key.pem"]


def test_the_fingerprint_is_the_one_that_openssl_shows(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    fingerprint = certificate.ensure(cert, key, "vpn.example", NOW)
    shown = subprocess.run(
        ["openssl", "x509", "-in", cert, "-noout", "-fingerprint", "-sha256", "-subject"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert fingerprint in shown.replace(":", "").lower()
    assert "vpn.example" in shown


def test_a_key_left_alone_by_a_kill_is_made_again(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    key.write_text("half a key")
    certificate.ensure(cert, key, "vpn.example", NOW)
    assert "PRIVATE KEY" in key.read_text()


def test_a_certificate_without_its_key_is_named_and_not_replaced(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.ensure(cert, key, "vpn.example", NOW)
    before = cert.read_bytes()
    key.unlink()
    assert certificate.ensure(cert, key, "vpn.example", NOW) == ""
    with pytest.raises(CertificateError, match=r"cert\.pem.*key\.pem"):
        certificate.load(cert, key)
    assert cert.read_bytes() == before


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\n"])
def test_files_that_hold_something_else_are_named(tmp_path: Path, text: str) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(text)
    key.write_text(text)
    with pytest.raises(CertificateError, match=r"cert\.pem"):
        certificate.load(cert, key)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.ensure(cert, key, "vpn.example", NOW)
    certificate.ensure(tmp_path / "cert2.pem", tmp_path / "key2.pem", "vpn.example", NOW)
    with pytest.raises(CertificateError):
        certificate.load(cert, tmp_path / "key2.pem")
