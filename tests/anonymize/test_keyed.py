"""Pseudonyms and tokens: what the key's holder can do with them, and nobody else."""

from __future__ import annotations

import string

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from hypothesis import given
from hypothesis import strategies as st

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Pseudonymize,
    Pseudonyms,
    Tokenize,
    Tokens,
)
from lightning_secure.errors import ConfigError, DataError, IntegrityError

VALUES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(10**30), 10**30)
)


@given(VALUES, st.integers(1, 4))
def test_tokens_go_back_with_their_type(keys, value, generation):
    tokens = Tokens(keys, domain="patient")
    token = tokens.of(value, generation=generation)
    assert (type(tokens.value(token)), tokens.value(token)) == (type(value), value)
    assert tokens.of(value, generation=generation) == token


def test_tokens_are_aes_siv(keys):
    key = keys.derive("token-generation/2/patient").derive(info=b"lsec/v1/token", length=64)
    import base64

    sealed = AESSIV(key).encrypt(b"sA-1\x80" + bytes(11), None)
    token = f"2.{base64.urlsafe_b64encode(sealed).decode().rstrip('=')}"
    assert Tokens(keys, domain="patient").of("A-1", generation=2) == token


def refused(tokens, token):
    with pytest.raises(IntegrityError, match="token was refused") as caught:
        tokens.value(token)
    assert caught.value.__context__ is None
    return True


def test_a_tampered_token_is_refused(keys, other_keys):
    tokens = Tokens(keys, domain="patient")
    token = tokens.of("Ada Lovelace, ward 7")
    for position in range(len(token)):
        for letter in "2A-_.":
            if token[position] != letter:
                altered = token[:position] + letter + token[position + 1 :]
                assert refused(tokens, altered)
    for wrong in (
        "",
        token[:-1],
        token + "A",
        token + "=",
        "0" + token,
        "9" * 5000,
        None,
        7,
        b"1.x",
    ):
        assert refused(tokens, wrong)
    short = tokens.of("A-1")  # bits of its last character are to spare
    for letter in string.ascii_letters + string.digits + "-_":
        assert letter == short[-1] or refused(tokens, short[:-1] + letter)
    assert refused(Tokens(keys, domain="doctor"), token)
    assert refused(Tokens(other_keys, domain="patient"), token)


def test_a_token_shows_the_length_in_blocks_only(keys):
    tokens = Tokens(keys, domain="patient")
    assert len({len(tokens.of("x" * n)) for n in range(15)}) == 1
    assert len(tokens.of("x" * 15)) > len(tokens.of("x" * 14))


def guessed(found, guesses, name):
    """A dictionary attack: everything that could be meant, by whoever can compute ``name``."""
    known = {name(guess): guess for guess in guesses}
    return [known[one] for one in found if one in known]


def test_without_the_key_trying_every_value_finds_nobody(keys, other_keys):
    """An unkeyed hash of 10,000 possible record numbers would give all of them away."""
    import hashlib
    import hmac

    records = [f"R{number:06d}" for number in range(0, 10_000, 997)]
    every = [f"R{number:06d}" for number in range(10_000)]
    plan = AnonymizationPlan({"p": Pseudonymize(domain="patient"), "t": Tokenize(domain="patient")})
    rows = plan.bind(keys).apply({"p": records, "t": records})
    thief = Pseudonyms(other_keys, domain="patient"), Tokens(other_keys, domain="patient")
    attacks = [
        lambda v: hashlib.sha256(v.encode()).hexdigest()[:32],
        lambda v: hashlib.sha256(b"s" + v.encode()).hexdigest()[:32],
        lambda v: hmac.digest(b"patient", b"s" + v.encode(), "sha256")[:16].hex(),
        *(one.of for one in thief),
    ]
    for attack in attacks:
        assert guessed([*rows["p"], *rows["t"]], every, attack) == []
    # The holder of the key can: pseudonymous data is personal data.
    assert guessed(rows["p"], every, Pseudonyms(keys, domain="patient").of) == records


def test_domains_keys_and_generations_cannot_be_linked(keys, other_keys):
    names = [
        kind(provider, domain=domain).of("A-1", generation=generation).split(".")[-1]
        for kind in (Pseudonyms, Tokens)
        for provider in (keys, other_keys)
        for domain in ("patient", "doctor", "2/patient", "generation/2/patient")
        for generation in (1, 2, 3)
    ]
    assert len(set(names)) == len(names)
    assert Pseudonyms(keys, domain="patient").of(7) != Pseudonyms(keys, domain="patient").of("7")


@given(st.integers(1, 5), st.integers(1, 5), VALUES)
def test_the_holder_of_the_key_joins_across_a_rotation(keys, one, other, value):
    since, generation = sorted((one, other))
    names, tokens = Pseudonyms(keys, domain="patient"), Tokens(keys, domain="patient")
    old, new = names.of(value, generation=since), names.of(value, generation=generation)
    assert names.renewed(old, since=since, generation=generation) == new
    assert tokens.renewed(tokens.of(value, generation=one), generation=other) == tokens.of(
        value, generation=other
    )


def test_nobody_else_joins_across_a_rotation(keys, other_keys):
    old = Pseudonyms(keys, domain="patient").of("A-1")
    new = Pseudonyms(keys, domain="patient").of("A-1", generation=2)
    for thief in (Pseudonyms(other_keys, domain="patient"), Pseudonyms(keys, domain="doctor")):
        assert thief.renewed(old, since=1, generation=2) != new


def test_a_pseudonym_does_not_go_backward(keys):
    names = Pseudonyms(keys, domain="patient")
    with pytest.raises(ConfigError, match="forward"):
        names.renewed(names.of("A-1", generation=2), since=2, generation=1)
    for wrong in ("A-1", "", names.of("A-1").upper(), None):
        with pytest.raises(DataError, match="32 hexadecimal"):
            names.renewed(wrong, since=1, generation=2)


def test_what_is_done_names_the_generation_and_older_descriptions_stay():
    assert Pseudonymize(domain="p").describe() == "pseudonymize(domain=p)"
    assert (
        Pseudonymize(domain="p", generation=2).describe() == "pseudonymize(generation=2, domain=p)"
    )
    assert Tokenize(domain="p", generation=3).describe() == "tokenize(generation=3, domain=p)"
    said = {
        operator.describe()
        for kind in (Pseudonymize, Tokenize)
        for operator in (
            kind(domain="p"), kind(domain="p", generation=2), kind(domain="p, generation=2"),
            kind(domain="p, generation=2)"),
        )
    }  # fmt: skip
    assert len(said) == 8


@pytest.mark.parametrize("generation", [0, -1, 1000, 1.5, True, "2", None])
@pytest.mark.parametrize("kind", [Pseudonymize, Tokenize])
def test_a_generation_is_a_number(kind, generation):
    with pytest.raises(ConfigError, match="whole number from 1"):
        kind(domain="p", generation=generation)


@pytest.mark.parametrize("kind", [Pseudonyms, Tokens])
def test_what_has_no_name_is_refused_and_not_shown(keys, kind):
    for value in (None, 1.5, True, b"secret", 10**400, "Mary \ud800"):
        with pytest.raises(DataError) as caught:
            kind(keys, domain="p").of(value)
        assert "secret" not in str(caught.value)
        assert "Mary" not in str(caught.value)
    for domain in ("", None, 7):
        with pytest.raises(ConfigError):
            kind(keys, domain=domain)


def test_keys_are_in_no_representation(keys):
    tokens = Tokens(keys, domain="p")
    tokens.of("A-1")
    assert repr(tokens).startswith("<lightning_secure")
    assert "key" not in repr(Tokenize(domain="p").bind(keys)).lower().replace("keyed", "")
