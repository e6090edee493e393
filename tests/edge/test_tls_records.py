"""The record layer: against the RFC's examples, against itself, and against noise."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.edge import tls_records
from pkvpn.edge.tls_records import (
    AES_128_GCM,
    ALERT,
    APPLICATION_DATA,
    HANDSHAKE,
    SUITES,
    Opener,
    Sealer,
    Suite,
    TLSError,
)

VECTORS = Path(__file__).parent.parent / "data" / "edge" / "rfc8448_simple_1rtt.txt"
RFC = {
    name: bytes.fromhex(value)
    for line in VECTORS.read_text().splitlines()
    if not line.startswith("#")
    for name, value in [line.split()]
}

each_suite = pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)


def secret(suite: Suite, seed: int = 1) -> bytes:
    return bytes([seed]) * tls_records.secret_size(suite)


def opened(opener: Opener, record: bytes) -> tuple[int, bytes]:
    assert tls_records.record_size(record) == len(record)
    out = bytearray(len(record))
    kind, size = opener.open(memoryview(record), memoryview(out))
    return kind, bytes(out[:size])


def sealed(sealer: Sealer, inner: bytes) -> bytes:
    """A record of any inner text, also of one that we would never make."""
    out = bytearray(len(inner) + tls_records.HEADER_SIZE + tls_records.TAG_SIZE)
    sealer.seal(memoryview(inner), memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("side", ["client", "server"])
def test_keys_and_ivs_are_those_of_the_rfc(side: str) -> None:
    for label, size in (("key", 16), ("iv", 12)):
        expanded = tls_records.expand_label("sha256", RFC[f"{side}_secret"], label, size)
        assert expanded == RFC[f"{side}_{label}"]


# The server's record 0 is a session ticket, which we never send.
@pytest.mark.parametrize(("side", "first"), [("client", 0), ("server", 1)])
def test_the_records_of_the_rfc_are_made_and_opened(side: str, first: int) -> None:
    sealer = Sealer(AES_128_GCM, RFC[f"{side}_secret"], first)
    opener = Opener(AES_128_GCM, RFC[f"{side}_secret"], first)
    data = bytes(range(50))

    assert sealer.seal_bytes(data) == RFC[f"{side}_data"]
    assert sealer.seal_alert(tls_records.Alert.CLOSE_NOTIFY) == RFC[f"{side}_close"]
    assert opened(opener, RFC[f"{side}_data"]) == (APPLICATION_DATA, data)
    assert opened(opener, RFC[f"{side}_close"]) == (ALERT, b"\1\0")


def test_labels_longer_than_a_hash_are_expanded_block_by_block() -> None:
    # From the HKDF-Expand of another implementation, which is tested against RFC 5869.
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    info = b"\0\x64" + b"\x0a" + b"tls13 test" + b"\0"
    expected = HKDFExpand(hashes.SHA384(), 100, info).derive(bytes(48))
    assert tls_records.expand_label("sha384", bytes(48), "test", 100) == expected


@each_suite
def test_no_number_is_used_twice(suite: Suite) -> None:
    sealer = Sealer(suite, secret(suite))
    records = {sealer.seal_bytes(b"same text") for _ in range(50)}
    assert len(records) == 50
    assert sealer.sequence == 50
    sealer.seal_key_update(ask=False)
    assert sealer.sequence == 0
    records |= {sealer.seal_bytes(b"same text") for _ in range(50)}
    assert len(records) == 100


@each_suite
def test_a_number_is_used_up_even_if_sealing_fails(suite: Suite) -> None:
    sealer = Sealer(suite, secret(suite))
    with pytest.raises(ValueError, match="buffer"):
        sealer.seal(memoryview(b"text\x17"), memoryview(bytearray(12)))
    assert sealer.sequence == 1


@each_suite
def test_another_process_goes_on_with_secret_and_number(suite: Suite) -> None:
    sealer, opener = Sealer(suite, secret(suite)), Opener(suite, secret(suite))
    for text in (b"one", b"two"):
        assert opened(opener, sealer.seal_bytes(text)) == (APPLICATION_DATA, text)
    opened(opener, sealer.seal_key_update(ask=True))
    opener.update()
    assert opened(opener, sealer.seal_bytes(b"three")) == (APPLICATION_DATA, b"three")

    sealer = Sealer(suite, sealer.secret, sealer.sequence)
    opener = Opener(suite, opener.secret, opener.sequence)
    assert opened(opener, sealer.seal_bytes(b"four")) == (APPLICATION_DATA, b"four")


@each_suite
def test_after_an_update_the_old_keys_open_nothing(suite: Suite) -> None:
    sealer, opener = Sealer(suite, secret(suite)), Opener(suite, secret(suite))
    kind, content = opened(opener, sealer.seal_key_update(ask=False))
    assert kind == HANDSHAKE
    assert not tls_records.read_key_update(content)
    with pytest.raises(TLSError, match="not authentic"):
        opened(opener, sealer.seal_bytes(b"new"))


@each_suite
@pytest.mark.parametrize("size", [0, 1, 16383, 16384])
@pytest.mark.parametrize("padding", [0, 1, 300])
def test_contents_of_all_sizes_and_paddings_pass(suite: Suite, size: int, padding: int) -> None:
    if size + padding > tls_records.MAX_CONTENT:
        return
    content = b"\0" * size  # zeros of the content are not padding
    record = sealed(Sealer(suite, secret(suite)), content + b"\x17" + bytes(padding))
    assert opened(Opener(suite, secret(suite)), record) == (APPLICATION_DATA, content)


def test_an_inner_text_that_is_too_long_is_never_sealed() -> None:
    sealer = Sealer(AES_128_GCM, secret(AES_128_GCM))
    for size in (0, tls_records.MAX_INNER + 1):
        with pytest.raises(AssertionError):
            sealer.seal(memoryview(bytes(size)), memoryview(bytearray(20000)))


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (b"\0", "zeros"),
        (bytes(200), "zeros"),
        (b"x\x14", "type 20"),
        (b"x\x18", "type 24"),
        (b"x\xff", "type 255"),
        (b"\x16", "empty"),
        (b"\x15\0\0", "empty"),
    ],
)
def test_inner_texts_that_may_not_be_are_refused(inner: bytes, text: str) -> None:
    suite = AES_128_GCM
    record = sealed(Sealer(suite, secret(suite)), inner)
    with pytest.raises(TLSError, match=text) as caught:
        opened(Opener(suite, secret(suite)), record)
    assert caught.value.alert == tls_records.Alert.UNEXPECTED_MESSAGE


@pytest.mark.parametrize(
    ("header", "alert"),
    [
        ("1503030013", 10),  # an alert in clear
        ("1603030013", 10),
        ("1403030001", 10),  # change_cipher_spec is over with the handshake
        ("1703010013", 10),
        ("1703030010", 50),  # nothing but a tag
        ("1703030000", 50),
        ("1703034012", 22),
        ("170303ffff", 22),
    ],
)
def test_headers_that_may_not_come_are_refused_at_once(header: str, alert: int) -> None:
    with pytest.raises(TLSError) as caught:
        tls_records.record_size(bytes.fromhex(header))
    assert caught.value.alert == alert


def test_the_shortest_and_the_longest_record_are_taken() -> None:
    assert tls_records.record_size(bytes.fromhex("1703030011")) == 22
    assert tls_records.record_size(bytes.fromhex("1703034011")) == 16406


@each_suite
@given(at=st.integers(0, 40), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_and_uses_no_number(suite: Suite, at: int, bit: int) -> None:
    record = bytearray(Sealer(suite, secret(suite)).seal_bytes(b"nineteen bytes long"))
    record[at] ^= 1 << bit
    opener = Opener(suite, secret(suite))
    out = memoryview(bytearray(len(record)))
    with pytest.raises(TLSError):
        opener.open(memoryview(record), out)
    assert opener.sequence == 0
    record[at] ^= 1 << bit
    assert opener.open(memoryview(record), out) == (APPLICATION_DATA, 19)


@each_suite
@given(st.binary(min_size=22, max_size=100))
def test_noise_raises_nothing_but_a_tls_error(suite: Suite, noise: bytes) -> None:
    opener = Opener(suite, secret(suite))
    with pytest.raises(TLSError):
        opener.open(memoryview(noise), memoryview(bytearray(100)))
    for read in (
        tls_records.record_size,
        tls_records.read_key_update,
        tls_records.read_alert,
    ):
        try:
            read(noise)
        except TLSError:
            pass


@pytest.mark.parametrize(("content", "ask"), [("1800000100", False), ("1800000101", True)])
def test_key_updates_are_read(content: str, ask: bool) -> None:
    assert tls_records.read_key_update(bytes.fromhex(content)) is ask


@pytest.mark.parametrize(
    "content",
    ["", "18000001", "1800000102", "180000010000", "1800000200", "04000000", "18000001000b000000"],
)
def test_other_handshake_messages_are_refused(content: str) -> None:
    with pytest.raises(TLSError):
        tls_records.read_key_update(bytes.fromhex(content))


def test_a_secret_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="47 bytes for TLS_AES_256_GCM_SHA384"):
        Sealer(tls_records.AES_256_GCM, bytes(47))
