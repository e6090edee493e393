"""What edge and core say to each other: one codec for both ends.

Strategy: a message is a named tuple; `encode` makes its bytes, `decode_from_edge` and
`decode_from_core` read them.  Whatever the bytes, the only exception that leaves is
`ChannelError`.  A message travels alone in one datagram of a SOCK_SEQPACKET pair, so it is whole
or absent and needs no length of its own.

There are two pairs per edge.  *control* carries everything but frames, *frames* carries `Frames`
and `FramesOut`: a flood of frames never delays a kick.

On the wire a message is 1 byte kind, then its fields, all numbers big endian:

    u  u64, any number
    d  a time in seconds: IEEE double, finite, not negative
    f  u8 of flags: bit 0 is true or false, the others are zero
    m  u8, a `Mode`
    v  u8, a version
    s  u16 size, UTF-8 text
    b  u32 size, bytes
    k  12 bytes: destination MAC, source MAC
    c  u64, a connection, never 0
    l  u16 count, then that many u64, connections, at least one
    n  a u64 for each `EdgeDrop`, in their order
    q  a u64 for each `Refusal`, in their order
    p  u16 count, then that many pairs of u64, a connection and a number
    r  the rest of the message

A message of the wrong direction, an unknown kind, a byte too many or too few is an error; who
receives it decides what the other end is worth.
"""

import enum
import itertools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

Bytes = bytes | bytearray | memoryview

# Said in Hello and in Adopted, which stay as they are in every version.  Edge and core are started
# from one image, so a difference means that an upgrade has replaced only one of them so far: until
# the other is replaced too, neither heeds what the other says, and known flows go on.
VERSION = 3

# No message is longer.
MAX_MESSAGE = 65536

# The longest request (head and body) that fits into a Request, and the longest blocks of a Frames.
MAX_REQUEST = MAX_MESSAGE - 21
MAX_BLOCKS = MAX_MESSAGE - 9

# The longest blob of a State: it has its place in the edge's checkpoint.
MAX_BLOB = 2048

# The longest reply of a State.
MAX_REPLY = 61440

# The most connections in a Present.
MAX_PRESENT = (MAX_MESSAGE - 3) // 16

# How many connection ids an edge can make that says one time of its start.
CONNS_PER_START = 1 << 20

# 0 is nobody: no connection has it.
NOBODY = 0

# The numbers of States count up from 1.  Nobody comes so far, and who is told one can count on.
MAX_NUMBER = (1 << 63) - 1

# Why an edge has closed a connection that it must have died on.
POISONED = "two edges died on it"

# In an Unflow: all of this connection.  No flow has this key, since a frame from the MAC of zeros
# is dropped before it is looked up.
ALL_FLOWS = bytes(12)

# Nothing larger is a frame (SoftEther: MAX_PACKET_SIZE * 2).
MAX_FRAME = 3200

U8 = struct.Struct("!B")
U16 = struct.Struct("!H")
U32 = struct.Struct("!I")
U64 = struct.Struct("!Q")
F64 = struct.Struct("!d")


class ChannelError(Exception):
    """These bytes are not a message, or this message has no bytes."""


class Mode(enum.IntEnum):
    """What travels on a connection."""

    HTTP = 0
    BLOCKS = 1
    BLOCKS_OUT = 2  # only from the server to the client (half duplex)
    BLOCKS_IN = 3  # only from the client to the server
    CLOSING = 4


class EdgeDrop(enum.Enum):
    """Why an edge dropped a frame from or to a client.  What has the name of a `Drop` of the hub is
    the same thing, found earlier."""

    SHORT = "short"  # no whole Ethernet header
    OVERSIZE = "oversize"  # longer than a frame, but not so long that the stream is out of step
    DIRECTION = "wrong direction"  # of a half-duplex connection
    CORE_BUSY = "core busy"  # no known flow, and the channel is full
    NOT_OPEN = "not open"  # to a client that is not in its data phase
    SLOW_CLIENT = "slow client"  # its send ring is full
    NO_MEMORY = "no memory"  # the rings of all have reached their limit
    NO_CONNECTION = "no such connection"  # gone while the frame was on its way


class Refusal(enum.Enum):
    """Why an edge turned a client away, or ended its connection."""

    ADDRESS = "connections of one address"  # more than the limit
    NO_PLACE = "connections without a place"  # too many waited for one
    NO_MEMORY = "connections without memory"
    MADE_ROOM = "strangers that made room"  # all places were taken, and it did not log in
    HANDSHAKE = "failed handshakes"
    SLOW_LOGIN = "logins that took too long"
    GARBAGE = "broken protocol"  # TLS, HTTP or blocks that are none


def conn_id(edge: int, started: float, counter: int) -> int:
    """The name of a connection: 8 bits edge, 36 bits start of the edge, 20 bits counter.

    ``started`` is the monotonic time of the edge's start in seconds.  36 bits of milliseconds are
    2.1 years, and two incarnations of an edge never start within one; so no name is used twice
    while anybody may remember it.

    Raises ChannelError if the counter is used up: the edge must then say another start.
    """
    if not 0 < edge < 256 or not 0 < counter < CONNS_PER_START:
        raise ChannelError(f"no connection id for edge {edge}, counter {counter}")
    return edge << 56 | (int(started * 1000) & (1 << 36) - 1) << 20 | counter


def edge_of(conn: int) -> int:
    """The index of the edge that has the connection."""
    return conn >> 56


# --- fields -------------------------------------------------------------------------------------
# A writer returns the bytes of a value, a reader returns the value and the offset behind it.


def _struct_field(layout: struct.Struct) -> tuple[Callable[[Any], bytes], Callable[..., Any]]:
    def read(data: bytes, at: int) -> tuple[int, int]:
        return layout.unpack_from(data, at)[0], at + layout.size

    return layout.pack, read


def _take(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if size > len(data) - at:
        raise ChannelError(f"{size} bytes announced, {len(data) - at} left")
    return data[at : at + size], at + size


def _write_time(value: float) -> bytes:
    if not (math.isfinite(value) and value >= 0):
        raise ChannelError(f"{value} is no time")
    return F64.pack(value)


def _read_time(data: bytes, at: int) -> tuple[float, int]:
    (value,) = F64.unpack_from(data, at)
    if not (math.isfinite(value) and value >= 0):
        raise ChannelError(f"{value} is no time")
    return value, at + 8


def _read_flag(data: bytes, at: int) -> tuple[bool, int]:
    if data[at] > 1:
        raise ChannelError(f"unknown flags {data[at]:#x}")
    return data[at] == 1, at + 1


def _read_mode(data: bytes, at: int) -> tuple[Mode, int]:
    try:
        return Mode(data[at]), at + 1
    except ValueError:
        raise ChannelError(f"unknown mode {data[at]}") from None


def _write_text(text: str) -> bytes:
    data = text.encode()
    return U16.pack(len(data)) + data


def _read_text(data: bytes, at: int) -> tuple[str, int]:
    (size,) = U16.unpack_from(data, at)
    raw, at = _take(data, at + 2, size)
    return raw.decode(), at


def _write_bytes(value: Bytes) -> bytes:
    return b"".join((U32.pack(len(value)), value))


def _read_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = U32.unpack_from(data, at)
    return _take(data, at + 4, size)


def _write_key(key: bytes) -> bytes:
    if len(key) != 12:
        raise ChannelError(f"a flow key of {len(key)} bytes")
    return key


def _read_key(data: bytes, at: int) -> tuple[bytes, int]:
    return _take(data, at, 12)


def _write_conn(conn: int) -> bytes:
    if conn == NOBODY:
        raise ChannelError("connection 0 is nobody")
    return U64.pack(conn)


def _read_conn(data: bytes, at: int) -> tuple[int, int]:
    (conn,) = U64.unpack_from(data, at)
    if conn == NOBODY:
        raise ChannelError("connection 0 is nobody")
    return conn, at + 8


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    (number,) = U64.unpack_from(data, at)
    if number > MAX_NUMBER:
        raise ChannelError(f"a State of number {number}")
    return number, at + 8


def _write_conns(conns: tuple[int, ...]) -> bytes:
    if not conns or NOBODY in conns:
        raise ChannelError(f"no list of connections: {conns}")
    return U16.pack(len(conns)) + struct.pack(f"!{len(conns)}Q", *conns)


def _read_conns(data: bytes, at: int) -> tuple[tuple[int, ...], int]:
    (count,) = U16.unpack_from(data, at)
    conns = struct.unpack_from(f"!{count}Q", data, at + 2)
    if not conns or NOBODY in conns:
        raise ChannelError("a list of connections is empty or has connection 0")
    return conns, at + 2 + 8 * count


def _numbers_field(count: int) -> tuple[Callable[[Any], bytes], Callable[..., Any]]:
    layout = struct.Struct(f"!{count}Q")

    def write(values: tuple[int, ...]) -> bytes:
        return layout.pack(*values)

    def read(data: bytes, at: int) -> tuple[tuple[int, ...], int]:
        return layout.unpack_from(data, at), at + layout.size

    return write, read


def _write_pairs(pairs: tuple[tuple[int, int], ...]) -> bytes:
    numbers = list(itertools.chain.from_iterable(pairs))
    if NOBODY in numbers[::2]:
        raise ChannelError("connection 0 is nobody")
    return U16.pack(len(pairs)) + struct.pack(f"!{len(numbers)}Q", *numbers)


def _read_pairs(data: bytes, at: int) -> tuple[tuple[tuple[int, int], ...], int]:
    (count,) = U16.unpack_from(data, at)
    numbers = struct.unpack_from(f"!{2 * count}Q", data, at + 2)
    conns = numbers[::2]
    if NOBODY in conns:
        raise ChannelError("connection 0 is nobody")
    return tuple(zip(conns, numbers[1::2], strict=True)), at + 2 + 16 * count


def _read_rest(data: bytes, at: int) -> tuple[bytes, int]:
    return data[at:], len(data)


_FIELDS: dict[str, tuple[Callable[[Any], Bytes], Callable[[bytes, int], tuple[Any, int]]]] = {
    "u": _struct_field(U64),
    "v": _struct_field(U8),
    "o": (U64.pack, _read_number),
    "d": (_write_time, _read_time),
    "f": (U8.pack, _read_flag),
    "m": (U8.pack, _read_mode),
    "s": (_write_text, _read_text),
    "b": (_write_bytes, _read_bytes),
    "k": (_write_key, _read_key),
    "c": (_write_conn, _read_conn),
    "l": (_write_conns, _read_conns),
    "n": _numbers_field(len(EdgeDrop)),
    "q": _numbers_field(len(Refusal)),
    "p": (_write_pairs, _read_pairs),
    "r": (lambda value: value, _read_rest),
}


# --- from the edge to the core ------------------------------------------------------------------


class Opened(NamedTuple):
    """A client has finished its TLS handshake."""

    conn: int
    peer: str  # "192.0.2.1:50000"
    local: str  # the same of our end
    tls: str  # such as "TLSv1.3 own TLS_AES_256_GCM_SHA384"


class Request(NamedTuple):
    """A whole HTTP request; the core answers with a State of the same number.

    The edge waits for it before it cuts the next one, and sends the request again after a Hello.
    """

    conn: int
    number: int  # of the last State applied, plus 1
    data: Bytes  # head and body as they came, at most MAX_REQUEST


class Closed(NamedTuple):
    """A connection is gone, whoever wanted it."""

    conn: int
    why: str


class Replay(NamedTuple):
    """Told for every live connection after a Hello."""

    conn: int
    number: int  # of the last State applied; 0: none yet
    mode: Mode
    peer: str
    local: str
    tls: str
    blob: bytes  # of that State, as it came


class Present(NamedTuple):
    """Instead of Replays, to a core that has heard them from a predecessor: who is there.

    Whoever it does not name is gone.
    """

    pairs: tuple[tuple[int, int], ...]  # connection, number of the last State applied


class Replayed(NamedTuple):
    """The end of the Replays for the Hello of this epoch, or of what is Present."""

    epoch: int


class Adopted(NamedTuple):
    """The first word of an edge; the core answers Hello and sends its flows again.

    Also the answer to the Hello of a core that speaks another version.
    """

    version: int


class Counts(NamedTuple):
    """What a connection has carried so far, known flows and all the rest together."""

    conn: int
    frames_in: int  # from the client
    bytes_in: int
    frames_out: int  # to the client
    bytes_out: int
    drops: tuple[int, ...]  # frames from or to this client that were dropped, per `EdgeDrop`


class Totals(NamedTuple):
    """What an edge and its predecessors have dropped and refused so far."""

    drops: tuple[int, ...]  # frames, per `EdgeDrop`
    refusals: tuple[int, ...]  # per `Refusal`


class FlowSeen(NamedTuple):
    """Frames of this known flow have passed lately: its MACs are alive."""

    conn: int
    key: bytes


class Frames(NamedTuple):
    """Frames that no known flow took.  On the frames socket."""

    conn: int
    blocks: Bytes  # u32 size, frame, u32 size, frame ...; see `split_blocks`


# --- from the core to the edge ------------------------------------------------------------------


class Hello(NamedTuple):
    """A core serves; the edge answers with its Replays, or Present, and Replayed(epoch)."""

    version: int
    epoch: int


class State(NamedTuple):
    """Any change of a connection, in one message: it is applied whole or not at all."""

    conn: int
    number: int  # of the Request it answers, or the last one plus 1 if nobody asked (a kick)
    reply: bytes  # to the client, before anything else; at most MAX_REPLY bytes
    mode: Mode  # from now on
    close: str  # why, or "" to keep it
    timeout: float  # T of the data phase in seconds; 0: no keep-alives, no limit
    key_update: bool  # a TLS KeyUpdate follows the reply in the same send
    blob: bytes  # kept for the core, comes back in a Replay; at most MAX_BLOB bytes


class Flow(NamedTuple):
    """From now on, frames with this key that come from ``conn`` go to ``to_conn``."""

    conn: int
    key: bytes  # 12 bytes: destination MAC, source MAC
    to_conn: int


class Unflow(NamedTuple):
    """This flow ends, or with ALL_FLOWS every flow from and to the connection."""

    conn: int
    key: bytes


class FramesOut(NamedTuple):
    """Frames for each of these connections.  On the frames socket."""

    conns: tuple[int, ...]
    blocks: Bytes


FromEdge = (
    Opened
    | Request
    | Closed
    | Replay
    | Present
    | Replayed
    | Adopted
    | Counts
    | FlowSeen
    | Frames
    | Totals
)
FromCore = Hello | State | Flow | Unflow | FramesOut

_Kinds = dict[int, tuple[type[Any], str]]
_FROM_EDGE: _Kinds = {
    1: (Opened, "csss"),
    2: (Request, "cob"),
    3: (Closed, "cs"),
    4: (Replay, "comsssb"),
    5: (Replayed, "u"),
    6: (Adopted, "v"),
    7: (Counts, "cuuuun"),
    8: (FlowSeen, "ck"),
    9: (Frames, "cr"),
    10: (Totals, "nq"),
    11: (Present, "p"),
}
_FROM_CORE: _Kinds = {
    17: (Hello, "vu"),
    18: (State, "cobmsdfb"),
    19: (Flow, "ckc"),
    20: (Unflow, "ck"),
    25: (FramesOut, "lr"),
}
_LAYOUTS = {cls: (kind, layout) for kind, (cls, layout) in (_FROM_EDGE | _FROM_CORE).items()}


def encode(message: FromEdge | FromCore) -> bytes:
    """The bytes of a message.

    Raises ChannelError if a field breaks its rule or the whole is longer than MAX_MESSAGE.
    """
    if isinstance(message, State):
        _check_state(message)
    kind, layout = _LAYOUTS[type(message)]
    parts: list[Bytes] = [U8.pack(kind)]
    try:
        for field, value in zip(layout, message, strict=True):
            parts.append(_FIELDS[field][0](value))
    except (struct.error, UnicodeEncodeError) as error:
        raise ChannelError(f"{message!r:.200} has no bytes: {error}") from None
    data = b"".join(parts)
    if len(data) > MAX_MESSAGE:
        name = type(message).__name__
        raise ChannelError(f"{name} would be {len(data)} bytes, the limit is {MAX_MESSAGE}")
    return data


def decode_from_edge(data: bytes) -> FromEdge:
    """Read one message of an edge.  Raises ChannelError."""
    message: FromEdge = _decode(_FROM_EDGE, data)
    return message


def decode_from_core(data: bytes) -> FromCore:
    """Read one message of the core.  Raises ChannelError."""
    message: FromCore = _decode(_FROM_CORE, data)
    return message


def _decode(kinds: _Kinds, data: bytes) -> Any:
    if not 0 < len(data) <= MAX_MESSAGE:
        raise ChannelError(f"a message of {len(data)} bytes")
    if data[0] not in kinds:
        raise ChannelError(f"a message of kind {data[0]} is not known here")
    cls, layout = kinds[data[0]]
    values = []
    at = 1
    try:
        for field in layout:
            value, at = _FIELDS[field][1](data, at)
            values.append(value)
    except (struct.error, IndexError):
        raise ChannelError(f"{cls.__name__} ends after {len(data)} bytes") from None
    except UnicodeDecodeError:
        raise ChannelError(f"{cls.__name__} has a text that is not UTF-8") from None
    if at != len(data):
        raise ChannelError(f"{cls.__name__} has {len(data) - at} bytes too many")
    message = cls(*values)
    if isinstance(message, State):
        _check_state(message)
    return message


def _check_state(state: State) -> None:
    if len(state.blob) > MAX_BLOB or len(state.reply) > MAX_REPLY:
        raise ChannelError(f"a blob of {len(state.blob)}, a reply of {len(state.reply)} bytes")


# --- blocks -------------------------------------------------------------------------------------


def join_blocks(frames: list[bytes]) -> bytes:
    """The blocks of these frames, each of 1 to MAX_FRAME bytes."""
    return b"".join([part for frame in frames for part in (U32.pack(len(frame)), frame)])


def split_blocks(blocks: bytes) -> list[bytes]:
    """The frames of a Frames or a FramesOut.

    Raises ChannelError unless the blocks are whole and each has 1 to MAX_FRAME bytes.
    """
    frames = []
    at, end = 0, len(blocks)
    unpack = U32.unpack_from
    while at < end:
        if end - at < 4:
            raise ChannelError(f"{end - at} bytes behind the last block")
        size = unpack(blocks, at)[0]
        at += 4
        if not 0 < size <= MAX_FRAME or size > end - at:
            raise ChannelError(f"a block of {size} bytes, {end - at} left")
        frames.append(blocks[at : at + size])
        at += size
    return frames


def count_blocks(blocks: Bytes) -> int:
    """How many blocks there are.  Raises ChannelError as `split_blocks` does."""
    count, at, end = 0, 0, len(blocks)
    unpack = U32.unpack_from
    while at + 4 <= end:
        size = unpack(blocks, at)[0]
        if not 0 < size <= MAX_FRAME:
            raise ChannelError(f"a block of {size} bytes")
        at += 4 + size
        count += 1
    if at != end:
        raise ChannelError("the last block is cut")
    return count
