"""What processes say to each other about what they were given."""

from __future__ import annotations

import pytest

from lightning_secure.util.agreement import differences, ranks


def test_the_same_is_no_difference():
    assert differences([{"a": "1", "b": b"x"}] * 3) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["1", "1", "2"], "is 1 on ranks 0, 1, 2 on rank 2"),
        (["1", None], "is 1 on rank 0, absent on rank 1"),
        ([b"secret", b"other", b"secret"], "(rank 1 differs from rank 0)"),
        ([b"secret", None, b"other"], "(ranks 1, 2 differ from rank 0)"),
    ],
)
def test_what_differs_is_told_with_the_ranks(values, told):
    statements = [{} if value is None else {"a": value} for value in values]
    assert differences(statements) == [f"a {told}"]


def test_digests_are_not_shown_and_long_texts_are_cut():
    text = differences([{"a": "x" * 1000, "b": b"secret"}, {"a": "y", "b": b"other"}])
    assert "secret" not in " ".join(text)
    assert max(map(len, text)) < 150


def test_many_names_and_many_ranks_are_counted():
    many = differences([{str(n): "1" for n in range(9)}, {str(n): "2" for n in range(9)}])
    assert len(many) == 6
    assert many[-1] == "4 more"
    assert ranks(range(10)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
