"""Packs: the named, typed values in which SoftEther's programs talk before the data phase.

Strategy: the reader is strict.  The original turns a value it cannot read into null and
goes on; here the whole pack is refused, since no sound peer sends one.  Every announced
length and count is compared with the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import functools
import ipaddress
import struct
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from pkvpn.protocol.errors import ProtocolError

# On the wire, all numbers big endian:
#   4  how many elements follow
#   then for each:  4  length of the name + 1,  n  the name (ASCII, no NUL)
#                   4  kind,  4  how many values follow
#   then each value:  INT     4
#                     DATA    4  length,  n  bytes
#                     STR     4  length,  n  bytes of UTF-8 (no NUL)
#                     UNISTR  4  length,  n  bytes of UTF-8, the last of them NUL
#                     INT64   8
_U32 = struct.Struct("!I")
_U64 = struct.Struct("!Q")
_KIND_AND_COUNT = struct.Struct("!II")

MAX_NAME = 63  # MAX_ELEMENT_NAME_LEN
MAX_PACK = 65536  # before login; the original's limit for a pack to the server
MAX_ELEMENTS = 512  # a stock login has about 78

Value: TypeAlias = int | bytes | str


class Kind(IntEnum):
    """The type of an element's values (SoftEther: VALUE_*)."""

    INT = 0  # VALUE_INT
    DATA = 1  # VALUE_DATA
    STR = 2  # VALUE_STR
    UNISTR = 3  # VALUE_UNISTR
    INT64 = 4  # VALUE_INT64


_SMALLEST = {Kind.INT: 4, Kind.DATA: 4, Kind.STR: 4, Kind.UNISTR: 4, Kind.INT64: 8}
_KINDS = {int(kind): kind for kind in Kind}


class Element(NamedTuple):
    """One name with its values, at least one, all of one kind."""

    name: str
    kind: Kind
    values: tuple[Value, ...]


class Elements(NamedTuple):
    """Elements as they go over the wire: what is in many packs is written once."""

    number: int
    data: bytes


def join(*parts: Elements) -> bytes:
    """One whole pack of these elements; the caller sees to it that no name is there twice."""
    count = _U32.pack(sum(part.number for part in parts))
    return b"".join((count, *(part.data for part in parts)))


class Pack:
    """Elements in the order they were put; names compare without regard to case.

    The ``get_`` accessors never fail on what a peer sent: an element that is missing, has
    another kind or too few values gives the default, as in the original.
    """

    __slots__ = ("_elements",)

    def __init__(self, elements: Iterable[Element] = ()) -> None:
        self._elements: dict[str, Element] = {}
        for element in elements:
            self.put(element)

    # Reading and writing the whole

    @classmethod
    def decode(
        cls, data: bytes, *, max_size: int = MAX_PACK, max_elements: int = MAX_ELEMENTS
    ) -> Pack:
        """Read one pack; bytes behind its last element are ignored.

        Raises `ProtocolError` for anything that is not a whole, unambiguous pack within
        the limits.
        """
        if len(data) > max_size:
            raise ProtocolError(f"pack of {len(data)} bytes is larger than {max_size}")
        pack = cls()
        elements = pack._elements
        at = 4
        try:
            (count,) = _U32.unpack_from(data)
            if count > max_elements:
                raise ProtocolError(f"pack of {count} elements has more than {max_elements}")
            for _ in range(count):
                element, at = _read_element(data, at)
                key = element.name.lower()
                if key in elements:
                    raise ProtocolError(f"pack names {element.name!r} twice")
                elements[key] = element
        except struct.error:
            raise ProtocolError(f"pack ends too early, in the element at byte {at}") from None
        return pack

    def written(self, *, sort: bool = False) -> Elements:
        """The elements in the order of `put`, or sorted by name as the originals do."""
        elements = list(self._elements.values())
        if sort:
            elements.sort(key=lambda element: element.name.lower())
        parts: list[bytes] = []
        for name, kind, values in elements:
            parts += _name_bytes(name), _KIND_AND_COUNT.pack(kind, len(values))
            for value in values:
                parts.append(_encode_value(kind, value))
        return Elements(len(elements), b"".join(parts))

    def encode(self, *, sort: bool = False) -> bytes:
        """The whole pack, in the order of `written`."""
        return join(self.written(sort=sort))

    # Elements

    def put(self, element: Element) -> None:
        """Add an element; raises `ValueError` for what no reader would take."""
        key = _key(element.name)
        if key in self._elements:
            raise ValueError(f"{element.name!r} is in the pack already")
        if not element.values:
            raise ValueError(f"{element.name!r} has no values: leave the element out")
        self._elements[key] = element

    def elements(self) -> tuple[Element, ...]:
        """All elements, in order."""
        return tuple(self._elements.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._elements

    def __iter__(self) -> Iterator[str]:
        return (element.name for element in self._elements.values())

    def __len__(self) -> int:
        return len(self._elements)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pack) and self.elements() == other.elements()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __repr__(self) -> str:
        # Names only: values are passwords and session keys as often as not.
        return f"Pack({', '.join(self)})"

    # Typed values

    def put_int(self, name: str, *values: int) -> None:
        """Add u32 values; a boolean is 0 or 1."""
        self.put(Element(name, Kind.INT, tuple([value & 0xFFFFFFFF for value in values])))

    def put_data(self, name: str, *values: bytes) -> None:
        """Add bytes values."""
        self.put(Element(name, Kind.DATA, values))

    def put_str(self, name: str, *values: str) -> None:
        """Add short text; it ends at the first NUL."""
        self.put(Element(name, Kind.STR, tuple([_until_nul(value) for value in values])))

    def put_unistr(self, name: str, *values: str) -> None:
        """Add text that users see; it ends at the first NUL."""
        self.put(Element(name, Kind.UNISTR, tuple([_until_nul(value) for value in values])))

    def put_int64(self, name: str, *values: int) -> None:
        """Add u64 values."""
        self.put(Element(name, Kind.INT64, tuple(value & 0xFFFFFFFFFFFFFFFF for value in values)))

    def put_ip(self, name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
        """Add an address as the four elements it travels in (SoftEther: PackAddIp)."""
        six = isinstance(address, ipaddress.IPv6Address)
        # The four bytes of an IPv4 address travel as a little-endian number.
        self.put_int(name, 0 if six else int.from_bytes(address.packed, "little"))
        self.put_int(name + "@ipv6_bool", int(six))
        self.put_data(name + "@ipv6_array", address.packed if six else bytes(16))
        self.put_int(name + "@ipv6_scope_id", 0)

    def get_int(self, name: str, default: int = 0, index: int = 0) -> int:
        """The u32 value."""
        value = self._value(name, Kind.INT, index)
        return value if isinstance(value, int) else default

    def get_data(self, name: str, default: bytes = b"", index: int = 0) -> bytes:
        """The bytes value."""
        value = self._value(name, Kind.DATA, index)
        return value if isinstance(value, bytes) else default

    def get_str(self, name: str, default: str = "", index: int = 0) -> str:
        """The short text; bytes that are not UTF-8 were replaced by U+FFFD."""
        value = self._value(name, Kind.STR, index)
        return value if isinstance(value, str) else default

    def get_unistr(self, name: str, default: str = "", index: int = 0) -> str:
        """The text that users see."""
        value = self._value(name, Kind.UNISTR, index)
        return value if isinstance(value, str) else default

    def get_int64(self, name: str, default: int = 0, index: int = 0) -> int:
        """The u64 value."""
        value = self._value(name, Kind.INT64, index)
        return value if isinstance(value, int) else default

    def get_ip(self, name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The address in the four elements that begin with ``name``; None without them."""
        if name not in self:
            return None
        if self.get_int(name + "@ipv6_bool"):
            packed = self.get_data(name + "@ipv6_array")
            return ipaddress.IPv6Address(packed) if len(packed) == 16 else None
        return ipaddress.IPv4Address(self.get_int(name).to_bytes(4, "little"))

    def count(self, name: str) -> int:
        """How many values the element has; 0 without it."""
        element = self._elements.get(name.lower())
        return 0 if element is None else len(element.values)

    def _value(self, name: str, kind: Kind, index: int) -> Value | None:
        element = self._elements.get(name.lower())
        if element is None or element.kind is not kind or index >= len(element.values):
            return None
        return element.values[index]


# Reading: a function returns what it read and where it ended.  Past the end of the data either
# struct.error is raised, which `Pack.decode` knows, or ProtocolError.


def _read_element(data: bytes, at: int) -> tuple[Element, int]:
    (size,) = _U32.unpack_from(data, at)
    if not 2 <= size <= MAX_NAME + 1:
        raise ProtocolError(f"name of {size - 1} bytes in a pack, 1 to {MAX_NAME} are allowed")
    at += 4
    raw = data[at : at + size - 1]
    at += size - 1
    if not raw.isascii() or b"\0" in raw:
        raise ProtocolError(f"name {raw!r} in a pack is not ASCII text")
    name = raw.decode("ascii")
    number, count = _KIND_AND_COUNT.unpack_from(data, at)
    at += 8
    kind = _KINDS.get(number)
    if kind is None:
        raise ProtocolError(f"{name!r} in a pack has the unknown kind {number}")
    if count == 0:
        raise ProtocolError(f"{name!r} in a pack has no values")
    read = _READERS[kind]
    if count == 1:  # nearly all are
        value, at = read(data, at)
        return Element(name, kind, (value,)), at
    if count * _SMALLEST[kind] > len(data) - at:
        left = len(data) - at
        raise ProtocolError(f"{name!r} announces {count} values with {left} bytes left")
    values = []
    for _ in range(count):
        value, at = read(data, at)
        values.append(value)
    return Element(name, kind, tuple(values)), at


def _read_int(data: bytes, at: int) -> tuple[Value, int]:
    return _U32.unpack_from(data, at)[0], at + 4


def _read_int64(data: bytes, at: int) -> tuple[Value, int]:
    return _U64.unpack_from(data, at)[0], at + 8


def _read_data(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = _U32.unpack_from(data, at)
    at += 4
    end = at + size
    if end > len(data):
        raise ProtocolError(f"pack ends {end - len(data)} bytes too early at byte {at}")
    return data[at:end], end


def _read_text(data: bytes, at: int) -> tuple[Value, int]:
    raw, at = _read_data(data, at)
    # Replaced, not escaped: a surrogate would blow up later, in a log or a database.
    return _until_nul(raw.decode("utf-8", "replace")), at


_READERS: dict[Kind, Callable[[bytes, int], tuple[Value, int]]] = {
    Kind.INT: _read_int,
    Kind.DATA: _read_data,
    Kind.STR: _read_text,
    Kind.UNISTR: _read_text,
    Kind.INT64: _read_int64,
}


# Writing.  The names that this program writes are few, and those of strangers are never written.


@functools.lru_cache(maxsize=1024)
def _key(name: str) -> str:
    """As which a name is found.  Raises ValueError for what no reader would take."""
    key = name.lower()
    if not 1 <= len(key) <= MAX_NAME or not key.isascii() or "\0" in key:
        raise ValueError(f"{name!r} cannot be the name of an element")
    return key


@functools.lru_cache(maxsize=1024)
def _name_bytes(name: str) -> bytes:
    return _U32.pack(len(name) + 1) + name.encode("ascii")


def _encode_value(kind: Kind, value: Value) -> bytes:
    if isinstance(value, int):
        return (_U64 if kind is Kind.INT64 else _U32).pack(value)
    raw = value.encode("utf-8", "replace") if isinstance(value, str) else value
    if kind is Kind.UNISTR:
        raw += b"\0"
    return _U32.pack(len(raw)) + raw


def _until_nul(text: str) -> str:
    # The originals hold text in C strings, so what lies behind a NUL does not exist for
    # them: a name must not mean one thing to us and another to them.
    return text.partition("\0")[0]
