"""How often a stranger may be wrong.

Strategy: a bucket of failures per key (an address, or a user); it empties with time.  Only failures
count, so whoever knows the password is not slowed down by its own logins.  The table is bounded:
when it is full, the keys whose buckets are nearest to empty make room.  So who wants to have the
failures of one user forgotten, by failing with names that he makes up, must fail as often with each
of thousands of them.
"""


class Attempts:
    """``failures`` at once, then one more every ``interval`` seconds."""

    def __init__(self, *, failures: int, interval: float, limit: int = 8192) -> None:
        self._capacity = failures * interval
        self._interval = interval
        self._limit = limit
        # key -> when its bucket will be empty.
        self._empty_at: dict[str, float] = {}

    def allows(self, key: str, now: float) -> bool:
        """May this key try?"""
        return self._empty_at.get(key, now) - now + self._interval <= self._capacity + 1e-9

    def failed(self, key: str, now: float) -> None:
        """It tried, and was wrong."""
        self._empty_at[key] = max(self._empty_at.get(key, now), now) + self._interval
        if len(self._empty_at) > self._limit:
            # An eighth at once: to sort for each failure would be work for a stranger to make.
            fullest = sorted(self._empty_at.items(), key=lambda item: item[1], reverse=True)
            self._empty_at = dict(fullest[: self._limit - self._limit // 8])
