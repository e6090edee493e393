"""SHA-0 and the password hashes that the protocol makes of it.

The stored key of a user is as good as the password for this server: whoever holds it
can log in.  Keep it like one.
"""

from __future__ import annotations

import struct

HASH_SIZE = 20  # SHA1_SIZE
RANDOM_SIZE = 20  # of the Hello; SHA1_SIZE

_BLOCK = struct.Struct("!16I")
_DIGEST = struct.Struct("!5I")
_MASK = 0xFFFFFFFF


def sha0(message: bytes) -> bytes:
    """SHA-1 as it was before 1995: without the rotation by one in the message schedule.

    Returns 20 bytes.  In plain Python about 0.1 ms per 64 bytes of message, so the
    caller bounds the length of what a stranger may have hashed.
    """
    length = len(message)
    padded = message + b"\x80" + bytes((55 - length) % 64) + (8 * length).to_bytes(8, "big")
    h0, h1, h2, h3, h4 = 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0
    for words in _BLOCK.iter_unpack(padded):
        w = list(words)
        for i in range(16, 80):
            w.append(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16])
        a, b, c, d, e = h0, h1, h2, h3, h4
        for i in range(80):
            if i < 20:
                f, k = d ^ (b & (c ^ d)), 0x5A827999
            elif i < 40:
                f, k = b ^ c ^ d, 0x6ED9EBA1
            elif i < 60:
                f, k = (b & c) | (d & (b | c)), 0x8F1BBCDC
            else:
                f, k = b ^ c ^ d, 0xCA62C1D6
            turned = ((a << 5) | (a >> 27)) & _MASK
            a, b, c, d, e = (
                (turned + f + e + k + w[i]) & _MASK,
                a,
                ((b << 30) | (b >> 2)) & _MASK,
                c,
                d,
            )
        h0, h1, h2, h3, h4 = (
            (h0 + a) & _MASK,
            (h1 + b) & _MASK,
            (h2 + c) & _MASK,
            (h3 + d) & _MASK,
            (h4 + e) & _MASK,
        )
    return _DIGEST.pack(h0, h1, h2, h3, h4)


def user_key(password: str, user: str) -> bytes:
    """The 20 bytes stored for a user (SoftEther: HashPassword).

    Only ASCII letters of the name are raised: two names that differ in the case of other
    letters have different keys.
    """
    return sha0(_bytes(password) + _bytes(user).upper())


def secure_password(key: bytes, random: bytes) -> bytes:
    """What is sent instead of the password (SoftEther: SecurePassword).

    ``key`` is `user_key` or `admin_key`, ``random`` the 20 bytes of this connection's
    Hello.
    """
    return sha0(key + random)


def admin_key(password: str) -> bytes:
    """The 20 bytes stored for a server's or a hub's administrator."""
    return sha0(_bytes(password))


def hub_admin_user_key(password: str) -> bytes:
    """The `user_key` of a hub's administrator when it logs in as a VPN user."""
    return user_key(password, "ADMINISTRATOR")


def _bytes(text: str) -> bytes:
    # A lone surrogate cannot come from a pack; from a terminal it can.
    return text.encode("utf-8", "surrogateescape")
