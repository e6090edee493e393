"""Certificates of users: what is stored, and the proof that a client has the key to one.

Strategy: only keys from our own database verify anything, so a stranger does not choose the size of
the numbers we calculate with.
"""

from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

MIN_BITS = 1024
MAX_BITS = 8192


class CertificateError(Exception):
    """Not the certificate of a user; says why."""


def read_certificate(data: bytes) -> bytes:
    """The DER of a certificate in PEM or DER.  Raises CertificateError."""
    try:
        if b"-----BEGIN" in data:
            certificate = x509.load_pem_x509_certificate(data)
        else:
            certificate = x509.load_der_x509_certificate(data)
        key = certificate.public_key()
    except Exception as error:  # the library's parsers raise many
        raise CertificateError(f"no X.509 certificate in PEM or DER: {error}") from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise CertificateError("the protocol knows RSA keys only, this certificate has another")
    if not MIN_BITS <= key.key_size <= MAX_BITS:
        raise CertificateError(f"an RSA key of {key.key_size} bits, not {MIN_BITS} to {MAX_BITS}")
    return certificate.public_bytes(serialization.Encoding.DER)


@lru_cache(maxsize=256)
def _public_key(certificate: bytes) -> rsa.RSAPublicKey:
    if not certificate:
        # Nobody's: the work for a user that does not exist.
        return rsa.RSAPublicNumbers(65537, (1 << 2048) - 1).public_key()
    key = x509.load_der_x509_certificate(certificate).public_key()
    assert isinstance(key, rsa.RSAPublicKey)  # read_certificate let no other in
    return key


def has_signed(certificate: bytes, signature: bytes, text: bytes) -> bool:
    """Was ``text`` signed with the key of this certificate (DER; empty: of nobody)?

    RSASSA-PKCS1-v1_5 with SHA-1, as the protocol has it.
    """
    try:
        key = _public_key(certificate)
        key.verify(signature, text, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303
    except InvalidSignature:
        return False
    return bool(certificate)
