from pkvpn.core.mac_table import Learnt, MacTable

A = bytes.fromhex("020000000001")
B = bytes.fromhex("020000000002")
TAG = b"\x00\x07"


def table(**limits: int) -> MacTable[str]:
    return MacTable(ageing=600.0, **limits)


def test_what_was_learnt_is_found_at_its_port() -> None:
    macs = table()
    assert macs.learn(A, "one", 0.0) is Learnt.NEW
    assert macs.learn(A, "one", 5.0) is Learnt.KNOWN
    assert macs.find(A, 5.0) == "one"
    assert macs.find(B, 5.0) is None


def test_an_address_moves_to_the_port_that_used_it_last() -> None:
    macs = table()
    macs.learn(A, "one", 0.0)
    assert macs.learn(A, "two", 1.0) is Learnt.MOVED
    assert macs.find(A, 1.0) == "two"
    assert macs.forget_port("one") == []
    assert macs.forget_port("two") == [A]


def test_an_address_that_is_silent_is_forgotten_and_one_that_speaks_is_not() -> None:
    macs = table()
    macs.learn(A, "one", 0.0)
    macs.learn(B, "one", 0.0)
    macs.learn(A, "one", 300.0)
    assert macs.next_deadline() == 600.0
    assert macs.expire(600.0) == []
    assert macs.find(B, 600.5) is None
    assert macs.expire(600.5) == [B]
    assert macs.next_deadline() == 900.0
    assert macs.find(A, 900.0) == "one"


def test_a_full_table_learns_nothing_new_and_still_follows_moves() -> None:
    macs = table(limit=2)
    macs.learn(A, "one", 0.0)
    macs.learn(B, "one", 0.0)
    assert macs.learn(b"\x02\0\0\0\0\x03", "one", 0.0) is Learnt.FULL
    assert macs.learn(A, "two", 0.0) is Learnt.MOVED
    assert len(macs) == 2


def test_a_port_fills_its_own_share_only() -> None:
    macs = table(limit=10, share=1)
    macs.learn(A, "one", 0.0)
    assert macs.learn(B, "one", 0.0) is Learnt.FULL
    assert macs.learn(B, "two", 0.0) is Learnt.NEW
    assert macs.learn(A, "two", 0.0) is Learnt.FULL
    assert macs.find(A, 0.0) == "one"


def test_tags_are_tables_of_their_own_and_a_tagged_address_is_not_settled() -> None:
    macs = table()
    assert not macs.settled(A, "one")
    macs.learn(A, "one", 0.0)
    assert macs.settled(A, "one")
    assert not macs.settled(A, "two")
    assert macs.learn(A + TAG, "two", 0.0) is Learnt.NEW
    assert macs.find(A, 0.0) == "one"
    assert macs.find(A + TAG, 0.0) == "two"
    assert not macs.settled(A, "one")
    macs.forget_port("two")
    assert macs.settled(A, "one")
