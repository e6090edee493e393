"""The data phase: batches of Ethernet frames and keep-alives, the same in both directions.

Strategy: `BlockDecoder` serves the client and the tests.  The edge cuts blocks on a path
of its own that builds nothing per frame; what both must agree on are the limits here and
the rule of `BlockDecoder.feed` for each size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from pkvpn.protocol.errors import ProtocolError

# On the wire, all numbers big endian, for ever:
#   4  n
#      n = 0xffffffff:  4  size,  size  bytes of anything: a keep-alive
#      n = 0:           nothing follows
#      else n blocks:   4  size,  size  bytes: one Ethernet frame without its checksum
U32 = struct.Struct("!I")

KEEP_ALIVE = 0xFFFFFFFF  # KEEP_ALIVE_MAGIC

# Both MACs and the type: nothing smaller is a frame.
MIN_FRAME = 14
# The largest frame that is passed on (SoftEther: MAX_PACKET_SIZE).
MAX_FRAME = 1600
# A longer block is a stream out of step (SoftEther: MAX_PACKET_SIZE * 2).
MAX_BLOCK = 3200
# The original takes any count; nobody sends more than some hundred.
MAX_COUNT = 4096
MAX_KEEP_ALIVE = 512  # MAX_KEEPALIVE_SIZE
# How many frames a batch of ours holds, as in the originals (SoftEther: MAX_SEND_SOCKET_QUEUE_NUM).
BATCH = 128


class BlockDecoder:
    """Cuts one connection's bytes into frames.

    ``units`` counts whole blocks, keep-alives and empty batches: as long as it grows, the
    peer is there.  ``keep_alives`` counts keep-alives alone.  Dropped frames are counted
    by reason: ``runts`` (below `MIN_FRAME`) and ``oversized`` (above `MAX_FRAME`).

    Whatever the peer sends, the only exception that leaves ``feed`` is `ProtocolError`;
    the decoder is of no use after it.
    """

    __slots__ = (
        "_blocks_left",
        "_in_keep_alive",
        "_rest",
        "keep_alives",
        "oversized",
        "runts",
        "units",
    )

    def __init__(self) -> None:
        self._rest = b""
        self._blocks_left = 0
        self._in_keep_alive = False
        self.units = 0
        self.keep_alives = 0
        self.runts = 0
        self.oversized = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the frames that are whole now; keep the rest for later.

        Blocks of 0 to 13 bytes and of 1601 to 3200 are dropped and counted; a longer one, a
        keep-alive above 512 bytes or a count above 4096 raises `ProtocolError`.
        """
        data = self._rest + data if self._rest else bytes(data)
        frames: list[bytes] = []
        at, end = 0, len(data)
        while end - at >= 4:
            (number,) = U32.unpack_from(data, at)
            if self._in_keep_alive:
                if number > MAX_KEEP_ALIVE:
                    raise ProtocolError(f"keep-alive of {number} bytes, at most {MAX_KEEP_ALIVE}")
                if end - at - 4 < number:
                    break
                at += 4 + number
                self._in_keep_alive = False
                self.keep_alives += 1
                self.units += 1
            elif self._blocks_left:
                if number > MAX_BLOCK:
                    raise ProtocolError(f"block of {number} bytes, at most {MAX_BLOCK}")
                if end - at - 4 < number:
                    break
                if number < MIN_FRAME:
                    self.runts += 1
                elif number > MAX_FRAME:
                    self.oversized += 1
                else:
                    frames.append(data[at + 4 : at + 4 + number])
                at += 4 + number
                self._blocks_left -= 1
                self.units += 1
            else:
                at += 4
                if number == KEEP_ALIVE:
                    self._in_keep_alive = True
                elif number > MAX_COUNT:
                    raise ProtocolError(f"batch of {number} blocks, at most {MAX_COUNT}")
                elif number:
                    self._blocks_left = number
                else:
                    self.units += 1
        self._rest = data[at:]
        return frames


def encode_batch(frames: Sequence[bytes]) -> bytes:
    """One batch of 1 to `MAX_COUNT` frames of at most `MAX_FRAME` bytes each."""
    if not 1 <= len(frames) <= MAX_COUNT:
        raise ValueError(f"a batch holds 1 to {MAX_COUNT} frames, not {len(frames)}")
    parts = [U32.pack(len(frames))]
    for frame in frames:
        if not MIN_FRAME <= len(frame) <= MAX_FRAME:
            raise ValueError(f"{len(frame)} bytes are no frame ({MIN_FRAME} to {MAX_FRAME})")
        parts += U32.pack(len(frame)), frame
    return b"".join(parts)


def encode_batches(frames: Sequence[bytes]) -> Iterator[bytes]:
    """As many batches of at most `BATCH` frames as it takes; none for no frames."""
    for start in range(0, len(frames), BATCH):
        yield encode_batch(frames[start : start + BATCH])


def encode_keep_alive(payload: bytes) -> bytes:
    """One keep-alive with 0 to `MAX_KEEP_ALIVE` bytes of anything.

    The originals ignore a keep-alive of 0 or 512 bytes, so send something between.
    """
    if len(payload) > MAX_KEEP_ALIVE:
        raise ValueError(f"{len(payload)} bytes are no keep-alive, at most {MAX_KEEP_ALIVE}")
    return U32.pack(KEEP_ALIVE) + U32.pack(len(payload)) + payload
