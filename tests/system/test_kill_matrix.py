"""What docs/kill-order.md promises: a pairwise sample now, and the table of the last whole run."""

from __future__ import annotations

import itertools

import pytest

from tests.system.kill_matrix import (
    DOCUMENT,
    Cell,
    Outcome,
    cells,
    expected,
    last_run,
    pairwise,
    run_cells,
    table,
    with_table,
)


def test_a_sample_has_every_pair_and_is_the_same_each_time() -> None:
    every, sample = cells(), pairwise(cells())
    for one, other in itertools.combinations(range(4), 2):
        pairs = {(cell[one], cell[other]) for cell in every}
        assert {(cell[one], cell[other]) for cell in sample} == pairs
    assert sample == pairwise(cells())
    assert len(sample) < len(every) / 10


def test_the_document_shows_what_the_last_whole_run_saw() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_table(text, last_run().values()), "run scripts/kill-matrix --write"


def test_every_cell_was_run_and_ended_as_is_promised() -> None:
    seen = {one.cell: one.error or one.outcome for one in last_run().values()}
    assert seen == {cell: expected(cell) for cell in cells()}


def test_a_cell_that_failed_is_in_the_table() -> None:
    results = [
        Outcome(Cell("core", "alone", "KILL", phase), "comes back", error)
        for phase, error in (("serving", ""), ("hang", "AssertionError"), ("respawn", ""))
    ]
    assert "comes back (hang: FAILED)" in table(results)
    assert "3 cells were run, 1 of them did not end as expected." in table(results)


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(600)
def test_a_sample_of_the_cells_ends_as_is_promised() -> None:
    results = run_cells(pairwise(cells()), jobs=3)
    assert not [f"{one.cell}: {one.error}" for one in results if one.error]
