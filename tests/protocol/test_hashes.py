"""The hashes against values that the real server stored or accepted."""

from __future__ import annotations

import hashlib

import pytest

from pkvpn.protocol import hashes

RANDOM = bytes(range(20))


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (b"", "f96cea198ad1dd5617ac084a3d92c6107708c0ef"),
        (b"abc", "0164b8a914cd2a5e74c4f7ff082c4d97f1edf880"),
    ],
)
def test_sha0(message: bytes, digest: str) -> None:
    assert hashes.sha0(message).hex() == digest


@pytest.mark.parametrize("size", [54, 55, 56, 63, 64, 65, 119, 120, 128])
def test_sha0_pads_at_every_edge_of_a_block(size: int) -> None:
    # The schedule's missing rotation is the only difference, so a plain reference that has
    # both is checked against hashlib with the rotation and against ours without it.
    message = bytes(i % 251 for i in range(size))
    assert _sha(message, rotate=1) == hashlib.sha1(message).digest()
    assert _sha(message, rotate=0) == hashes.sha0(message)


@pytest.mark.parametrize(
    ("user", "password", "key", "secure"),
    [
        (
            "u1",
            "pw1",
            "193de8497a3f67192425339402ef33ec2e8caea7",
            "1e9d2e20b76071f3d4b08ea984c3cb710723825f",
        ),
        (
            "u2",
            "pw2",
            "d6a6cfe27505d71ef4ce7db43bd8d384c9b51d07",
            "a1472335bfc7bf2c77fd1b7bb62e484b3b7ff851",
        ),
    ],
)
def test_user_passwords(user: str, password: str, key: str, secure: str) -> None:
    assert hashes.user_key(password, user).hex() == key
    assert hashes.user_key(password, user.upper()).hex() == key
    assert hashes.secure_password(bytes.fromhex(key), RANDOM).hex() == secure


def test_admin_passwords() -> None:
    key = hashes.admin_key("admin")
    assert key.hex() == "f39fa4b9220651280be591d92a77ad464fb2bc2e"
    assert hashes.secure_password(key, RANDOM).hex() == "897d16ce0f838e0d2d3bfcdb787f94759432cd97"
    assert hashes.admin_key("xx").hex() == "738a430324ea886c1b23fae607273eb4b463e26a"
    assert hashes.hub_admin_user_key("xx").hex() == "f8ac278a2c27f4e51a686e3ec61a0c14314b90f8"


def test_only_ascii_letters_of_a_name_are_raised() -> None:
    assert hashes.user_key("p", "aé") == hashes.sha0(b"p" + b"A" + "é".encode())


def _sha(message: bytes, rotate: int) -> bytes:
    def rol(x: int, n: int) -> int:
        return (x << n | x >> (32 - n)) & 0xFFFFFFFF

    padded = message + b"\x80" + bytes((55 - len(message)) % 64)
    padded += (8 * len(message)).to_bytes(8, "big")
    state = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0]
    for at in range(0, len(padded), 64):
        w = [int.from_bytes(padded[at + i : at + i + 4], "big") for i in range(0, 64, 4)]
        for i in range(16, 80):
            w.append(rol(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], rotate))
        a, b, c, d, e = state
        for i, x in enumerate(w):
            f, k = (
                (b & c | ~b & d, 0x5A827999),
                (b ^ c ^ d, 0x6ED9EBA1),
                (b & c | b & d | c & d, 0x8F1BBCDC),
                (b ^ c ^ d, 0xCA62C1D6),
            )[i // 20]
            t = (rol(a, 5) + (f & 0xFFFFFFFF) + e + k + x) & 0xFFFFFFFF
            a, b, c, d, e = t, a, rol(b, 30), c, d
        state = [(x + y) & 0xFFFFFFFF for x, y in zip(state, (a, b, c, d, e), strict=True)]
    return b"".join(x.to_bytes(4, "big") for x in state)
