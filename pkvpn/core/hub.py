"""A virtual hub: an Ethernet segment between ports.

Strategy: the hub knows ports and MAC addresses, not who is behind a port; a session and a bridge
are the same to it.  `Hub.switch` takes frames as blocks (u32 size, frame, u32 size, frame ...) and
answers in *runs*: slices of these blocks, headers included, with the ports they go to.  No object
is built per frame; a new decision is made where the MACs change.  What is not forwarded is counted
by name at the port it came from.

A frame never goes back to the port it came from, and there is no way from one hub to another.
"""

import enum
import struct
from collections import Counter
from typing import Any, NamedTuple

from pkvpn.core.flows import FlowBook, KnownFlow
from pkvpn.core.mac_table import Learnt, MacTable

# u32 size of the frame, then its destination MAC and source MAC, then its type.
_HEAD = struct.Struct("!I12sH")
_SIZE = struct.Struct("!I")

MIN_FRAME = 14
# SoftEther: MAX_PACKET_SIZE.  What is longer up to 3200 is dropped here, beyond that the edge
# ends the connection.
MAX_FRAME = 1600

_VLAN = 0x8100
_ZEROS = bytes(6)

# Frames a second and port that may be flooded; twice as many at once.  Generous: a stream of
# 100 Mbit/s to a group is 8,000 frames a second.
STORM_FRAMES = 10_000


class Drop(enum.Enum):
    """Why a frame was not forwarded."""

    MALFORMED = "malformed"  # the blocks are cut: a bug of an edge
    SHORT = "short"  # no whole Ethernet header
    OVERSIZE = "oversize"  # more than MAX_FRAME bytes
    BAD_SOURCE = "bad source"  # the source is zero, a group, or the destination
    SAME_PORT = "same port"  # the destination is behind the port it came from
    STORM = "storm"  # more flooded frames than the limit
    OFFLINE = "offline"  # the hub is
    NO_CONNECTION = "no connection"  # the session waits for its client to come back
    QUEUE_FULL = "queue full"  # the destination's queue


class Port:
    """Anything with frames.  ``owner`` is whatever the caller finds it by."""

    __slots__ = (
        "bytes_in",
        "bytes_out",
        "drops",
        "filled_at",
        "frames_in",
        "frames_out",
        "name",
        "number",
        "only",
        "owner",
        "tokens",
    )

    def __init__(self, name: str, number: int, owner: Any, tokens: float, now: float) -> None:
        self.name = name
        self.number = number  # never used twice in a hub
        self.owner = owner
        self.only: tuple[Port, ...] = (self,)
        # From and to this port through the switch.
        self.frames_in = 0
        self.bytes_in = 0
        self.frames_out = 0
        self.bytes_out = 0
        self.drops: dict[Drop, int] = {}
        self.tokens = tokens
        self.filled_at = now

    def drop(self, why: Drop, frames: int = 1) -> None:
        """Count what was not forwarded."""
        self.drops[why] = self.drops.get(why, 0) + frames

    def named_drops(self) -> dict[str, int]:
        return {why.value: count for why, count in self.drops.items()}


class Run(NamedTuple):
    """``blocks[start:end]`` goes to each of these ports."""

    ports: tuple[Port, ...]
    start: int
    end: int
    frames: int


_NOWHERE: tuple[Port, ...] = ()


class Hub:
    """The switch and what it has learnt.

    ``reflects``: every frame goes back to its sender, and nobody else; nothing is learnt and no
    limit applies.  Only the hub of the canary does that.
    """

    def __init__(
        self,
        name: str,
        *,
        online: bool = True,
        reflects: bool = False,
        ageing: float = 600.0,
        storm_frames: int = STORM_FRAMES,
        max_macs: int = 16384,
    ) -> None:
        self.name = name
        self.online = online
        self.reflects = reflects
        self.storm_frames = storm_frames
        self.ports: dict[int, Port] = {}
        self.macs: MacTable[Port] = MacTable(
            ageing=ageing, limit=max_macs, share=max(1, max_macs // 4)
        )
        self.flows = FlowBook()
        self.macs_not_learnt = 0
        # Of ports that are gone.
        self._past_drops: Counter[str] = Counter()
        self._next_port = 1
        # Since the last switch began: an address has moved, or was seen with a tag.
        self._moved = False
        # Where the last flood went, and from whom; None: find out.
        self._flooding: Port | None = None
        self._flooded_to: tuple[Port, ...] = _NOWHERE
        # Flows that an edge still has and that do not hold any more; see take_withdrawn.
        self._withdrawn: list[KnownFlow] = []

    def join(self, name: str, owner: Any, now: float) -> Port:
        """A new port."""
        port = Port(name, self._next_port, owner, 2.0 * self.storm_frames, now)
        self._next_port += 1
        self.ports[port.number] = port
        self._flooding = None
        return port

    def leave(self, port: Port) -> None:
        """The port is gone, and with it all addresses behind it."""
        if self.ports.pop(port.number, None) is not None:
            self._past_drops.update(port.named_drops())
        self._flooding = None
        for key in self.macs.forget_port(port):
            self._withdraw(key[:6])

    def drops(self) -> Counter[str]:
        """All that was not forwarded, by name."""
        drops = self._past_drops.copy()
        for port in self.ports.values():
            drops.update(port.named_drops())
        return drops

    def set_online(self, *, online: bool) -> None:
        """An offline hub forwards nothing."""
        self.online = online
        if not online:
            self._withdrawn += self.flows.forget_all()

    def take_withdrawn(self) -> list[KnownFlow]:
        """Flows to withdraw at the edges; to be called after anything that may move an address."""
        withdrawn, self._withdrawn = self._withdrawn, []
        return withdrawn

    # --- the path of a frame

    def switch(
        self, sender: Port, blocks: bytes, now: float
    ) -> tuple[list[Run], dict[bytes, Port]]:
        """Decide where these frames go.

        Also returns the keys (destination MAC, source MAC) among them that may become known flows,
        each with the port that frames of this key go to, and to no other.
        """
        if self.reflects:
            return self._reflect(sender, blocks), {}
        runs: list[Run] = []
        candidates: dict[bytes, Port] = {}
        self._refill(sender, now)
        unpack = _HEAD.unpack_from
        at = start = frames = total = 0
        end = len(blocks)
        ports = wanted = _NOWHERE  # of the run so far; of this frame
        known = b""  # the MACs that `wanted` holds for; b"": none
        flooded = False
        while at < end:
            if end - at >= 18:
                size, macs, kind = unpack(blocks, at)
            else:
                size, macs, kind = self._read_tail(blocks, at), b"", 0
            after = at + 4 + size
            if (
                macs != known
                or kind == _VLAN
                or not MIN_FRAME <= size <= MAX_FRAME
                or after > end
                or (flooded and sender.tokens < 1.0)
            ):
                if after > end:
                    after = end
                    why: Drop | None = Drop.MALFORMED
                elif not MIN_FRAME <= size <= MAX_FRAME:
                    why = Drop.SHORT if size < MIN_FRAME else Drop.OVERSIZE
                else:
                    tag = b""
                    if kind == _VLAN and size >= 16:
                        # The twelve bits of the VLAN, without the priority.
                        tag = bytes((blocks[at + 18] & 15, blocks[at + 19]))
                    # Decided before in this message, and nothing has moved since.
                    port = None if self._moved or kind == _VLAN else candidates.get(macs)
                    if port is not None:
                        wanted, flooded, why = port.only, False, None
                    else:
                        wanted, flooded, why = self._decide(sender, macs, tag, now, candidates)
                if why is None:
                    known = b"" if kind == _VLAN else macs
                else:
                    known = b""
                    wanted = _NOWHERE
                    flooded = False
                    sender.drop(why)
            if flooded:
                sender.tokens -= 1.0
            if wanted is not ports:
                if ports:
                    self._end_run(runs, ports, start, at, frames)
                ports = wanted
                start = at
                frames = 0
            frames += 1
            total += 1
            at = after
        if ports:
            self._end_run(runs, ports, start, end, frames)
        sender.frames_in += total
        sender.bytes_in += end - 4 * total
        if self._moved:
            # A later frame may have moved what an earlier one was sent to.
            self._moved = False
            candidates = {
                key: port for key, port in candidates.items() if self._holds(key, sender, port)
            }
        return runs, candidates

    def _decide(
        self, sender: Port, macs: bytes, tag: bytes, now: float, candidates: dict[bytes, Port]
    ) -> tuple[tuple[Port, ...], bool, Drop | None]:
        """Where frames with these MACs go, whether that is a flood, why they go nowhere."""
        if not self.online:
            return _NOWHERE, False, Drop.OFFLINE
        destination, source = macs[:6], macs[6:]
        if source[0] & 1 or source in (_ZEROS, destination):
            return _NOWHERE, False, Drop.BAD_SOURCE
        self._learn(source + tag, sender, now)
        if not destination[0] & 1:
            port = self.macs.find(destination + tag, now)
            if port is sender:
                return _NOWHERE, False, Drop.SAME_PORT
            if port is not None:
                if self._holds(macs, sender, port):
                    candidates[macs] = port
                return port.only, False, None
        if sender.tokens < 1.0:
            return _NOWHERE, False, Drop.STORM
        return self._others(sender), True, None

    def _learn(self, key: bytes, port: Port, now: float) -> None:
        match self.macs.learn(key, port, now):
            case Learnt.KNOWN:
                pass
            case Learnt.FULL:
                self.macs_not_learnt += 1
                # Known elsewhere, and this port may not take it: it is nowhere for sure.
            case Learnt.MOVED:
                self._moved = True
                self._withdraw(key[:6])
            case Learnt.NEW:
                if len(key) > 6:
                    # An edge does not look at tags: it must not have flows of this MAC now.
                    self._moved = True
                    self._withdraw(key[:6])

    def _others(self, sender: Port) -> tuple[Port, ...]:
        if self._flooding is not sender:
            self._flooding = sender
            self._flooded_to = tuple([port for port in self.ports.values() if port is not sender])
        return self._flooded_to

    def _refill(self, port: Port, now: float) -> None:
        rate = self.storm_frames
        port.tokens = min(2.0 * rate, port.tokens + (now - port.filled_at) * rate)
        port.filled_at = now

    def _end_run(
        self, runs: list[Run], ports: tuple[Port, ...], start: int, end: int, frames: int
    ) -> None:
        runs.append(Run(ports, start, end, frames))
        size = end - start - 4 * frames
        for port in ports:
            port.frames_out += frames
            port.bytes_out += size

    def _read_tail(self, blocks: bytes, at: int) -> int:
        """The size of a block too short for `_HEAD`; beyond the end of the blocks if it is cut."""
        return int(_SIZE.unpack_from(blocks, at)[0]) if len(blocks) - at >= 4 else len(blocks)

    def _reflect(self, sender: Port, blocks: bytes) -> list[Run]:
        frames, at = 0, 0
        while at + 4 <= len(blocks):
            at += 4 + int(_SIZE.unpack_from(blocks, at)[0])
            frames += 1
        runs: list[Run] = []
        if at == len(blocks) and frames:
            sender.frames_in += frames
            sender.bytes_in += at - 4 * frames
            self._end_run(runs, sender.only, 0, at, frames)
        return runs

    # --- known flows

    def offer_flow(self, flow: KnownFlow, to_conn: int, now: float) -> bool:
        """A candidate of `switch` between two connections of one edge.  True: teach it."""
        return self.flows.offer(flow, to_conn, now)

    def flow_seen(self, flow: KnownFlow, sender: Port, now: float) -> bool:
        """Frames pass in the edge: what they tell about their source, the switch has not seen.

        False if this flow does not hold (any more).
        """
        if not self.flows.seen(flow, now):
            return False
        self._learn(flow.key[6:], sender, now)
        return True

    def relearn(self, key: bytes, sender: Port, now: float) -> Port | None:
        """An edge had this flow from the core before us; the port it goes to if it may go on."""
        destination, source = key[:6], key[6:]
        if self.reflects or not self.online or source[0] & 1 or source in (_ZEROS, destination):
            return None
        self._learn(source, sender, now)
        port = self.macs.find(destination, now)
        if port is None or port is sender or not self._holds(key, sender, port):
            return None
        return port

    def _holds(self, key: bytes, sender: Port, port: Port) -> bool:
        """May an edge send all frames with these MACs from here to there?

        It looks at no tags, so both MACs must be without; and both must be known here, or nothing
        would withdraw the flow when they turn up elsewhere.
        """
        return self.macs.settled(key[:6], port) and self.macs.settled(key[6:], sender)

    def connection_gone(self, conn: int) -> bool:
        """No flow from or to this connection holds any more; True if there was one."""
        return bool(self.flows.forget_connection(conn))

    def _withdraw(self, mac: bytes) -> None:
        self._withdrawn += self.flows.forget_mac(mac)

    # --- time

    def next_deadline(self) -> float | None:
        """When an address is too old."""
        return self.macs.next_deadline()

    def expire(self, now: float) -> None:
        """Forget the addresses that were not seen for too long and the flows nobody uses."""
        for key in self.macs.expire(now):
            self._withdraw(key[:6])
        self._withdrawn += self.flows.expire(now)
