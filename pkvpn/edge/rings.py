"""A stretch of memory that holds the part of a byte stream that is between two processes' hands.

Strategy: everything is said in positions of the stream, counted from the first byte of the TCP
connection, so that they can be compared with what the kernel says it has received and sent.  A
position's place in the memory follows from ``base``, ``size`` and itself; a successor that knows
these numbers finds every byte again.
"""


class Ring:
    """The bytes ``start`` to ``end`` of a stream.

    Always: start <= end <= start + size, and base <= start.
    """

    __slots__ = ("base", "end", "high", "limit", "memory", "size", "start")

    def __init__(self, memory: memoryview, start: int, end: int, base: int) -> None:
        if not base <= start <= end <= start + len(memory):
            raise ValueError(f"no ring of {len(memory)}: base {base}, {start} to {end}")
        self.memory = memory
        self.size = len(memory)
        self.start = start
        self.end = end
        # The position that lies (or would lie) at the first byte of the memory.
        self.base = base
        # How much of the memory may have been touched; for who gives it back.  What a
        # predecessor touched is not known.
        self.high = self.size
        # Who puts much in should stop there: `size`, or less while memory is short.
        self.limit = self.size

    def room(self) -> int:
        return self.size - (self.end - self.start)

    def rewind(self) -> None:
        """If nothing is in it, go on at the first byte: a quiet connection then uses one page.

        To be followed by a checkpoint before anything is put in: until then a successor looks
        for new bytes where the old base says.
        """
        if self.start == self.end:
            if self.end - self.base > self.high:
                self.high = min(self.end - self.base, self.size)
            self.base = self.end

    def free(self) -> memoryview:
        """Where the next bytes may be put, in one piece; there may be more room in a second one.

        To be followed by `put`.
        """
        at = (self.end - self.base) % self.size
        # To the end of the memory, or to the first byte that is in use.
        return self.memory[at : at + self.size - max(at, self.end - self.start)]

    def put(self, size: int) -> None:
        """So many bytes lie now in what `free` returned."""
        self.end += size

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Put these bytes in, of which there are at most `room`."""
        at = (self.end - self.base) % self.size
        first = min(len(data), self.size - at)
        self.memory[at : at + first] = data[:first]
        if first < len(data):
            self.memory[: len(data) - first] = data[first:]
        self.end += len(data)

    def view(self, position: int, size: int) -> memoryview:
        """The bytes at a position: the memory itself, or a copy if they lie in two pieces."""
        at = (position - self.base) % self.size
        if at + size <= self.size:
            return self.memory[at : at + size]
        first = self.size - at
        return memoryview(bytes(self.memory[at:]) + self.memory[: size - first])

    def first_piece(self) -> memoryview:
        """What lies at ``start``, in one piece; there may be more in a second one."""
        at = (self.start - self.base) % self.size
        return self.memory[at : at + min(self.size - at, self.end - self.start)]

    def spare(self, kept: int) -> list[tuple[int, int]]:
        """The stretches of the memory (from, to) that hold nothing and may have been touched;
        without the first ``kept`` bytes, which are touched again by whatever comes.

        To be given back, all of them, by the caller.
        """
        touched = max(self.high, min(self.end - self.base, self.size))
        self.high = 0
        first, behind = (self.start - self.base) % self.size, (self.end - self.base) % self.size
        if self.start == self.end:
            pieces = [(0, touched)]
        elif first < behind:
            pieces = [(0, first), (behind, touched)]
        else:
            pieces = [(behind, first)]
        return [(max(kept, begin), end) for begin, end in pieces if max(kept, begin) < end]
