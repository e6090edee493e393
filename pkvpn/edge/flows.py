"""Known flows: which frames need not be shown to the core.

Strategy: exact matches only.  An entry belongs to the connection that the frame comes from and has
both MACs in its key, so whoever uses another's address never meets the other's entry.  The table
decides nothing: it holds what the core said, and forgets when it must.  What is in it stands in the
checkpoint as well; a successor begins with that, as with the word of a core that is gone.
"""

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

# Of one connection.  A hub has as many MACs as it has computers; whoever has more is misses.
MAX_FLOWS = 4096

# The core that said what a predecessor left; no core has this epoch.
_INHERITED = 0


class Saved(Protocol):
    """Where the flows of one connection are kept for a successor."""

    def put(self, key: bytes, to_conn: int) -> None: ...
    def remove(self, key: bytes) -> None: ...
    def load(self) -> list[tuple[bytes, int]]: ...


class Flows(Generic[T]):
    """The entries of all connections; ``T`` is what a frame can be delivered to."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[bytes, T]] = {}
        # (connection, key) -> the core that said so, and where it goes
        self._epochs: dict[tuple[int, bytes], tuple[int, int]] = {}
        # connection -> the entries that lead to it
        self._towards: dict[int, set[tuple[int, bytes]]] = {}
        self._saved: dict[int, Saved] = {}

    def table(self, conn: int) -> dict[bytes, T]:
        """The entries of one connection: key -> target.  It stays the same object."""
        return self._tables.setdefault(conn, {})

    def save_in(self, conn: int, saved: Saved) -> None:
        """From now on this holds what is known of the connection."""
        self._saved[conn] = saved

    def restore(self, conn: int, target_of: Callable[[int], T | None]) -> None:
        """Begin with what a predecessor saved; ``target_of``: None if nobody has the name."""
        saved = self._saved[conn]
        for key, to_conn in saved.load():
            target = target_of(to_conn)
            if target is None or to_conn == conn:
                saved.remove(key)
            else:
                self._put(conn, key, to_conn, target, _INHERITED)

    def redirect(self, to_conn: int, target: T) -> None:
        """Frames for this connection go to another target from now on."""
        for conn, key in self._towards.get(to_conn, ()):
            self._tables[conn][key] = target

    def add(self, conn: int, key: bytes, to_conn: int, target: T, epoch: int) -> bool:
        """Install or renew an entry; False if the connection has too many."""
        known = self._epochs.get((conn, key))
        if known is not None:
            if known[1] == to_conn:
                self._epochs[conn, key] = (epoch, to_conn)
                return True
            self.remove(conn, key)
        elif len(self.table(conn)) >= MAX_FLOWS:
            return False
        self._put(conn, key, to_conn, target, epoch)
        saved = self._saved.get(conn)
        if saved is not None:
            saved.put(key, to_conn)
        return True

    def _put(self, conn: int, key: bytes, to_conn: int, target: T, epoch: int) -> None:
        self.table(conn)[key] = target
        self._epochs[conn, key] = (epoch, to_conn)
        self._towards.setdefault(to_conn, set()).add((conn, key))

    def remove(self, conn: int, key: bytes) -> None:
        """Forget one entry, if there is one."""
        entry = self._epochs.pop((conn, key), None)
        if entry is not None:
            del self._tables[conn][key]
            towards = self._towards[entry[1]]
            towards.discard((conn, key))
            if not towards:
                del self._towards[entry[1]]
            saved = self._saved.get(conn)
            if saved is not None:
                saved.remove(key)

    def remove_all(self, conn: int) -> None:
        """Forget every entry from and to the connection."""
        for key in list(self._tables.get(conn, ())):
            self.remove(conn, key)
        for entry in list(self._towards.get(conn, ())):
            self.remove(*entry)

    def close(self, conn: int) -> None:
        """To be called when the connection is gone."""
        self.remove_all(conn)
        self._tables.pop(conn, None)
        self._saved.pop(conn, None)

    def remove_others(self, epoch: int) -> int:
        """Forget all that another core than this one said; return how many there were."""
        old = [entry for entry, (said, _) in self._epochs.items() if said != epoch]
        for entry in old:
            self.remove(*entry)
        return len(old)

    def clear(self) -> int:
        """Forget all; return how many there were."""
        count = len(self._epochs)
        for entry in list(self._epochs):
            self.remove(*entry)
        return count

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return iter(list(self._epochs))

    def __len__(self) -> int:
        return len(self._epochs)
