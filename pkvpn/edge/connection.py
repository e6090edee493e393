"""One connection after its TLS handshake: records, requests, blocks, and where frames go.

Strategy: no descriptor and no clock.  The shell puts bytes into the receive ring and calls
`receive`; it sends what lies in the send ring.  What `receive` is not done with stays in the ring
*sealed*, and is opened again with the next bytes: then what a successor would find is what this
process itself goes on with, and nothing lives in the heap only.  It costs one record more per
turn (2 us), and a limit on the records of one message.

The order in which things come in force is what loses no frame and uses no nonce twice:

1. Records are made in the send ring of the destination, then its checkpoint is saved.
2. Only then is the position of the source saved: a kill in between sends a turn's frames twice.
3. The shell sends only what has been saved.

The path of a frame: `receive`, `OwnRecords.open_all`, `_blocks`, `_run_ends`, `deliver`,
`OwnRecords.write`, `save`.  Nothing on it builds an object per frame; runs of blocks to one
destination stay one slice of the scratch memory, with the batch headers that came with them.
"""

import functools
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from pkvpn.channel import MAX_BLOCKS, MAX_REQUEST, EdgeDrop, Mode, Refusal, Replay, State
from pkvpn.edge.checkpoint import Cold, Hot, Identity, Slot
from pkvpn.edge.rings import Ring
from pkvpn.edge.tls_records import (
    ALERT,
    APPLICATION_DATA,
    HEADER_SIZE,
    MAX_CONTENT,
    MAX_RECORD,
    OVERHEAD,
    RECORDS_PER_KEY,
    SUITE_NUMBERS,
    Alert,
    Opener,
    Sealer,
    TLSError,
    read_alert,
    read_key_update,
    record_size,
)
from pkvpn.protocol.blocks import (
    KEEP_ALIVE,
    MAX_BLOCK,
    MAX_COUNT,
    MAX_FRAME,
    MAX_KEEP_ALIVE,
    MIN_FRAME,
)
from pkvpn.protocol.errors import ProtocolError
from pkvpn.protocol.http import MAX_HEAD, RequestCutter

U32 = struct.Struct("!I")
# The beginning of a block: 4 size, 6 destination, 6 source; read and compared in one piece.
_HEAD = struct.Struct("!16s")


@functools.cache
def _stride(step: int) -> struct.Struct:
    """Blocks of one size, each ``step`` bytes with its head; there are MAX_FRAME sizes."""
    return struct.Struct(f"!16s{step - 16}x")


# Kept free in the send ring for what must always fit: keep-alive, KeyUpdates, alert.
_RESERVE = 1024

# A message that is spread over more records than this is an attempt to keep us busy: each of
# them is opened again with every packet that comes.  A stock client uses two or three.
_MAX_RECORDS_PER_MESSAGE = 64

# RFC 8446 sets no limit; each one costs a key derivation (10 us).
_KEY_UPDATES_PER_SECOND = 10

# Memory before the place where a turn's first byte is opened to, for a batch header in front.
_HEADROOM = 16

_PLACE = {why: at for at, why in enumerate(EdgeDrop)}
_NO_DROPS = (0,) * len(EdgeDrop)

# Modes in which frames are taken from, or sent to, the client.
_RECEIVING = frozenset({Mode.BLOCKS, Mode.BLOCKS_IN})
_SENDING = frozenset({Mode.BLOCKS, Mode.BLOCKS_OUT})


class ConnectionEnds(Exception):
    """This connection must be closed; the text says why."""


class BrokenProtocol(ConnectionEnds):
    """By what the client sent, which no client of ours would have."""


class Target(Protocol):
    """Where frames can be delivered to."""

    def deliver(
        self, buffer: memoryview, start: int, end: int, frames: int, octets: int, now: float
    ) -> None: ...


class Records(Protocol):
    """How the bytes of the rings and plain text become each other."""

    kind: str  # "own" or "openssl"
    peer_closed: bool  # a close_notify has come: nothing comes after it
    whole_at: int  # before the receive ring ends there, `open_all` finds nothing new

    def open_all(self, scratch: memoryview, at: int, now: float) -> tuple[int, int]:
        """Put what has come, and was not consumed, into scratch from ``at`` on.

        Returns its begin and end.  To be followed by `consume`.  Raises TLSError.
        """
        ...

    def consume(self, to: int) -> int:
        """Everything before this place in scratch is done with.

        Returns how many records the rest lies in.
        """
        ...

    def skip_over(self, size: int) -> None:
        """So many bytes behind what `consume` was told are done with too.

        To be called before anything else is opened.
        """
        ...

    def room(self) -> int:
        """How many bytes `write` can take now."""
        ...

    def write(self, buffer: memoryview, start: int, end: int) -> None:
        """Seal these bytes into the send ring.

        ``buffer`` is writable, and has at least one byte behind ``end``; it is as before after.
        """
        ...

    def key_update(self, *, ask: bool) -> None:
        """Go on with a new key for what is written from now on."""
        ...

    def renew(self) -> bool:
        """To be called once a turn: renew worn-out keys; True if something lies in the send ring.

        Raises ConnectionEnds if the client does not do its part.
        """
        ...

    def alert(self, description: int) -> None:
        """Say it in the send ring; after close_notify nothing may be written."""
        ...


class OwnRecords:
    """TLS 1.3 records of our own on the two rings.

    Between two calls ``opener`` stands at the record at ``rx.start``, of whose content ``skip``
    bytes are done with: exactly what the checkpoint says.
    """

    __slots__ = (
        "_answered",
        "_asked_to_renew",
        "_consumed",
        "_marks",
        "_starts",
        "_update_second",
        "_updates",
        "keys_changed",
        "kind",
        "opener",
        "peer_closed",
        "rx",
        "sealer",
        "skip",
        "tx",
        "whole_at",
    )

    def __init__(self, rx: Ring, tx: Ring, opener: Opener, sealer: Sealer, skip: int = 0) -> None:
        self.kind = "own"
        self.rx = rx
        self.tx = tx
        self.opener = opener
        self.sealer = sealer
        self.skip = skip
        self.peer_closed = False
        self.whole_at = 0
        # A secret has changed since the last cold copy was written.
        self.keys_changed = False
        # Up to this position KeyUpdates have been answered: a message that is not whole brings
        # them here again.
        self._answered = rx.start
        # The secret that the client has been asked to renew.
        self._asked_to_renew = b""
        self._updates = 0
        self._update_second = 0
        # What `consume` was told last.
        self._consumed = 0
        # Of the records that `open_all` opened: where in scratch each begins, and
        # (position, number, opener) of it; the last entry is what follows them.
        self._starts: list[int] = []
        self._marks: list[tuple[int, int, Opener]] = []

    def open_all(self, scratch: memoryview, at: int, now: float) -> tuple[int, int]:
        rx = self.rx
        opener = self.opener
        position, end = rx.start, rx.end
        memory, size_of_ring, base = rx.memory, rx.size, rx.base
        begin = at + self.skip
        starts = self._starts = []
        marks = self._marks = []
        while not self.peer_closed:
            self.whole_at = position + HEADER_SIZE
            if self.whole_at > end:
                break
            offset = (position - base) % size_of_ring
            if offset + HEADER_SIZE <= size_of_ring:
                size = record_size(memory, offset)
            else:
                size = record_size(rx.view(position, HEADER_SIZE))
            self.whole_at = position + size
            if self.whole_at > end:
                break
            starts.append(at)
            marks.append((position, opener.sequence, opener))
            kind, length = opener.open(rx.view(position, size), scratch[at:])
            position += size
            if kind == APPLICATION_DATA:
                at += length
            elif kind == ALERT:
                self._take_alert(bytes(scratch[at : at + length]))
            else:
                ask = read_key_update(bytes(scratch[at : at + length]))
                opener = Opener(opener.suite, opener.secret, opener.sequence)
                opener.update()
                if position > self._answered:
                    self._answered = position
                    self._count_key_update(now)
                    if ask:
                        self.key_update(ask=False)
        starts.append(at)
        marks.append((position, opener.sequence, opener))
        return begin, at

    def _take_alert(self, content: bytes) -> None:
        description = read_alert(content)
        if description == Alert.CLOSE_NOTIFY:
            self.peer_closed = True
        elif description != Alert.USER_CANCELED:
            raise ConnectionEnds(f"client sent TLS alert {description}")

    def _count_key_update(self, now: float) -> None:
        if int(now) != self._update_second:
            self._update_second, self._updates = int(now), 0
        self._updates += 1
        if self._updates > _KEY_UPDATES_PER_SECOND:
            raise TLSError(Alert.UNEXPECTED_MESSAGE, "too many KeyUpdates")

    def consume(self, to: int) -> int:
        # The last record that begins at or before ``to``: the one in which it lies, or what
        # follows all of them.
        index = bisect_right(self._starts, to) - 1
        position, sequence, opener = self._marks[index]
        self.keys_changed |= opener is not self.opener
        opener.sequence = sequence
        self.opener = opener
        self.skip = to - self._starts[index]
        self.rx.start = position
        self._consumed = to
        return len(self._starts) - 1 - index

    def skip_over(self, size: int) -> None:
        self.consume(self._consumed + size)

    def room(self) -> int:
        tx = self.tx
        room = tx.limit - (tx.end - tx.start) - _RESERVE
        return max(0, room - OVERHEAD * (room // MAX_RECORD + 1))

    def write(self, buffer: memoryview, start: int, end: int) -> None:
        while start < end:
            stop = min(start + MAX_CONTENT, end)
            # The type stands behind the content: its place is borrowed for a moment.
            behind = buffer[stop]
            buffer[stop] = APPLICATION_DATA
            self._seal(buffer[start : stop + 1])
            buffer[stop] = behind
            start = stop

    def _seal(self, inner: memoryview) -> None:
        size = len(inner) + OVERHEAD - 1
        tx = self.tx
        piece = tx.free()
        if len(piece) >= size:
            self.sealer.seal(inner, piece)
            tx.put(size)
        else:
            record = bytearray(size)
            self.sealer.seal(inner, memoryview(record))
            # A number that is used up without its record having a place would be a hole that the
            # client cannot pass, so who writes looks at the room before.
            assert size <= tx.room()  # test_no_write_is_larger_than_the_room
            tx.append(record)

    def key_update(self, *, ask: bool) -> None:
        if self.tx.room() < _RESERVE // 2:
            raise ConnectionEnds("no room for a KeyUpdate to a client that does not read")
        self.tx.append(self.sealer.seal_key_update(ask=ask))
        self.keys_changed = True

    def renew(self) -> bool:
        """AES-GCM wears out (RFC 8446 5.5): renew our key, and have the client renew its own."""
        read, written = self.opener.sequence, self.sealer.sequence
        if read < RECORDS_PER_KEY and written < RECORDS_PER_KEY:
            return False
        if read > 2 * RECORDS_PER_KEY:
            raise ConnectionEnds("client does not renew its key")
        ask = read >= RECORDS_PER_KEY and self._asked_to_renew != self.opener.secret
        if written < RECORDS_PER_KEY and not ask:
            return False
        if ask:
            self._asked_to_renew = self.opener.secret
        self.key_update(ask=ask)
        return True

    def alert(self, description: int) -> None:
        self.tx.append(self.sealer.seal_alert(description))


def scratch_size(rx_size: int) -> int:
    """All that a receive ring of ``rx_size`` bytes can hold, what OpenSSL's records may have left
    over, and a record's tail."""
    return _HEADROOM + rx_size + MAX_REQUEST + MAX_RECORD


class Turn:
    """What the connections of one edge share: scratch memory, and what a turn collects."""

    def __init__(self, scratch: memoryview) -> None:
        """``scratch``: memory of `scratch_size` bytes."""
        self.scratch = scratch
        # Connections that have something to send.
        self.touched: list[Connection] = []
        # What was dropped and refused in all.
        self.drops: Counter[EdgeDrop] = Counter()
        self.refusals: Counter[Refusal] = Counter()
        # Frames forwarded by known flows.
        self.forwarded = 0


class Connection:
    """A client's connection, from the end of its handshake to the end of its last byte."""

    __slots__ = (
        "_batch_left",
        "_idle_until",
        "_login_bytes",
        "_turn",
        "blob",
        "bytes_in",
        "bytes_out",
        "closing",
        "drops",
        "flows",
        "frames_in",
        "frames_out",
        "heard_at",
        "identity",
        "keep_alive_after",
        "misses",
        "mode",
        "number",
        "records",
        "request",
        "rx",
        "seen",
        "sent_at",
        "slot",
        "timeout",
        "touched",
        "tx",
    )

    def __init__(
        self,
        identity: Identity,
        records: Records,
        rx: Ring,
        tx: Ring,
        *,
        turn: Turn,
        flows: dict[bytes, Target],
        slot: Slot | None,
        login_bytes: int,
        now: float,
    ) -> None:
        """``slot``: where the checkpoint goes; None if nobody else could go on with it."""
        self.identity = identity
        self.records = records
        self.rx = rx
        self.tx = tx
        self.slot = slot
        self.flows = flows
        self.mode = Mode.HTTP
        self.number = 0
        self.blob = b""
        self.timeout = 0.0
        # Why it is being closed; "" while it lives.
        self.closing = ""
        # The request that waits for its State.
        self.request = b""
        # When a whole block or keep-alive came last, and when something was sent last.
        self.heard_at = now
        self.sent_at = now
        self.keep_alive_after = 0.0
        # Keys of the flows that were used since they were last reported.
        self.seen: set[bytes] = set()
        # Blocks for the core, each part at most one run; taken by the shell in the same turn.
        self.misses: list[bytes] = []
        self.frames_in = self.bytes_in = self.frames_out = self.bytes_out = 0
        self.drops = _NO_DROPS
        # It stands in Turn.touched.
        self.touched = False
        self._turn = turn
        self._batch_left = 0
        # Up to this position of the receive ring there is nothing new to open.
        self._idle_until = 0
        self._login_bytes = login_bytes

    @property
    def conn(self) -> int:
        return self.identity.conn

    # --- checkpoint -------------------------------------------------------------------------------

    def hot(self) -> Hot:
        return Hot(*self._hot())

    def _hot(self) -> tuple[int, int, int, int, int, int, int, int]:
        """As `hot`; this one is called in every turn, and a plain tuple costs a third."""
        records, rx, tx = self.records, self.rx, self.tx
        assert isinstance(records, OwnRecords)  # only these have a slot
        return (
            rx.start,
            records.opener.sequence,
            rx.base,
            records.skip,
            self._batch_left,
            tx.end,
            records.sealer.sequence,
            tx.base,
        )

    def cold(self) -> Cold:
        records = self.records
        assert isinstance(records, OwnRecords)  # only these have a slot
        return Cold(
            records.opener.secret,
            records.sealer.secret,
            self.number,
            self.mode,
            self.timeout,
            self.closing,
            self.blob,
        )

    def save(self) -> None:
        """Put in force what has happened; to be called before anything of it leaves."""
        slot = self.slot
        if slot is None:
            return
        records = self.records
        assert isinstance(records, OwnRecords)
        if records.keys_changed:
            slot.save_cold(self.cold())
            records.keys_changed = False
        slot.save(self._hot())

    def save_all(self) -> None:
        """As `save`, when more than positions and sequence numbers has changed."""
        if self.slot is not None:
            self.slot.save_cold(self.cold())
        self.save()

    @classmethod
    def adopt(
        cls,
        slot: Slot,
        received: int,
        sent: int,
        *,
        turn: Turn,
        flows: Callable[[int], dict[bytes, Target]],
        login_bytes: int,
        now: float,
    ) -> "Connection":
        """Go on with what a predecessor left, given how far the kernel says it has come.

        Raises CheckpointError, ValueError or KeyError if the slot makes no sense.
        """
        identity, hot, cold = slot.load()
        rx, tx = slot.rings(received, sent, hot)
        suite = SUITE_NUMBERS[identity.suite]
        records = OwnRecords(
            rx,
            tx,
            Opener(suite, cold.read_secret, hot.in_sequence),
            Sealer(suite, cold.write_secret, hot.out_sequence),
            hot.skip,
        )
        self = cls(
            identity,
            records,
            rx,
            tx,
            turn=turn,
            flows=flows(identity.conn),
            slot=slot,
            login_bytes=login_bytes,
            now=now,
        )
        self._batch_left = hot.batch_left
        self.number, self.mode, self.timeout = cold.number, cold.mode, cold.timeout
        self.closing, self.blob = cold.close, cold.blob
        (self.frames_in, self.bytes_in, self.frames_out, self.bytes_out, *drops) = (
            slot.load_counts()
        )
        self.drops = tuple(drops)
        return self

    def replay(self) -> Replay:
        """What a new core is told."""
        identity = self.identity
        return Replay(
            identity.conn,
            self.number,
            self.mode,
            identity.peer,
            identity.local,
            identity.tls,
            self.blob,
        )

    def counts(self) -> tuple[int, int, int, int, tuple[int, ...]]:
        return self.frames_in, self.bytes_in, self.frames_out, self.bytes_out, self.drops

    # --- what comes in ----------------------------------------------------------------------------

    @property
    def wants_bytes(self) -> bool:
        """Should the shell read?  Not while a request waits for the core, nor into a full ring."""
        return not self.request and self.rx.end - self.rx.start < self.rx.size

    def receive(self, now: float) -> None:
        """To be called when bytes have been put into the receive ring.

        Afterwards `misses` holds what the core must see and `request` what it must answer; when
        the shell has handed both on, it calls `save`.  Raises ConnectionEnds or TLSError.
        """
        if self.closing or self.request:
            return
        records = self.records
        if self.rx.end < self._idle_until and self.rx.room():
            # No record has become whole: a client that sends byte by byte would have all that
            # waits opened again with each of them.
            return
        scratch = self._turn.scratch
        at, end = records.open_all(scratch, _HEADROOM, now)
        mode = self.mode
        if mode is Mode.HTTP:
            self._cut_request(scratch[at:end])
        else:
            at = self._blocks(scratch, at, end, now)
        kept = records.consume(at)
        if records.renew():
            self._touch()
        if records.peer_closed:
            raise ConnectionEnds("client said goodbye")
        if not self.request:
            if kept > _MAX_RECORDS_PER_MESSAGE:
                raise BrokenProtocol(f"a message in more than {_MAX_RECORDS_PER_MESSAGE} records")
            if not self.rx.room():
                raise BrokenProtocol(f"{self.rx.size} bytes and no message")
            self.rx.rewind()
            self._idle_until = records.whole_at

    def _cut_request(self, data: memoryview) -> None:
        """Find the next request, if it is whole, and leave it where it is until it is answered."""
        if self.rx.end > self._login_bytes:
            raise BrokenProtocol(f"more than {self._login_bytes} bytes before a login")
        if not data:
            return
        try:
            cutter = RequestCutter(max_body=MAX_REQUEST - MAX_HEAD, max_head=MAX_HEAD)
            # Only the first: what is behind it may be anything, and as many as a ring can hold.
            request = cutter.first(bytes(data[:MAX_REQUEST]))
        except ProtocolError as error:
            raise BrokenProtocol(str(error)) from None
        if request is not None:
            self.request = request

    def _blocks(self, scratch: memoryview, at: int, end: int, now: float) -> int:
        """Walk over blocks, hand them on in runs; return where the first unfinished one starts.

        A run is the blocks of one batch that follow each other and go to one destination, with
        the four bytes before them: the batch's header, or the tail of a block that has been
        handed on, where the header is then written.  Runs that touch are handed on as one.
        """
        read_u32 = U32.unpack_from
        read_head = _HEAD.unpack_from
        flows = self.flows
        left = self._batch_left
        wanted = self.mode in _RECEIVING
        begin = at
        # The run that is not handed on yet, and what is in it.
        target: Target | None = None
        start = stop = frames = octets = 0
        # Earlier runs, copied because their place in scratch may be written over.
        parts: dict[Target, list[tuple[bytes, int, int]]] = {}

        while end - at >= 4:
            (size,) = read_u32(scratch, at)
            if not left:
                if size == KEEP_ALIVE:
                    if end - at < 8:
                        break
                    (size,) = read_u32(scratch, at + 4)
                    if size > MAX_KEEP_ALIVE:
                        raise BrokenProtocol(f"keep-alive of {size} bytes")
                    if end - at < 8 + size:
                        break
                    at += 8 + size
                elif size > MAX_COUNT:
                    raise BrokenProtocol(f"batch of {size} frames")
                else:
                    left = size
                    at += 4
                continue
            if size > MAX_BLOCK:
                raise BrokenProtocol(f"block of {size} bytes")
            if end - at < 4 + size:
                break
            if not MIN_FRAME <= size <= MAX_FRAME or not wanted:
                self._drop_block(size)
                at += 4 + size
                left -= 1
                continue
            first, before = at, left
            (head,) = read_head(scratch, at)
            destination = flows.get(head[4:])
            at, left = self._run(scratch, at, end, left, head, destination)
            count = before - left
            size = at - first - 4 * count
            self.frames_in += count
            self.bytes_in += size
            if destination is None:
                self.misses.append(bytes(scratch[first:at]))
                continue
            first -= 4
            if destination is not target or first != stop:
                if target is not None:
                    copy = bytes(scratch[start:stop])
                    parts.setdefault(target, []).append((copy, frames, octets))
                target, start, frames, octets = destination, first, 0, 0
            U32.pack_into(scratch, first, count)
            stop = at
            frames += count
            octets += size

        if target is not None:
            if target in parts:
                parts[target].append((bytes(scratch[start:stop]), frames, octets))
            else:
                target.deliver(scratch, start, stop, frames, octets, now)
        for destination, copied in parts.items():
            joined = bytearray().join([part[0] for part in copied])
            stop = len(joined)
            joined.append(0)
            frames = sum(part[1] for part in copied)
            octets = sum(part[2] for part in copied)
            destination.deliver(memoryview(joined), 0, stop, frames, octets, now)
        if at != begin:
            self.heard_at = now
        self._batch_left = left
        return at

    def _run(
        self,
        scratch: memoryview,
        at: int,
        end: int,
        left: int,
        head: bytes,
        destination: Target | None,
    ) -> tuple[int, int]:
        """Step over the whole blocks of this batch that go where the one at ``at`` goes.

        ``head``: of that one.  Returns where the next block is, and how many are left.
        """
        read_head = _HEAD.unpack_from
        flows = self.flows
        while True:
            if destination is not None:
                self.seen.add(head[4:])
            step = 4 + int.from_bytes(head[:4], "big")
            at += step
            left -= 1
            # Mostly frames of one flow and one size follow each other; a loop over a stride
            # costs half of reading each head by itself.
            like_it = min(left, (end - at) // step)
            if like_it:
                count = 0
                for (other,) in _stride(step).iter_unpack(scratch[at : at + like_it * step]):
                    if other != head:
                        break
                    count += 1
                at += count * step
                left -= count
            if not left or end - at < 4:
                return at, left
            (size,) = U32.unpack_from(scratch, at)
            if not MIN_FRAME <= size <= MAX_FRAME or end - at < 4 + size:
                return at, left
            (head,) = read_head(scratch, at)
            if flows.get(head[4:]) is not destination:
                return at, left

    def _drop_block(self, size: int) -> None:
        if not size:
            return  # nothing was in it
        if size < MIN_FRAME:
            self.drop(EdgeDrop.SHORT, 1)
        else:
            self.drop(EdgeDrop.OVERSIZE if size > MAX_FRAME else EdgeDrop.DIRECTION, 1)

    def drop(self, why: EdgeDrop, frames: int) -> None:
        """Count frames from or to this client that go no further."""
        self._turn.drops[why] += frames
        at = _PLACE[why]
        self.drops = (*self.drops[:at], self.drops[at] + frames, *self.drops[at + 1 :])

    def take_misses(self) -> list[bytes]:
        """What `receive` left for the core, in pieces of whole blocks that fit into a Frames."""
        misses, self.misses = self.misses, []
        pieces = []
        size = 0
        small: list[bytes] = []
        for part in misses:
            for piece in _pieces(part):
                if size + len(piece) > MAX_BLOCKS:
                    pieces.append(b"".join(small))
                    small, size = [], 0
                small.append(piece)
                size += len(piece)
        if small:
            pieces.append(b"".join(small))
        return pieces

    # --- what goes out ----------------------------------------------------------------------------

    def deliver(
        self, buffer: memoryview, start: int, end: int, frames: int, octets: int, now: float
    ) -> None:
        """Seal whole batches for this client, and put that in force.

        What does not fit is dropped: a client that does not read costs its own frames only.
        """
        if self.mode not in _SENDING:
            self.drop(EdgeDrop.NOT_OPEN, frames)
            return
        room = self.records.room()
        if end - start > room:
            end, fit, octets = _cut(buffer, start, start + room)
            short = self.tx.limit < self.tx.size
            self.drop(EdgeDrop.NO_MEMORY if short else EdgeDrop.SLOW_CLIENT, frames - fit)
            frames = fit
            if not frames:
                return
        self.records.write(buffer, start, end)
        self.frames_out += frames
        self.bytes_out += octets
        self.sent_at = now
        self._turn.forwarded += frames
        self._touch()
        self.save()

    def _write(self, data: bytes) -> None:
        """Seal something of our own."""
        if len(data) > self.records.room():
            raise ConnectionEnds(f"no room for {len(data)} bytes to a client that does not read")
        self.records.write(memoryview(bytearray(data + b"\0")), 0, len(data))
        self._touch()

    def _touch(self) -> None:
        """To be called between a write into the send ring and the `save` that puts it in force."""
        if not self.touched:
            self.touched = True
            if self.slot is not None:
                # A successor that finds it in force sends it at once: no event would say so.
                self.slot.set_dirty(True)
            self._turn.touched.append(self)

    def apply(self, state: State, now: float) -> bool:
        """Take over what the core decided; False if it has been applied before.

        To be followed by `receive`, since what came behind the request may wait.  Raises
        ConnectionEnds or TLSError.
        """
        if self.closing or state.number <= self.number:
            return False
        self._idle_until = 0  # what has come may mean something else now
        if self.request:
            self.records.skip_over(len(self.request))
            self.request = b""
        if state.reply:
            self._write(state.reply)
        if state.key_update:
            self.records.key_update(ask=False)
            self._touch()
        if state.mode is not self.mode:
            self.heard_at = now
            # A sender says something at once, so that the other end sees that it is there.
            self.keep_alive_after = 0.0
        self.number = state.number
        self.mode = state.mode
        self.timeout = state.timeout
        self.blob = state.blob
        if state.close or state.mode is Mode.CLOSING:
            self.close(state.close or "closed by the core")
        else:
            self.save_all()
        return True

    def close(self, why: str, alert: int = Alert.CLOSE_NOTIFY) -> None:
        """Say goodbye, behind all that is in the send ring already; nothing is read any more."""
        if self.closing:
            return
        self.closing = why
        self.mode = Mode.CLOSING
        self.request = b""
        self.records.alert(alert)
        self._touch()
        self.save_all()

    # --- time -------------------------------------------------------------------------------------

    def expire(self, now: float, chance: Callable[[], float]) -> None:
        """To be called some times a second: keep-alives and limits.  Raises ConnectionEnds.

        ``chance`` gives random numbers from 0.0 up to 1.0.
        """
        timeout = self.timeout
        if not timeout or self.closing:
            return
        if self.mode in _RECEIVING and now - self.heard_at > timeout:
            raise ConnectionEnds(f"silent for {timeout:g} s")
        if self.records.renew():
            self._touch()
            self.save()
        if self.mode in _SENDING and now - self.sent_at >= self.keep_alive_after:
            # From a fifth to a half of T, as the originals do; their size varies too.
            self.keep_alive_after = timeout * (0.2 + 0.3 * chance())
            self.sent_at = now
            size = int(chance() * 64)
            if self.records.room() > 8 + size:
                self._write(U32.pack(KEEP_ALIVE) + U32.pack(size) + bytes(size))
                self.save()


def _cut(buffer: memoryview, start: int, limit: int) -> tuple[int, int, int]:
    """The longest beginning of these batches that ends before ``limit``, made whole by itself.

    Returns its end, its frames and their bytes.
    """
    at, frames, octets = start, 0, 0
    while limit - at >= 4:
        header = at
        (left,) = U32.unpack_from(buffer, at)
        at += 4
        count = 0
        while count < left and limit - at >= 4:
            (size,) = U32.unpack_from(buffer, at)
            if at + 4 + size > limit:
                break
            at += 4 + size
            count += 1
            octets += size
        frames += count
        if count < left:
            U32.pack_into(buffer, header, count)
            return (at if count else header), frames, octets
    return at, frames, octets


def _pieces(blocks: bytes) -> list[bytes]:
    """Cut blocks at their borders into pieces that fit into a Frames."""
    if len(blocks) <= MAX_BLOCKS:
        return [blocks]
    pieces = []
    start = at = 0
    while at < len(blocks):
        (size,) = U32.unpack_from(blocks, at)
        if at + 4 + size - start > MAX_BLOCKS:
            pieces.append(blocks[start:at])
            start = at
        at += 4 + size
    pieces.append(blocks[start:])
    return pieces
