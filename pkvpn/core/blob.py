"""What an edge keeps for the core: the state of one connection, in a few dozen bytes.

Strategy: strict and versioned.  A core that cannot read a blob of its predecessor ends that
connection and no other.  What the session key says is not said again.
"""

import enum
import struct
from dataclasses import dataclass

from pkvpn.core.session import KEY_SIZE
from pkvpn.protocol.messages import Direction

VERSION = 1
MAX_SIZE = 2048

# version, stage, requests so far, refusals so far, random of the Hello
_HEAD = struct.Struct("!BBBB20s")
# In a session: key, direction, when it began (monotonic), the client's installation
_SESSION = struct.Struct("!20sBd16s")
# then: number of the connection's name (CID-n), the name the client gives itself
_NAMES = struct.Struct("!IB")
_MAX_CLIENT = 200


class BlobError(Exception):
    """These bytes are no blob of this version."""


class Stage(enum.IntEnum):
    """How far the login of a connection is."""

    FRESH = 0  # not known to be a VPN client
    GREETED = 1  # it has its Hello
    IN_SESSION = 2
    CLOSING = 3


@dataclass(slots=True)
class Blob:
    """The state of one connection.  The last six hold in stage IN_SESSION only."""

    stage: Stage = Stage.FRESH
    requests: int = 0
    refusals: int = 0
    random: bytes = bytes(20)
    key: bytes = bytes(KEY_SIZE)
    direction: Direction = Direction.BOTH
    created_at: float = 0.0
    unique_id: bytes = b""
    connection_number: int = 0
    client: str = ""

    def encode(self) -> bytes:
        """At most MAX_SIZE bytes."""
        head = _HEAD.pack(
            VERSION, self.stage, min(self.requests, 255), min(self.refusals, 255), self.random
        )
        if self.stage is not Stage.IN_SESSION:
            return head
        client = self.client.encode()[:_MAX_CLIENT]
        return b"".join(
            (
                head,
                _SESSION.pack(self.key, self.direction, self.created_at, self.unique_id),
                _NAMES.pack(self.connection_number, len(client)),
                client,
            )
        )


def decode(data: bytes) -> Blob:
    """Read a blob; an empty one is a connection that has not said anything yet.

    Raises BlobError.
    """
    if not data:
        return Blob()
    try:
        version, stage, requests, refusals, random = _HEAD.unpack_from(data)
        if version != VERSION:
            raise BlobError(f"a blob of version {version}, this core knows {VERSION}")
        blob = Blob(Stage(stage), requests, refusals, random)
        at = _HEAD.size
        if blob.stage is Stage.IN_SESSION:
            key, direction, created_at, unique_id = _SESSION.unpack_from(data, at)
            at += _SESSION.size
            number, size = _NAMES.unpack_from(data, at)
            at += _NAMES.size
            client = data[at : at + size]
            if len(client) != size:
                raise BlobError("a blob that is cut")
            at += size
            blob.key = key
            blob.direction = Direction(direction)
            blob.created_at = created_at
            blob.unique_id = b"" if unique_id == bytes(16) else unique_id
            blob.connection_number = number
            blob.client = client.decode(errors="replace")
    except (struct.error, ValueError) as error:
        raise BlobError(f"a blob of {len(data)} bytes: {error}") from None
    if at != len(data):
        raise BlobError(f"a blob with {len(data) - at} bytes too many")
    return blob
