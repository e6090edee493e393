"""Known flows: which frames need not be shown to the core.

Strategy: exact matches only.  An entry belongs to the connection that the frame comes from and has
both MACs in its key, so whoever uses another's address never meets the other's entry.  The table
decides nothing: it holds what the core said, and forgets when it must.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# Of one connection.  A hub has as many MACs as it has computers; whoever has more is misses.
MAX_FLOWS = 4096


class Flows(Generic[T]):
    """The entries of all connections; ``T`` is what a frame can be delivered to."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[bytes, T]] = {}
        # (connection, key) -> the core that said so, and where it goes
        self._epochs: dict[tuple[int, bytes], tuple[int, int]] = {}
        # connection -> the entries that lead to it
        self._towards: dict[int, set[tuple[int, bytes]]] = {}

    def table(self, conn: int) -> dict[bytes, T]:
        """The entries of one connection: key -> target.  It stays the same object."""
        return self._tables.setdefault(conn, {})

    def add(self, conn: int, key: bytes, to_conn: int, target: T, epoch: int) -> bool:
        """Install or renew an entry; False if the connection has too many."""
        table = self.table(conn)
        if key in table:
            self.remove(conn, key)
        elif len(table) >= MAX_FLOWS:
            return False
        table[key] = target
        self._epochs[conn, key] = (epoch, to_conn)
        self._towards.setdefault(to_conn, set()).add((conn, key))
        return True

    def remove(self, conn: int, key: bytes) -> None:
        """Forget one entry, if there is one."""
        entry = self._epochs.pop((conn, key), None)
        if entry is not None:
            del self._tables[conn][key]
            towards = self._towards[entry[1]]
            towards.discard((conn, key))
            if not towards:
                del self._towards[entry[1]]

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
