"""The order in which a tree comes up and goes down."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pkvpn.watchdog.machine import (
    ChildMachine,
    Dismiss,
    Event,
    Gone,
    Kill,
    Ready,
    Spawn,
    Spawned,
    Start,
    State,
    Stop,
)
from pkvpn.watchdog.policy import OnLimit, RestartPolicy
from pkvpn.watchdog.spec import ChildSpec, Restart
from pkvpn.watchdog.tree import Tree

CRASH = Gone(None, 9)
CLEAN = Gone(0, None)


def child(
    name: str, restart: Restart = Restart.PERMANENT, on_limit: OnLimit = OnLimit.GO_ON
) -> ChildMachine:
    policy = RestartPolicy(intensity=1, on_limit=on_limit)
    return ChildMachine(ChildSpec(name, lambda _child: None, restart=restart, policy=policy))


def advance(tree: Tree, now: float = 0.0) -> list[tuple[str, type[Event]]]:
    """Tell the machines what the tree says, until it says nothing more."""
    said = []
    while told := tree.advance():
        for machine, event in told:
            said.append((machine.spec.name, type(event)))
            if any(isinstance(one, Spawn) for one in machine.receive(event, now)):
                machine.receive(Spawned(1), now)
    return said


def test_each_child_starts_when_the_one_before_it_serves() -> None:
    log, core, edge = machines = [child(name) for name in ("log", "core", "edge")]
    tree = Tree(machines)
    assert advance(tree) == [("log", Start)]
    assert advance(tree) == []
    log.receive(Ready(), 1.0)
    assert advance(tree) == [("core", Start)]
    core.receive(Ready(), 2.0)
    assert advance(tree) == [("edge", Start)]
    assert not tree.ready
    edge.receive(Ready(), 3.0)
    assert advance(tree) == []
    assert tree.ready


def test_a_child_that_dies_after_all_came_up_does_not_hold_back_the_others() -> None:
    log, core = machines = [child("log"), child("core")]
    tree = Tree(machines)
    for machine in (log, core):
        advance(tree)
        machine.receive(Ready(), 1.0)
    advance(tree)
    log.receive(CRASH, 50.0)
    assert advance(tree) == []
    assert tree.ready


def test_a_transient_child_that_has_done_its_work_counts_as_having_been_up() -> None:
    setup, _core = machines = [child("setup", Restart.TRANSIENT), child("core")]
    tree = Tree(machines)
    advance(tree)
    setup.receive(CLEAN, 0.5)
    assert advance(tree) == [("core", Start)]


def test_a_stop_goes_in_the_reverse_order_one_after_the_other() -> None:
    machines = [child(name) for name in ("log", "core", "edge")]
    log, core, edge = machines
    tree = Tree(machines)
    for machine in machines:
        advance(tree)
        machine.receive(Ready(), 1.0)
    advance(tree)

    told = tree.stop()
    assert [(m.spec.name, type(e)) for m, e in told] == [
        ("log", Dismiss), ("core", Dismiss), ("edge", Dismiss), ("edge", Stop),
    ]  # fmt: skip
    for machine, event in told:
        machine.receive(event, 60.0)
    assert advance(tree) == []
    edge.receive(CLEAN, 60.1)
    assert advance(tree) == [("core", Stop)]
    core.receive(CLEAN, 60.2)
    assert advance(tree) == [("log", Stop)]
    assert not tree.over
    log.receive(CLEAN, 60.3)
    assert advance(tree) == []
    assert tree.over


def test_a_child_that_dies_while_others_are_stopped_does_not_come_back() -> None:
    core, edge = machines = [child("core"), child("edge")]
    tree = Tree(machines)
    for machine in machines:
        advance(tree)
        machine.receive(Ready(), 1.0)
    for machine, event in tree.stop():
        machine.receive(event, 60.0)
    core.receive(CRASH, 60.1)
    assert core.state is State.DOWN
    edge.receive(CLEAN, 60.2)
    advance(tree)
    assert tree.over


def test_a_stop_during_the_start_starts_nobody_any_more() -> None:
    log, core = machines = [child("log"), child("core")]
    tree = Tree(machines)
    advance(tree)
    for machine, event in tree.stop():
        machine.receive(event, 0.1)
    log.receive(CLEAN, 0.2)
    assert advance(tree) == []
    assert core.state is State.DOWN
    assert tree.over


def test_a_second_stop_says_nothing() -> None:
    tree = Tree([child("log")])
    advance(tree)
    assert tree.stop()
    assert tree.stop() == []


@pytest.mark.parametrize("on_limit", list(OnLimit))
def test_a_child_that_cannot_start_is_named(on_limit: OnLimit) -> None:
    core, edge = machines = [child("core", on_limit=on_limit), child("edge")]
    tree = Tree(machines)
    advance(tree)
    now = 0.0
    while core.state in (State.STARTING, State.BACKOFF):
        assert tree.blocked_by() is None
        now += 1.0
        event: Event = CRASH
        commands = core.receive(event, now) if core.state is State.STARTING else core.expire(now)
        if any(isinstance(one, Spawn) for one in commands):
            core.receive(Spawned(1), now)
    assert tree.blocked_by() is core
    assert edge.state is State.DOWN


class LifeOfATree(RuleBasedStateMachine):
    """Random deaths and one stop: nobody comes back after it, and it always ends."""

    def __init__(self) -> None:
        super().__init__()
        self.machines = [child(name) for name in ("a", "b", "c")]
        self.tree = Tree(self.machines)
        self.now = 0.0
        self.stopped = False
        self.advance()

    def advance(self) -> None:
        advance(self.tree, self.now)

    def tell(self, machine: ChildMachine, event: Event) -> None:
        for command in machine.receive(event, self.now):
            if isinstance(command, Spawn):
                assert not self.stopped, "started after the stop"
                machine.receive(Spawned(1), self.now)
        self.advance()

    @rule(index=st.integers(0, 2))
    def gets_ready(self, index: int) -> None:
        if self.machines[index].state is State.STARTING:
            self.tell(self.machines[index], Ready())

    @rule(index=st.integers(0, 2), end=st.sampled_from([CRASH, CLEAN]))
    def dies(self, index: int, end: Gone) -> None:
        if self.machines[index].state in (State.STARTING, State.UP, State.STOPPING):
            self.tell(self.machines[index], end)

    @rule(by=st.floats(0.01, 30.0))
    def time_passes(self, by: float) -> None:
        self.now += by
        for machine in self.machines:
            for command in machine.expire(self.now):
                if isinstance(command, Spawn):
                    assert not self.stopped, "started after the stop"
                    machine.receive(Spawned(1), self.now)
                elif isinstance(command, Kill):
                    self.tell(machine, CRASH)
        self.advance()

    @rule()
    def stop(self) -> None:
        told = self.tree.stop()
        self.stopped = True
        for machine, event in told:
            self.tell(machine, event)

    @invariant()
    def at_most_one_is_asked_to_stop_at_a_time(self) -> None:
        if self.stopped:
            assert self.tree.over or any(
                machine.next_deadline() is not None for machine in self.machines
            )

    def teardown(self) -> None:
        self.stop()
        for _ in range(40):
            self.time_passes(10.0)
        assert self.tree.over


TestLifeOfATree = LifeOfATree.TestCase
