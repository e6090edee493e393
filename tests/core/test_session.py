import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvpn.channel import EdgeDrop
from pkvpn.core.session import Claim, Session, SessionKeys, Sessions
from pkvpn.protocol.messages import Direction

KEYS = SessionKeys(bytes(32))
CLAIMS = st.builds(
    Claim,
    st.integers(0, 2**40 - 1),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.integers(1, 32),
    st.integers(0, 2**16 - 1),
)


def sessions(started_at: float = 0.0) -> Sessions:
    return Sessions(KEYS, timeout=60.0, started_at=started_at)


def opened(
    table: Sessions, *, half: bool = False, max_connection: int = 1, now: float = 0.0
) -> Session:
    return table.open(
        hub_id=1,
        user_id=2,
        user="Ann",
        generation=3,
        half=half,
        max_connection=max_connection,
        random=b"\x12\x34",
        now=now,
    )


@given(CLAIMS)
def test_a_key_says_what_it_was_made_of(claim: Claim) -> None:
    key = KEYS.make(claim)
    assert len(key) == 20
    assert KEYS.read(key) == claim


@given(CLAIMS, st.integers(0, 159))
def test_a_key_with_one_other_bit_is_none(claim: Claim, bit: int) -> None:
    key = int.from_bytes(KEYS.make(claim), "big") ^ (1 << bit)
    assert KEYS.read(key.to_bytes(20, "big")) is None


@given(st.binary(max_size=40))
def test_no_bytes_are_a_key_by_accident(key: bytes) -> None:
    assert KEYS.read(key) is None


def test_a_key_of_another_secret_is_none() -> None:
    assert SessionKeys(b"\x01" * 32).read(KEYS.make(Claim(1, 1, False, 1))) is None


def test_a_key_alone_brings_no_session_back_that_began_long_ago() -> None:
    table = Sessions(KEYS, timeout=60.0, started_at=0.0, week=2900)
    claim = opened(table).claim
    assert KEYS.read(KEYS.make(claim)) == claim
    for week, good in ((2899, True), (2900, True), (2904, True), (2905, False), (2898, False)):
        later = Sessions(KEYS, timeout=60.0, started_at=100.0, week=week)
        assert later.may_rebuild(claim, 101.0) is good
    # Who is replayed by an edge has been there all the time.
    later.rebuild(claim, hub_id=1, user_id=2, user="Ann", created_at=0.0, now=101.0)
    assert later.find(claim) is not None


def test_names_count_up() -> None:
    table = sessions()
    assert [opened(table).name for _ in range(3)] == ["SID-ANN-1", "SID-ANN-2", "SID-ANN-3"]
    assert table.next_connection_number() == 1


def test_half_duplex_connections_take_turns_as_in_the_original() -> None:
    table = sessions()
    session = opened(table, half=True, max_connection=4)
    table.attach(session, 1, session.first_direction())
    for conn in (2, 3, 4):
        table.attach(session, conn, session.next_direction())
    assert list(session.connections.values()) == [
        Direction.TO_SERVER,
        Direction.TO_CLIENT,
        Direction.TO_CLIENT,
        Direction.TO_SERVER,
    ]
    assert session.to_client == (2, 3)


def test_a_session_waits_for_its_client_and_then_ends() -> None:
    table = sessions()
    session = opened(table)
    table.attach(session, 1, Direction.BOTH)
    assert table.next_deadline() is None
    assert table.detach(1, 100.0) is session
    assert table.next_deadline() == 160.0
    assert table.expire(159.9) == []
    assert table.expire(160.0) == [session]
    assert len(table) == table.count(1) == 0
    assert table.find(session.claim) is None


def test_a_client_that_comes_back_in_time_finds_its_session() -> None:
    table = sessions()
    session = opened(table)
    table.attach(session, 1, Direction.BOTH)
    table.detach(1, 100.0)
    claim = KEYS.read(session.key)
    assert claim is not None
    assert table.find(claim) is session
    table.attach(session, 2, session.next_direction())
    assert table.expire(1000.0) == []
    assert table.of_connection(2) is session


def test_a_login_that_never_gets_its_connection_ends_too() -> None:
    table = sessions()
    session = opened(table, now=5.0)
    assert table.expire(65.0) == [session]


def test_only_a_young_core_believes_a_key_alone() -> None:
    claim = Claim(7 << 16 | 5, 3, False, 1)
    table = sessions(started_at=100.0)
    assert table.may_rebuild(claim, 159.0)
    assert not table.may_rebuild(claim, 160.0)
    session = table.rebuild(claim, hub_id=1, user_id=2, user="Ann", created_at=1.0, now=101.0)
    assert (session.name, session.key) == ("SID-ANN-7", KEYS.make(claim))
    assert not table.may_rebuild(claim, 102.0)
    assert opened(table).name == "SID-ANN-8"


def test_a_session_that_ended_here_does_not_come_back_by_its_key() -> None:
    table = sessions(started_at=0.0)
    session = opened(table)
    table.attach(session, 4, Direction.BOTH)
    assert table.end(session, 10.0) == [4]
    assert table.end(session, 10.0) == []
    assert not table.may_rebuild(session.claim, 11.0)
    assert table.of_connection(4) is None
    assert table.detach(4, 12.0) is None


NONE = (0,) * len(EdgeDrop)


def test_counts_of_connections_that_are_gone_stay_with_the_session() -> None:
    table = sessions()
    session = opened(table, max_connection=2)
    for conn in (1, 2):
        table.attach(session, conn, Direction.BOTH)
        session.counts[conn] = (conn, 10, 20, 30, *NONE)
    table.detach(1, 0.0)
    session.counts[2] = (5, 11, 21, 31, 1, *NONE[1:])
    assert session.total_counts() == (6, 21, 41, 61, 1, *NONE[1:])


@pytest.mark.parametrize("conn", [0, 99])
def test_a_connection_of_nobody_has_no_session(conn: int) -> None:
    assert sessions().of_connection(conn) is None
