"""Packs: vectors taken from the real programs, round trips, and whatever a stranger sends."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn.protocol.errors import ProtocolError
from pkvpn.protocol.pack import MAX_ELEMENTS, MAX_PACK, Element, Kind, Pack

ERROR_9 = bytes.fromhex("00000001 00000006 6572726f72 00000000 00000001 00000009")
TWO_HUBS = bytes.fromhex(
    "00000002 00000008 4875624e616d65 00000002 00000002 00000001 41 00000002 4243"
    "00000007 4e756d487562 00000000 00000001 00000002"
)
ALL_KINDS = bytes.fromhex(
    "00000005 00000002 69 00000000 00000001 00000001"
    "00000002 64 00000001 00000001 00000002 dead"
    "00000002 73 00000002 00000001 00000002 6162"
    "00000002 75 00000003 00000001 00000003 c3a900"
    "00000002 71 00000004 00000001 0102030405060708"
)


def all_kinds() -> Pack:
    pack = Pack()
    pack.put_int("i", 1)
    pack.put_data("d", bytes.fromhex("dead"))
    pack.put_str("s", "ab")
    pack.put_unistr("u", "é")
    pack.put_int64("q", 0x0102030405060708)
    return pack


def test_error_vector() -> None:
    pack = Pack.decode(ERROR_9)
    assert pack.get_int("error") == 9
    assert len(ERROR_9) == 25
    assert pack.encode() == ERROR_9


def test_array_vector() -> None:
    pack = Pack.decode(TWO_HUBS)
    assert [pack.get_str("hubname", index=i) for i in range(pack.count("HUBNAME"))] == ["A", "BC"]
    assert pack.get_int("NumHub") == 2
    assert len(TWO_HUBS) == 56
    assert pack.encode() == TWO_HUBS


def test_vector_of_all_kinds() -> None:
    assert len(ALL_KINDS) == 100
    assert all_kinds().encode() == ALL_KINDS
    assert Pack.decode(ALL_KINDS) == all_kinds()


@pytest.mark.parametrize("vector", [ERROR_9, TWO_HUBS, ALL_KINDS])
def test_every_cut_pack_is_refused_and_a_tail_ignored(vector: bytes) -> None:
    for size in range(len(vector)):
        with pytest.raises(ProtocolError):
            Pack.decode(vector[:size])
    assert Pack.decode(vector + b"tail") == Pack.decode(vector)


def test_sorted_as_the_originals_write_it() -> None:
    pack = Pack()
    for name in ("b", "C", "a"):
        pack.put_int(name, 0)
    assert list(Pack.decode(pack.encode(sort=True))) == ["a", "b", "C"]
    assert list(Pack.decode(pack.encode())) == ["b", "C", "a"]


def test_accessors_give_the_default_for_what_is_missing_or_of_another_kind() -> None:
    pack = all_kinds()
    assert pack.get_int("none", 7) == 7
    assert pack.get_int("s", 7) == 7
    assert pack.get_int("i", 7, index=1) == 7
    assert pack.get_data("i") == b""
    assert pack.get_str("u") == ""
    assert pack.get_unistr("s", "x") == "x"
    assert pack.get_int64("i", 5) == 5
    assert (pack.get_data("d"), pack.get_str("s"), pack.get_unistr("u")) == (b"\xde\xad", "ab", "é")
    assert pack.get_int64("q") == 0x0102030405060708
    assert "I" in pack
    assert 1 not in pack
    assert pack.count("none") == 0


def test_an_ipv4_address_is_a_little_endian_number() -> None:
    pack = Pack()
    pack.put_ip("x", ipaddress.IPv4Address("10.98.0.2"))
    assert pack.get_int("x") == 33579530
    assert bytes.fromhex("0200620a") in pack.encode()
    assert list(pack) == ["x", "x@ipv6_bool", "x@ipv6_array", "x@ipv6_scope_id"]
    assert Pack.decode(pack.encode()).get_ip("X") == ipaddress.IPv4Address("10.98.0.2")


def test_an_ipv6_address() -> None:
    pack = Pack()
    pack.put_ip("x", ipaddress.IPv6Address("fd00::1"))
    assert pack.get_int("x") == 0
    assert Pack.decode(pack.encode()).get_ip("x") == ipaddress.IPv6Address("fd00::1")
    assert pack.get_ip("y") is None


def test_a_broken_ipv6_address_is_none() -> None:
    pack = Pack()
    pack.put_int("x", 0)
    pack.put_int("x@ipv6_bool", 1)
    pack.put_data("x@ipv6_array", bytes(15))
    assert pack.get_ip("x") is None


def element(name: bytes, kind: int, count: int, values: bytes, size: int | None = None) -> bytes:
    announced = len(name) + 1 if size is None else size
    head = announced.to_bytes(4, "big") + name
    return head + kind.to_bytes(4, "big") + count.to_bytes(4, "big") + values


def pack_of(*elements: bytes, count: int | None = None) -> bytes:
    return (len(elements) if count is None else count).to_bytes(4, "big") + b"".join(elements)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends"),
        (pack_of(count=MAX_ELEMENTS + 1), "513 elements"),
        (pack_of(count=0xFFFFFFFF), "4294967295 elements"),
        (pack_of(element(b"", 0, 1, bytes(4))), "name of 0 bytes"),
        (pack_of(element(b"", 0, 1, bytes(4), size=0)), "name of -1 bytes"),
        (pack_of(element(b"n" * 64, 0, 1, bytes(4))), "name of 64 bytes"),
        (pack_of(element(b"n\0", 0, 1, bytes(4))), "not ASCII"),
        (pack_of(element(b"\xff", 0, 1, bytes(4))), "not ASCII"),
        (pack_of(element(b"n", 0, 1, bytes(4)), element(b"N", 0, 1, bytes(4))), "'N' twice"),
        (pack_of(element(b"n", 5, 1, bytes(4))), "unknown kind 5"),
        (pack_of(element(b"n", 0, 0, b"")), "'n' in a pack has no values"),
        (pack_of(element(b"n", 0, 2, bytes(4))), "2 values with 4 bytes left"),
        (pack_of(element(b"n", 1, 0xFFFFFFFF, bytes(40))), "4294967295 values"),
        (pack_of(element(b"n", 4, 2, bytes(12))), "2 values with 12 bytes left"),
        (pack_of(element(b"n", 1, 1, b"\xff\xff\xff\xff")), "4294967295 bytes too early"),
        (bytes(MAX_PACK + 1), "larger than 65536"),
    ],
)
def test_a_pack_that_is_refused_and_why(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        Pack.decode(data)


def test_limits_are_arguments() -> None:
    assert len(Pack.decode(bytes(MAX_PACK + 1), max_size=MAX_PACK + 1)) == 0
    with pytest.raises(ProtocolError):
        Pack.decode(TWO_HUBS, max_elements=1)


def test_text_ends_at_its_first_nul_and_is_always_text() -> None:
    data = pack_of(
        element(b"a", 2, 1, b"\0\0\0\4u1\0x"),
        element(b"b", 3, 1, b"\0\0\0\0"),
        element(b"c", 2, 1, b"\0\0\0\2\xc3A"),
    )
    pack = Pack.decode(data)
    assert (pack.get_str("a"), pack.get_unistr("b"), pack.get_str("c")) == ("u1", "", "\ufffdA")


@pytest.mark.parametrize(
    "wrong",
    [
        Element("", Kind.INT, (1,)),
        Element("n" * 64, Kind.INT, (1,)),
        Element("é", Kind.INT, (1,)),
        Element("n", Kind.INT, ()),
        Element("I", Kind.INT, (1,)),
    ],
)
def test_what_no_reader_would_take_cannot_be_put(wrong: Element) -> None:
    with pytest.raises(ValueError, match="'"):
        all_kinds().put(wrong)


def test_values_do_not_show_in_its_repr() -> None:
    pack = Pack()
    pack.put_str("plain_password", "hush")
    assert repr(pack) == "Pack(plain_password)"


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=63)
texts = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)
elements = st.one_of(
    st.builds(
        Element,
        names,
        st.just(Kind.INT),
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4).map(tuple),
    ),
    st.builds(
        Element,
        names,
        st.just(Kind.INT64),
        st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4).map(tuple),
    ),
    st.builds(
        Element,
        names,
        st.just(Kind.DATA),
        st.lists(st.binary(max_size=40), min_size=1, max_size=4).map(tuple),
    ),
    st.builds(
        Element,
        names,
        st.sampled_from([Kind.STR, Kind.UNISTR]),
        st.lists(texts, min_size=1, max_size=4).map(tuple),
    ),
)
packs = st.lists(elements, max_size=8, unique_by=lambda e: e.name.lower()).map(Pack)


@settings(max_examples=100, deadline=None)
@given(packs, st.binary(max_size=8))
def test_round_trip(pack: Pack, tail: bytes) -> None:
    assert Pack.decode(pack.encode() + tail) == pack


@settings(max_examples=200, deadline=None)
@given(packs, st.data())
def test_a_damaged_pack_is_a_pack_or_a_protocol_error(pack: Pack, data: st.DataObject) -> None:
    raw = bytearray(pack.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = Pack.decode(bytes(raw))
    except ProtocolError:
        return
    assert Pack.decode(decoded.encode()) == decoded
