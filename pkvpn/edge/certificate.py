"""The server's certificate and key: made once for good, and its fingerprint.

A client compares the certificate of an additional connection with that of its first one and ends
the session if they differ, so a certificate is never made anew while there is one.
"""

import contextlib
import datetime as dt
import hashlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Stock clients check nothing by default, and one installation keeps its certificate: 20 years.
VALIDITY = dt.timedelta(days=20 * 365)


# So much of a fingerprint tells the certificates of one server apart.
SHOWN_SIZE = 16


class CertificateError(Exception):
    """These files are not a certificate and its key; the text names them."""


def ensure(certificate: Path, key: Path, name: str, now: dt.datetime) -> str:
    """Make a self-signed certificate unless there is one; return its SHA-256 fingerprint in hex,
    or nothing if there was one.

    ``name`` becomes the common name.  The key file is written with mode 0600, before the
    certificate: a certificate without its key is an error that somebody must look at, a key
    without a certificate is what a kill in between left, and both are made again.  Raises OSError
    for the file system; whether what there is can be used is seen when it is loaded.
    """
    # Several edges start at the same time, and all must show the same one.
    with _only_one(certificate.parent):
        if certificate.exists():
            return ""
        _make(certificate, key, name, now)
    return load(certificate, key)


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    if os.name == "nt":
        yield  # there is one process that asks, and Windows opens no directories
        return
    import fcntl

    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def load(certificate: Path, key: Path) -> str:
    """Check that the files fit each other and return the fingerprint of the certificate.

    Raises CertificateError.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        return fingerprint(certificate.read_text())
    except (OSError, ValueError) as error:
        raise CertificateError(f"certificate {certificate} with key {key}: {error}") from None


def fingerprint(pem: str) -> str:
    """SHA-256 in hex of the first certificate of a text.  Raises ValueError."""
    der = ssl.PEM_cert_to_DER_cert(_first_certificate(pem))
    return hashlib.sha256(der).hexdigest()


def joined(certificate: Path, key: Path) -> bytes:
    """Both in one text, the key first.  Raises OSError."""
    return b"%b\n%b" % (key.read_bytes(), certificate.read_bytes())


def _first_certificate(text: str) -> str:
    """The first certificate of a chain file, which may have text around it."""
    begin, end = ssl.PEM_HEADER, ssl.PEM_FOOTER
    at = text.index(begin)
    return text[at : text.index(end, at) + len(end)]


def _make(certificate: Path, key: Path, name: str, now: dt.datetime) -> None:
    # 90 ms of imports, at the very first start only.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    # Stock clients take it, and a signature costs a tenth of RSA's: it is most of a handshake.
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        # A day back, for clients whose clock is late.
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write(key, pem, 0o600)
    _write(certificate, made.public_bytes(serialization.Encoding.PEM), 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is whole or absent, also after a power failure."""
    fd, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if os.name == "nt":
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
