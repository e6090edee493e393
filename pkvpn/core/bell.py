"""Something that a thread rings and a selector hears: a pipe, or what Windows can wait for."""

import os
import socket


class Bell:
    """Readable from the first `ring` on until `clear`."""

    def __init__(self) -> None:
        # A core makes no sockets any more when it serves; and Windows waits for nothing else.
        self._ends: tuple[socket.socket, socket.socket] | tuple[int, int]
        if os.name == "nt":
            self._ends = socket.socketpair()
            for end in self._ends:
                end.setblocking(False)
        else:
            self._ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        read = self._ends[0]
        return read if isinstance(read, int) else read.fileno()

    def ring(self) -> None:
        """To be called by any thread."""
        write = self._ends[1]
        try:
            if isinstance(write, int):
                os.write(write, b"!")
            else:
                write.send(b"!")
        except BlockingIOError:
            pass  # full: it is heard anyway

    def clear(self) -> None:
        read = self._ends[0]
        try:
            if isinstance(read, int):
                os.read(read, 4096)
            else:
                read.recv(4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        for end in self._ends:
            if isinstance(end, int):
                os.close(end)
            else:
                end.close()
