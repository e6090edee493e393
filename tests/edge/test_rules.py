"""The rules of a connection that is data: the table of ARCHITECTURE.md, the code and the tests."""

from __future__ import annotations

import ast
import re

import pytest

from tests.edge.break_rules import BREAKS, ROOT, Break

# A row: its number, the rule, and the tests, each as `path::name`.
_ROW = re.compile(r"^\| (\d+) \| .* \| (.*) \|$", re.MULTILINE)
_TEST = re.compile(r"`(tests/[^`]*::[^`]*)`")


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: f"{one.rule}-{one.test.split('::')[1]}")
def test_the_code_that_a_rule_is_about_is_there(one: Break) -> None:
    """Who changes such a line changes the break with it, and runs `tests.edge.break_rules`."""
    text = (ROOT / one.path).read_text(encoding="utf-8")
    assert text.count(one.old) == 1, f"rule {one.rule}: not once in {one.path}: {one.old!r}"


@pytest.mark.parametrize("test", sorted({one.test for one in BREAKS}))
def test_the_test_of_a_rule_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {one.id for one in node.targets if isinstance(one, ast.Name)}
    assert name in names


def test_the_table_names_for_each_rule_the_tests_that_notice_its_breaks() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = table.partition("## A connection that is data")[2].partition("\n## ")[0]
    shown = {int(number): _TEST.findall(tests) for number, tests in _ROW.findall(table)}
    proved: dict[int, list[str]] = {}
    for one in BREAKS:
        tests = proved.setdefault(one.rule, [])
        if one.test not in tests:
            tests.append(one.test)
    assert shown == proved
    assert list(shown) == list(range(1, 13))
