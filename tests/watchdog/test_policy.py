"""When a child that died comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pkvpn.watchdog.policy import RestartCounter, RestartPolicy

POLICY = RestartPolicy(
    first=0.1, factor=2.0, cap=1.0, jitter=0.0, healthy_after=5.0, intensity=6, period=60.0
)


def young_deaths(counter: RestartCounter, count: int, *, start: float = 0.0) -> list[float]:
    return [
        counter.died(up_for=0.0, wild=False, now=start + i, lot=0.5).delay for i in range(count)
    ]


def test_the_first_restart_is_immediate_and_the_next_wait_twice_as_long_each() -> None:
    assert young_deaths(RestartCounter(POLICY), 6) == [0.0, 0.1, 0.2, 0.4, 0.8, 1.0]


def test_a_child_that_had_served_for_a_while_comes_back_at_once_however_often_it_is_killed() -> (
    None
):
    counter = RestartCounter(POLICY)
    for i in range(100):
        decision = counter.died(up_for=5.0, wild=False, now=i * 5.0, lot=0.5)
        assert decision == (0.0, False)


def test_health_makes_young_deaths_forgotten() -> None:
    counter = RestartCounter(POLICY)
    young_deaths(counter, 6)
    counter.died(up_for=5.0, wild=False, now=10.0, lot=0.5)
    assert young_deaths(counter, 2, start=11.0) == [0.0, 0.1]


def test_more_young_deaths_than_intensity_within_the_period_reach_the_limit() -> None:
    counter = RestartCounter(POLICY)
    young_deaths(counter, 6)
    assert counter.died(up_for=0.0, wild=False, now=6.0, lot=0.5) == (1.0, True)


def test_young_deaths_older_than_the_period_do_not_count_towards_the_limit() -> None:
    counter = RestartCounter(POLICY)
    young_deaths(counter, 6)
    assert not counter.died(up_for=0.0, wild=False, now=65.1, lot=0.5).limit


def test_after_a_wild_crash_nobody_comes_back_at_once_even_if_it_was_healthy() -> None:
    counter = RestartCounter(POLICY)
    assert counter.died(up_for=100.0, wild=True, now=0.0, lot=0.5).delay == 0.1
    assert counter.died(up_for=0.0, wild=True, now=1.0, lot=0.5).delay == 0.2


def test_jitter_moves_the_delay_both_ways_by_its_share() -> None:
    policy = RestartPolicy(first=1.0, jitter=0.2, cap=10.0)
    delays = []
    for lot in (0.0, 0.5, 0.999999):
        counter = RestartCounter(policy)
        counter.died(up_for=0.0, wild=False, now=0.0, lot=lot)
        delays.append(round(counter.died(up_for=0.0, wild=False, now=1.0, lot=lot).delay, 3))
    assert delays == [0.8, 1.0, 1.2]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 20), st.booleans(), st.floats(0, 30), st.floats(0, 1, exclude_max=True)
        ),
        max_size=60,
    )
)
def test_no_history_of_deaths_waits_beyond_the_cap_or_is_forgiven_too_early(
    deaths: list[tuple[float, bool, float, float]],
) -> None:
    policy = RestartPolicy(first=0.1, cap=1.0, jitter=0.2, healthy_after=5.0, intensity=3, period=9)
    counter = RestartCounter(policy)
    now = 0.0
    young: list[float] = []
    for up_for, wild, later, lot in deaths:
        now += later
        decision = counter.died(up_for=up_for, wild=wild, now=now, lot=lot)
        if up_for >= policy.healthy_after:
            young.clear()
        if up_for < policy.healthy_after or wild:
            young.append(now)
        recent = [at for at in young if at > now - policy.period]
        assert 0.0 <= decision.delay <= policy.cap * (1 + policy.jitter)
        assert decision.limit == (len(recent) > policy.intensity and bool(young))
        if wild:
            assert decision.delay > 0.0
