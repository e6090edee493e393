"""Breaks each cell of the table of a child's life in turn, and sees that a test notices.

Strategy: a cell is replaced by each function that stands elsewhere in its column, by the one that
ignores and by the one that refuses: the slips of a hand.  Each broken table lives in a process of
its own; the cells' own test is called first and directly, which takes milliseconds, and only what
survives it is shown to all tests of the machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from pkvpn.watchdog.machine import TABLE, Cell, ChildMachine, Dismiss, Event, State, Stop
from tests.watchdog import test_machine

Breakage = tuple[State, type[Event], Cell]


# What is down is not wanted: to want it no more changes nothing.
EQUAL: set[Breakage] = {
    (State.DOWN, Dismiss, ChildMachine._want_down),
    (State.DOWN, Stop, ChildMachine._ask_again),
}


def breakages() -> Iterator[Breakage]:
    for state, row in TABLE.items():
        for event, cell in row.items():
            others = [TABLE[other][event] for other in TABLE]
            others += [ChildMachine._ignore, ChildMachine._impossible]
            for other in dict.fromkeys(others):
                if other is not cell and (state, event, other) not in EQUAL:
                    yield state, event, other


def notices(breakage: Breakage) -> bool:
    """Whether a test fails with this table."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            state, event, cell = breakage
            TABLE[state][event] = cell
            code = 1 if _fails_at_once() or _fails() else 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def _fails_at_once() -> bool:
    try:
        for state in State:
            for name in test_machine.EVENTS:
                test_machine.test_a_cell_of_the_table(state, name)
    except BaseException:  # noqa: BLE001 - pytest's outcomes are no Exceptions
        return True
    return False


def _fails() -> bool:
    """All tests of the machine, called as pytest would; which could not be run in 200 forks.

    Not the one with random events: what only chance finds is not held.
    """
    try:
        for name, test in vars(test_machine).items():
            if name.startswith("test_"):
                for arguments in _parameters(test):
                    test(**arguments)
    except BaseException:  # noqa: BLE001 - pytest's outcomes are no Exceptions
        return True
    return False


def _parameters(test: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", ()):
        names, values = mark.args
        more = [
            {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
            for value in values
        ]
        found = [{**one, **other} for one in found for other in more]
    return found


def main() -> int:
    sys.dont_write_bytecode = True
    if _fails():
        print("the tests fail with the table as it is")
        return 2
    total = 0
    survivors = []
    for breakage in breakages():
        total += 1
        if not notices(breakage):
            survivors.append(breakage)
            state, event, cell = breakage
            print(f"nobody notices: {state.value}, {event.__name__} -> {cell.__name__}", flush=True)
    print(f"{total} breakages of {sum(map(len, TABLE.values()))} cells, {len(survivors)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
