"""Whom a key file trusts, and how its key ends."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.providers import (
    HpkeKeyProvider,
    HpkePrivateKey,
    LocalKeyProvider,
    SigningKey,
)
from lightning_secure.errors import AuditWriteError, IntegrityError, KeyUnavailableError
from lightning_secure.util import events


def test_other_signers_can_be_trusted_and_travel_with_a_pickle(tmp_path, other_keys):
    LocalKeyProvider.generate(tmp_path / "a.kek")
    keys = LocalKeyProvider(tmp_path / "a.kek", trusted=[other_keys.signer.public_key])
    again = pickle.loads(pickle.dumps(keys))
    for one in (keys, again):
        assert set(one.trusted_signers) == {keys.signer.key_id, other_keys.signer.key_id}
    assert again.key_id == keys.key_id


def test_a_retired_key_is_destroyed_on_disk_and_refused_in_memory(tmp_path, heard):
    path = tmp_path / "a.kek"
    keys = LocalKeyProvider.generate(path)
    wrapped = keys.wrap(DataKey.generate(), context={})
    descriptor = os.open(path, os.O_RDONLY)  # somebody has it open, or undeletes it
    assert keys.retire()
    assert not any(os.read(descriptor, 4096))
    os.close(descriptor)
    assert not path.exists()
    for use in (
        lambda: keys.unwrap(wrapped, context={}),
        lambda: keys.wrap(DataKey.generate(), context={}),
        lambda: keys.derive("x"),
    ):
        with pytest.raises(KeyUnavailableError, match="retired"):
            use()
    assert "key.retire" in [event.action for event in heard]


def test_a_key_that_took_the_place_of_the_retired_one_is_left_alone(tmp_path):
    path = tmp_path / "a.kek"
    keys = LocalKeyProvider.generate(path)
    path.rename(tmp_path / "old.kek")
    LocalKeyProvider.generate(path)
    good = path.read_bytes()
    with pytest.raises(KeyUnavailableError, match="another key"):
        keys.retire()
    assert path.read_bytes() == good


def test_a_key_is_not_retired_without_a_record(tmp_path):
    keys = LocalKeyProvider.generate(tmp_path / "a.kek")

    def refuse(event):
        raise AuditWriteError("full")

    events.subscribe("refuse", refuse)
    with pytest.raises(AuditWriteError):
        keys.retire()
    assert LocalKeyProvider(tmp_path / "a.kek").key_id == keys.key_id


def test_a_key_file_that_cannot_be_removed_is_reported(tmp_path, monkeypatch):
    keys = LocalKeyProvider.generate(tmp_path / "a.kek")

    def refused(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refused)  # root may remove everything
    with pytest.raises(KeyUnavailableError, match="could not be destroyed"):
        keys.retire()


@pytest.mark.parametrize("passphrase", [None, lambda: "correct horse battery"])
def test_a_key_in_memory_whose_file_is_gone_is_not_confirmed(tmp_path, passphrase):
    path, asked = tmp_path / "a.kek", []
    ask = passphrase and (lambda: asked.append(1) or passphrase())
    keys = LocalKeyProvider.generate(path, passphrase=ask)
    wrapped = keys.wrap_all(DataKey.generate(), context={})
    before = len(asked)
    keys.confirm(wrapped, context={})
    assert len(asked) == before, "nobody may be there to type it again"
    path.rename(tmp_path / "away.kek")
    with pytest.raises(KeyUnavailableError, match="cannot be opened"):
        keys.confirm(wrapped, context={})
    LocalKeyProvider.generate(path)
    with pytest.raises(KeyUnavailableError, match="another key"):
        keys.confirm(wrapped, context={})
    with pytest.raises(IntegrityError):
        keys.confirm(wrapped, context={"other": "use"})


def test_who_only_seals_cannot_confirm_and_is_not_stopped(tmp_path):
    recipient = HpkePrivateKey.generate(tmp_path / "recipient")
    SigningKey.generate(tmp_path / "signing")
    sealer = HpkeKeyProvider(recipients=[recipient.public.text], signing_key=tmp_path / "signing")
    sealer.confirm(sealer.wrap_all(DataKey.generate(), context={}), context={})
