"""Each cell of the table, and the promises that hold across cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pkvpn.watchdog.machine import (
    EVIDENCE_TIMEOUT,
    TABLE,
    UNDEAD_TIMEOUT,
    Announce,
    Ask,
    ChildMachine,
    Command,
    Condemned,
    Dismiss,
    Due,
    Event,
    Gather,
    Gathered,
    GiveUp,
    Gone,
    ImpossibleEvent,
    Kill,
    Phase,
    Ready,
    Replace,
    ReportDeath,
    Spawn,
    Spawned,
    SpawnFailed,
    Start,
    State,
    Stop,
    Why,
)
from pkvpn.watchdog.policy import OnLimit, RestartPolicy
from pkvpn.watchdog.spec import ChildSpec, Restart

CRASH = Gone(code=None, signal=9)
CLEAN = Gone(code=0, signal=None)


def spec(
    restart: Restart = Restart.PERMANENT,
    on_limit: OnLimit = OnLimit.GO_ON,
    intensity: int = 3,
) -> ChildSpec:
    return ChildSpec(
        "core",
        lambda _child: None,
        restart=restart,
        start_timeout=10.0,
        stop_timeout=5.0,
        policy=RestartPolicy(
            first=0.1, jitter=0.0, cap=1.0, healthy_after=5.0, intensity=intensity,
            period=60.0, on_limit=on_limit,
        ),
    )  # fmt: skip


def told(machine: ChildMachine, *events: tuple[Event, float]) -> list[Command]:
    """Tell everything; return what the last one was answered with."""
    commands: list[Command] = []
    for event, now in events:
        commands = machine.receive(event, now)
    return commands


# --- a machine in each state, by the way it gets there


def down() -> ChildMachine:
    return ChildMachine(spec())


def starting() -> ChildMachine:
    machine = ChildMachine(spec())
    told(machine, (Start(), 0.0), (Spawned(7), 0.0))
    return machine


def up() -> ChildMachine:
    machine = starting()
    told(machine, (Ready(), 1.0))
    return machine


def stopping() -> ChildMachine:
    machine = up()
    told(machine, (Stop(), 20.0))
    return machine


def backoff() -> ChildMachine:
    machine = starting()
    told(machine, (CRASH, 0.0), (Spawned(8), 0.0), (CRASH, 0.0))
    return machine


def failing() -> ChildMachine:
    machine = ChildMachine(spec(intensity=0))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0), (CRASH, 0.0))
    return machine


def failed() -> ChildMachine:
    machine = ChildMachine(spec(intensity=0, on_limit=OnLimit.GIVE_UP))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0), (CRASH, 0.0))
    return machine


IN_STATE: dict[State, Callable[[], ChildMachine]] = {
    State.DOWN: down,
    State.STARTING: starting,
    State.UP: up,
    State.STOPPING: stopping,
    State.BACKOFF: backoff,
    State.FAILING: failing,
    State.FAILED: failed,
}
EVENTS: dict[str, Event] = {
    "start": Start(),
    "dismiss": Dismiss(),
    "stop": Stop(),
    "replace": Replace(),
    "spawned": Spawned(9),
    "spawn-failed": SpawnFailed("no memory"),
    "ready": Ready(),
    "crash": CRASH,
    "clean": CLEAN,
    "condemned": Condemned("blocked"),
    "gathered": Gathered(),
    "due": Due(),
}
A = Announce()
AT = 100.0

# What each event does in each state: (state after, wanted up after, commands).  What is not
# here is impossible there.
CELLS: dict[tuple[State, str], tuple[State, bool, list[Command]]] = {
    (State.DOWN, "start"): (State.STARTING, True, [Spawn(), A]),
    (State.DOWN, "dismiss"): (State.DOWN, False, []),
    (State.DOWN, "stop"): (State.DOWN, False, []),
    (State.DOWN, "replace"): (State.STARTING, True, [Spawn(), A]),
    (State.STARTING, "start"): (State.STARTING, True, []),
    (State.STARTING, "dismiss"): (State.STARTING, False, []),
    (State.STARTING, "stop"): (State.STOPPING, False, [Ask(), A]),
    (State.STARTING, "replace"): (State.STOPPING, True, [Ask(yielding=True), A]),
    (State.STARTING, "spawned"): (State.STARTING, True, []),
    (State.STARTING, "spawn-failed"): (State.STARTING, True, [Spawn(), A]),
    (State.STARTING, "ready"): (State.UP, True, [A]),
    (State.STARTING, "crash"): (State.STARTING, True, [Spawn(), A, ReportDeath()]),
    (State.STARTING, "clean"): (State.STARTING, True, [Spawn(), A, ReportDeath()]),
    (State.STARTING, "condemned"): (State.STOPPING, True, [Gather(), A]),
    (State.STARTING, "due"): (State.STOPPING, True, [Gather(), A]),
    (State.UP, "start"): (State.UP, True, []),
    (State.UP, "dismiss"): (State.UP, False, []),
    (State.UP, "stop"): (State.STOPPING, False, [Ask(), A]),
    (State.UP, "replace"): (State.STOPPING, True, [Ask(yielding=True), A]),
    (State.UP, "ready"): (State.UP, True, []),
    (State.UP, "crash"): (State.STARTING, True, [Spawn(), A, ReportDeath()]),
    (State.UP, "clean"): (State.STARTING, True, [Spawn(), A, ReportDeath()]),
    (State.UP, "condemned"): (State.STOPPING, True, [Gather(), A]),
    (State.STOPPING, "start"): (State.STOPPING, True, []),
    (State.STOPPING, "dismiss"): (State.STOPPING, False, []),
    (State.STOPPING, "stop"): (State.STOPPING, False, []),
    (State.STOPPING, "replace"): (State.STOPPING, True, []),
    (State.STOPPING, "ready"): (State.STOPPING, False, []),
    (State.STOPPING, "crash"): (State.DOWN, False, [ReportDeath(), A]),
    (State.STOPPING, "clean"): (State.DOWN, False, [A]),
    (State.STOPPING, "condemned"): (State.STOPPING, False, []),
    (State.STOPPING, "gathered"): (State.STOPPING, False, []),  # nobody has asked for it yet
    (State.STOPPING, "due"): (State.STOPPING, False, [Gather()]),
    (State.BACKOFF, "start"): (State.STARTING, True, [Spawn(), A]),
    (State.BACKOFF, "dismiss"): (State.DOWN, False, [A]),
    (State.BACKOFF, "stop"): (State.DOWN, False, [A]),
    (State.BACKOFF, "replace"): (State.STARTING, True, [Spawn(), A]),
    (State.BACKOFF, "due"): (State.STARTING, True, [Spawn(), A]),
    (State.FAILING, "start"): (State.STARTING, True, [Spawn(), A]),
    (State.FAILING, "dismiss"): (State.DOWN, False, [A]),
    (State.FAILING, "stop"): (State.DOWN, False, [A]),
    (State.FAILING, "replace"): (State.STARTING, True, [Spawn(), A]),
    (State.FAILING, "due"): (State.STARTING, True, [Spawn(), A]),
    (State.FAILED, "start"): (State.STARTING, True, [Spawn(), A]),
    (State.FAILED, "dismiss"): (State.DOWN, False, [A]),
    (State.FAILED, "stop"): (State.DOWN, False, [A]),
    (State.FAILED, "replace"): (State.STARTING, True, [Spawn(), A]),
}


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("name", list(EVENTS))
def test_a_cell_of_the_table(state: State, name: str) -> None:
    machine = IN_STATE[state]()
    assert machine.state is state
    expected = CELLS.get((state, name))
    if expected is None:
        with pytest.raises(ImpossibleEvent):
            machine.receive(EVENTS[name], AT)
        return
    commands = machine.receive(EVENTS[name], AT)
    assert (machine.state, machine.wanted_up, commands) == expected


def test_the_table_is_total() -> None:
    assert set(TABLE) == set(State)
    kinds = {type(event) for event in EVENTS.values()}
    assert all(set(row) == kinds for row in TABLE.values())


# --- what holds across cells


def test_a_hang_is_evidence_then_kill_then_a_successor_with_the_reason() -> None:
    machine = up()
    assert told(machine, (Condemned("blocked"), 20.0)) == [Gather(), A]
    assert (machine.state, machine.why, machine.phase) == (
        State.STOPPING, Why.HANG, Phase.EVIDENCE,
    )  # fmt: skip
    assert machine.next_deadline() == 20.0 + EVIDENCE_TIMEOUT
    assert machine.expire(20.0 + EVIDENCE_TIMEOUT) == [Kill()]
    assert told(machine, (CRASH, 20.1)) == [Spawn(), A, ReportDeath()]
    assert (machine.state, machine.why, machine.restarts) == (State.STARTING, Why.HANG, 1)


def test_evidence_that_has_come_is_not_waited_for() -> None:
    machine = up()
    told(machine, (Condemned("blocked"), 20.0))
    assert told(machine, (Gathered(), 20.001)) == [Kill()]
    assert machine.next_deadline() == 20.001 + UNDEAD_TIMEOUT
    assert told(machine, (Gathered(), 20.002)) == []  # it is being killed already
    assert not machine.undead


def test_one_that_cannot_write_its_stacks_is_killed_without_waiting() -> None:
    assert told(up(), (Condemned("stopped", evidence=False), 20.0)) == [Gather(), Kill(), A]


def test_a_start_that_takes_too_long_is_killed_and_counted() -> None:
    machine = starting()
    assert machine.next_deadline() == 10.0
    assert machine.expire(9.9) == []
    assert machine.expire(10.0) == [Gather(), A]
    machine.expire(10.0 + EVIDENCE_TIMEOUT)
    assert told(machine, (CRASH, 10.1)) == [Spawn(), A, ReportDeath()]
    assert machine.why is Why.START_TIMEOUT


def test_a_stop_is_asked_then_evidence_then_kill_then_said_to_be_undead() -> None:
    machine = stopping()
    assert machine.why is Why.STOPPED
    assert machine.next_deadline() == 25.0
    assert machine.expire(25.0) == [Gather()]
    now = 25.0 + EVIDENCE_TIMEOUT
    assert machine.expire(now) == [Kill()]
    assert not machine.undead
    now += UNDEAD_TIMEOUT
    (again, said) = machine.expire(now)
    assert again == Kill()
    assert isinstance(said, Announce)
    assert "still there" in said.note
    assert machine.undead
    assert told(machine, (CRASH, now + 60)) == [ReportDeath(), A]
    assert (machine.state, machine.undead, machine.phase) == (State.DOWN, False, None)


def test_a_stop_during_the_death_of_a_hung_child_is_final() -> None:
    machine = up()
    told(machine, (Condemned("busy"), 20.0), (Stop(), 20.01))
    assert told(machine, (CRASH, 20.1)) == [ReportDeath(), A]
    assert machine.state is State.DOWN


def test_a_start_during_a_stop_brings_it_back_after_it_is_gone() -> None:
    machine = stopping()
    told(machine, (Start(), 20.5))
    assert told(machine, (CLEAN, 21.0)) == [Spawn(), A]


def test_one_that_makes_way_and_gets_no_successor_is_asked_to_end_everything() -> None:
    machine = up()
    told(machine, (Replace(), 20.0))
    assert told(machine, (Stop(), 20.1)) == [Ask()]
    assert told(machine, (Stop(), 20.2)) == []
    assert told(machine, (CLEAN, 20.3)) == [A]
    assert machine.state is State.DOWN


def test_a_replaced_child_comes_back_at_once_however_young_it_was() -> None:
    machine = starting()
    for now in range(1, 20):
        told(machine, (Ready(), now), (Replace(), now))
        assert told(machine, (CLEAN, now)) == [Spawn(), A]
        told(machine, (Spawned(7), now))


def test_a_dismissed_child_goes_on_and_does_not_come_back() -> None:
    machine = up()
    assert told(machine, (Dismiss(), 20.0)) == []
    assert told(machine, (CRASH, 30.0)) == [ReportDeath(), A]
    assert machine.state is State.DOWN


@pytest.mark.parametrize(
    ("restart", "end", "comes_back"),
    [
        (Restart.PERMANENT, CLEAN, True),
        (Restart.PERMANENT, CRASH, True),
        (Restart.TRANSIENT, CLEAN, False),
        (Restart.TRANSIENT, CRASH, True),
        (Restart.TEMPORARY, CLEAN, False),
        (Restart.TEMPORARY, CRASH, False),
    ],
)
def test_the_restart_type_says_which_ends_are_followed_by_a_new_one(
    restart: Restart, end: Gone, comes_back: bool
) -> None:
    machine = ChildMachine(spec(restart))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0), (Ready(), 1.0))
    commands = told(machine, (end, 20.0))
    assert (Spawn() in commands) == comes_back
    assert machine.state is (State.STARTING if comes_back else State.DOWN)
    assert machine.why is (Why.CLEAN if end.clean else Why.CRASH)
    assert (ReportDeath() in commands) == (comes_back or not end.clean)


def test_after_a_wild_crash_the_next_one_starts_by_exec_and_not_at_once() -> None:
    machine = up()
    assert told(machine, (Gone(None, 11, wild=True), 20.0)) == [ReportDeath(), A]
    assert machine.state is State.BACKOFF
    assert machine.expire(20.1) == [Spawn(fresh=True), A]
    told(machine, (Spawned(8), 20.1), (Ready(), 20.2))
    assert told(machine, (CRASH, 40.0))[0] == Spawn(fresh=False)


def test_deaths_in_a_row_back_off_and_then_fail_at_the_cap_and_go_on() -> None:
    machine = ChildMachine(spec(intensity=2))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0), (CRASH, 0.0), (Spawned(8), 0.0))
    assert told(machine, (CRASH, 0.0)) == [ReportDeath(), A]
    assert (machine.state, machine.next_deadline()) == (State.BACKOFF, 0.1)
    assert machine.expire(0.1) == [Spawn(), A]
    told(machine, (Spawned(9), 0.1))
    assert told(machine, (CRASH, 0.1)) == [ReportDeath(), A]
    assert (machine.state, machine.why, machine.next_deadline()) == (
        State.FAILING, Why.CRASH, 1.1,
    )  # fmt: skip
    assert machine.expire(1.1) == [Spawn(), A]


def test_one_that_gives_up_ends_the_tree_and_says_why() -> None:
    machine = ChildMachine(spec(intensity=0, on_limit=OnLimit.GIVE_UP))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0))
    assert told(machine, (CRASH, 0.0)) == [ReportDeath(), A, GiveUp()]
    assert (machine.state, machine.why) == (State.FAILED, Why.TOO_MANY_RESTARTS)
    assert machine.next_deadline() is None


def test_a_start_by_hand_forgets_the_deaths_before_it() -> None:
    machine = failing()
    told(machine, (Start(), 10.0), (Spawned(7), 10.0))
    assert told(machine, (SpawnFailed("no memory"), 10.0)) == [A]
    machine = ChildMachine(spec(intensity=1))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0), (CRASH, 0.0), (Spawned(8), 0.0), (CRASH, 0.0))
    assert machine.state is State.FAILING
    told(machine, (Start(), 1.0), (Spawned(9), 1.0))
    assert Spawn() in told(machine, (CRASH, 1.0))


@pytest.mark.parametrize("make", [starting, up, stopping])
def test_the_last_wish_counts_while_a_process_is_there(make: Callable[[], ChildMachine]) -> None:
    machine = make()
    for wish, wanted in ((Dismiss(), False), (Start(), True), (Dismiss(), False), (Start(), True)):
        told(machine, (wish, 20.0))
        assert machine.wanted_up == wanted
    assert Spawn() in told(machine, (CRASH, 20.0))


@pytest.mark.parametrize("by_hand", [Start(), Replace()])
@pytest.mark.parametrize("policy", [OnLimit.GO_ON, OnLimit.GIVE_UP])
@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_whoever_is_started_by_hand_has_the_deaths_before_forgotten(
    by_hand: Event, policy: OnLimit, deaths: int
) -> None:
    """From each state without a process: down, backoff, failing or failed."""
    machine = ChildMachine(spec(Restart.PERMANENT, policy, intensity=2))
    told(machine, (Start(), 0.0), (Spawned(7), 0.0), (CRASH, 0.0))
    if deaths == 0:
        told(machine, (Stop(), 0.0), (CRASH, 0.0))
        assert machine.state is State.DOWN
    for _ in range(deaths):
        told(machine, (CRASH, 0.0))
        if deaths == 2 and machine.state is State.BACKOFF:
            machine.expire(0.1)
    told(machine, (by_hand, 1.0), (Spawned(9), 1.0))
    assert Spawn() in told(machine, (CRASH, 1.0))  # at once, as after a first death
    assert told(machine, (CRASH, 1.0)) == [ReportDeath(), A]
    assert machine.state is State.BACKOFF


def test_no_process_to_be_had_is_a_failure_like_a_death_but_without_a_report() -> None:
    machine = ChildMachine(spec())
    told(machine, (Start(), 0.0), (SpawnFailed("EAGAIN"), 0.0))
    assert machine.why is Why.SPAWN_FAILED
    assert told(machine, (SpawnFailed("EAGAIN"), 0.0)) == [A]
    assert machine.state is State.BACKOFF


def test_time_the_watchdog_was_away_is_not_held_against_the_child() -> None:
    machine = starting()
    machine.postpone(3.0)
    assert machine.expire(12.9) == []
    assert machine.expire(13.0) == [Gather(), A]


def test_a_new_spec_holds_for_the_next_death() -> None:
    machine = up()
    slow = RestartPolicy(first=4.0, jitter=0.0, healthy_after=3600.0)
    machine.take_spec(dataclasses.replace(spec(), policy=slow))

    told(machine, (CRASH, 10.0), (Spawned(8), 10.0), (Ready(), 10.0), (CRASH, 100.0))
    assert (machine.state, machine.next_deadline()) == (State.BACKOFF, 104.0)


class LifeOfAChild(RuleBasedStateMachine):
    """Random events against the operator's wish and a process that is there or is not."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = ChildMachine(spec(intensity=1))
        self.now = 0.0
        self.alive = False
        self.serving = False
        self.wish = False
        self.killed = False

    def tell(self, event: Event) -> None:
        self.obey(self.machine.receive(event, self.now))

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Spawn):
                assert not self.alive, "a second process beside the first"
                assert self.wish, "a process that nobody wants"
                self.alive, self.serving, self.killed = True, False, False
                self.tell(Spawned(1))
            elif isinstance(command, Ask | Gather):
                assert self.alive
            elif isinstance(command, Kill):
                assert self.alive
                self.killed = True
            else:
                assert not isinstance(command, GiveUp)

    @rule()
    def operator_starts(self) -> None:
        self.wish = True
        self.tell(Start())

    @rule()
    def operator_stops(self) -> None:
        self.wish = False
        self.tell(Stop())

    @rule()
    def operator_replaces(self) -> None:
        self.wish = True
        self.tell(Replace())

    @rule()
    def tree_dismisses(self) -> None:
        self.wish = False
        self.tell(Dismiss())

    @precondition(lambda self: self.alive and not self.serving)
    @rule()
    def gets_ready(self) -> None:
        self.serving = True
        self.tell(Ready())

    @precondition(lambda self: self.alive and not self.killed)
    @rule(end=st.sampled_from([CLEAN, CRASH, Gone(None, 11, wild=True)]))
    def ends(self, end: Gone) -> None:
        self.alive = self.serving = False
        self.tell(end)

    @precondition(lambda self: self.killed)
    @rule()
    def dies_of_the_kill(self) -> None:
        self.alive = self.serving = self.killed = False
        self.tell(CRASH)

    @precondition(lambda self: self.serving)
    @rule()
    def is_condemned(self) -> None:
        self.tell(Condemned("deaf"))

    @precondition(lambda self: self.machine.state is State.STOPPING)
    @rule()
    def has_written_its_stacks(self) -> None:
        self.tell(Gathered())

    @rule(by=st.floats(0.01, 20.0))
    def time_passes(self, by: float) -> None:
        self.now += by
        self.obey(self.machine.expire(self.now))

    @invariant()
    def the_state_fits_the_process(self) -> None:
        has_process = self.machine.state in (State.STARTING, State.UP, State.STOPPING)
        assert self.alive == has_process
        assert (self.machine.phase is None) == (self.machine.state is not State.STOPPING)
        if self.machine.state is State.UP:
            assert self.serving

    @invariant()
    def the_wish_is_known_and_nothing_waits_for_ever(self) -> None:
        assert self.machine.wanted_up == self.wish
        if self.machine.state not in (State.DOWN, State.UP):
            assert self.machine.next_deadline() is not None
        if self.wish:
            assert self.machine.state is not State.DOWN


TestLifeOfAChild = LifeOfAChild.TestCase
