"""The core's end of the channel to one edge.

Strategy: control messages wait in a queue that nothing is dropped from.  If it ever passes its
bound, the edge has not read for long: the whole queue is thrown away, and when the edge reads again
it is greeted anew, as after a death of the core; what it must know follows from its replay.
"""

import logging
import select
import selectors
import socket
from collections import deque
from collections.abc import Iterator

from pkvpn import channel
from pkvpn.channel import FromCore, Hello, Totals
from pkvpn.core.outbox import Outbox

_log = logging.getLogger("pkvpn.core")

# Bytes of control messages that wait for one edge.  A State is some hundred bytes.
MAX_BACKLOG = 16 << 20
# Teaching a flow can wait for the next frame: it is not worth a long queue.
MAX_FLOW_BACKLOG = 1 << 20

# Messages taken from one socket in one turn of the loop: no edge has it for itself.
_READ_AT_ONCE = 64


class Link:
    """One edge, by its index (1, 2, ...)."""

    def __init__(self, index: int, control_fd: int, frames_fd: int) -> None:
        self.index = index
        self.control = socket.socket(fileno=control_fd)
        self.frames = socket.socket(fileno=frames_fd)
        for one in (self.control, self.frames):
            one.setblocking(False)
        self.outbox = Outbox()
        self._backlog: deque[bytes] = deque()
        self._backlog_size = 0
        self.lost = False  # the backlog was thrown away
        self.totals: Totals | None = None  # the last that it told
        self.heeded = True  # it speaks our version
        # The edge has told all it has since its last Hello.
        self.replayed = False
        self.replayed_at = 0.0
        self.connections = 0  # that are known of it
        # Connections that it named since then; the others are gone.
        self.present: set[int] = set()
        # Flows it has from a core before us: (conn, key).
        self.old_flows: list[tuple[int, bytes]] = []

    def close(self) -> None:
        """The sockets; their other descriptors stay with the watchdog."""
        self.control.close()
        self.frames.close()

    def greet(self, epoch: int) -> None:
        """Ask the edge for all it has."""
        self.replayed = False
        self.present.clear()
        self.old_flows.clear()
        self.send(Hello(channel.VERSION, epoch))

    def may_teach(self) -> bool:
        """Is there room for a flow?"""
        return not self.lost and self._backlog_size < MAX_FLOW_BACKLOG

    def send(self, message: FromCore) -> None:
        """Queue a control message."""
        if self.lost:
            return
        data = channel.encode(message)
        self._backlog.append(data)
        self._backlog_size += len(data)
        if self._backlog_size > MAX_BACKLOG:
            _log.error(
                "edge-%d has not read for so long that %d control messages (%d bytes) wait:"
                " they are dropped, and it will be greeted anew",
                self.index,
                len(self._backlog),
                self._backlog_size,
            )
            self._backlog.clear()
            self._backlog_size = 0
            self.lost = True
            self.replayed = False

    def read_control(self) -> Iterator[bytes]:
        """What has come, at most so much as one turn may take; what is not taken stays there."""
        return _read(self.control)

    def read_frames(self) -> Iterator[bytes]:
        """The same of the other socket."""
        return _read(self.frames)

    def flush(self, epoch: int) -> None:
        """Send what the sockets take."""
        if self.lost and _writable(self.control):
            self.lost = False
            self.greet(epoch)
        try:
            while self._backlog:
                self.control.send(self._backlog[0])
                self._backlog_size -= len(self._backlog.popleft())
        except (BlockingIOError, OSError) as error:
            _check_full(error)
        try:
            while self.outbox:
                self.frames.send(self.outbox.first())
                self.outbox.sent()
        except (BlockingIOError, OSError) as error:
            _check_full(error)

    def wanted(self) -> tuple[int, int]:
        """The events to wait for: of control, of frames."""
        read, both = selectors.EVENT_READ, selectors.EVENT_READ | selectors.EVENT_WRITE
        return (
            both if self._backlog or self.lost else read,
            both if self.outbox else read,
        )


def _read(sock: socket.socket) -> Iterator[bytes]:
    for _ in range(_READ_AT_ONCE):
        try:
            # One more than there may be: what is longer is no message, and not its beginning.
            data = sock.recv(channel.MAX_MESSAGE + 1)
        except BlockingIOError:
            return
        if not data and _is_closed(sock):
            # The watchdog holds both ends open, so this is its end.
            raise SystemExit("the channel to an edge was closed")
        yield data


def _is_closed(sock: socket.socket) -> bool:
    """Tell the end from a message of no bytes, which any edge could send."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _writable(sock: socket.socket) -> bool:
    with selectors.PollSelector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        return bool(selector.select(0))


def _check_full(error: OSError) -> None:
    """Full is no error: EAGAIN, or ENOBUFS where the kernel has no memory for a moment."""
    if isinstance(error, BlockingIOError) or error.errno == 105:
        return
    raise error
