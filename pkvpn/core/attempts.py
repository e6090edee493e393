"""How often a stranger may be wrong.

Strategy: a bucket of failures per key (an address, or a user); it empties with time.  Only failures
count, so whoever knows the password is not slowed down by its own logins.  The table is bounded:
when it is full the key that has failed longest ago makes room.
"""

from collections import OrderedDict


class Attempts:
    """``failures`` at once, then one more every ``interval`` seconds."""

    def __init__(self, *, failures: int, interval: float, limit: int = 8192) -> None:
        self._capacity = failures * interval
        self._interval = interval
        self._limit = limit
        # key -> when its bucket will be empty; the last failure last.
        self._empty_at: OrderedDict[str, float] = OrderedDict()

    def allows(self, key: str, now: float) -> bool:
        """May this key try?"""
        return self._empty_at.get(key, now) - now + self._interval <= self._capacity + 1e-9

    def failed(self, key: str, now: float) -> None:
        """It tried, and was wrong."""
        self._empty_at[key] = max(self._empty_at.get(key, now), now) + self._interval
        self._empty_at.move_to_end(key)
        if len(self._empty_at) > self._limit:
            self._empty_at.popitem(last=False)
