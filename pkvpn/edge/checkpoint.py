"""What a successor needs to go on with the connections of an edge, in memory that outlives it.

Strategy: a slot per connection.  All of it that changes together is written to the copy that is
not in force, then one byte is written that puts it in force; so at every instant, whatever kills
the edge, one whole copy is in force.  The few numbers that change with every turn (*hot*) have two
copies of their own, and say which of the two copies of the rest (*cold*) belongs to them: a turn
writes some ninety bytes and one more, a change of keys or of state writes a cold copy first.

The memory, all numbers in the machine's own order since it never leaves the machine:

    header    4096  8 magic, u32 slots, u32 size of a receive ring, u32 of a send ring
              64:   the poison mark: u64 connection, u64 position
              80:   the mark at which a predecessor died, the same two
              128:  what was dropped and refused in all, per `EdgeDrop` and `Refusal`
    switches  for each slot u8: 0 free, else 1 + the hot copy in force; then for each slot
              u8 dirty: something may lie in its rings; filled up to a whole page
    slots     SLOT_SIZE each
    rings     for each slot its receive ring, then its send ring

The switches stand together so that a successor finds the few slots that are used without touching
the pages of the others: memory that nobody has touched does not exist.

Nothing here trusts what it reads: a slot that makes no sense raises CheckpointError, and costs one
connection.
"""

import re
import struct
from typing import NamedTuple

from pkvpn.channel import MAX_BLOB, EdgeDrop, Mode, Refusal
from pkvpn.edge.rings import Ring

MAGIC = b"pkvpn ck"
HEADER_SIZE = 4096
SLOT_SIZE = 8192

_USED = re.compile(rb"[^\0]")

_HEADER = struct.Struct("=8sIII")
_MARK = struct.Struct("=QQ")
_MARK_AT = 64
_DIED_AT = 80
_TOTALS = struct.Struct(f"={len(EdgeDrop) + len(Refusal)}Q")
_TOTALS_AT = 128

# A slot:
#   0         identity, written once before the switch leaves 0
#   512       what was counted, without a switch: wrong numbers in it harm nobody
#   640       two hot copies
#   1024      two cold copies
_IDENTITY_AT, _COUNTS_AT, _HOT_AT, _COLD_AT = 0, 512, 640, 1024
_HOT_SIZE, _COLD_SIZE = 128, 3072
_TEXT = 128
# conn, SO_COOKIE, when it was accepted, number of the suite, peer, local, tls
_IDENTITY = struct.Struct(f"=QQdH{_TEXT}p{_TEXT}p{_TEXT}p")
_HOT = struct.Struct("=QQQIIQQQB")
# Frames in, bytes in, frames out, bytes out; frames dropped per `EdgeDrop`.
_COUNTS = struct.Struct(f"={4 + len(EdgeDrop)}Q")
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


class Slot:
    """One connection's place.

    `save_cold` only prepares: it comes in force with the `save` that follows.
    """

    __slots__ = (
        "_at",
        "_cold",
        "_dirty",
        "_hot",
        "_memory",
        "_next_cold",
        "index",
        "rx_memory",
        "tx_memory",
    )

    def __init__(self, memory: memoryview, index: int) -> None:
        """Slot ``index`` of this memory, whose header is one of ours."""
        _, slots, _, tx_size = _HEADER.unpack_from(memory, 0)
        self._memory = memory
        self._at = _slots_at(slots) + index * SLOT_SIZE
        self._dirty = HEADER_SIZE + slots + index
        # The copies in force, and the cold one that the next `save` puts in force.
        self._hot = 0
        self._cold = 0
        self._next_cold = 0
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
        self._memory[self._dirty] = 1
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

    def save(self, hot: tuple[int, int, int, int, int, int, int, int]) -> None:
        """Put all of it in force, in the one write of the switch."""
        other = self._hot ^ 1
        at = self._at
        _HOT.pack_into(self._memory, at + _HOT_AT + other * _HOT_SIZE, *hot, self._next_cold)
        self._memory[HEADER_SIZE + self.index] = 1 + other
        self._hot, self._cold = other, self._next_cold

    def set_dirty(self, dirty: bool) -> None:
        """To be called with True before anything is put into a ring."""
        self._memory[self._dirty] = dirty

    @property
    def dirty(self) -> bool:
        return bool(self._memory[self._dirty])

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
        _, slots, rx_size, tx_size = _HEADER.unpack_from(self._memory, 0)
        at = _rings_at(slots) + self.index * (rx_size + tx_size)
        return at, at + rx_size

    def clear(self) -> None:
        """Make it free; nothing in it counts from now on."""
        at = self._at
        self._memory[HEADER_SIZE + self.index] = 0
        # The keys of a connection go with it.
        self._memory[at + _COLD_AT : at + _COLD_AT + 2 * _COLD_SIZE] = bytes(2 * _COLD_SIZE)
        self._hot = self._cold = self._next_cold = 0


class Checkpoint:
    """All the slots of one edge, and the poison mark."""

    def __init__(self, memory: memoryview) -> None:
        """Use memory that has been made by `make`.  Raises CheckpointError."""
        if len(memory) < HEADER_SIZE:
            raise CheckpointError(f"checkpoint memory of {len(memory)} bytes")
        magic, slots, rx_size, tx_size = _HEADER.unpack_from(memory, 0)
        if magic != MAGIC:
            raise CheckpointError("this memory holds no checkpoint")
        if len(memory) < checkpoint_size(slots, rx_size, tx_size):
            raise CheckpointError(f"{len(memory)} bytes are too few for {slots} slots")
        self._memory = memory
        self.rx_size = rx_size
        # As a predecessor left them.  Looked through from one free place to the next: a list of
        # all of them costs a new edge more than anything else that it does.
        self._switches = bytes(memory[HEADER_SIZE : HEADER_SIZE + slots])
        self._looked = 0
        self._given_back: list[int] = []

    @classmethod
    def make(cls, memory: memoryview, slots: int, rx_size: int, tx_size: int) -> "Checkpoint":
        """Use fresh memory, all zeros, of `checkpoint_size` bytes."""
        _HEADER.pack_into(memory, 0, MAGIC, slots, rx_size, tx_size)
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

    def left(self) -> list[Slot]:
        """The slots that a predecessor left, those first in which something waits."""
        used = [match.start() for match in _USED.finditer(self._switches)]
        slots = [Slot(self._memory, index) for index in used]
        return sorted(slots, key=lambda slot: not slot.dirty)

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


def _slots_at(slots: int) -> int:
    return (HEADER_SIZE + 2 * slots + 4095) // 4096 * 4096


def _rings_at(slots: int) -> int:
    return _slots_at(slots) + slots * SLOT_SIZE


def checkpoint_size(slots: int, rx_size: int, tx_size: int) -> int:
    """How much memory is needed; what has never been used of it costs nothing."""
    return _rings_at(slots) + slots * (rx_size + tx_size)


assert _TOTALS_AT + _TOTALS.size <= HEADER_SIZE
assert _IDENTITY_AT + _IDENTITY.size <= _COUNTS_AT
assert _COUNTS_AT + _COUNTS.size <= _HOT_AT
assert _HOT.size <= _HOT_SIZE
assert _HOT_AT + 2 * _HOT_SIZE <= _COLD_AT
assert _COLD.size <= _COLD_SIZE
assert _COLD_AT + 2 * _COLD_SIZE <= SLOT_SIZE
