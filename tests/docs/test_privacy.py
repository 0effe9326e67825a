"""The failure table names tests that exist, and each is turned red by some mutation or more."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from mutation import catalogue

from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import epsilon_by

ROOT = Path(__file__).parent.parent.parent
TABLE = (ROOT / "docs" / "privacy.md").read_text().split("## What goes wrong elsewhere")[1]
ROWS = [
    re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| Failure")
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
    plain = re.sub(r" and (\w*\d\w*|flooding|max_grad_norm|weighted)\b", "", words.strip("'"))
    return plain.split(" or ")


def test_every_row_has_tests():
    assert len(ROWS) >= 18
    assert all(ROWS)


@pytest.mark.parametrize(("file", "name"), sorted({test for row in ROWS for test in row}))
def test_the_tests_exist(file, name):
    assert name in defined(file)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][1])
def test_some_mutation_turns_a_test_of_each_row_red(row):
    assert any(turns_red(mutation, *test) for test in row for mutation in catalogue())


def test_the_figures_of_opacus_gdp_accountant_are_what_it_says():
    text = " ".join((ROOT / "docs" / "privacy.md").read_text().split())
    third = [Release(1.0, 0.01, 1000)]  # of tests/privacy/test_accounting.py
    gdp, pld = (epsilon_by(name, third, delta=1e-5) for name in ("opacus-gdp", "pld"))
    assert f"({gdp:.2f} where {pld:.2f} is spent, in the third reference case)" in text
