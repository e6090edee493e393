"""Which connection a core was working on when it died.

Strategy: before a core touches what a connection sent, it writes down which one, in memory that the
watchdog keeps for its successor.  A request comes again after a death, so dying twice on the same
one is proof enough; frames do not, so there it takes several deaths close to each other.
"""

import mmap
import struct

# conn, number of the request (0: frames) that is being worked on;
# then of the last death: conn, number, how many in a row, when (monotonic seconds).
_MARK = struct.Struct("=QQ")
_DEATHS = struct.Struct("=QQQd")
SIZE = _MARK.size + _DEATHS.size

REQUEST_DEATHS = 2
FRAME_DEATHS = 4
# Deaths on frames that are further apart are not counted as a row.
IN_A_ROW = 10.0


class Mark:
    """One such memory, on a descriptor of at least SIZE bytes, all zeros at first."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SIZE)

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()

    def begin(self, conn: int, number: int) -> None:
        """Work begins on a request, or with number 0 on frames, of this connection."""
        _MARK.pack_into(self._memory, 0, conn, number)

    def end(self) -> None:
        """It has ended well."""
        _MARK.pack_into(self._memory, 0, 0, 0)

    def judge(self, now: float) -> int:
        """To be called once by a new core: the connection to be closed, or 0."""
        conn, number = _MARK.unpack_from(self._memory, 0)
        self.end()
        if not conn:
            return 0
        last_conn, last_number, deaths, at = _DEATHS.unpack_from(self._memory, _MARK.size)
        if (conn, number) != (last_conn, last_number) or (not number and now - at > IN_A_ROW):
            deaths = 0
        deaths += 1
        _DEATHS.pack_into(self._memory, _MARK.size, conn, number, deaths, now)
        return int(conn) if deaths >= (REQUEST_DEATHS if number else FRAME_DEATHS) else 0
