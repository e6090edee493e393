"""Frames that wait for the way to one edge.

Strategy: whatever an edge or a client does not take is bounded per connection, and what is over
the bound is dropped, newest first; a slow client costs its own frames and nobody else's.  Frames
for the same connections that follow each other travel in one message.
"""

from collections import deque

from pkvpn.channel import MAX_MESSAGE, U32, FramesOut, encode

# What may wait for one connection, in bytes; then for all of an edge together.
PER_CONNECTION = 1 << 20
IN_ALL = 64 << 20

# As many connections in one message; a flood to more of them is several messages.
MAX_CONNS = 512
_HEAD = 3  # kind, number of connections


class _Batch:
    """Blocks for the same connections."""

    __slots__ = ("conns", "parts", "size")

    def __init__(self, conns: tuple[int, ...]) -> None:
        self.conns = conns
        self.parts: list[bytes] = []
        self.size = 0


class Outbox:
    """The queue of one edge."""

    def __init__(self) -> None:
        self._batches: deque[_Batch] = deque()
        self._waiting: dict[int, int] = {}  # bytes of each connection
        self._size = 0
        self._encoded: bytes | None = None  # the first batch, ready to be sent

    def __bool__(self) -> bool:
        return bool(self._batches)

    def put(self, conns: tuple[int, ...], blocks: bytes) -> list[int]:
        """Queue whole blocks; the connections that do not get them, because their queue is full."""
        size = len(blocks)
        waiting = self._waiting
        full = [
            conn
            for conn in conns
            if waiting.get(conn, 0) + size > PER_CONNECTION or self._size + size > IN_ALL
        ]
        if full:
            conns = tuple([conn for conn in conns if conn not in full])
            if not conns:
                return full
        for start in range(0, len(conns), MAX_CONNS):
            self._queue(conns[start : start + MAX_CONNS], blocks)
        for conn in conns:
            waiting[conn] = waiting.get(conn, 0) + size
        return full

    def _queue(self, conns: tuple[int, ...], blocks: bytes) -> None:
        room = MAX_MESSAGE - _HEAD - 8 * len(conns)
        self._size += len(blocks)
        for part in _cut(blocks, room):
            last = self._batches[-1] if self._batches else None
            if (
                last is None
                or last.conns != conns
                or last.size + len(part) > room
                or (self._encoded is not None and len(self._batches) == 1)
            ):
                last = _Batch(conns)
                self._batches.append(last)
            last.parts.append(part)
            last.size += len(part)

    def first(self) -> bytes:
        """The message to send next.  To be called only if there is one."""
        if self._encoded is None:
            batch = self._batches[0]
            blocks = batch.parts[0] if len(batch.parts) == 1 else b"".join(batch.parts)
            self._encoded = encode(FramesOut(batch.conns, blocks))
        return self._encoded

    def sent(self) -> None:
        """To be called when `first` has been sent."""
        batch = self._batches.popleft()
        self._encoded = None
        self._size -= batch.size
        for conn in batch.conns:
            left = self._waiting[conn] - batch.size
            if left:
                self._waiting[conn] = left
            else:
                del self._waiting[conn]


def _cut(blocks: bytes, room: int) -> list[bytes]:
    """Pieces of at most ``room`` bytes, each of whole blocks."""
    if len(blocks) <= room:
        return [blocks]
    pieces: list[bytes] = []
    start = at = 0
    while at < len(blocks):
        after = at + 4 + U32.unpack_from(blocks, at)[0]
        if after - start > room:
            pieces.append(blocks[start:at])
            start = at
        at = after
    pieces.append(blocks[start:])
    return pieces
