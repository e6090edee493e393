"""Judgement with assigned times: who is condemned, who is spared, and when."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkvpn.watchdog.verdict import (
    Action,
    Beat,
    Command,
    Condemn,
    Continue,
    Facts,
    Judge,
    Limits,
    Look,
    Note,
    Verdict,
    Workload,
)

PID = 7
MS = 1_000_000
LIMITS = Limits(
    beat_interval=0.2,
    hang_timeout=1.0,
    starved_timeout=30.0,
    stopped_timeout=10.0,
    dump_timeout=60.0,
    deaf_timeout=5.0,
)


def armed(limits: Limits = LIMITS) -> Judge:
    """A child that was last heard at 0.0."""
    judge = Judge(PID, limits)
    judge.arm(0.0)
    assert judge.beat(Beat(1, 0.0, ()), 0.0) == []
    return judge


def facts(state: str = "S", *, run: int = 0, wait: int = 0, **more: Any) -> Facts:
    """Times in ms."""
    return Facts(state=state, run_ns=run * MS, wait_ns=wait * MS, **more)


def judged(judge: Judge, first: Facts | None, second: Facts | None) -> list[Command]:
    """What is said at the deadline, 1.0, after a first sample at 0.5."""
    assert judge.expire(0.5) == [Look(PID)]
    assert judge.facts(first, 0.5) == []
    assert judge.next_deadline() == 1.0
    assert judge.expire(1.0) == [Look(PID)]
    return judge.facts(second, 1.0)


def condemned(commands: list[Command]) -> Verdict | None:
    found = [command.verdict for command in commands if isinstance(command, Condemn)]
    assert len(found) <= 1
    return found[0] if found else None


def noted(commands: list[Command]) -> list[Verdict | None]:
    return [command.verdict for command in commands if isinstance(command, Note)]


# The classes


def test_there_are_eleven_classes_and_each_has_its_action() -> None:
    assert [verdict.value for verdict in Verdict] == [
        *("dead", "blocked", "busy", "deaf", "mute", "corrupt"),
        *("starved", "stopped", "traced", "frozen", "dumping"),
    ]
    for verdict in Verdict:
        assert verdict.guilty == (verdict.action is Action.KILL)
        assert Verdict[verdict.name] is verdict


@pytest.mark.parametrize("state", ["S", "D", "I"])
def test_a_child_that_sleeps_through_its_deadline_is_blocked(state: str) -> None:
    commands = judged(armed(), facts(state), facts(state, wchan="futex_do_wait"))

    assert condemned(commands) is Verdict.BLOCKED
    (condemn,) = commands
    assert isinstance(condemn, Condemn)
    assert condemn.text.startswith("no beat for 1.00 s")
    assert "futex_do_wait" in condemn.text


def test_a_child_that_spins_is_busy_at_its_deadline() -> None:
    commands = judged(armed(), facts("R", run=5000), facts("R", run=5495))

    assert condemned(commands) is Verdict.BUSY


def test_a_child_that_runs_all_the_time_is_busy_whatever_its_state_shows() -> None:
    assert condemned(judged(armed(), facts("S"), facts("S", run=500))) is Verdict.BUSY


def test_a_child_that_got_half_a_processor_has_twice_the_time() -> None:
    judge = armed()
    assert condemned(judged(judge, facts("R"), facts("R", run=250, wait=250))) is None
    assert judge.verdict == "starved"

    at, verdict = 1.0, None
    while verdict is None:
        deadline = judge.next_deadline()
        assert deadline is not None
        at = deadline
        assert judge.expire(at) == [Look(PID)]
        half = int((at - 0.5) * 500)
        verdict = condemned(judge.facts(facts("R", run=half, wait=half), at))
    assert verdict is Verdict.BUSY
    assert at == 2.0


def test_a_child_that_waits_for_a_processor_is_starved_and_is_extended() -> None:
    judge = armed()
    commands = judged(judge, facts("R"), facts("R", run=13, wait=480))

    assert noted(commands) == [Verdict.STARVED]
    assert judge.verdict == "starved"
    assert judge.next_deadline() == pytest.approx(1.974)


def test_a_runnable_child_whose_wait_is_not_yet_counted_is_starved() -> None:
    # The kernel adds a wait when it ends: run and wait both stand still.
    assert noted(judged(armed(), facts("R"), facts("R"))) == [Verdict.STARVED]


def test_the_starved_are_announced_once_and_condemned_after_starved_timeout() -> None:
    judge = armed()
    notes = noted(judged(judge, facts("R"), facts("R", wait=500)))
    now = 1.0
    while now < 100:
        deadline = judge.next_deadline()
        assert deadline is not None
        assert deadline > now
        now = deadline
        assert judge.expire(now) == [Look(PID)]
        commands = judge.facts(facts("R", run=int(now), wait=int(now * 990)), now)
        notes += noted(commands)
        if condemned(commands) is Verdict.STARVED:
            break
    assert notes == [Verdict.STARVED]
    assert now == 30.0


def test_a_starved_child_that_then_sleeps_is_blocked() -> None:
    judge = armed()
    judged(judge, facts("R"), facts("R", wait=480))
    judge.expire(2.0)
    assert condemned(judge.facts(facts("S", wait=490), 2.0)) is Verdict.BLOCKED


def silent_again(judge: Judge, beat_at: float, *views: Facts) -> list[Command]:
    """It beats, is silent again, and is looked at at half and at the whole of its timeout."""
    judge.beat(Beat(int(beat_at * 100), 0.0, ()), beat_at)
    said: list[Command] = []
    for view, at in zip(views, (beat_at + 0.5, beat_at + 1.0), strict=True):
        assert judge.expire(at) == [Look(PID)]
        said += judge.facts(view, at)
    return said


def test_processor_time_from_before_a_beat_does_not_count() -> None:
    judge = armed()
    judged(judge, facts("R"), facts("R", run=400, wait=100))
    said = silent_again(judge, 1.1, facts("R", run=500, wait=600), facts("R", run=510, wait=1000))
    assert condemned(said) is None
    assert judge.verdict == "starved"


def test_what_held_it_before_a_beat_is_no_excuse_after() -> None:
    judge = armed()
    judged(judge, facts("S", frozen=True), facts("S", frozen=True))
    assert condemned(silent_again(judge, 1.1, facts("S"), facts("S"))) is Verdict.BLOCKED


def test_processor_time_from_while_it_was_held_does_not_count() -> None:
    judge = armed()
    assert judged(judge, facts("t", tracer_pid=1), facts("R", run=900)) == []
    judge.expire(1.5)
    assert judge.facts(facts("R", run=900), 1.5) == []
    judge.expire(2.0)
    assert noted(judge.facts(facts("R", run=910, wait=480), 2.0)) == [Verdict.STARVED]


def test_without_a_count_of_waits_sleep_is_what_it_did_not_run() -> None:
    asleep = judged(armed(), Facts(state="S", run_ns=0), Facts(state="S", run_ns=10 * MS))
    assert condemned(asleep) is Verdict.BLOCKED
    runnable = judged(armed(), Facts(state="R", run_ns=0), Facts(state="R", run_ns=10 * MS))
    assert noted(runnable) == [Verdict.STARVED]
    half = judged(armed(), facts("S"), Facts(state="S", run_ns=10 * MS))
    assert condemned(half) is Verdict.BLOCKED


def test_without_schedstat_the_ticks_of_all_threads_decide() -> None:
    spins = judged(
        armed(),
        Facts(state="R", utime=1.0, stime=0.1),
        Facts(state="R", utime=1.4, stime=0.2),
    )
    assert condemned(spins) is Verdict.BUSY

    waits = judged(
        armed(),
        Facts(state="R", utime=1.0, stime=0.1),
        Facts(state="R", utime=1.01, stime=0.1),
    )
    assert noted(waits) == [Verdict.STARVED]


def test_without_any_processor_time_the_state_decides() -> None:
    assert condemned(judged(armed(), Facts(state="R"), Facts(state="R"))) is Verdict.BUSY
    assert condemned(judged(armed(), Facts(state="S"), Facts(state="S"))) is Verdict.BLOCKED
    assert condemned(judged(armed(), Facts(), Facts())) is Verdict.BLOCKED


def test_without_proc_silence_is_all_there_is() -> None:
    assert condemned(judged(armed(), None, None)) is Verdict.BLOCKED


def test_facts_that_vanish_get_one_more_look() -> None:
    judge = armed()
    assert judged(judge, facts(), None) == []
    assert judge.next_deadline() == 1.25
    judge.expire(1.25)
    assert condemned(judge.facts(None, 1.25)) is Verdict.BLOCKED


def test_facts_that_appear_start_the_difference() -> None:
    judge = armed()
    assert judged(judge, None, facts("R")) == []
    judge.expire(1.25)
    assert noted(judge.facts(facts("R", wait=240), 1.25)) == [Verdict.STARVED]


def test_a_main_thread_that_ended_is_dead() -> None:
    assert condemned(judged(armed(), facts("S"), facts("Z", threads=2))) is Verdict.DEAD


@pytest.mark.parametrize(
    ("excuse", "verdict"),
    [
        (facts("t", tracer_pid=99), Verdict.TRACED),
        (facts("S", tracer_pid=99), Verdict.TRACED),
        (facts("t"), Verdict.TRACED),
        (facts("D", frozen=True), Verdict.FROZEN),  # v1
        (facts("S", frozen=True), Verdict.FROZEN),  # v2
        (facts("T", frozen=True), Verdict.FROZEN),
    ],
)
def test_judgement_rests_while_it_is_held(excuse: Facts, verdict: Verdict) -> None:
    judge = armed()
    commands = judged(judge, excuse, excuse)
    assert noted(commands) == [verdict]
    assert condemned(commands) is None
    for now in range(2, 500):
        assert judge.next_deadline() == now
        assert judge.expire(now) == [Look(PID)]
        assert judge.facts(excuse, now) == []
    assert judge.verdict == verdict.value

    # Let go, it has a whole round to beat in.
    judge.expire(500)
    assert judge.facts(facts("S"), 500) == []
    assert judge.next_deadline() == 500.5
    judge.expire(500.5)
    assert judge.facts(facts("S"), 500.5) == []
    judge.expire(501.0)
    assert condemned(judge.facts(facts("S"), 501.0)) is Verdict.BLOCKED


def test_who_was_held_at_the_first_look_only_gets_a_round() -> None:
    judge = armed()
    assert judged(judge, facts("S", frozen=True), facts("S")) == []
    assert judge.next_deadline() == 1.5
    assert noted(judge.beat(Beat(2, 0.0, ()), 1.1)) == []
    assert judge.verdict == "ok"


def test_a_core_dump_is_extended_up_to_dump_timeout() -> None:
    judge = armed()
    dump = facts("D", core_dumping=True)
    assert noted(judged(judge, dump, dump)) == [Verdict.DUMPING]
    now = 1.0
    while True:
        deadline = judge.next_deadline()
        assert deadline is not None
        now = deadline
        judge.expire(now)
        if commands := judge.facts(dump, now):
            break
    assert condemned(commands) is Verdict.DUMPING
    assert now == 60.5  # first seen at 0.5


def test_a_stopped_child_is_continued_once() -> None:
    judge = armed()
    commands = judged(judge, facts("S"), facts("T"))

    assert Continue(PID) in commands
    assert noted(commands) == [Verdict.STOPPED]
    assert noted(judge.beat(Beat(2, 0.0, ()), 1.01)) == [None]
    assert judge.verdict == "ok"


def test_a_child_that_stays_stopped_after_the_sigcont_is_condemned() -> None:
    judge = armed()
    judged(judge, facts("T"), facts("T"))
    judge.expire(1.5)
    assert judge.facts(facts("T"), 1.5) == []
    judge.expire(2.0)
    assert condemned(judge.facts(facts("T"), 2.0)) is Verdict.STOPPED


def stopped_again(judge: Judge, at: float) -> list[Command]:
    """It beat at ``at`` and is found stopped at the next deadline."""
    judge.beat(Beat(int(at * 10), 0.0, ()), at)
    judge.expire(at + 0.5)
    judge.facts(facts("T"), at + 0.5)
    judge.expire(at + 1.0)
    return judge.facts(facts("T"), at + 1.0)


def test_a_child_stopped_again_soon_is_condemned_and_later_is_continued() -> None:
    judge = armed()
    judged(judge, facts("S"), facts("T"))
    assert condemned(stopped_again(judge, 9.0)) is Verdict.STOPPED

    judge = armed()
    judged(judge, facts("S"), facts("T"))
    assert Continue(PID) in stopped_again(judge, 10.5)


def test_a_policy_may_leave_it_stopped_for_stopped_timeout() -> None:
    judge = armed(Limits(stopped_timeout=3.0, continue_stopped=False))
    assert noted(judged(judge, facts("S"), facts("T"))) == [Verdict.STOPPED]
    for now in (2.0, 3.0):
        judge.expire(now)
        assert judge.facts(facts("T"), now) == []
    judge.expire(4.0)
    assert condemned(judge.facts(facts("T"), 4.0)) is Verdict.STOPPED


def test_what_it_does_after_the_sigcont_is_judged_by_itself() -> None:
    judge = armed()
    judged(judge, facts("T"), facts("T"))
    judge.expire(1.5)
    judge.facts(facts("S"), 1.5)
    judge.expire(2.0)
    assert condemned(judge.facts(facts("S"), 2.0)) is Verdict.BLOCKED


# Deaf


def waiting(
    judge: Judge, *, start: float, end: float, done: int = 0, since: float = 0.0, seq: int = 100
) -> tuple[list[Command], float]:
    """Beats every 0.2 s with one duty; the first commands, and when."""
    now, number = start, seq
    while now < end:
        if commands := judge.beat(Beat(number, 0.0, ((done, since),)), now):
            return commands, now
        now, number = round(now + 0.2, 3), number + 1
    return [], now


def test_a_duty_that_waits_and_does_not_move_is_deaf() -> None:
    commands, at = waiting(armed(), start=1.0, end=20, since=0.9)
    assert condemned(commands) is Verdict.DEAF
    assert at == 6.0


def test_idle_is_not_deaf() -> None:
    assert waiting(armed(), start=1.0, end=100)[0] == []


def test_each_thing_done_gives_deaf_timeout_again() -> None:
    judge = armed()
    assert waiting(judge, start=1.0, end=5.5, since=0.9, done=1)[0] == []
    commands, at = waiting(judge, start=5.6, end=20, since=0.9, done=2, seq=500)
    assert condemned(commands) is Verdict.DEAF
    assert at == pytest.approx(10.6)


def test_a_newer_thing_that_waits_counts_from_its_own_time() -> None:
    judge = armed()
    assert waiting(judge, start=1.0, end=5.5, since=0.9)[0] == []
    commands, at = waiting(judge, start=5.6, end=20, since=5.5, seq=500)
    assert condemned(commands) is Verdict.DEAF
    assert at == 10.6


@pytest.mark.parametrize("since", [math.nan, math.inf, 1e12, -5.0])
def test_a_time_that_cannot_be_is_counted_on_our_clock(since: float) -> None:
    commands, at = waiting(armed(), start=1.0, end=20, since=since)
    assert condemned(commands) is Verdict.DEAF
    assert at == 6.0


def test_nobody_is_deaf_before_it_is_ready() -> None:
    judge = Judge(PID, LIMITS)
    assert waiting(judge, start=1.0, end=50, since=0.5)[0] == []
    judge.arm(50.0)
    commands, at = waiting(judge, start=50.1, end=99, since=0.5, seq=900)
    assert condemned(commands) is Verdict.DEAF
    assert at == pytest.approx(55.1)


def test_a_duty_may_have_a_timeout_of_its_own() -> None:
    limits = Limits(deaf_timeout=5.0, deaf_timeouts=(None, 2.0), duty_names=("loop", "login"))
    judge = armed(limits)
    now = 1.0
    commands: list[Command] = []
    seq = 10
    while not commands:
        commands = judge.beat(Beat(seq, 0.0, ((0, 0.9), (0, 0.9))), now)
        now, seq = now + 0.2, seq + 1
    assert condemned(commands) is Verdict.DEAF
    assert now - 0.2 == pytest.approx(3.0)
    (condemn,) = commands
    assert isinstance(condemn, Condemn)
    assert "duty 'login'" in condemn.text


# Own lag, repeated beats, after the verdict


def test_own_lag_gives_one_more_round() -> None:
    judge = armed()
    judge.expire(0.5)
    judge.facts(facts("S"), 0.5)
    assert judge.woke_late(0.3, 3.0) == []
    assert judge.next_deadline() == 3.5
    assert judge.expire(3.0) == []


def test_a_little_lag_changes_nothing() -> None:
    judge = armed()
    judge.woke_late(0.2, 0.4)
    assert judge.next_deadline() == 0.5


def test_a_suspend_gives_one_more_round_and_to_duties_too() -> None:
    judge = armed()
    judge.beat(Beat(2, 0.0, ((0, 0.1),)), 0.2)
    judge.suspended(3600.0, 4.9)
    assert judge.next_deadline() == 5.4
    commands, at = waiting(judge, start=5.0, end=99, since=0.1)
    assert condemned(commands) is Verdict.DEAF
    assert at == pytest.approx(10.0)


def test_a_late_first_look_is_followed_by_a_second() -> None:
    judge = armed()
    assert judge.expire(1.1) == [Look(PID)]
    assert judge.facts(facts("S"), 1.1) == []
    assert judge.next_deadline() == 1.35
    judge.expire(1.35)
    assert condemned(judge.facts(facts("S"), 1.35)) is Verdict.BLOCKED


def test_a_look_that_nobody_answers_is_asked_for_again() -> None:
    judge = armed()
    assert judge.expire(0.5) == [Look(PID)]
    assert judge.next_deadline() == 0.75
    assert judge.expire(0.75) == [Look(PID)]


def test_a_beat_that_repeats_itself_is_no_sign_of_life() -> None:
    judge = armed()
    judge.beat(Beat(5, 0.0, ()), 0.3)
    judge.beat(Beat(5, 0.0, ()), 0.6)
    assert judge.silent_since == 0.3


def test_mute_and_corrupt_are_guilty_at_once_also_before_ready() -> None:
    assert condemned(Judge(PID).mute(0.1)) is Verdict.MUTE
    assert condemned(armed().corrupt(0.1, "bad magic")) is Verdict.CORRUPT


def test_the_condemned_are_judged_once() -> None:
    judge = armed()
    judge.mute(0.1)
    assert judge.verdict == "mute"
    assert judge.next_deadline() is None
    assert judge.mute(0.2) == []
    assert judge.corrupt(0.2) == []
    assert judge.beat(Beat(9, 0.0, ()), 0.3) == []
    assert judge.facts(facts("S"), 0.4) == []
    assert judge.expire(99.0) == []
    judge.woke_late(9.0, 99.0)
    assert judge.next_deadline() is None
    judge.arm(100.0)
    assert judge.next_deadline() is None


def test_nothing_is_asked_before_it_is_ready() -> None:
    judge = Judge(PID, LIMITS)
    assert judge.next_deadline() is None
    assert judge.silent_since is None
    assert judge.verdict == "ok"
    assert judge.expire(100.0) == []
    assert judge.facts(facts("S"), 100.0) == []
    judge.woke_late(5.0, 100.0)
    assert judge.next_deadline() is None
    judge.arm(200.0)
    judge.arm(201.0)
    assert judge.next_deadline() == 200.5


def test_trouble_that_comes_and_goes_is_announced_now_and_then() -> None:
    judge = armed()
    notes: list[Verdict | None] = []
    for second in range(0, 60, 2):
        judge.expire(second + 0.5)
        judge.facts(facts("R"), second + 0.5)
        judge.expire(second + 1.0)
        notes += noted(judge.facts(facts("R", wait=500), second + 1.0))
        assert judge.verdict == "starved"
        notes += noted(judge.beat(Beat(1000 + second, 0.0, ()), second + 2.0))
        assert judge.verdict == "ok"
    assert notes == [Verdict.STARVED, None] * 6


# Invariants

STATES = st.sampled_from("RSDITtZ")


@st.composite
def worlds(draw: st.DrawFn) -> Facts | None:
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    maybe = st.one_of(st.none(), st.integers(0, 10**11))
    return Facts(
        state=draw(STATES),
        run_ns=draw(maybe),
        wait_ns=draw(maybe),
        utime=draw(st.one_of(st.none(), st.floats(0, 1e5))),
        stime=draw(st.one_of(st.none(), st.floats(0, 1e5))),
        tracer_pid=draw(st.one_of(st.none(), st.integers(0, 3))),
        core_dumping=draw(st.one_of(st.none(), st.booleans())),
        frozen=draw(st.one_of(st.none(), st.booleans())),
    )


def run_shell(judge: Judge, world: Facts | None, now: float) -> list[Command]:
    """What a shell does at ``now``; looks are answered at once."""
    said = []
    for command in judge.expire(now):
        assert command == Look(PID)
        said += judge.facts(world, now)
    return said


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=20),
    views=st.lists(worlds(), min_size=1, max_size=8),
)
def test_who_beats_in_time_and_does_its_duties_is_never_condemned(
    gaps: list[float], views: list[Facts | None]
) -> None:
    judge = armed()
    now, done = 0.0, 0
    for number, gap in enumerate(gaps):
        for step in (0.3, 0.6, 0.9):
            said = run_shell(judge, views[number % len(views)], now + gap * step)
            assert condemned(said) is None
        now, done = now + gap, done + 1
        assert condemned(judge.beat(Beat(number + 2, 0.0, ((done, now - 1e-3),)), now)) is None


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0.21, 1e4), worlds()), min_size=1, max_size=20),
    since=st.floats(0.0, 1e4),
)
def test_own_lag_never_condemns(steps: list[tuple[float, Facts | None]], since: float) -> None:
    judge = armed()
    now = 0.0
    for number, (late, world) in enumerate(steps):
        now += late
        judge.woke_late(late, now)
        assert condemned(run_shell(judge, world, now)) is None
        beat = Beat(number + 2, 0.0, ((0, since),))
        if number % 2:
            assert condemned(judge.beat(beat, now)) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 3.0), st.integers(0, 3), worlds()), max_size=40))
def test_the_judge_keeps_its_promises_whatever_comes(
    events: list[tuple[float, int, Facts | None]],
) -> None:
    """At most one verdict of guilt, none without silence for a hang_timeout; notes alternate;
    while it judges there is a deadline in the future; no exception."""
    judge = Judge(PID, LIMITS)
    judge.arm(0.0)
    now, heard, guilty = 0.0, 0.0, 0
    last_note: object = "nothing"
    for number, (gap, what, world) in enumerate(events):
        now += gap
        said: list[Command] = []
        if what == 0:
            said = judge.beat(Beat(number + 1, 0.0, ()), now)
            heard = now
        elif what == 1:
            said = judge.woke_late(gap, now)
            heard = now if gap > LIMITS.beat_interval else heard
        else:
            said = run_shell(judge, world, now)
        for command in said:
            if isinstance(command, Condemn):
                guilty += 1
                assert now - heard >= LIMITS.hang_timeout
            elif isinstance(command, Note):
                assert command.verdict is not last_note
                last_note = command.verdict
        if guilty:
            assert judge.next_deadline() is None
        elif what > 1:
            deadline = judge.next_deadline()
            assert deadline is not None
            assert deadline > now
    assert guilty <= 1


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 1.0), st.sampled_from(["busy", "blocked"]))
def test_who_is_guilty_is_found_within_its_share_of_the_processor(share: float, how: str) -> None:
    """A spinning child after a hang_timeout's worth of CPU, a sleeping one at its deadline."""
    judge = armed(Limits(starved_timeout=1000.0))
    now = 0.0
    while True:
        deadline = judge.next_deadline()
        assert deadline is not None
        now = deadline
        ran = int(now * 1000 * share) if how == "busy" else 0
        waited = int(now * 1000) - ran if how == "busy" else 0
        verdict = condemned(
            run_shell(judge, facts("R" if how == "busy" else "S", run=ran, wait=waited), now)
        )
        if verdict is not None:
            break
    assert verdict.value == how
    if how == "blocked":
        assert now == 1.0
    else:
        assert now * share <= 1.3


# --- busy, and not deaf


@pytest.mark.parametrize(
    ("ran", "waited", "done", "excused"),
    [
        (1.9, 0.0, (5, 0), True),
        (0.4, 1.2, (0, 1), True),  # it would run if it could
        (1.9, 0.0, (0, 0), False),  # nothing comes of it
        (0.5, 0.0, (50, 50), False),  # it has time enough
    ],
)
def test_who_has_no_time_left_and_gets_things_done_is_busy_and_not_deaf(
    ran: float, waited: float, done: tuple[int, int], excused: bool
) -> None:
    work = Workload()
    assert work.excuse([0, 1]) == ""
    work.look(Facts(run_ns=0, wait_ns=0), (0, 0, 0), 10.0)
    assert work.excuse([0, 1]) == ""
    after = Facts(run_ns=int(ran * 1e9), wait_ns=int(waited * 1e9))
    work.look(after, (*done, 99), 12.0)
    assert bool(work.excuse([0, 1])) == excused


def test_what_somebody_did_long_ago_or_a_moment_ago_is_no_excuse() -> None:
    work = Workload()
    work.look(Facts(run_ns=0), (0,), 0.0)
    work.look(Facts(run_ns=10**9), (100,), 1.0)
    assert work.excuse([0])
    work.look(Facts(run_ns=10**9), (100,), 6.5)
    assert not work.excuse([0])
    work.look(Facts(run_ns=10**9 + 10**8), (101,), 6.6)
    assert not work.excuse([0])
    work.look(None, (101,), 7.0)
