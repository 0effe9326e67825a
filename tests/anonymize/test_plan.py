from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Pseudonymize,
    Suppress,
)
from lightning_secure.errors import ConfigError, DataError


def applied(plan, keys, **columns):
    return AnonymizationPlan(plan).bind(keys).apply(columns)


def test_each_operator(keys):
    rows = applied(
        {
            "name": Suppress(),
            "id": Pseudonymize(domain="patient"),
            "born": Generalize(date="year"),
            "died": Generalize(date="decade"),
            "zip": Generalize(prefix=2),
            "age": Generalize(width=10),
            "weight": Generalize(width=2.5),
            "note": Keep(),
        },
        keys,
        name=["Ada"],
        id=["A-1"],
        born=["1957-03-21"],
        died=[dt.date(2019, 1, 1)],
        zip=["80233"],
        age=[47],
        weight=[68.9],
        note=["fine"],
        x=[1.5],
    )
    assert len(rows.pop("id")[0]) == 32
    assert rows == {
        "born": [1957],
        "died": [2010],
        "zip": ["80"],
        "age": [40],
        "weight": [67.5],
        "note": ["fine"],
        "x": [1.5],
    }


def test_pseudonyms_join_under_one_key_and_domain_only(keys, other_keys):
    def name(value, domain="patient", provider=keys):
        (result,) = applied({"id": Pseudonymize(domain=domain)}, provider, id=[value])["id"]
        return result

    assert name("A-1") == name("A-1")
    different = {name("A-1"), name("A-2"), name("A-1", "doctor"), name("A-1", provider=other_keys)}
    assert len(different) == 4
    assert name(7) != name("7")
    assert "A-1" not in name("A-1")


def test_pseudonyms_are_hmacs(keys):
    import hashlib
    import hmac

    key = keys.derive("pseudonym/patient").derive(info=b"lsec/v1/pseudonym")
    expected = hmac.new(key, b"sA-1", hashlib.sha256).hexdigest()[:32]
    assert applied({"id": Pseudonymize(domain="patient")}, keys, id=["A-1"])["id"] == [expected]


def test_text_that_nobody_decided_about_is_refused(keys):
    for values in (["free text"], [None, "text"], np.array(["text"]), [b"bytes"]):
        with pytest.raises(DataError, match="'note' holds text"):
            applied({"id": Keep()}, keys, id=[1], note=values)
    numbers = np.zeros(3)
    assert applied({}, keys, x=numbers)["x"] is numbers


def test_a_renamed_column_is_refused(keys):
    with pytest.raises(DataError, match=r"'email'.*renamed"):
        applied({"email": Suppress()}, keys, e_mail=["a"])


@pytest.mark.parametrize(
    ("operator", "value"),
    [
        (Pseudonymize(domain="p"), None),
        (Pseudonymize(domain="p"), 1.5),
        (Pseudonymize(domain="p"), True),
        (Generalize(date="year"), "21.03.1957"),
        (Generalize(date="year"), 1957),
        (Generalize(prefix=2), 80233),
        (Generalize(width=10), "47"),
        (Generalize(width=10), True),
        (Generalize(width=10.0), 1957 * 10**400),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_not_shown(keys, operator, value):
    with pytest.raises(DataError, match="'secret'") as caught:
        applied({"secret": operator}, keys, secret=[value])
    assert "1957" not in str(caught.value)
    assert "80233" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"date": "year", "prefix": 2},
        {"date": "month"},
        {"prefix": 0},
        {"width": -1.0},
        {"width": "wide"},
    ],
)
def test_wrong_generalisations_are_refused(options):
    with pytest.raises(ConfigError):
        Generalize(**options)


@pytest.mark.parametrize("columns", [{"x": "hunter2"}, {7: Keep()}, ["x"], {"x": Keep}])
def test_a_column_has_an_operator(columns):
    with pytest.raises(ConfigError, match="operator for each name") as caught:
        AnonymizationPlan(columns)
    assert "hunter2" not in str(caught.value)


def test_a_plan_is_not_changed_by_what_it_was_made_of():
    columns = {"x": Keep()}
    plan = AnonymizationPlan(columns)
    columns["x"] = Suppress()
    assert plan.describe() == {"x": "keep"}


def test_a_pseudonym_needs_a_domain():
    with pytest.raises(ConfigError):
        Pseudonymize(domain="")


def test_half_a_character_is_refused_and_not_shown(keys):
    with pytest.raises(DataError, match=r"'name'.*lone surrogate") as caught:
        applied({"name": Pseudonymize(domain="p")}, keys, name=["Mary \ud800"])
    assert "Mary" not in str(caught.value)
    assert not isinstance(caught.value.__context__, UnicodeError)
    assert caught.value.__context__.__context__ is None
    with pytest.raises(DataError, match="domain"):
        Pseudonymize(domain="\ud800")
    with pytest.raises(DataError, match="purpose"):
        keys.derive("\ud800")


def test_what_was_done_is_described_without_values(keys):
    plan = AnonymizationPlan(
        {"a": Suppress(), "b": Pseudonymize(domain="p"), "c": Generalize(width=5), "d": Keep()}
    )
    assert plan.describe() == {
        "a": "suppress",
        "b": "pseudonymize(domain=p)",
        "c": "generalize(width=5)",
        "d": "keep",
    }


def test_bins():
    bins = Generalize(bins=[18, 40, 65.5])
    assert applied({"age": bins}, None, age=[-1, 17.9, 18, 39, 40, 65.5, 1e300])["age"] == [
        0, 0, 1, 1, 2, 3, 3,
    ]  # fmt: skip
    assert bins.describe() == "generalize(bins=[18, 40, 65.5])"
    edges = [1.0]
    frozen = Generalize(bins=edges)
    edges.append(0.0)
    assert frozen.bins == (1.0,)
    with pytest.raises(DataError, match="'age': a NaN lies in no bin"):
        applied({"age": bins}, None, age=[float("nan")])


@pytest.mark.parametrize(
    "bins", [[], [1, 1], [2, 1], ["a"], [float("nan")], [float("inf")], "12", [True], 7, b"a"]
)
def test_edges_are_ascending_numbers(bins):
    with pytest.raises(ConfigError, match=r"bins="):
        Generalize(bins=bins)


def test_keep_leaves_an_array_an_array(keys):
    values = np.arange(3, dtype="float32")
    assert applied({"x": Keep()}, keys, x=values)["x"] is values


@pytest.mark.parametrize(
    "options",
    [
        {"quasi_identifiers": "zip"},
        {"quasi_identifiers": ["zip", 7]},
        {"quasi_identifiers": ["zip", "zip"]},
        {"quasi_identifiers": ["zip"], "sensitive": ["zip"]},
        {"sensitive": ["dx"]},
    ],
)
def test_columns_that_tell_rows_apart_are_named_once(options):
    with pytest.raises(ConfigError):
        AnonymizationPlan({}, **options)


def test_a_renamed_column_does_not_leave_k_unmeasured(keys):
    for plan in (
        AnonymizationPlan({}, quasi_identifiers=["zip"]),
        AnonymizationPlan({}, quasi_identifiers=["n"], sensitive=["zip"]),
    ):
        with pytest.raises(DataError, match=r"'zip'.*renamed"):
            plan.bind(keys).apply({"n": np.zeros(2), "zip_code": np.zeros(2)})
