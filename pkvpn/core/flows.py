"""Which known flows the edges have been taught.

Strategy: the book holds exactly what the edges hold or will soon hold, so whatever happens to a
MAC or to a connection, the book says which flows to withdraw.  It decides nothing about where a
frame goes; a flow is offered to it after the hub has decided that.
"""

from typing import NamedTuple, TypeVar

K = TypeVar("K")

# A connection that speaks with more peers at once sends the rest of its frames through the core.
MAX_FLOWS_OF_CONNECTION = 1024

# A flow that no frame has used for so long is withdrawn; the next frame brings it back.
UNUSED_TIMEOUT = 120.0


class KnownFlow(NamedTuple):
    """Frames with this key (destination MAC, source MAC) from this connection."""

    conn: int
    key: bytes


class FlowBook:
    """The flows of one hub."""

    def __init__(self) -> None:
        self._flows: dict[KnownFlow, tuple[int, float]] = {}  # -> to_conn, when it was used
        self._of_mac: dict[bytes, set[KnownFlow]] = {}
        self._from: dict[int, set[KnownFlow]] = {}
        self._to: dict[int, set[KnownFlow]] = {}

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, flow: KnownFlow) -> bool:
        return flow in self._flows

    def offer(self, flow: KnownFlow, to_conn: int, now: float) -> bool:
        """True if the edge is to be taught this flow, False if it knows it or may not."""
        known = self._flows.get(flow)
        if known is not None:
            if known[0] == to_conn:
                return False
            self._remove(flow)
        if len(self._from.get(flow.conn, ())) >= MAX_FLOWS_OF_CONNECTION:
            return False
        self._flows[flow] = (to_conn, now)
        self._from.setdefault(flow.conn, set()).add(flow)
        self._to.setdefault(to_conn, set()).add(flow)
        self._of_mac.setdefault(flow.key[:6], set()).add(flow)
        self._of_mac.setdefault(flow.key[6:], set()).add(flow)
        return True

    def seen(self, flow: KnownFlow, now: float) -> bool:
        """An edge says that frames pass; False if there is no such flow (any more)."""
        known = self._flows.get(flow)
        if known is None:
            return False
        self._flows[flow] = (known[0], now)
        return True

    def of_connection(self, conn: int) -> list[tuple[KnownFlow, int]]:
        """The flows from this connection, each with where it goes."""
        return [(flow, self._flows[flow][0]) for flow in self._from.get(conn, ())]

    def forget_mac(self, mac: bytes) -> list[KnownFlow]:
        """Remove the flows from and to this MAC: to be withdrawn at the edges."""
        return self._remove_all(self._of_mac.get(mac))

    def forget_connection(self, conn: int) -> list[KnownFlow]:
        """Remove the flows from and to this connection: to be withdrawn at the edges."""
        return self._remove_all(self._from.get(conn)) + self._remove_all(self._to.get(conn))

    def forget_all(self) -> list[KnownFlow]:
        """Remove all flows: to be withdrawn at the edges."""
        return self._remove_all(set(self._flows))

    def expire(self, now: float) -> list[KnownFlow]:
        """Remove what nobody has used for long: to be withdrawn at the edges."""
        return self._remove_all(
            {flow for flow, (_, at) in self._flows.items() if now - at > UNUSED_TIMEOUT}
        )

    def _remove_all(self, flows: set[KnownFlow] | None) -> list[KnownFlow]:
        gone = list(flows or ())
        for flow in gone:
            self._remove(flow)
        return gone

    def _remove(self, flow: KnownFlow) -> None:
        to_conn, _ = self._flows.pop(flow)
        _discard(self._from, flow.conn, flow)
        _discard(self._to, to_conn, flow)
        _discard(self._of_mac, flow.key[:6], flow)
        if flow.key[:6] != flow.key[6:]:
            _discard(self._of_mac, flow.key[6:], flow)


def _discard(index: dict[K, set[KnownFlow]], key: K, flow: KnownFlow) -> None:
    flows = index[key]
    flows.discard(flow)
    if not flows:
        del index[key]
