"""The order of a tree: who starts next, who stops next, when is it ready, when is it over.

Strategy: children come up one after the other, each when the one before it serves, and go
down in the reverse order.  Once all have been up, each lives for itself.  A stop wins over
everything: from its first moment nobody is started again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pkvpn.watchdog.machine import ChildMachine, Dismiss, Event, Replace, Start, State, Stop

_OVER = (State.DOWN, State.FAILED)
_STUCK = (State.BACKOFF, State.FAILING, State.FAILED)


class Tree:
    """Knows the children in their order, and what the operator wants of all of them."""

    def __init__(self, machines: Sequence[ChildMachine]) -> None:
        self._machines = list(machines)
        self._coming = 0  # children before this one have been up
        self._asked: set[str] = set()
        self.stopping = False

    @property
    def ready(self) -> bool:
        """Every child has been up at least once."""
        return self._coming == len(self._machines)

    @property
    def over(self) -> bool:
        """A stop was asked, and nobody is left."""
        return self.stopping and all(one.state in _OVER for one in self._machines)

    def adopt(self) -> None:
        """Go on with a tree that was up before us (after an upgrade of the watchdog)."""
        self._coming = len(self._machines)
        self._asked = {machine.spec.name for machine in self._machines}

    def blocked_by(self) -> ChildMachine | None:
        """The child that cannot come up, while the tree comes up; None if all is well."""
        if self.ready or self.stopping:
            return None
        machine = self._machines[self._coming]
        return machine if machine.state in (State.FAILING, State.FAILED) else None

    def stop(self) -> list[tuple[ChildMachine, Event]]:
        """To be called when the service is to end, however often; returns what to tell whom."""
        if self.stopping:
            return []
        self.stopping = True
        return [(machine, Dismiss()) for machine in self._machines] + self.advance()

    def advance(self) -> list[tuple[ChildMachine, Event]]:
        """To be called after anything happened, until it returns nothing."""
        return self._next_to_stop() if self.stopping else self._next_to_start()

    def _next_to_start(self) -> list[tuple[ChildMachine, Event]]:
        while self._coming < len(self._machines):
            machine = self._machines[self._coming]
            if machine.spec.name not in self._asked:
                self._asked.add(machine.spec.name)
                return [(machine, Start())]
            # A transient child that has done its work and ended has been up, too.
            if machine.state is not State.UP and (machine.state is not State.DOWN):
                return []
            self._coming += 1
        return []

    def _next_to_stop(self) -> list[tuple[ChildMachine, Event]]:
        for machine in reversed(self._machines):
            if machine.state is State.STOPPING:
                if machine.undead:
                    continue  # in the kernel's hands; the others need not wait for it
                return []
            if machine.state not in _OVER:
                return [(machine, Stop())]
        return []


class Rollover:
    """Replaces children one by one, each when the one before it serves again."""

    def __init__(self, machines: Sequence[ChildMachine]) -> None:
        self._left = list(machines)
        self._asked = False
        self._restarts = 0

    @property
    def done(self) -> bool:
        return not self._left

    @property
    def stuck(self) -> ChildMachine | None:
        """The child that does not come up again; None if all goes well."""
        if self._asked and self._left and self._left[0].state in _STUCK:
            return self._left[0]
        return None

    def advance(self) -> list[tuple[ChildMachine, Event]]:
        """To be called after anything happened, until it returns nothing."""
        while self._left:
            machine = self._left[0]
            if not self._asked:
                self._asked, self._restarts = True, machine.restarts
                return [(machine, Replace())]
            if machine.state is not State.UP or machine.restarts == self._restarts:
                return []
            self._left.pop(0)
            self._asked = False
        return []
