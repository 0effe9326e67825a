"""k and l against counting by hand, and where there are too many classes to keep."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_secure.anonymize.classes import ClassCount, Classes, RowHash
from lightning_secure.errors import DataError


def counted(rows, quasi, sensitive, *, step=3, most=2**20):
    """Return k and the l of each sensitive column of rows given as tuples."""
    classes, hashes = Classes(sensitive=len(sensitive), most=most), RowHash()
    for start in range(0, len(rows), step):
        part = list(zip(*rows[start : start + step], strict=True))

        def of(columns, part=part):
            return hashes.rows([(str(c), part[c]) for c in columns], count=len(part[0]))

        classes.add(of(quasi), [of([column]) for column in sensitive])
    return classes.k, [classes.diversity(n) for n in range(len(sensitive))]


def exactly(number):
    return ClassCount(least=number, exact=True)


# Machanavajjhala et al. 2007, l-Diversity: Privacy Beyond k-Anonymity, ACM TKDD 1(1):
# figure 1, inpatient microdata; figure 2, the same 4-anonymous; figure 3, 3-diverse.
DISEASES = (
    "heart", "heart", "viral", "viral", "cancer", "heart", "viral", "viral", "cancer", "cancer",
    "cancer", "cancer",
)  # fmt: skip
MICRODATA = list(zip(
    (13053, 13068, 13068, 13053, 14853, 14853, 14850, 14850, 13053, 13053, 13068, 13068),
    (28, 29, 21, 23, 50, 55, 47, 49, 31, 37, 36, 35),
    ("Russian", "American", "Japanese", "American", "Indian", "Russian", "American", "American",
     "American", "Indian", "Japanese", "American"),
    DISEASES, strict=True,
))  # fmt: skip
FOUR_ANONYMOUS = list(zip(
    ["130**"] * 4 + ["1485*"] * 4 + ["130**"] * 4, ["<30"] * 4 + [">=40"] * 4 + ["3*"] * 4,
    "*" * 12, DISEASES, strict=True,
))  # fmt: skip
THREE_DIVERSE = [
    (*row, disease)
    for row, diseases in (
        (("1305*", "<=40", "*"), ("heart", "viral", "cancer", "cancer")),
        (("1485*", ">40", "*"), ("cancer", "heart", "viral", "viral")),
        (("1306*", "<=40", "*"), ("heart", "viral", "cancer", "cancer")),
    )
    for disease in diseases
]


def test_the_tables_of_the_paper():
    assert counted(MICRODATA, (0, 1, 2), [3]) == (exactly(1), [exactly(1)])
    # Everybody in the last class has cancer: 4-anonymous, and nothing is hidden.
    assert counted(FOUR_ANONYMOUS, (0, 1, 2), [3]) == (exactly(4), [exactly(1)])
    assert counted(THREE_DIVERSE, (0, 1, 2), [3]) == (exactly(4), [exactly(3)])


VALUES = st.sampled_from(["a", "b", "", 1, -1, -2, 2.5, True, None, b"a", dt.date(2020, 1, 1)])


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=40), st.integers(1, 50))
def test_any_rows_as_counted_by_hand(rows, step):
    typed = [tuple((type(v), v) for v in row) for row in rows]
    sizes = Counter(row[:2] for row in typed)
    kinds = defaultdict(set)
    for row in typed:
        kinds[row[:2]].add(row[2])
    k, (diversity,) = counted(rows, (0, 1), [2], step=step)
    assert k == exactly(min(sizes.values()))
    assert diversity == exactly(min(map(len, kinds.values())))


def test_values_that_python_takes_for_equal_are_not_one():
    """hash(-1) == hash(-2), and 1 == True: a table of such hashes would join their classes."""
    for pair in ((-1, -2), (1, True), (1, 1.0), ("1", 1), ("a", b"a"), (None, "None")):
        assert counted([(value,) for value in pair], [0], []) == (exactly(1), [])
    assert counted([("a", "bc"), ("ab", "c")], [0, 1], []) == (exactly(1), [])
    assert counted([("a", "b"), ("b", "a")], [0, 1], []) == (exactly(1), [])
    for same in ((float("nan"), float("nan")), (0.0, -0.0)):
        assert counted([(value,) for value in same], [0], [], step=1) == (exactly(2), [])


def test_arrays_and_lists_are_the_same():
    hashes = RowHash()
    lists = hashes.rows([("x", [1, 2, 1]), ("y", [0.5, 0.5, 0.5])], count=3)
    arrays = hashes.rows([("x", np.array([1, 2, 1])), ("y", torch.full((3,), 0.5))], count=3)
    scalars = hashes.rows([("x", list(np.array([1, 2, 1]))), ("y", [0.5] * 3)], count=3)
    assert np.array_equal(lists, arrays)
    assert np.array_equal(lists, scalars)
    assert not np.array_equal(lists, RowHash().rows([("x", [1, 2, 1])], count=3))


def test_without_rows_or_columns():
    assert Classes().k == ClassCount(least=None, exact=False)
    assert Classes(sensitive=1).diversity(0) == ClassCount(least=None, exact=False)
    assert counted([("a",), ("b",)], [], [0]) == (exactly(2), [exactly(2)])


def test_what_cannot_tell_rows_apart_is_refused():
    for value in ([1, 2], np.zeros(2), object()):
        with pytest.raises(DataError, match="'x' is counted by the anonymisation plan"):
            RowHash().rows([("x", [value])], count=1)


def test_of_too_many_classes_a_share_is_kept_and_said_to_be_one():
    rows = [(i // 3, i % 3) for i in range(3000)]
    k, (diversity,) = counted(rows, [0], [1], step=100, most=200)
    assert k == ClassCount(least=3, exact=False)
    assert diversity == ClassCount(least=3, exact=False)
    # One that is certain: nothing is smaller.
    k, _ = counted([(i,) for i in range(3000)], [0], [], step=100, most=200)
    assert k == exactly(1)


def test_memory_stays_bounded():
    classes, hashes = Classes(sensitive=1, most=1000), RowHash()
    for start in range(0, 200_000, 5000):
        numbers = np.arange(start, start + 5000)
        one = hashes.rows([("x", numbers)], count=5000)
        classes.add(one, [hashes.rows([("y", numbers)], count=5000)])
        for table in (classes._rows, *classes._pairs):
            assert len(table._keys) + table._waiting < 140_000
    assert len(classes._rows.merged()[0]) <= 1000
