from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric, Param

from lightning_secure.loggers.client import RedactingClient
from lightning_secure.redaction.clean_metrics import known_clean
from lightning_secure.redaction.mlflow_store.values import Policy
from lightning_secure.redaction.redactor import REDACTED, Redactor

ADDRESS = "zoe.quill@clinic.example"
# The text of a container, which only a store looks into.
CONTAINER = '["password", "hunter2"]'
NAMES = ("train/loss", "epoch", "lr-Adam", "été", "_x", "", CONTAINER, f"of {ADDRESS}", "MRN-123")
KNOWN = Redactor()
STRICTER = Redactor(extra_patterns=[r"MRN-\d+"])
for known in (KNOWN, STRICTER):
    for text in NAMES:
        known.redact_text(text)


class Posing(str):
    """Says that it is another text."""

    __slots__ = ()

    def __eq__(self, other):
        return other == "epoch"

    def __hash__(self):
        return hash("epoch")


class OfTheUsersOwn(Metric):
    pass


def fields(entity):
    return {name: repr(value) for name, value in vars(entity).items()}


numbers = st.one_of(st.floats(), st.integers(-(2**60), 2**60))
metrics = st.builds(
    lambda kind, name, value, timestamp, step, rest: kind(name, value, timestamp, step, **rest),
    st.sampled_from([Metric, Metric, Metric, OfTheUsersOwn]),
    st.one_of(st.sampled_from(NAMES), st.just(Posing(ADDRESS)), st.text(max_size=5)),
    st.one_of(numbers, numbers, st.booleans()),
    st.one_of(st.integers(0, 2**50), st.just(f"at {ADDRESS}")),
    st.one_of(st.integers(0, 99), st.just(True)),
    st.sampled_from([
        {}, {}, {}, {"model_id": "m-0123456789abcdef"}, {"run_id": "0" * 32},
        {"dataset_name": ADDRESS, "dataset_digest": "d"},
    ]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(metrics, max_size=3), st.sampled_from([[KNOWN], [KNOWN, STRICTER]]))
def test_metrics_that_are_known_to_be_clean_are_those_that_redacting_would_not_change(
    given_, redactors
):
    policy = Policy(*redactors)
    client = RedactingClient(None, KNOWN)
    if known_clean(given_, redactors):
        for entity in given_:
            for clean in (policy._entity(entity), client._entity(entity)):
                assert clean.value == entity.value or entity.value != entity.value
                clean._value = entity._value
                assert fields(clean) == fields(entity)
                assert type(clean._key) is type(entity._key)


def refused():
    noted = Metric("epoch", 1.0, 0, 0)
    noted.note = ADDRESS
    yield "a field that a newer MLflow brings", noted
    yield "a name that poses as another", Metric(Posing(ADDRESS), 1.0, 0, 0)
    yield "a number that is text", Metric("epoch", ADDRESS, 0, 0)
    yield "a time that is text", Metric("epoch", 1.0, ADDRESS, 0)
    yield "a step that is text", Metric("epoch", 1.0, 0, ADDRESS)
    yield "a dataset", Metric("epoch", 1.0, 0, 0, None, ADDRESS, ADDRESS)
    yield "a model", Metric("epoch", 1.0, 0, 0, ADDRESS)
    yield "a run", Metric("epoch", 1.0, 0, 0, run_id=ADDRESS)
    yield "the text of a container", Metric(CONTAINER, 1.0, 0, 0)
    yield "what is taken out", Metric(f"of {ADDRESS}", 1.0, 0, 0)
    yield "a subclass", OfTheUsersOwn("epoch", 1.0, 0, 0)
    yield "another entity", Param("epoch", "1")


@pytest.mark.parametrize("entity", [e for _, e in refused()], ids=[what for what, _ in refused()])
def test_nothing_else_passes_without_a_look(entity):
    clean = Metric("epoch", 1, 0, 0)
    assert known_clean([clean, clean], [KNOWN])
    assert not known_clean([clean, entity], [KNOWN])


def test_what_one_redactor_knows_another_may_take_out():
    entity = Metric("MRN-123", 1.0, 0, 0)
    assert known_clean([entity], [KNOWN])
    assert not known_clean([entity], [KNOWN, STRICTER])
    policy = Policy(KNOWN)
    assert policy.argument([entity])[0].key == "MRN-123"
    policy.add(STRICTER)
    assert policy.argument([entity])[0].key == REDACTED
    assert policy.argument([Metric(CONTAINER, 1.0, 0, 0)])[0].key == f'["password", "{REDACTED}"]'


def test_a_list_that_changes_later_does_not_change_what_was_looked_at():
    given_ = [Metric("epoch", 1.0, 0, 0)]
    checked = Policy(KNOWN).argument(given_)
    given_.append(Metric(ADDRESS, 1.0, 0, 0))
    assert [entity.key for entity in checked] == ["epoch"]
