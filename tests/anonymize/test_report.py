from __future__ import annotations

import hashlib
import json

import pytest

from lightning_secure.anonymize import (
    AnonymizationPlan,
    AnonymizationReport,
    Generalize,
    Keep,
    Suppress,
)
from lightning_secure.anonymize.report import REPORT_DIGEST
from lightning_secure.anonymize.tally import Tally
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.errors import IntegrityError

PLAN = AnonymizationPlan(
    {"name": Suppress(), "zip": Generalize(prefix=1), "dx": Keep()},
    quasi_identifiers=["name", "zip"],
    sensitive=["dx"],
)
ROWS = {
    "name": ["Ada", "Bob", "Cleo", "Dan"],
    "zip": ["81", "82", "91", "92"],
    "dx": ["flu", "gout", "flu", "flu"],
}


def reported(plan, *batches, keys, unseen=0):
    bound, tally = plan.bind(keys), Tally(plan)
    for rows in batches:
        applied = bound.run(rows)
        tally.add(tally.prepared(rows, applied, rows=len(rows["zip"])))
    return tally.report(unseen=unseen)


def least(figure):
    return figure.before.least, figure.after.least


def test_it_says_what_was_done_and_how_rows_hide(keys):
    report = reported(PLAN, ROWS, keys=keys)
    assert report.rows == 4
    assert {name: column.done for name, column in report.columns.items()} == PLAN.describe()
    assert least(report.k_anonymity) == (1, 2)
    # Everybody in the class of 9 has the flu.
    assert least(report.l_diversity["dx"]) == (1, 1)
    better = {**ROWS, "dx": ["flu", "gout", "flu", "gout"]}
    assert least(reported(PLAN, better, keys=keys).l_diversity["dx"]) == (1, 2)
    shown = report.text.replace(report.to_json()["salt"], "")  # in which any digits may stand
    for value in ("Ada", "81", "gout"):
        assert value not in shown


def test_batches_make_no_difference(keys):
    parts = [{name: values[i : i + 1] for name, values in ROWS.items()} for i in range(4)]
    whole, pieces = reported(PLAN, ROWS, keys=keys), reported(PLAN, *parts, keys=keys)
    assert {**whole.to_json(), "salt": ""} == {**pieces.to_json(), "salt": ""}


def test_a_sensitive_column_that_is_not_sealed_is_learnt_of_nobody(keys):
    plan = AnonymizationPlan(
        {"name": Suppress(), "zip": Keep(), "dx": Suppress()},
        quasi_identifiers=["zip"],
        sensitive=["dx"],
    )
    figure = reported(plan, ROWS, keys=keys).l_diversity["dx"]
    assert (figure.after.least, figure.after.exact) == (None, True)


def test_of_rows_that_were_not_seen_it_does_not_guess(keys):
    report = reported(PLAN, ROWS, keys=keys, unseen=3)
    assert (report.rows, report.unseen) == (4, 3)
    assert report.k_anonymity is None
    assert report.l_diversity == {}
    assert "not looked at again" in report.unknown


def test_it_can_be_read_again_and_nothing_else_can(keys):
    report = reported(PLAN, ROWS, keys=keys)
    again = AnonymizationReport.parse(report.text, digest=report.digest)
    assert again == report
    assert report.digest == hashlib.sha256(report.text.encode()).hexdigest()
    assert json.loads(report.text)["k_anonymity"]["after"] == {"exact": True, "least": 2}
    value = report.to_json()
    for wrong in (
        {**value, "version": 2},
        {**value, "more": 1},
        {n: v for n, v in value.items() if n != "rows"},
        {**value, "columns": {}},
        {**value, "columns": [7]},
        {**value, "k_anonymity": {"before": 1}},
        {**value, "l_diversity": []},
    ):
        with pytest.raises(IntegrityError):
            AnonymizationReport.parse(canonical_json(wrong))
    for text in ("", "[]", "\ud800", report.text + " ", json.dumps(value)):
        with pytest.raises(IntegrityError):
            AnonymizationReport.parse(text)


def test_another_report_is_not_taken_for_the_one_that_was_signed(keys):
    report = reported(PLAN, ROWS, keys=keys)
    other = reported(PLAN, ROWS, keys=keys)
    assert other.digest != report.digest  # the salt: no guess of a report can be tested
    attributes = {name.removeprefix("encrypted."): v for name, v in report.attributes.items()}
    assert AnonymizationReport.of(attributes) == report
    for digest in (other.digest, ""):
        with pytest.raises(IntegrityError, match="not the one that the manifest names"):
            AnonymizationReport.of({**attributes, REPORT_DIGEST: digest})
    for name, value in attributes.items():  # one of the two without the other
        with pytest.raises(IntegrityError):
            AnonymizationReport.of({name: value})
    assert AnonymizationReport.of({}) is None


def test_several_parts_add_up_but_for_k(keys):
    note = AnonymizationPlan({"zip": Keep()}, quasi_identifiers=["zip"])
    parts = [reported(note, {"zip": ["jo@x.org", "x"]}, keys=keys) for _ in range(3)]
    both = AnonymizationReport.together(parts, unknown="by several")
    assert (both.rows, both.k_anonymity, both.unknown) == (6, None, "by several")
    assert both.columns["zip"].found == {"e-mail": 3}
    assert both.columns["zip"].inspected == 6
    assert AnonymizationReport.parse(both.text) == both
