"""What every key provider holds to, whoever guards the key."""

from __future__ import annotations

import logging
import pickle

import pytest

import lightning_secure
from lightning_secure.crypto.keys import DataKey, WrappedKey
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.errors import (
    AuditWriteError,
    ConfigError,
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    WrongKeyError,
)
from lightning_secure.util import events

CONTEXT = {"purpose": "partition", "dataset": "00" * 16, "partition": "train"}


def chain(error: BaseException | None) -> str:
    """Everything that a printed traceback could say about an error."""
    text = ""
    while error is not None:
        text += f"{error} {error.args!r} {vars(error)!r} "
        error = error.__cause__ or error.__context__
    return text


def test_a_key_comes_back(provider):
    key = DataKey.generate()
    wrapped = provider.wrap(key, context=CONTEXT)
    assert (wrapped.provider, wrapped.key_id) == (provider.name, provider.key_id)
    assert provider.unwrap(WrappedKey.from_json(wrapped.to_json()), context=CONTEXT) == key


def test_another_object_for_the_same_key_opens_it(case, provider):
    key = DataKey.generate()
    wrapped = provider.wrap(key, context=CONTEXT)
    assert case.make().unwrap(wrapped, context=CONTEXT) == key


def test_the_wrapped_form_does_not_hold_the_key(provider):
    key = DataKey(b"\x5a" * 32)
    first, second = (provider.wrap(key, context=CONTEXT).blob for _ in range(2))
    assert key._material not in first
    assert first != second


@pytest.mark.parametrize(
    "changes",
    [
        {"partition": "val"},
        {"dataset": "11" * 16},
        {"purpose": "checkpoint"},
        {"more": "1"},
        {"partition": None},
    ],
    ids=lambda changes: next(iter(changes)) + "-" + str(next(iter(changes.values()))),
)
def test_another_context_is_refused(provider, changes):
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    context = {name: text for name, text in {**CONTEXT, **changes}.items() if text is not None}
    with pytest.raises(IntegrityError, match="rejected"):
        provider.unwrap(wrapped, context=context)


def test_a_flipped_bit_is_refused_wherever_it_is(provider):
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    length = len(wrapped.blob)
    for place in sorted({0, 7, 9, 15, 40, length // 2, length - 18, length - 2, length - 1}):
        for bit in (1, 128):
            blob = bytearray(wrapped.blob)
            blob[place] ^= bit
            changed = WrappedKey(provider=wrapped.provider, key_id=wrapped.key_id, blob=bytes(blob))
            # Where the blob names its key, a service may answer that it knows no such key.
            with pytest.raises((IntegrityError, KeyAccessError)):
                provider.unwrap(changed, context=CONTEXT)


@pytest.mark.parametrize("length", ["empty", "one", "half", "short", "long"])
def test_another_length_is_refused(provider, length):
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    blob = {
        "empty": b"",
        "one": wrapped.blob[:1],
        "half": wrapped.blob[: len(wrapped.blob) // 2],
        "short": wrapped.blob[:-1],
        "long": wrapped.blob + b"\0",
    }[length]
    changed = WrappedKey(provider=wrapped.provider, key_id=wrapped.key_id, blob=blob)
    with pytest.raises(IntegrityError):
        provider.unwrap(changed, context=CONTEXT)


def test_another_key_is_named_and_does_not_open(case, provider, heard):
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    other = case.other()
    with pytest.raises(WrongKeyError, match=provider.key_id):
        other.unwrap(wrapped, context=CONTEXT)
    relabelled = WrappedKey(provider=other.name, key_id=other.key_id, blob=wrapped.blob)
    with pytest.raises((IntegrityError, KeyUnavailableError)):
        other.unwrap(relabelled, context=CONTEXT)
    assert [(event.action, event.outcome) for event in heard] == [
        ("key.wrap", "success"),
        ("key.unwrap", "failure"),
        ("key.unwrap", "failure"),
    ]


def test_another_kind_of_provider_is_named(provider, keys, other_keys):
    stranger = other_keys if provider.name == "local" else keys
    wrapped = stranger.wrap(DataKey.generate(), context=CONTEXT)
    with pytest.raises(WrongKeyError, match="'local'"):
        provider.unwrap(wrapped, context=CONTEXT)


def test_it_is_pickled_by_its_configuration(case, provider):
    data = pickle.dumps(provider)
    for secret in case.secrets():
        assert secret.encode() not in data
    again = pickle.loads(data)
    key = DataKey.generate()
    assert again.unwrap(provider.wrap(key, context=CONTEXT), context=CONTEXT) == key
    assert list(again.trusted_signers) == list(provider.trusted_signers)


def test_nothing_secret_is_shown(case, provider):
    wrapped = provider.wrap(DataKey(b"\x5a" * 32), context=CONTEXT)
    provider.unwrap(wrapped, context=CONTEXT)
    shown = repr(provider) + str(provider) + repr(vars(provider)) + repr(wrapped)
    for secret in [*case.secrets(), repr(b"\x5a" * 32)]:
        assert secret not in shown
    assert type(provider).__name__ in repr(provider)


def test_nothing_secret_is_logged_at_any_level(case, caplog):
    key = DataKey(b"\x5a" * 32)
    caplog.set_level(logging.DEBUG)
    for name in list(logging.root.manager.loggerDict):
        caplog.set_level(logging.DEBUG, logger=name)
    provider = case.make()
    wrapped = provider.wrap(key, context=CONTEXT)
    provider.unwrap(wrapped, context=CONTEXT)
    with pytest.raises(IntegrityError):
        provider.unwrap(wrapped, context={})
    text = caplog.text + "".join(repr(vars(record)) for record in caplog.records)
    # Base64 of the key at each of the three alignments, and its bytes as Python shows them.
    traces = ["WlpaWlpaWlpa", "ZZZZZZZZZZZZ", "\\x5a" * 8, *case.secrets()]
    assert not [trace for trace in traces if trace in text]


def test_nothing_secret_is_in_an_error(case, provider):
    wrapped = provider.wrap(DataKey(b"\x5a" * 32), context=CONTEXT)
    with pytest.raises(IntegrityError) as caught:
        provider.unwrap(wrapped, context={})
    text = chain(caught.value)
    assert not [secret for secret in [*case.secrets(), "ZZZZZZZZ", "WlpaWlpa"] if secret in text]


def test_each_use_is_announced_before_anything_is_released(provider, heard):
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    provider.unwrap(wrapped, context=CONTEXT)
    expected = {"provider": provider.name, "key_id": provider.key_id, **CONTEXT}
    assert [(event.action, event.outcome, dict(event.details)) for event in heard] == [
        ("key.wrap", "success", expected),
        ("key.unwrap", "success", expected),
    ]


def test_a_listener_that_fails_stops_the_release(provider):
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)

    def full(event):
        raise AuditWriteError("the log is full")

    events.subscribe("full", full)
    with pytest.raises(AuditWriteError):
        provider.wrap(DataKey.generate(), context=CONTEXT)
    with pytest.raises(AuditWriteError):
        provider.unwrap(wrapped, context=CONTEXT)


# ---------------------------------------------------------------- a dataset


def seal(root, provider, split="train"):
    with lightning_secure.EncryptedShardWriter(root, split=split, keys=provider) as writer:
        writer.write_batch({"x": [[float(3 * row + i) for i in range(3)] for row in range(10)]})


def test_a_dataset_is_sealed_and_read_with_one_call_per_partition(case, provider, heard, folder):
    seal(folder, provider)
    seal(folder, provider, split="val")
    reader = case.make()
    heard.clear()
    before = case.requests() if case.requests else 0
    for number, split in enumerate(("train", "val"), start=1):
        data = lightning_secure.EncryptedShardDataset(folder, split=split, keys=reader)
        assert data.__getitems__([9, 0])[0][0].tolist() == [27.0, 28.0, 29.0]
        assert sum(event.action == "key.unwrap" for event in heard) == number
        if case.requests:
            assert case.requests() - before == number


def test_training_starts_with_one_call_per_partition(case, provider, heard, folder):
    seal(folder, provider)
    seal(folder, provider, split="val")
    module = lightning_secure.EncryptedDataModule(folder, keys=case.make(), batch_size=5)
    heard.clear()
    before = case.requests() if case.requests else 0
    module.setup("fit")
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert sum(len(batch[0]) for batch in loader) == 10
    assert [event.action for event in heard].count("key.unwrap") == 2
    if case.requests:
        assert case.requests() - before == 2


def test_a_reader_without_a_signing_key_reads_and_cannot_seal(case, provider, sealer, folder):
    if isinstance(provider, LocalKeyProvider):
        return  # a local key file holds both
    seal(folder, provider)
    reader = case.make(signing_key=None, trusted=[sealer.public])
    assert len(lightning_secure.EncryptedShardDataset(folder, split="train", keys=reader)) == 10
    with pytest.raises(KeyUnavailableError, match="cannot seal"):
        seal(folder, reader, split="val")
    assert not (folder / "val").exists()


def test_a_dataset_of_an_unknown_sealer_is_refused(case, provider, other_sealer, folder):
    if isinstance(provider, LocalKeyProvider):
        return  # trusts itself alone
    seal(folder, provider)
    for trusted in ([], [other_sealer.public]):
        stranger = case.make(signing_key=None, trusted=trusted)
        with pytest.raises(IntegrityError, match="no valid signature of a trusted key"):
            lightning_secure.EncryptedShardDataset(folder, split="train", keys=stranger)


# ---------------------------------------------------------------- derived keys


def test_derived_keys_are_the_same_each_time(case, provider, tmp_path, heard):
    if isinstance(provider, LocalKeyProvider):
        first, second = case.make(), case.make()
    else:
        with pytest.raises(KeyUnavailableError, match="create_derivation_key"):
            provider.derive("pseudonym/patient")
        provider.create_derivation_key(tmp_path / "derivation")
        first, second = (case.make(derivation_key=tmp_path / "derivation") for _ in range(2))
    heard.clear()
    assert first.derive("a") == second.derive("a")
    assert first.derive("a") != first.derive("b")
    assert [event.action for event in heard].count("key.derive") == 4
    again = pickle.loads(pickle.dumps(first))
    assert again.derive("a") == first.derive("a")


def test_a_derivation_key_belongs_to_its_provider(case, provider, tmp_path):
    if isinstance(provider, LocalKeyProvider):
        return
    provider.create_derivation_key(tmp_path / "derivation")
    with pytest.raises(ConfigError, match="not overwritten"):
        provider.create_derivation_key(tmp_path / "derivation")
    foreign = case.other()
    foreign._derivation_path = tmp_path / "derivation"
    with pytest.raises(WrongKeyError):
        foreign.derive("a")
