"""The failure table names tests that exist, and each is turned red by some mutation or more."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TABLE = (ROOT / "docs" / "privacy.md").read_text().split("## What goes wrong elsewhere")[1]
ROWS = [
    re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| Failure")
]
CATALOGUE = [
    mutation
    for path in sorted((ROOT / "tests" / "mutations" / "catalogue").glob("*.py"))
    for mutation in importlib.import_module(f"catalogue.{path.stem}").CATALOGUE
]


def defined(file):
    return {n.name for n in ast.parse((ROOT / file).read_text()).body if hasattr(n, "name")}


def turns_red(mutation, file, name):
    """Whether a mutation's arguments for pytest choose a test, by its name without parameters."""
    found, _, words = mutation.tests.partition(" -k ")
    if not file.startswith(found):
        return False
    return any(all(w in name for w in part.split(" and ")) for part in alternatives(words))


def alternatives(words):
    plain = re.sub(r" and (\w*\d\w*|max_grad_norm|weighted)\b", "", words.strip("'"))
    return plain.split(" or ")


def test_every_row_has_tests():
    assert len(ROWS) >= 18
    assert all(ROWS)


@pytest.mark.parametrize(("file", "name"), sorted({test for row in ROWS for test in row}))
def test_the_tests_exist(file, name):
    assert name in defined(file)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][1])
def test_some_mutation_turns_a_test_of_each_row_red(row):
    assert any(turns_red(mutation, *test) for test in row for mutation in CATALOGUE)
