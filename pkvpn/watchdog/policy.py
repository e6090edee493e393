"""When does a child that died come back?

Strategy: no clock and no dice in here.  Only deaths before health count: a child that had
served for a while is started again at once, however often it is killed; one that dies young
waits longer each time, and when it has died young too often in a while, the limit is
reached.  What happens then is the operator's choice.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class OnLimit(Enum):
    """What to do with a child that cannot be kept alive."""

    GO_ON = "go-on"  # try again for ever, at the cap; the state says `failing`
    GIVE_UP = "give-up"  # end the tree with an exit code of its own


@dataclass(frozen=True)
class RestartPolicy:
    """Times in seconds.  The first restart is immediate, the second waits ``first``."""

    first: float = 0.05
    factor: float = 2.0
    cap: float = 10.0
    jitter: float = 0.2  # share of the delay that is drawn by lot, both ways
    healthy_after: float = 0.5  # up for so long: what came before is forgotten
    intensity: int = 5  # more young deaths than this
    period: float = 60.0  # within so long, and the limit is reached
    on_limit: OnLimit = OnLimit.GO_ON


class Decision(NamedTuple):
    """How long to wait, and whether the limit is reached."""

    delay: float
    limit: bool


class RestartCounter:
    """Knows how often one child died young, and decides how long it stays down."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self._in_a_row = 0
        self._young: deque[float] = deque()

    def died(self, *, up_for: float, wild: bool, now: float, lot: float) -> Decision:
        """To be called for each death that nobody asked for.

        ``up_for``: seconds it had served, 0.0 if it never got ready.  ``wild``: it crashed
        in a way that smells of broken memory, so it does not come back at once.  ``lot``: a
        random number in [0, 1).
        """
        policy = self.policy
        if up_for >= policy.healthy_after:
            self.reset()
            if not wild:
                return Decision(0.0, False)
        self._in_a_row += 1
        self._young.append(now)
        while self._young and self._young[0] <= now - policy.period:
            self._young.popleft()
        if len(self._young) > policy.intensity:
            return Decision(policy.cap, True)
        steps = self._in_a_row - 1 + wild
        if steps == 0:
            return Decision(0.0, False)
        delay = min(policy.cap, policy.first * policy.factor ** (steps - 1))
        return Decision(delay * (1 + policy.jitter * (2 * lot - 1)), False)

    def reset(self) -> None:
        """Forget what was: it got healthy, or an operator starts it anew."""
        self._in_a_row = 0
        self._young.clear()
