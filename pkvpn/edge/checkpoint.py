"""What a successor needs to go on with the connections of an edge, in memory that outlives it.

Strategy: a slot per connection.  All of it that changes together is written to the copy that is
not in force, then one byte is written that puts it in force; so at every instant, whatever kills
the edge, one whole copy is in force.  The few numbers that change with every turn (*hot*) have two
copies of their own, and say which of the two copies of the rest (*cold*) belongs to them: a turn
writes some ninety bytes and one more, a change of keys or of state writes a cold copy first.

The memory, all numbers in the machine's own order since it never leaves the machine:

    header    4096  8 magic, u32 version, u32 slots, u32 size of a receive ring, u32 of a send ring
              64:   the poison mark: u64 connection, u64 position
              80:   the mark at which a predecessor died, the same two
              96:   u64 epoch of the core that has been told of all connections
              104:  u8 nobody may be adopted: the kernel does not tell how far a socket has come
              128:  what was dropped and refused in all, per `EdgeDrop` and `Refusal`
    switches  for each slot u8: 0 free, else 1 + the hot copy in force; then for each slot
              u8 dirty: something may lie in its rings; then for each slot
              u8 busy: frames have passed lately; filled up to a whole page
    directory for each slot u64 connection, u64 number of the last State; filled up likewise
    slots     SLOT_SIZE each
    rings     for each slot its receive ring, then its send ring

Switches and directory stand together so that a successor learns who is there, and who cannot wait,
without touching the slots: thousands of idle ones cost it a millisecond.  Memory that nobody has
touched does not exist.

The known flows of a connection lie in its slot too, so that its frames need no core after a death
of the edge, whatever has become of the core meanwhile.

Nothing here trusts what it reads: a slot that makes no sense raises CheckpointError, and costs one
connection.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pkvpn.channel import MAX_BLOB, EdgeDrop, Mode, Refusal
from pkvpn.edge.rings import Ring

MAGIC = b"pkvpn ck"
# To be changed with every change of what is written here: an upgrade meets memory of the old code.
VERSION = 1
HEADER_SIZE = 4096
SLOT_SIZE = 32768

_IN_USE = re.compile(rb"[^\0]")

_HEADER = struct.Struct("=8sIIII")
_MARK = struct.Struct("=QQ")
_MARK_AT = 64
_DIED_AT = 80
_EPOCH = struct.Struct("=Q")
_EPOCH_AT = 96
_REFUSED_AT = 104
_ENTRY = struct.Struct("=QQ")
_ENTRY_NUMBER = struct.Struct("=Q")
_TOTALS = struct.Struct(f"={len(EdgeDrop) + len(Refusal)}Q")
_TOTALS_AT = 128

# A slot:
#   0         identity, written once before the switch leaves 0
#   512       what was counted, without a switch: wrong numbers in it harm nobody
#   632       how many places of flows have ever been used
#   640       two hot copies
#   1024      two cold copies
#   8192      flows: for each place u8 whether it is used; then for each 12 key, u64 connection
_IDENTITY_AT, _COUNTS_AT, _USED_AT, _HOT_AT, _COLD_AT, _FLOWS_AT = 0, 512, 632, 640, 1024, 8192
_HOT_SIZE, _COLD_SIZE = 128, 3072
# As many as a core teaches for one connection.
SAVED_FLOWS = 1024
_TEXT = 128
# conn, SO_COOKIE, when it was accepted, number of the suite, peer, local, tls
_IDENTITY = struct.Struct(f"=QQdH{_TEXT}p{_TEXT}p{_TEXT}p")
_HOT = struct.Struct("=QQQIIQQQB")
# Frames in, bytes in, frames out, bytes out; frames dropped per `EdgeDrop`.
_COUNTS = struct.Struct(f"={4 + len(EdgeDrop)}Q")
_USED = struct.Struct("=I")
_FLOW = struct.Struct("=12sQ")
# read secret, write secret, number, mode, T, why it is closed, blob
_COLD = struct.Struct(f"=49p49pQBd{_TEXT * 2 - 1}pH{MAX_BLOB}s")


class CheckpointError(Exception):
    """This memory or this slot holds no checkpoint that makes sense."""


class Identity(NamedTuple):
    """What never changes of a connection."""

    conn: int
    cookie: int  # SO_COOKIE of its socket: a descriptor is paired with its slot by this
    accepted_at: float  # monotonic, which is the same clock for all processes of a boot
    suite: int
    peer: str
    local: str
    tls: str


class Hot(NamedTuple):
    """What changes with every turn."""

    in_position: int  # where the record starts that holds the first byte not done with
    in_sequence: int  # its number
    in_base: int
    skip: int  # how many bytes of its content are done with
    batch_left: int  # blocks of the current batch that have not come yet
    out_end: int  # up to here there are records
    out_sequence: int  # the number of the next one
    out_base: int


class Cold(NamedTuple):
    """What changes now and then."""

    read_secret: bytes
    write_secret: bytes
    number: int  # of the last State applied
    mode: Mode
    timeout: float
    close: str  # why it is being closed, or ""
    blob: bytes


class SavedFlows:
    """The known flows of one connection: key -> connection, each whole or absent."""

    __slots__ = ("_at", "_free", "_memory", "_places", "_used", "_used_at")

    def __init__(self, memory: memoryview, slot_at: int) -> None:
        self._memory = memory
        self._at = slot_at + _FLOWS_AT
        self._used_at = slot_at + _USED_AT
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> place, connection
        self._free: list[int] = []
        self._used = 0

    def put(self, key: bytes, to_conn: int) -> None:
        """Keep it, if there is a place; what is not kept is taught again by the core."""
        known = self._places.get(key)
        if known is not None:
            if known[1] == to_conn:
                return
            place = known[0]
            self._memory[self._at + place] = 0
        elif self._free:
            place = self._free.pop()
        elif self._used < SAVED_FLOWS:
            place, self._used = self._used, self._used + 1
            _USED.pack_into(self._memory, self._used_at, self._used)
        else:
            return
        _FLOW.pack_into(self._memory, self._flow_at(place), key, to_conn)
        self._memory[self._at + place] = 1
        self._places[key] = place, to_conn

    def remove(self, key: bytes) -> None:
        known = self._places.pop(key, None)
        if known is not None:
            self._memory[self._at + known[0]] = 0
            self._free.append(known[0])

    def load(self) -> list[tuple[bytes, int]]:
        """What a predecessor kept."""
        (used,) = _USED.unpack_from(self._memory, self._used_at)
        self._used = min(used, SAVED_FLOWS)
        for place, valid in enumerate(bytes(self._memory[self._at : self._at + self._used])):
            key, to_conn = _FLOW.unpack_from(self._memory, self._flow_at(place))
            if valid and key not in self._places:
                self._places[key] = place, to_conn
            else:
                self._free.append(place)
        return [(key, to_conn) for key, (_, to_conn) in self._places.items()]

    def clear(self) -> None:
        """Forget all that there may be."""
        (used,) = _USED.unpack_from(self._memory, self._used_at)
        used = min(used, SAVED_FLOWS)
        self._memory[self._at : self._at + used] = bytes(used)
        _USED.pack_into(self._memory, self._used_at, 0)
        self._places.clear()
        self._free.clear()
        self._used = 0

    def _flow_at(self, place: int) -> int:
        return self._at + SAVED_FLOWS + place * _FLOW.size


class Slot:
    """One connection's place.

    `save_cold` only prepares: it comes in force with the `save` that follows.
    """

    __slots__ = (
        "_at",
        "_busy",
        "_cold",
        "_dirty",
        "_entry_at",
        "_hot",
        "_memory",
        "_next_cold",
        "_number",
        "flows",
        "index",
        "rx_memory",
        "tx_memory",
    )

    def __init__(self, memory: memoryview, index: int) -> None:
        """Slot ``index`` of this memory, whose header is one of ours."""
        _, _, slots, _, tx_size = _HEADER.unpack_from(memory, 0)
        self._memory = memory
        self._at = _slots_at(slots) + index * SLOT_SIZE
        self._entry_at = _directory_at(slots) + index * _ENTRY.size
        self._dirty = HEADER_SIZE + slots + index
        self._busy = self._dirty + slots
        # The copies in force, and the cold one that the next `save` puts in force.
        self._hot = 0
        self._cold = 0
        self._next_cold = 0
        self._number = 0  # in the cold copy that was written last
        self.flows = SavedFlows(memory, self._at)
        self.index = index
        rx, tx = self.rings_at()
        self.rx_memory = memory[rx:tx]
        self.tx_memory = memory[tx : tx + tx_size]

    def create(self, identity: Identity, hot: Hot, cold: Cold) -> None:
        """Put a connection into a free slot."""
        assert not self.used  # test_a_slot_is_never_given_twice
        _IDENTITY.pack_into(
            self._memory,
            self._at + _IDENTITY_AT,
            *identity[:4],
            *(text.encode()[: _TEXT - 1] for text in identity[4:]),
        )
        _ENTRY.pack_into(self._memory, self._entry_at, identity.conn, 0)
        self._memory[self._dirty] = 1
        self._memory[self._busy] = 0
        self.save_counts(*bytes(4 + len(EdgeDrop)))
        self.save_cold(cold)
        self.save(hot)

    def save_cold(self, cold: Cold) -> None:
        """Write what the next `save` puts in force; again, if it has changed again by then."""
        other = self._cold ^ 1
        _COLD.pack_into(
            self._memory,
            self._at + _COLD_AT + other * _COLD_SIZE,
            cold.read_secret,
            cold.write_secret,
            cold.number,
            cold.mode,
            cold.timeout,
            cold.close.encode()[: _TEXT * 2 - 2],
            len(cold.blob),
            cold.blob,
        )
        self._next_cold = other
        self._number = cold.number

    def save(self, hot: tuple[int, int, int, int, int, int, int, int]) -> None:
        """Put all of it in force, in the one write of the switch."""
        other = self._hot ^ 1
        at = self._at
        _HOT.pack_into(self._memory, at + _HOT_AT + other * _HOT_SIZE, *hot, self._next_cold)
        self._memory[HEADER_SIZE + self.index] = 1 + other
        if self._cold != self._next_cold:
            # Killed right here, it says a number too low: then the core says that State again.
            _ENTRY_NUMBER.pack_into(self._memory, self._entry_at + 8, self._number)
        self._hot, self._cold = other, self._next_cold

    def set_dirty(self, dirty: bool) -> None:
        """To be called with True before anything is put into a ring."""
        self._memory[self._dirty] = dirty

    @property
    def dirty(self) -> bool:
        return bool(self._memory[self._dirty])

    def set_busy(self, busy: bool) -> None:
        """Whether it is likely that its client says something in the next moment."""
        self._memory[self._busy] = busy

    @property
    def used(self) -> bool:
        return bool(self._memory[HEADER_SIZE + self.index])

    def save_counts(self, *counts: int) -> None:
        _COUNTS.pack_into(self._memory, self._at + _COUNTS_AT, *counts)

    def load_counts(self) -> tuple[int, ...]:
        return _COUNTS.unpack_from(self._memory, self._at + _COUNTS_AT)

    def load(self) -> tuple[Identity, Hot, Cold]:
        """What a predecessor left in force.  Raises CheckpointError."""
        switch = self._memory[HEADER_SIZE + self.index]
        if switch not in {1, 2}:
            raise CheckpointError(f"slot {self.index}: switch is {switch}")
        conn, cookie, accepted_at, suite, *texts = _IDENTITY.unpack_from(
            self._memory, self._at + _IDENTITY_AT
        )
        *hot, cold = _HOT.unpack_from(self._memory, self._at + _HOT_AT + (switch - 1) * _HOT_SIZE)
        if cold > 1:
            raise CheckpointError(f"slot {self.index}: cold copy {cold}")
        read, write, number, mode, timeout, close, size, blob = _COLD.unpack_from(
            self._memory, self._at + _COLD_AT + cold * _COLD_SIZE
        )
        try:
            identity = Identity(
                conn,
                cookie,
                accepted_at,
                suite,
                *(text.decode("utf-8", "replace") for text in texts),
            )
            state = Cold(
                read,
                write,
                number,
                Mode(mode),
                timeout,
                close.decode("utf-8", "replace"),
                blob[:size],
            )
        except ValueError as error:
            raise CheckpointError(f"slot {self.index}: {error}") from None
        self._hot, self._cold, self._next_cold = switch - 1, cold, cold
        return identity, Hot(*hot), state

    def rings(self, received: int, sent: int, hot: Hot) -> tuple[Ring, Ring]:
        """The two rings, given the positions that the kernel says.  Raises CheckpointError."""
        try:
            return (
                Ring(self.rx_memory, hot.in_position, received, hot.in_base),
                Ring(self.tx_memory, sent, hot.out_end, hot.out_base),
            )
        except ValueError as error:
            raise CheckpointError(f"slot {self.index}: {error}") from None

    def rings_at(self) -> tuple[int, int]:
        """Where in the memory the receive ring and the send ring begin."""
        _, _, slots, rx_size, tx_size = _HEADER.unpack_from(self._memory, 0)
        at = _rings_at(slots) + self.index * (rx_size + tx_size)
        return at, at + rx_size

    def extents(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where in the memory its own part and its rings are: begin and size of each."""
        rx_at, _ = self.rings_at()
        # Both stand side by side.
        return (self._at, SLOT_SIZE), (rx_at, len(self.rx_memory) + len(self.tx_memory))

    def clear(self) -> None:
        """Make it free; nothing in it counts from now on."""
        at = self._at
        self._memory[HEADER_SIZE + self.index] = 0
        self.flows.clear()
        # The keys of a connection go with it.
        self._memory[at + _COLD_AT : at + _COLD_AT + 2 * _COLD_SIZE] = bytes(2 * _COLD_SIZE)
        self._hot = self._cold = self._next_cold = 0


class Checkpoint:
    """All the slots of one edge, and the poison mark."""

    def __init__(self, memory: memoryview) -> None:
        """Use memory that has been made by `make`.  Raises CheckpointError."""
        if len(memory) < HEADER_SIZE:
            raise CheckpointError(f"checkpoint memory of {len(memory)} bytes")
        magic, version, slots, rx_size, tx_size = _HEADER.unpack_from(memory, 0)
        if magic != MAGIC:
            raise CheckpointError("this memory holds no checkpoint")
        if version != VERSION:
            raise CheckpointError(f"a checkpoint of version {version}, this edge knows {VERSION}")
        if len(memory) < checkpoint_size(slots, rx_size, tx_size):
            raise CheckpointError(f"{len(memory)} bytes are too few for {slots} slots")
        self._memory = memory
        self._slots = slots
        self.rx_size = rx_size
        # As a predecessor left them.  Looked through from one free place to the next: a list of
        # all of them costs a new edge more than anything else that it does.
        self._switches = bytes(memory[HEADER_SIZE : HEADER_SIZE + slots])
        self._looked = 0
        self._given_back: list[int] = []

    @classmethod
    def make(cls, memory: memoryview, slots: int, rx_size: int, tx_size: int) -> "Checkpoint":
        """Use fresh memory, all zeros, of `checkpoint_size` bytes."""
        _HEADER.pack_into(memory, 0, MAGIC, VERSION, slots, rx_size, tx_size)
        return cls(memory)

    def take(self) -> Slot | None:
        """A free slot, to be given back with `give_back`; None if all are taken."""
        if self._given_back:
            return Slot(self._memory, self._given_back.pop())
        free = self._switches.find(0, self._looked)
        if free < 0:
            self._looked = len(self._switches)
            return None
        self._looked = free + 1
        return Slot(self._memory, free)

    def give_back(self, slot: Slot) -> None:
        slot.clear()
        self._given_back.append(slot.index)

    def slot(self, index: int) -> Slot:
        """One of those that `left` names."""
        return Slot(self._memory, index)

    def left(self) -> tuple[dict[int, int], list[int]]:
        """What a predecessor left, to be called once: connection -> slot, and those connections
        that cannot wait: first the ones in whose rings something may lie, then the busy ones."""
        slots = self._slots
        flags = bytes(self._memory[HEADER_SIZE + slots : HEADER_SIZE + 3 * slots])
        left: dict[int, int] = {}
        dirty, busy = [], []
        for index, conn, _ in self._entries(self._switches):
            if not conn or conn in left:
                self.give_back(Slot(self._memory, index))
                continue
            left[conn] = index
            if flags[index]:
                dirty.append(conn)
            elif flags[slots + index]:
                busy.append(conn)
        return left, dirty + busy

    def directory(self) -> list[tuple[int, int]]:
        """All connections there are, each with the number of its last State."""
        switches = bytes(self._memory[HEADER_SIZE : HEADER_SIZE + self._slots])
        return [(conn, number) for _, conn, number in self._entries(switches)]

    def _entries(self, switches: bytes) -> Iterator[tuple[int, int, int]]:
        """Of the directory: slot, connection, number."""
        at = _directory_at(self._slots)
        for match in _IN_USE.finditer(switches):
            index = match.start()
            conn, number = _ENTRY.unpack_from(self._memory, at + index * _ENTRY.size)
            yield index, conn, number

    @property
    def epoch(self) -> int:
        """Of the core that knows of all connections here with their numbers; 0: none does."""
        return int(_EPOCH.unpack_from(self._memory, _EPOCH_AT)[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        _EPOCH.pack_into(self._memory, _EPOCH_AT, epoch)

    @property
    def adoptable(self) -> bool:
        """May a successor rely on what the kernel says?"""
        return not self._memory[_REFUSED_AT]

    def refuse_adoption(self) -> None:
        """No connection is kept here from now on."""
        self._memory[_REFUSED_AT] = 1

    def mark(self, conn: int, position: int) -> None:
        """Say what is worked on now; 0 and 0: nothing."""
        _MARK.pack_into(self._memory, _MARK_AT, conn, position)

    def save_totals(self, drops: tuple[int, ...], refusals: tuple[int, ...]) -> None:
        _TOTALS.pack_into(self._memory, _TOTALS_AT, *drops, *refusals)

    def load_totals(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        totals = _TOTALS.unpack_from(self._memory, _TOTALS_AT)
        return totals[: len(EdgeDrop)], totals[len(EdgeDrop) :]

    def poisoned(self) -> int:
        """To be called once at start: the connection that two predecessors died on, or 0.

        The second death at the same mark counts; a connection that merely was there is innocent.
        """
        mark = _MARK.unpack_from(self._memory, _MARK_AT)
        died = _MARK.unpack_from(self._memory, _DIED_AT)
        _MARK.pack_into(self._memory, _DIED_AT, *mark)
        self.mark(0, 0)
        return mark[0] if mark[0] and mark == died else 0


def _directory_at(slots: int) -> int:
    return (HEADER_SIZE + 3 * slots + 4095) // 4096 * 4096


def _slots_at(slots: int) -> int:
    return (_directory_at(slots) + slots * _ENTRY.size + 4095) // 4096 * 4096


def _rings_at(slots: int) -> int:
    return _slots_at(slots) + slots * SLOT_SIZE


def checkpoint_size(slots: int, rx_size: int, tx_size: int) -> int:
    """How much memory is needed; what has never been used of it costs nothing."""
    return _rings_at(slots) + slots * (rx_size + tx_size)


def slots_that_fit(size: int, rx_size: int, tx_size: int) -> int:
    """How many slots memory of this size has room for."""
    slots = size // (SLOT_SIZE + rx_size + tx_size)
    while slots and checkpoint_size(slots, rx_size, tx_size) > size:
        slots -= 1
    return slots


assert _TOTALS_AT + _TOTALS.size <= HEADER_SIZE
assert _IDENTITY_AT + _IDENTITY.size <= _COUNTS_AT
assert _COUNTS_AT + _COUNTS.size <= _USED_AT
assert _USED_AT + _USED.size <= _HOT_AT
assert _HOT.size <= _HOT_SIZE
assert _HOT_AT + 2 * _HOT_SIZE <= _COLD_AT
assert _COLD.size <= _COLD_SIZE
assert _COLD_AT + 2 * _COLD_SIZE <= _FLOWS_AT
assert _FLOWS_AT + SAVED_FLOWS * (1 + _FLOW.size) <= SLOT_SIZE
