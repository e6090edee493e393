"""What is shown of findings."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

from pkvpn.chaos import paper
from pkvpn.chaos.laboratory import Finding

GOOD = Finding("kill-core", "WHOLE", ["core dead"], 1.25, 123.4, silence_ms=2.0, frames=10)
BAD = Finding("kill-edge", "WHOLE", ["edge-1 dead"], 0.5, 20.0, lost=3, violations=["3 frames <"])
MIXED = Finding("kill-core+kill-edge", "KEPT", [], None, 40.0, lost=2)
SKIPPED = Finding("freeze-core", "WHOLE", skipped="not root")


def test_a_line_stands_below_the_heading_and_names_what_was_not_held() -> None:
    head = paper.heading()
    line = paper.line(GOOD)
    assert len(line) == len(head)
    assert line.split() == ["kill-core", "core", "dead", "1.2", "ms", "123", "ms", "2.0", "ms",
                            "0", "0", "0"]  # fmt: skip
    first, second = paper.line(BAD).splitlines()
    assert len(first) == len(head)
    assert second == "    NOT HELD: 3 frames <"
    assert paper.line(SKIPPED).split() == ["freeze-core", "skipped:", "not", "root"]


def test_a_summary_counts_faults_and_not_rounds() -> None:
    text = paper.summary([GOOD, BAD, MIXED, SKIPPED])
    assert "4 faults in 3 rounds, 1 skipped" in text
    assert "5 frames lost, 3 of them where none was to be" in text
    assert "1 rounds in which something did not hold" in text
    assert "everything held" in paper.summary([GOOD])


def test_a_picture_has_a_row_for_each_fault_that_was_made() -> None:
    root = ET.fromstring(paper.plot([GOOD, BAD, MIXED, SKIPPED]))
    texts = [one.text for one in root if one.tag.endswith("}text")]
    assert {"kill-core", "kill-edge", "kill-core+kill-edge"} <= set(texts)
    assert "freeze-core" not in texts
    dots = [one for one in root if one.tag.endswith("}circle")]
    assert len(dots) == 3 + 3 + 2 + 1  # the legend, and what is known of each


def test_the_file_has_every_finding_whole() -> None:
    written = json.loads(json.dumps(paper.as_json([GOOD, SKIPPED], seed=7)))
    assert written["seed"] == 7
    assert written["findings"][0] == vars(GOOD)
    assert written["findings"][1]["skipped"] == "not root"
