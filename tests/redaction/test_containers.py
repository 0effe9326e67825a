from __future__ import annotations

import collections
import dataclasses
import json
import types
from argparse import Namespace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lightning_secure.errors import RedactionError
from lightning_secure.redaction.containers import number_of
from lightning_secure.redaction.redactor import REDACTED, Redactor


@dataclasses.dataclass
class Database:
    host: str = "db"
    password: str = "hunter2"


class Login(NamedTuple):
    user: str
    password: str


class Items(list):
    def __iter__(self):
        raise RuntimeError("hunter2")


NESTED = [
    {"db": Database()}, {"db": [Database(), {"x": Database()}]}, {"db": Login("bob", "hunter2")},
    Namespace(db=Namespace(password="hunter2")), SimpleNamespace(api_keys={"a": "hunter2"}),
    {"db": types.MappingProxyType({"password": "hunter2"})},
    {"a": collections.deque([{"pwd": "hunter2"}])}, {"api": {"key": "hunter2"}},
    {"api": [{"key": ["hunter2"]}]}, {"secrets": [{"a": ["hunter2"]}]},
    {"argv": ["x", "--password", "hunter2"]}, {"argv": ["x", "--password=hunter2"]},
    {"pairs": [("password", "hunter2"), ["lr", 1]]}, {"pairs": {"password": "hunter2"}.items()},
    {"env": [{"name": "DB_PASSWORD", "value": "hunter2"}]},
    {"env": {"key": "token", "val": ["hunter2"]}}, {("db", "password"): "hunter2"}, {"a": Items()},
    {"bytes": b"password=hunter2"}, {"json": json.dumps({"a": {"password": "hunter2"}})},
    {"db/passwords/0": "hunter2"}, {"db.password": "hunter2"},
    {"password1": 1.5, "tokens": {"hunter2"}}, {"s": {"password=hunter2"}},
]  # fmt: skip


@pytest.mark.parametrize("value", NESTED, ids=range(len(NESTED)))
def test_secrets_are_found_in_whatever_holds_them(value):
    clean = Redactor().redact(value)
    assert "hunter2" not in str(clean)
    assert REDACTED in str(clean)


def test_what_stands_beside_a_secret_stays():
    assert Redactor().redact({"db": Database()}) == {"db": {"host": "db", "password": REDACTED}}
    clean = Redactor().redact(
        {"env": [{"name": "LR", "value": "1"}, {"name": "A_TOKEN", "value": "x"}]}
    )
    assert clean["env"] == [{"name": "LR", "value": "1"}, {"name": "A_TOKEN", "value": REDACTED}]
    assert Redactor().redact({1: "a", "1": "b"}) == {"1": "a", "1'": "b"}
    assert Redactor().redact(["a", "--password", "x", "--lr", "1"])[3:] == ["--lr", "1"]
    assert Redactor().redact(["--password", "--lr"]) == ["--password", "--lr"]
    assert Redactor().redact({"cls": Database, "n": range(3)})["n"] == "range(0, 3)"


def test_a_container_that_fails_to_tell_is_dropped():
    """OmegaConf does, for a value that is missing or cannot be interpolated."""

    class Config(dict):
        def items(self):
            raise RuntimeError("hunter2")

    assert Redactor().redact({"x": Config(a=1)}) == {"x": REDACTED}


def test_models_and_attrs_are_looked_into():
    import attrs
    import pydantic

    @attrs.define
    class Db:
        password: str

    class Model(pydantic.BaseModel, extra="allow"):
        password: str

    value = [Db("hunter2"), Model(password="hunter2", api_key="hunter2")]
    expected = [{"password": REDACTED}, {"password": REDACTED, "api_key": REDACTED}]
    assert Redactor().redact(value) == expected


@pytest.mark.parametrize("value", ["hunter2", ["hunter2"], None, 10**400, torch.ones(2)])
def test_what_is_no_number_is_refused_without_repeating_it(value):
    with pytest.raises(RedactionError, match="not a number but") as caught:
        number_of(value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None
