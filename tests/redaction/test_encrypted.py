"""What is tracked as ciphertext opens with its key, whole and under its name, or not at all."""

from __future__ import annotations

import json
import os
import struct

import pytest

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.providers import HpkeKeyProvider, HpkePrivateKey, SigningKey
from lightning_secure.errors import (
    AuditWriteError,
    ConfigError,
    DataError,
    IntegrityError,
    WrongKeyError,
)
from lightning_secure.redaction.artifacts.encrypted import (
    decrypt_artifacts,
    encrypted,
    open_artifact,
)
from lightning_secure.redaction.artifacts.recognise import is_sealed
from lightning_secure.util import events

DATA = b"\x89PNG\0" + b"lilac-sparrow-9" * 3000
PREFIX = struct.Struct("<8sHI")


@pytest.fixture
def stored(tmp_path, keys):
    path = tmp_path / "a.png.encrypted"
    path.write_bytes(encrypted(DATA, name="a.png", keys=keys))
    return path


def read(path, keys):
    with open_artifact(path, keys=keys) as stream:
        return stream.read()


@pytest.mark.parametrize("data", [b"", b"\0", DATA, bytes(16384), bytes(40000)])
def test_it_opens_as_it_was_and_is_known_as_encrypted(tmp_path, keys, data):
    sealed = encrypted(data, name="a", keys=keys)
    (tmp_path / "a.encrypted").write_bytes(sealed)
    assert read(tmp_path / "a.encrypted", keys) == data
    assert is_sealed(sealed)
    assert b"lilac" not in sealed
    assert sealed != encrypted(data, name="a", keys=keys)
    with open_artifact(str(tmp_path / "a.encrypted"), keys=keys) as stream:
        assert stream.seek(0, os.SEEK_END) == len(data)


def test_every_change_is_refused(stored, keys):
    sealed = stored.read_bytes()
    _, _, length = PREFIX.unpack_from(sealed)
    header = json.loads(sealed[PREFIX.size : PREFIX.size + length])
    body = sealed[PREFIX.size + length :]

    def with_header(**changed):
        data = canonical_json({**header, **changed})
        return PREFIX.pack(b"LSECFILE", 1, len(data)) + data + body

    changed = [
        sealed[:-1], sealed + b"\0", sealed[: PREFIX.size], b"", DATA, b"LSECCKPT" + sealed[8:],
        sealed[:8] + b"\2" + sealed[9:], with_header(name="b.png"), with_header(file="0" * 32),
        with_header(extra=1), with_header(key=header["key"] * 2), with_header(key={}),
        with_header(key=[]), PREFIX.pack(b"LSECFILE", 1, 2**31) + sealed[PREFIX.size :],
        *(
            sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
            for at in (3, 9, 12, 30, PREFIX.size + length + 5, len(sealed) // 2, len(sealed) - 1)
        ),
    ]  # fmt: skip
    for data in changed:
        stored.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"a.png.encrypted"):
            read(stored, keys)
    stored.write_bytes(sealed)
    assert read(stored, keys) == DATA


def test_a_file_is_refused_under_another_name(stored, keys):
    """Else whoever can write there could show one figure as another."""
    other = stored.with_name("b.png.encrypted")
    stored.rename(other)
    with pytest.raises(IntegrityError, match="another name"):
        read(other, keys)


def test_another_key_a_pipe_and_nothing_at_all(stored, tmp_path, keys, other_keys):
    with pytest.raises(WrongKeyError):
        read(stored, other_keys)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.encrypted", keys)
    os.mkfifo(tmp_path / "pipe.encrypted")
    with pytest.raises(IntegrityError, match="not a regular file"):
        read(tmp_path / "pipe.encrypted", keys)


def test_an_opening_that_cannot_be_recorded_returns_nothing(stored, keys, heard):
    def full(event):
        if event.action == "artifact.open":
            raise AuditWriteError("no space left")

    events.subscribe("full", full)
    with pytest.raises(AuditWriteError):
        read(stored, keys)
    events.unsubscribe("full")
    encrypted(DATA, name="c", keys=keys)
    assert [e.action for e in heard] == [
        "key.unwrap", "artifact.open", "key.wrap", "artifact.encrypt"
    ]  # fmt: skip


def test_every_recipient_opens_it(tmp_path):
    for name in ("alice", "bob"):
        HpkePrivateKey.generate(tmp_path / name)
    SigningKey.generate(tmp_path / "sealer")
    sender = HpkeKeyProvider(
        recipients=[tmp_path / "alice.pub", tmp_path / "bob.pub"], signing_key=tmp_path / "sealer"
    )
    (tmp_path / "a.encrypted").write_bytes(encrypted(DATA, name="a", keys=sender))
    for name in ("alice", "bob"):
        reader = HpkeKeyProvider(private_key=tmp_path / name, trusted=[tmp_path / "sealer.pub"])
        assert read(tmp_path / "a.encrypted", reader) == DATA


def test_a_folder_is_decrypted_without_what_nothing_authenticates(tmp_path, keys):
    source = tmp_path / "got"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "m.pkl.encrypted").write_bytes(encrypted(DATA, name="m.pkl", keys=keys))
    (source / "MLmodel").write_text("flavors: {}")
    (source / "m.pkl").write_bytes(b"somebody else's")
    written = decrypt_artifacts(source, tmp_path / "clear", keys=keys)
    assert written == [tmp_path / "clear" / "deep" / "m.pkl"]
    assert written[0].read_bytes() == DATA
    written = decrypt_artifacts(source, tmp_path / "all", keys=keys, insecure_copy_others=True)
    assert len(written) == 3
    one = decrypt_artifacts(source / "deep" / "m.pkl.encrypted", tmp_path / "one", keys=keys)
    assert [path.name for path in one] == ["m.pkl"]


def test_a_folder_with_an_altered_file_gives_none_of_it(tmp_path, keys):
    source = tmp_path / "got"
    source.mkdir()
    sealed = encrypted(DATA, name="a", keys=keys)
    (source / "a.encrypted").write_bytes(sealed[:20000] + b"\0" + sealed[20001:])
    with pytest.raises(IntegrityError):
        decrypt_artifacts(source, tmp_path / "clear", keys=keys)
    assert not any(path.is_file() for path in (tmp_path / "clear").rglob("*"))
    with pytest.raises(ConfigError, match="not an empty folder"):
        decrypt_artifacts(source, source, keys=keys)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no encrypted file"):
        decrypt_artifacts(tmp_path / "plain", tmp_path / "clear2", keys=keys)


def test_what_only_begins_like_an_encrypted_file_is_not_taken_for_one(keys):
    sealed = encrypted(DATA, name="a", keys=keys)
    for data in (sealed[:60], sealed + b"A" * 80, b"LSECFILE" + DATA, sealed[:8] + sealed[9:]):
        assert not is_sealed(data)
