from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Pseudonymize,
    Suppress,
)
from lightning_secure.anonymize.check import PlanCheck
from lightning_secure.anonymize.identifying import identifying
from lightning_secure.errors import DataError


def checked(plan, rows):
    check = PlanCheck(AnonymizationPlan(plan) if isinstance(plan, dict) else plan)
    check.look(rows, rows=len(next(iter(rows.values()))))
    return check


def test_what_the_plan_forgets():
    rows = {
        "name": ["Ada", "Bob"],
        "e": ["ada@x.org", "bob@x.org"],
        "born": [dt.date(1957, 3, 21), dt.date(1961, 1, 2)],
        "card": np.array([4111111111111111, 5500005555555559]),
        "kept": ["ask jo@x.org", "fine"],
        "word": ["fine", "good"],
        "x": np.zeros((2, 3)),
    }
    columns = checked({"name": Suppress(), "kept": Keep()}, rows).columns
    assert [name for name, of in columns.items() if of.forgotten] == ["e", "born", "card"]
    assert columns["kept"].found == {"e-mail": 1}  # somebody said so, and sees it
    assert (columns["born"].text, columns["word"].text, columns["x"].text) == (True, True, False)


def test_every_value_is_looked_at_also_of_columns_that_go():
    rows = {"note": ["fine"] * 2000 + ["jo@x.org"], "n": np.array([7] * 2000 + [4111111111111111])}
    columns = checked({"note": Suppress()}, rows).columns
    assert (columns["note"].inspected, columns["note"].found) == (2001, {"e-mail": 1})
    # One number in two thousand has right check digits by chance.
    assert (columns["n"].found, columns["n"].forgotten) == ({"card": 1}, False)


def test_k_and_l_are_as_a_sealing_would_report_them(keys):
    rows = {"id": ["a", "b", "a", "b"], "age": [17, 20, 16, 39], "dx": ["x", "y", "x", "z"]}
    plan = AnonymizationPlan(
        {"id": Pseudonymize(domain="p"), "age": Generalize(bins=[18]), "dx": Keep()},
        quasi_identifiers=["id", "age"],
        sensitive=["dx"],
    )
    report = checked(plan, rows).report
    figures = report.k_anonymity, report.l_diversity["dx"]
    assert [(f.before.least, f.after.least) for f in figures] == [(1, 2), (1, 1)]


def test_a_name_that_is_itself_a_persons_is_said_to_be():
    """As in a table without a line of names, whose first row is taken for one."""
    rows = {"jo@clinic.example": np.zeros(2), "4111 1111 1111 1111": np.zeros(2), "x": np.zeros(2)}
    columns = checked({}, rows).columns
    assert [of.identifying for of in columns.values()] == ["e-mail", "card", ""]
    assert [of.forgotten for of in columns.values()] == [True, True, False]


def test_a_column_that_is_missing_is_an_error_here_too():
    with pytest.raises(DataError, match="renamed"):
        checked({"email": Suppress()}, {"e_mail": ["a"]})


@pytest.mark.parametrize(
    "name",
    [
        "name", "Name", "patient_name", "patientName", "firstName", "last name", "Nachname",
        "PRENOM", "Prénom", "email", "e-mail address", "contact.email", "phone_1", "Telefon",
        "address_line_1", "Straße", "zip", "zip_code", "PLZ", "city", "lat", "dob", "birth_date",
        "Geburtsdatum", "ssn", "passport_no", "iban", "mrn", "patient_id", "customerId",
        "user id", "student_number", "client_ip_address", "mac_address", "credit_card",
        "license_plate", "imei", "social_security_number", "medical_record_number",
    ],
)  # fmt: skip
def test_names_that_point_at_people(name):
    assert identifying(name)


HARMLESS = (
    "", "x", "label", "file_name", "class_name", "feature name", "names", "text", "note", "image",
    "id", "row_id", "product_id", "number", "email_count", "num_phones", "address_length",
    "has_valid_email", "latent", "lattice", "cityscape", "zipf", "n_users", "user_score",
    "customer", "first", "age", "sex", "bmi", "key", "code", "capacity", "total", "birth_count",
    "embedding",
)  # fmt: skip


def test_names_that_do_not():
    names = [*HARMLESS]
    for load in (load_breast_cancer, load_diabetes, load_wine):
        names += list(load().feature_names)
    assert [name for name in names if identifying(name)] == []
