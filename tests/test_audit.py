"""The audit of dependencies finds what it is there for."""

from __future__ import annotations

from tests.audit import bounds_of, compare, main, needed, too_low

LISTED = {"one": {"oldest": "1.10", "since": "a hole"}}


def test_what_is_installed_is_on_the_list() -> None:
    assert main() == 0


def test_what_is_unknown_too_old_or_not_needed_is_named() -> None:
    assert list(compare({"one": "1.10.0"}, LISTED)) == []
    assert list(compare({"one": "1.9"}, LISTED)) == ["one 1.9 is before 1.10: a hole"]
    unknown, unneeded = compare({"two": "1"}, LISTED)
    assert unknown.startswith("two 1: nobody has looked at it")
    assert unneeded.startswith("one is in")


def test_a_bound_of_setup_below_the_list_is_named() -> None:
    setup = 'install_requires=["One>=1.9", "two>=3"], extras_require={"dev": ["three>=1"]}'
    assert bounds_of(setup) == {"one": "1.9", "two": "3"}
    (wrong,) = too_low(bounds_of(setup), LISTED)
    assert wrong.startswith("one: setup.py allows 1.9")


def test_what_a_dependency_needs_is_one_as_well() -> None:
    assert {"cryptography", "cffi"} <= needed(["cryptography"])
    assert "typing-extensions" not in needed(["cryptography"])  # of older interpreters only
