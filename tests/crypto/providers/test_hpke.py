"""Public-key recipients: whoever seals cannot open, and nobody else can seal."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

import lightning_secure
from lightning_secure.crypto.encoding import b64encode, canonical_json
from lightning_secure.crypto.keys import DataKey, WrappedKey
from lightning_secure.crypto.providers import HpkeKeyProvider, HpkePrivateKey, SigningKey
from lightning_secure.crypto.providers.hpke import HYBRID, X25519, HpkePublicKey
from lightning_secure.errors import (
    CheckpointCorruptedError,
    ConfigError,
    IntegrityError,
    KeyUnavailableError,
    WrongKeyError,
)

CONTEXT = {"purpose": "partition", "dataset": "00" * 16, "partition": "train"}


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Private keys of alice (hybrid), bob (X25519) and mallory (hybrid)."""
    folder = tmp_path_factory.mktemp("people")
    for name, kem in (("alice", HYBRID), ("bob", X25519), ("mallory", HYBRID)):
        HpkePrivateKey.generate(folder / name, kem=kem)
    return folder


@pytest.fixture
def seals(people, sealer) -> HpkeKeyProvider:
    """Whoever seals for alice and bob, and has neither's private key."""
    return HpkeKeyProvider(
        recipients=[people / "alice.pub", people / "bob.pub"], signing_key=sealer._path
    )


@pytest.fixture
def reads(people, sealer):
    def make(name: str, **changes) -> HpkeKeyProvider:
        arguments = {"private_key": people / name, "trusted": [sealer.public], **changes}
        return HpkeKeyProvider(**arguments)

    return make


def rows():
    return {"x": [[float(3 * row + i) for i in range(3)] for row in range(10)]}


def test_every_recipient_opens_and_whoever_sealed_does_not(seals, reads):
    key = DataKey.generate()
    wrapped = seals.wrap_all(key, context=CONTEXT)
    assert [one.key_id for one in wrapped] == list(seals.recipients)
    for name in ("alice", "bob"):
        assert reads(name).unwrap_any(wrapped, context=CONTEXT) == key
    with pytest.raises(KeyUnavailableError, match="cannot open"):
        seals.unwrap_any(wrapped, context=CONTEXT)
    for one in wrapped:
        assert key._material not in one.blob
        with pytest.raises((KeyUnavailableError, WrongKeyError)):
            seals.unwrap(one, context=CONTEXT)


def test_somebody_else_does_not_open(seals, reads, heard):
    wrapped = seals.wrap_all(DataKey.generate(), context=CONTEXT)
    with pytest.raises(WrongKeyError):
        reads("mallory").unwrap_any(wrapped, context=CONTEXT)
    mine = WrappedKey(provider="hpke", key_id=reads("mallory").key_id, blob=wrapped[0].blob)
    with pytest.raises(IntegrityError):
        reads("mallory").unwrap(mine, context=CONTEXT)
    assert [event.outcome for event in heard if event.action == "key.unwrap"] == ["failure"] * 2


def test_one_recipients_form_is_not_anothers(seals, reads):
    """The signature says for whom it was wrapped."""
    for_alice, for_bob = seals.wrap_all(DataKey.generate(), context=CONTEXT)
    swapped = WrappedKey(provider="hpke", key_id=for_alice.key_id, blob=for_bob.blob)
    with pytest.raises(IntegrityError, match="not signed"):
        reads("alice").unwrap(swapped, context=CONTEXT)


def test_a_single_wrapped_key_would_leave_recipients_out(seals, heard):
    with pytest.raises(ConfigError, match="wrap_all"):
        seals.wrap(DataKey.generate(), context=CONTEXT)
    assert heard == []


def test_the_single_form_is_that_for_the_first_recipient(seals, reads):
    key = DataKey.generate()
    blob = seals._wrap(key, CONTEXT)
    wrapped = WrappedKey(provider="hpke", key_id=seals.recipients[0], blob=blob)
    assert reads("alice").unwrap(wrapped, context=CONTEXT) == key


def test_each_recipient_is_announced(seals, heard):
    seals.wrap_all(DataKey.generate(), context=CONTEXT)
    assert [event.details["key_id"] for event in heard] == list(seals.recipients)


def test_a_dataset_for_two_is_sealed_by_a_third(seals, reads, folder, heard):
    with lightning_secure.EncryptedShardWriter(folder, split="train", keys=seals) as writer:
        writer.write_batch(rows())
    heard.clear()
    for name in ("alice", "bob"):
        data = lightning_secure.EncryptedShardDataset(folder, split="train", keys=reads(name))
        assert data[9][0].tolist() == [27.0, 28.0, 29.0]
    assert sum(event.action == "key.unwrap" for event in heard) == 2
    with pytest.raises(KeyUnavailableError, match="cannot open"):
        lightning_secure.EncryptedShardDataset(folder, split="train", keys=seals)
    with pytest.raises(WrongKeyError):
        lightning_secure.EncryptedShardDataset(folder, split="train", keys=reads("mallory"))


def test_a_checkpoint_for_two_opens_for_both(seals, reads, tmp_path):
    path = tmp_path / "x.ckpt"
    lightning_secure.EncryptedCheckpointIO(seals).save_checkpoint({"w": 7}, path)
    for name in ("alice", "bob"):
        state = lightning_secure.EncryptedCheckpointIO(reads(name)).load_checkpoint(path)
        assert state["w"] == 7
    with pytest.raises(KeyUnavailableError):
        lightning_secure.EncryptedCheckpointIO(seals).load_checkpoint(path)


def test_more_recipients_than_a_checkpoint_can_name(sealer, tmp_path):
    keys = [
        "hpke-x25519:" + b64encode(X25519PrivateKey.generate().public_key().public_bytes_raw())
        for _ in range(250)
    ]
    crowd = HpkeKeyProvider(recipients=keys, signing_key=sealer._path)
    with pytest.raises(ConfigError, match="more recipients than its header"):
        lightning_secure.EncryptedCheckpointIO(crowd).save_checkpoint({"w": 7}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- forging


def test_a_stranger_with_the_public_key_cannot_forge(people, reads, tmp_path):
    """HPKE's base mode lets anybody encrypt to a public key; the signature does not."""
    SigningKey.generate(tmp_path / "mallory.sign")
    forger = HpkeKeyProvider(
        recipients=[people / "alice.pub"], signing_key=tmp_path / "mallory.sign"
    )
    lightning_secure.EncryptedCheckpointIO(forger).save_checkpoint({"w": 7}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointCorruptedError, match="is not trusted"):
        lightning_secure.EncryptedCheckpointIO(reads("alice")).load_checkpoint(tmp_path / "x.ckpt")


def test_the_sealers_name_on_a_strangers_key_is_refused(people, sealer, other_sealer, reads):
    """All of it is public, but for the signature."""
    alice = HpkePublicKey.read(people / "alice.pub")
    info = b"lsec/v1/hpke\0" + canonical_json(
        {"context": CONTEXT, "recipient": alice.key_id, "signer": sealer.key_id}
    )
    sealed = alice._seal(bytes(32), info)
    for signature in (bytes(64), other_sealer.signer.sign(sealed)):
        blob = bytes.fromhex(sealer.key_id) + signature + sealed
        forged = WrappedKey(provider="hpke", key_id=alice.key_id, blob=blob)
        with pytest.raises(IntegrityError, match="not signed"):
            reads("alice").unwrap(forged, context=CONTEXT)


def test_a_second_trusted_sealer_cannot_claim_the_firsts_key(people, sealer, other_sealer, reads):
    """Signing anothers message anew does not open: the signer is part of HPKE's info."""
    alice = reads("alice", trusted=[sealer.public, other_sealer.public])
    (wrapped,) = HpkeKeyProvider(
        recipients=[people / "alice.pub"], signing_key=sealer._path
    ).wrap_all(DataKey.generate(), context=CONTEXT)
    info = b"lsec/v1/hpke\0" + canonical_json(
        {"context": CONTEXT, "recipient": wrapped.key_id, "signer": other_sealer.key_id}
    )
    sealed = wrapped.blob[80:]
    kind = b"application/vnd.lightning-secure.hpke-wrapped-key.v1+json"
    payload = canonical_json({"info": b64encode(info), "sealed": b64encode(sealed)})
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    blob = bytes.fromhex(other_sealer.key_id) + other_sealer.signer.sign(signed) + sealed
    claimed = WrappedKey(provider="hpke", key_id=wrapped.key_id, blob=blob)
    with pytest.raises(IntegrityError, match="HPKE refuses it"):
        alice.unwrap(claimed, context=CONTEXT)


def labeled(prk: bytes, label: bytes, value: bytes, suite: bytes, length: int | None) -> bytes:
    """LabeledExtract and, where there is a length, LabeledExpand of RFC 9180, section 4."""
    if length is None:
        return hmac.digest(prk, b"HPKE-v1" + suite + label + value, "sha256")
    info = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + value
    return HKDFExpand(SHA256(), length, info).derive(prk)


def opened_by_the_standard(message: bytes, private: dict, info: bytes) -> bytes:
    """Open an HPKE message by RFC 9180 and its hybrid KEM alone, without HPKE of a library."""
    data = base64.b64decode(private["private"])
    x = X25519PrivateKey.from_private_bytes(data[-32:])
    public = x.public_key().public_bytes_raw()
    if private["kem"] == X25519:
        kem_id, encapsulated, sealed = b"\x00\x20", message[:32], message[32:]
        kem = b"KEM" + kem_id
        dh = x.exchange(X25519PublicKey.from_public_bytes(encapsulated))
        secret = labeled(b"", b"eae_prk", dh, kem, None)
        secret = labeled(secret, b"shared_secret", encapsulated + public, kem, 32)
    else:
        kem_id, encapsulated, sealed = b"\x64\x7a", message[:1120], message[1120:]
        mlkem = MLKEM768PrivateKey.from_seed_bytes(data[:64]).decapsulate(encapsulated[:1088])
        dh = x.exchange(X25519PublicKey.from_public_bytes(encapsulated[1088:]))
        label = bytes.fromhex("5c2e2f2f5e5c")
        secret = hashlib.sha3_256(mlkem + dh + encapsulated[1088:] + public + label).digest()
    suite = b"HPKE" + kem_id + b"\x00\x01\x00\x02"  # HKDF-SHA256, AES-256-GCM
    context = b"\0" + labeled(b"", b"psk_id_hash", b"", suite, None)
    context += labeled(b"", b"info_hash", info, suite, None)
    schedule = labeled(secret, b"secret", b"", suite, None)
    key = labeled(schedule, b"key", context, suite, 32)
    nonce = labeled(schedule, b"base_nonce", context, suite, 12)
    return AESGCM(key).decrypt(nonce, sealed, b"")


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_the_form_is_the_documented_one(people, sealer, name):
    """A second reader, from docs/format.md and the standards that it names."""
    provider = HpkeKeyProvider(recipients=[people / f"{name}.pub"], signing_key=sealer._path)
    key = DataKey.generate()
    (wrapped,) = provider.wrap_all(key, context=CONTEXT)
    kem, _, public = (people / f"{name}.pub").read_text().strip().partition(":")
    named = b"lsec/v1/hpke-key-id\0" + kem.encode() + b"\0" + base64.b64decode(public)
    assert wrapped.key_id == hashlib.sha256(named).hexdigest()[:32]
    signer, signature, message = wrapped.blob[:16], wrapped.blob[16:80], wrapped.blob[80:]
    assert signer.hex() == sealer.key_id
    info = b"lsec/v1/hpke\0" + canonical_json(
        {"context": CONTEXT, "recipient": wrapped.key_id, "signer": sealer.key_id}
    )
    kind = b"application/vnd.lightning-secure.hpke-wrapped-key.v1+json"
    payload = canonical_json({"info": b64encode(info), "sealed": b64encode(message)})
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    sealer.signer.public_key.verify(signature, signed)
    private = json.loads((people / name).read_text())
    assert opened_by_the_standard(message, private, info) == key._material


# ---------------------------------------------------------------- key files


def test_a_private_key_is_its_owners_and_the_public_one_is_text(people):
    assert stat.S_IMODE((people / "alice").stat().st_mode) == 0o600
    text = (people / "alice.pub").read_text()
    assert text.startswith("hpke-mlkem768-x25519:")
    assert HpkePublicKey.read(text.strip()) == HpkePrivateKey(people / "alice").public
    assert HpkePublicKey.read(people / "alice.pub") == HpkePrivateKey(people / "alice").public


def test_recipients_may_be_given_as_text(people, sealer, reads):
    text = (people / "bob.pub").read_text().strip()
    seals = HpkeKeyProvider(recipients=[text], signing_key=sealer._path)
    key = DataKey.generate()
    assert reads("bob").unwrap(seals.wrap(key, context=CONTEXT), context=CONTEXT) == key


def test_keys_are_never_overwritten(people, tmp_path):
    before = (people / "alice").read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        HpkePrivateKey.generate(people / "alice")
    assert (people / "alice").read_bytes() == before
    (tmp_path / "carol.pub").touch()
    with pytest.raises(ConfigError, match="exists"):
        HpkePrivateKey.generate(tmp_path / "carol")
    assert not (tmp_path / "carol").exists()


def test_a_private_key_that_others_can_read_is_refused(tmp_path):
    HpkePrivateKey.generate(tmp_path / "x", kem=X25519)
    (tmp_path / "x").chmod(0o644)
    with pytest.raises(KeyUnavailableError, match="0644"):
        HpkeKeyProvider(private_key=tmp_path / "x")


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_a_public_key_that_others_can_write_is_refused(tmp_path, mode):
    """Whoever exchanges it reads all that is sealed from now on."""
    HpkePrivateKey.generate(tmp_path / "x", kem=X25519)
    (tmp_path / "x.pub").chmod(mode)
    with pytest.raises(KeyUnavailableError, match=f"{mode:04o}"):
        HpkeKeyProvider(recipients=[tmp_path / "x.pub"])


@pytest.mark.parametrize("damage", ["kem", "kem type", "short", "text", "fields", "empty"])
def test_a_damaged_private_key_is_refused_and_not_shown(tmp_path, damage):
    path = tmp_path / "x"
    HpkePrivateKey.generate(path)
    record = json.loads(path.read_text())
    changes = {
        "kem": {"kem": X25519},
        "kem type": {"kem": ["hpke-x25519"]},
        "short": {"private": record["private"][:-8]},
        "text": {"private": 7},
        "fields": {"more": 1},
        "empty": None,
    }[damage]
    path.write_text("" if changes is None else json.dumps({**record, **changes}))
    with pytest.raises(KeyUnavailableError, match="or it is damaged") as caught:
        HpkePrivateKey(path)
    assert record["private"][:12] not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "hpke-x25519:" + b64encode(bytes(32)),
        "hpke-x25519:" + b64encode(bytes(31)),
        "hpke-mlkem768-x25519:" + b64encode(bytes(32)),
        "hpke-mlkem768-x25519:" + b64encode(b"\xff" * 1216),
        "hpke-p256:" + b64encode(bytes(65)),
        "ed25519:" + b64encode(bytes(32)),
        "hpke-x25519:AAA",
    ],
    ids=lambda text: text[:28],
)
def test_what_is_not_a_recipient_is_refused(text, sealer):
    with pytest.raises(ConfigError):
        HpkeKeyProvider(recipients=[text], signing_key=sealer._path)


def test_a_provider_needs_somebody(people):
    with pytest.raises(ConfigError, match="needs recipients"):
        HpkeKeyProvider()
    with pytest.raises(ConfigError, match="must be a list"):
        HpkeKeyProvider(recipients=str(people / "bob.pub"))
    with pytest.raises(ConfigError, match="'hpke-p256'"):
        HpkePrivateKey.generate(people / "carol", kem="hpke-p256")


def test_a_private_key_shows_its_id_alone(people):
    key = HpkePrivateKey(people / "bob")
    assert repr(key) == f"HpkePrivateKey({str(people / 'bob')!r}, key_id={key.public.key_id!r})"
    assert HpkePrivateKey(*key.__reduce__()[1]).public == key.public


def test_whoever_only_seals_cannot_derive(seals, people, reads, tmp_path):
    seals.create_derivation_key(tmp_path / "derivation")
    alice = reads("alice", derivation_key=tmp_path / "derivation")
    bob = reads("bob", derivation_key=tmp_path / "derivation")
    assert alice.derive("a") == bob.derive("a")
    seals._derivation_path = tmp_path / "derivation"
    with pytest.raises(KeyUnavailableError, match="cannot open"):
        seals.derive("a")


# ---------------------------------------------------------------- signing keys


def test_a_signing_key_file_is_its_owners_alone(tmp_path):
    before = os.umask(0)
    try:
        key = SigningKey.generate(tmp_path / "new" / "sealer.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "new" / "sealer.key").stat().st_mode) == 0o600
    assert (tmp_path / "new" / "sealer.key.pub").read_text().strip() == key.public
    assert SigningKey(tmp_path / "new" / "sealer.key").key_id == key.key_id
    assert (
        repr(key) == f"SigningKey({str(tmp_path / 'new' / 'sealer.key')!r}, key_id={key.key_id!r})"
    )
    assert SigningKey(*key.__reduce__()[1]).public == key.public
    (tmp_path / "new" / "sealer.key").chmod(0o640)
    with pytest.raises(KeyUnavailableError, match="0640"):
        SigningKey(tmp_path / "new" / "sealer.key")


@pytest.mark.parametrize("changes", [{"seed": "AAAA"}, {"seed": None}, {"more": 1}, {"version": 2}])
def test_a_damaged_signing_key_is_refused(tmp_path, changes):
    SigningKey.generate(tmp_path / "x")
    record = json.loads((tmp_path / "x").read_text())
    (tmp_path / "x").write_text(json.dumps({**record, **changes}))
    with pytest.raises(KeyUnavailableError, match="or it is damaged"):
        SigningKey(tmp_path / "x")


def test_trusted_signers_are_those_that_were_named(people, sealer, other_sealer, tmp_path):
    provider = HpkeKeyProvider(
        private_key=people / "bob",
        signing_key=sealer._path,
        trusted=[Path(f"{other_sealer._path}.pub")],
    )
    assert set(provider.trusted_signers) == {sealer.key_id, other_sealer.key_id}
    for wrong in (
        "hpke-x25519:" + b64encode(bytes(32)),
        "ed25519:" + b64encode(bytes(31)),
        "ed25519:AAA",
    ):
        with pytest.raises(ConfigError):
            HpkeKeyProvider(private_key=people / "bob", trusted=[wrong])
    with pytest.raises(ConfigError, match="must be a list"):
        HpkeKeyProvider(private_key=people / "bob", trusted=sealer.public)
    (tmp_path / "not.pub").write_text("hello\n")
    with pytest.raises(ConfigError, match="not a public key"):
        HpkeKeyProvider(private_key=people / "bob", trusted=[tmp_path / "not.pub"])
    with pytest.raises(KeyUnavailableError, match="cannot be opened"):
        HpkeKeyProvider(private_key=people / "bob", trusted=[tmp_path / "nothing.pub"])


def test_the_public_text_is_the_key(sealer):
    key = Ed25519PrivateKey.from_private_bytes(
        base64.b64decode(json.loads(sealer._path.read_text())["seed"])
    )
    raw = key.public_key().public_bytes_raw()
    assert sealer.public == "ed25519:" + b64encode(raw)


@pytest.mark.parametrize("damage", ["fields", "list", "empty", "entry"])
def test_a_damaged_derivation_key_is_refused(people, sealer, tmp_path, damage):
    path = tmp_path / "derivation"
    arguments = {"private_key": people / "bob", "signing_key": sealer._path}
    HpkeKeyProvider(**arguments).create_derivation_key(path)
    record = json.loads(path.read_text())
    changes = {
        "fields": {"more": 1},
        "list": {"keys": record["keys"][0]},
        "empty": {"keys": []},
        "entry": {"keys": [{}]},
    }[damage]
    path.write_text(json.dumps({**record, **changes}))
    with pytest.raises((KeyUnavailableError, IntegrityError)):
        HpkeKeyProvider(**arguments, derivation_key=path).derive("a")
