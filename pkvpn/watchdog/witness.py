"""A child that sees others from outside, as a user does, and says when they do not answer.

Strategy: a witness has duties in which others are accused; while something waits in one of
them, those are *deaf*: their beats are fine, but nobody is served.  They are believed guilty
only if they, and everybody else whom this witness knows, lived and beat since the trouble began:
a witness that asked while somebody was just being replaced, or was stopped, accuses nobody.  Nor
does one that beats and has stopped looking: what it says is what it last saw.
"""

from __future__ import annotations

from typing import NamedTuple


class Accuses(NamedTuple):
    """While something waits in ``duty`` for longer than ``patience`` seconds, the children named
    in ``accused`` are deaf, and not the one that says so.

    ``times``: so many troubles in a row, each of a beginning of its own, and not once well in
    between; one request that was lost on a busy machine is no proof.

    ``excused_by``: duties of the accused; while one of them gets done and he has no time left, he
    is busy and not deaf.

    ``looks``: a duty of the witness itself that gets done each time it looks; a beat in which it
    stands still says nothing.  Without it, every beat counts.
    """

    duty: str
    accused: tuple[str, ...]
    patience: float = 0.0
    times: int = 1
    excused_by: tuple[str, ...] = ()
    looks: str = ""


class Accusation(NamedTuple):
    """``accused`` do not answer since ``since`` (CLOCK_MONOTONIC seconds)."""

    duty: str
    accused: tuple[str, ...]
    since: float
    excused_by: tuple[str, ...] = ()


class Witness:
    """Knows what one incarnation of a witness has said; counts each trouble once."""

    def __init__(self, duties: tuple[str, ...], accuses: tuple[Accuses, ...]) -> None:
        self._duties = duties
        self._accuses = {one.duty: one for one in accuses}
        self._said: dict[str, float] = {}  # duty -> the trouble that was counted last
        self._row: dict[str, list[float]] = {}  # duty -> troubles since it was well or accused
        self._looked: dict[str, int] = {}  # duty -> how often, by the last beat

    def knows(self) -> set[str]:
        """Everybody on whom its troubles may depend."""
        return {name for one in self._accuses.values() for name in one.accused}

    def own_duties(self, told: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        """What of a beat is about the witness itself: nothing waits where others are accused."""
        return tuple(
            (done, 0.0 if name in self._accuses else since)
            for name, (done, since) in zip(self._duties, told, strict=True)
        )

    def suspects(self, told: tuple[tuple[int, float], ...]) -> set[str]:
        """Those for whom something waits, and who may have an excuse."""
        return {
            name
            for duty, (_, since) in zip(self._duties, told, strict=True)
            if since and duty in self._accuses and self._accuses[duty].excused_by
            for name in self._accuses[duty].accused
        }

    def accusations(self, told: tuple[tuple[int, float], ...], now: float) -> list[Accusation]:
        """To be called for each beat; ``since`` of what it returns: of the first of the row."""
        found = []
        looked = dict(zip(self._duties, (done for done, _ in told), strict=True))
        stale, self._looked = self._looked, looked
        for name, (_, since) in zip(self._duties, told, strict=True):
            accuses = self._accuses.get(name)
            if accuses is None or self._said.get(name, 0.0) == since:
                continue
            if accuses.looks and looked[accuses.looks] == stale.get(accuses.looks):
                continue
            if not since:
                del self._said[name]
                self._row.pop(name, None)
            elif now - since >= accuses.patience:
                self._said[name] = since
                row = self._row.setdefault(name, [])
                row.append(since)
                if len(row) >= accuses.times:
                    found.append(Accusation(name, accuses.accused, row[0], accuses.excused_by))
                    del self._row[name]
        return found
