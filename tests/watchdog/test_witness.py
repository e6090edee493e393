"""A witness accuses others, once per trouble, and never itself."""

from __future__ import annotations

from pkvpn.watchdog.witness import Accusation, Accuses, Witness

DUTIES = ("reach-edge", "reach-core", "own")
ACCUSES = (Accuses("reach-edge", ("edge-1", "edge-2")), Accuses("reach-core", ("core",), 5.0))


def test_a_trouble_is_passed_on_once_with_those_it_accuses() -> None:
    witness = Witness(DUTIES, ACCUSES)
    well = ((5, 0.0), (5, 0.0), (0, 0.0))
    troubled = ((5, 12.5), (5, 0.0), (0, 0.0))
    assert witness.accusations(well, 20.0) == []
    assert witness.accusations(troubled, 20.0) == [
        Accusation("reach-edge", ("edge-1", "edge-2"), 12.5)
    ]
    assert witness.accusations(troubled, 20.0) == []


def test_a_new_trouble_after_it_was_well_or_of_a_later_visit_is_passed_on_again() -> None:
    witness = Witness(DUTIES, ACCUSES)
    assert witness.accusations(((5, 0.0), (5, 12.5), (0, 0.0)), 30.0)
    assert not witness.accusations(((5, 0.0), (6, 0.0), (0, 0.0)), 30.0)
    assert witness.accusations(((5, 0.0), (6, 20.0), (0, 0.0)), 30.0)
    assert witness.accusations(((5, 0.0), (6, 25.0), (0, 0.0)), 30.0)


def test_the_witness_itself_is_judged_by_its_own_duties_only() -> None:
    witness = Witness(DUTIES, ACCUSES)
    told = ((5, 12.5), (5, 0.0), (7, 3.0))
    assert witness.own_duties(told) == ((5, 0.0), (5, 0.0), (7, 3.0))


def test_nobody_is_accused_before_the_patience_of_the_witness_is_over() -> None:
    witness = Witness(DUTIES, ACCUSES)
    told = ((0, 0.0), (5, 12.5), (0, 0.0))
    assert witness.accusations(told, 17.4) == []
    assert witness.accusations(told, 17.5) == [Accusation("reach-core", ("core",), 12.5)]
    assert witness.accusations(told, 30.0) == []


def test_as_many_troubles_in_a_row_as_it_takes_and_again_for_the_successors() -> None:
    witness = Witness(("reach",), (Accuses("reach", ("core",), times=2),))
    told = [10.0, 10.0, 0.0, 12.0, 14.0, 14.0, 16.0, 18.0]
    found = [witness.accusations(((0, since),), 20.0) for since in told]
    accused = [[one.since for one in accusations] for accusations in found]
    assert accused == [[], [], [], [], [12.0], [], [], [16.0]]
    assert witness.knows() == {"core"}


def test_who_is_suspected_and_may_have_an_excuse_is_looked_at_before_it_is_accused() -> None:
    excused = Accuses("reach", ("core",), 5.0, excused_by=("login",))
    witness = Witness(("reach",), (excused,))
    assert witness.suspects(((0, 0.0),)) == set()
    assert witness.suspects(((0, 12.5),)) == {"core"}
    assert witness.accusations(((0, 12.5),), 13.0) == []
    assert witness.accusations(((0, 12.5),), 18.0)[0].excused_by == ("login",)
    assert Witness(DUTIES, ACCUSES).suspects(((0, 1.0), (0, 1.0), (0, 1.0))) == set()


def test_what_a_witness_says_that_has_stopped_looking_is_old() -> None:
    looking = Accuses("reach", ("core",), 5.0, looks="look")
    witness = Witness(("reach", "look"), (looking,))
    assert witness.accusations(((0, 12.5), (7, 0.0)), 13.0) == []
    assert witness.accusations(((0, 12.5), (7, 0.0)), 18.0) == []
    assert witness.accusations(((0, 12.5), (7, 0.0)), 30.0) == []
    assert witness.accusations(((0, 12.5), (8, 0.0)), 31.0) == [
        Accusation("reach", ("core",), 12.5)
    ]
