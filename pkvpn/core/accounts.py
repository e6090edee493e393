"""Hubs, users and bridges in memory, and what can change about them.

Strategy: a change is a record.  `store` makes them after the change is on the disk, and whoever
owns an `Accounts` applies them to it.
"""

from typing import NamedTuple


class HubRecord(NamedTuple):
    """A virtual hub."""

    id: int
    name: str
    online: bool
    max_sessions: int  # 0: no limit
    storm_frames: int  # flooded frames a second and session; 0: the server's default


class UserRecord(NamedTuple):
    """A user of one hub."""

    id: int
    hub_id: int
    name: str
    auth: str  # one of AUTH_TYPES
    password: bytes  # H of the protocol, 20 bytes; empty unless auth is "password"
    certificate: bytes  # DER; empty unless auth is "certificate"
    generation: int


class BridgeRecord(NamedTuple):
    """A hub joined to a TAP device."""

    device: str
    hub_id: int
    linux_bridge: str  # the TAP is enslaved to it; "": to none


class HubGone(NamedTuple):
    """With its users and bridges."""

    id: int


class UserGone(NamedTuple):
    """A user was deleted."""

    id: int


class BridgeGone(NamedTuple):
    """A bridge was deleted."""

    device: str


class Kicked(NamedTuple):
    """The key of this session is worth nothing any more."""

    generation: int
    session: int


Change = HubRecord | UserRecord | BridgeRecord | HubGone | UserGone | BridgeGone | Kicked


def name_key(name: str) -> str:
    """What names are compared by."""
    return name.lower()


class Accounts:
    """The database in memory.

    Names are compared without case; a generation belongs to one user; users and bridges of a hub
    that is gone are gone.
    """

    def __init__(self) -> None:
        self.hubs: dict[int, HubRecord] = {}
        self.users: dict[int, UserRecord] = {}
        self.bridges: dict[str, BridgeRecord] = {}
        self.kicked: set[tuple[int, int]] = set()
        self._hub_ids: dict[str, int] = {}
        self._user_ids: dict[tuple[int, str], int] = {}
        self._generations: dict[int, int] = {}

    def hub(self, name: str) -> HubRecord | None:
        """The hub of this name, in any case."""
        return self.hubs.get(self._hub_ids.get(name_key(name), 0))

    def user(self, hub_id: int, name: str) -> UserRecord | None:
        """The user of this name, in any case."""
        return self.users.get(self._user_ids.get((hub_id, name_key(name)), 0))

    def user_of_generation(self, generation: int) -> UserRecord | None:
        """The user whose session keys have this generation; None: they are worth nothing."""
        return self.users.get(self._generations.get(generation, 0))

    def users_of(self, hub_id: int) -> list[UserRecord]:
        """All users of a hub."""
        return [user for user in self.users.values() if user.hub_id == hub_id]

    def replace(self, other: "Accounts") -> None:
        """Become a copy of another."""
        self.__init__()  # type: ignore[misc]
        changes: list[Change] = [*other.hubs.values(), *other.users.values()]
        changes += other.bridges.values()
        for change in changes:
            self.apply(change)
        self.kicked = set(other.kicked)

    def apply(self, change: Change) -> None:
        """Take over one change; each may come twice."""
        match change:
            case HubRecord():
                self.hubs[change.id] = change
                self._hub_ids[name_key(change.name)] = change.id
            case HubGone():
                hub = self.hubs.pop(change.id, None)
                if hub is not None:
                    del self._hub_ids[name_key(hub.name)]
                    for user in self.users_of(change.id):
                        self._forget_user(user)
                    for bridge in list(self.bridges.values()):
                        if bridge.hub_id == change.id:
                            del self.bridges[bridge.device]
            case UserRecord():
                before = self.users.get(change.id)
                if before is not None:
                    self._forget_user(before, but_kicked_of=change.generation)
                self.users[change.id] = change
                self._user_ids[change.hub_id, name_key(change.name)] = change.id
                self._generations[change.generation] = change.id
            case UserGone():
                if change.id in self.users:
                    self._forget_user(self.users[change.id])
            case BridgeRecord():
                self.bridges[change.device] = change
            case BridgeGone():
                self.bridges.pop(change.device, None)
            case Kicked():
                self.kicked.add((change.generation, change.session))

    def _forget_user(self, user: UserRecord, but_kicked_of: int = 0) -> None:
        del self.users[user.id]
        del self._user_ids[user.hub_id, name_key(user.name)]
        del self._generations[user.generation]
        if user.generation != but_kicked_of:
            self.kicked = {entry for entry in self.kicked if entry[0] != user.generation}
