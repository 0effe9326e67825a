from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_secure.redaction.bound_call import Parameters


def plain(self, a, b=2):
    return locals()


def named(self, a, *, b=2, c):
    return locals()


def open_ended(self, a, *args, b=2, **kwargs):
    return locals()


def by_position(self, a, /, b=2):
    return locals()


calls = st.tuples(
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.dictionaries(st.sampled_from(["self", "a", "b", "c", "d", "args"]), st.integers(0, 9)),
)


@given(st.sampled_from([plain, named, open_ended, by_position]), calls)
def test_arguments_have_the_names_that_python_gives_them(method, call):
    args, kwargs = call
    parameters = Parameters(method)
    try:
        expected = inspect.signature(method).bind(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError):
            parameters.bind(args, kwargs)
        return
    given = parameters.bind(args, kwargs)
    assert given == expected.arguments
    positional, more = parameters.spread(given)
    assert method(*positional, **more) == method(*args, **kwargs)


def test_what_wraps_a_method_may_ask_for_its_first_argument():
    """A decorator's ``args[0]`` is the object, so that must not be given by its name."""
    parameters = Parameters(plain)
    positional, more = parameters.spread(parameters.bind((0,), {"b": 3, "a": 2}))
    assert (list(positional), more) == ([0, 2, 3], {})
