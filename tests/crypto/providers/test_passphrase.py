"""A key file under a passphrase, and where passphrases come from."""

from __future__ import annotations

import functools
import json
import pickle
import resource

import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from lightning_secure.crypto.encoding import b64decode, b64encode, canonical_json
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.providers import EnvironmentSecret, FileSecret, LocalKeyProvider
from lightning_secure.crypto.providers import passphrase as passphrases
from lightning_secure.errors import ConfigError, KeyAccessError, KeyUnavailableError

CONTEXT = {"purpose": "test"}
PASSPHRASE = "correct horse battery staple"


def right() -> str:
    return PASSPHRASE


def wrong() -> str:
    return "incorrect horse battery staple"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("protected") / "project.kek"
    LocalKeyProvider.generate(path, passphrase=right)
    return path


@pytest.fixture
def path(made, tmp_path):
    copy = tmp_path / "project.kek"
    copy.write_bytes(made.read_bytes())
    copy.chmod(0o600)
    return copy


def test_the_parameters_are_those_of_rfc_9106_and_are_stored(path):
    record = json.loads(path.read_text())
    kdf = record["kdf"]
    assert (kdf["name"], kdf["memory_kib"], kdf["iterations"], kdf["lanes"]) == (
        "argon2id",
        65536,
        3,
        4,
    )
    assert len(b64decode(kdf["salt"], what="salt")) == 16
    assert record.keys() == {"type", "version", "kdf", "sealed"}


def test_the_file_opens_by_its_documented_form(path):
    """A second reader, from docs/format.md."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    record = json.loads(path.read_text())
    kdf, sealed = record["kdf"], b64decode(record.pop("sealed"), what="sealed")
    key = Argon2id(
        salt=b64decode(kdf["salt"], what="salt"),
        length=32,
        iterations=kdf["iterations"],
        lanes=kdf["lanes"],
        memory_cost=kdf["memory_kib"],
    ).derive(PASSPHRASE.encode())
    plain = AESGCM(key).decrypt(sealed[:12], sealed[12:], canonical_json(record))
    assert DataKey(plain[:32]).key_id == LocalKeyProvider(path, passphrase=right).key_id
    assert len(plain) == 64


def test_argon2id_is_that_of_rfc_9106():
    """Known answer: section 5.3."""
    tag = Argon2id(
        salt=b"\2" * 16, length=32, iterations=3, lanes=4, memory_cost=32,
        ad=b"\4" * 12, secret=b"\3" * 8,
    ).derive(b"\1" * 32)  # fmt: skip
    assert tag.hex() == "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"


def test_only_the_passphrase_opens_it(path):
    assert LocalKeyProvider(path, passphrase=right).name == "local"
    with pytest.raises(KeyUnavailableError, match="passphrase is wrong") as caught:
        LocalKeyProvider(path, passphrase=wrong)
    assert caught.value.__context__ is None
    assert wrong() not in str(caught.value)


def test_it_does_not_open_without_one(path):
    with pytest.raises(KeyUnavailableError, match="none was given"):
        LocalKeyProvider(path)


def test_an_open_file_in_its_place_is_refused(tmp_path):
    """Whoever can exchange the file would choose the key under which all is sealed from now on."""
    LocalKeyProvider.generate(tmp_path / "open.kek")
    with pytest.raises(KeyUnavailableError, match="not the file that was made with it"):
        LocalKeyProvider(tmp_path / "open.kek", passphrase=right)


def test_two_encodings_of_one_passphrase_are_one(tmp_path):
    path = tmp_path / "x.kek"
    LocalKeyProvider.generate(path, passphrase=lambda: "Schl\u00fcsselm\u00e4nner")
    LocalKeyProvider(path, passphrase=lambda: "Schlu\u0308sselma\u0308nner")


@pytest.mark.parametrize("text", ["", "short", "elevenchars"])
def test_a_short_passphrase_makes_no_file(tmp_path, text):
    with pytest.raises((ConfigError, KeyUnavailableError)):
        LocalKeyProvider.generate(tmp_path / "x.kek", passphrase=lambda: text)
    assert not (tmp_path / "x.kek").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_kib", 65537),
        ("iterations", 4),
        ("lanes", 3),
        ("salt", b64encode(bytes(16))),
    ],
)
def test_a_parameter_that_was_changed_is_refused(path, name, value):
    record = json.loads(path.read_text())
    record["kdf"][name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(KeyUnavailableError, match="was altered"):
        LocalKeyProvider(path, passphrase=right)


def test_parameters_are_authenticated_and_not_merely_used(path):
    """The same key derived under the same parameters, and a header that says something else."""
    record = json.loads(path.read_text())
    sealed = record["sealed"]
    opened = passphrases.open_with_passphrase(record, PASSPHRASE)
    assert opened is not None
    assert (
        passphrases.open_with_passphrase({**record, "more": 1, "sealed": sealed}, PASSPHRASE)
        is None
    )


@pytest.mark.parametrize(
    "change",
    [
        {"memory_kib": 2**31 - 1},
        {"memory_kib": 262145},
        {"memory_kib": 8},
        {"iterations": 2**31 - 1},
        {"iterations": 9},
        {"iterations": 1},
        {"lanes": 9},
        {"lanes": 0},
        {"lanes": True},
        {"iterations": "3"},
        {"memory_kib": 65536.0},
        {"name": "argon2d"},
        {"more": 1},
        {"salt": b64encode(bytes(15))},
        {"salt": 7},
    ],
    ids=str,
)
def test_a_hostile_file_cannot_exhaust_the_machine(path, change):
    record = json.loads(path.read_text())
    record["kdf"].update(change)
    path.write_text(json.dumps(record))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(KeyUnavailableError, match="or it is damaged"):
        LocalKeyProvider(path, passphrase=right)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("damage", ["kdf", "sealed", "short", "type", "more"])
def test_a_damaged_file_is_refused(path, damage):
    record = json.loads(path.read_text())
    changes = {
        "kdf": {"kdf": "argon2id"},
        "sealed": {"sealed": 7},
        "short": {"sealed": b64encode(bytes(5))},
        "type": {"type": ["lightning-secure/local-key"]},
        "more": {"more": 1},
    }[damage]
    path.write_text(json.dumps({**record, **changes}))
    with pytest.raises(KeyUnavailableError):
        LocalKeyProvider(path, passphrase=right)


# ---------------------------------------------------------------- sources


def test_a_passphrase_is_not_given_as_text(path):
    for act in (LocalKeyProvider, LocalKeyProvider.generate):
        with pytest.raises(ConfigError, match="does not keep secrets") as caught:
            act(path, passphrase=PASSPHRASE)
        assert PASSPHRASE not in str(caught.value)


def test_a_passphrase_is_nowhere_in_the_provider(path):
    provider = LocalKeyProvider(path, passphrase=right)
    assert PASSPHRASE not in repr(provider) + repr(vars(provider))
    assert PASSPHRASE.encode() not in pickle.dumps(provider)


def test_a_source_that_could_carry_its_secret_is_not_pickled(path):
    def local() -> str:
        return PASSPHRASE

    for source in (functools.partial(str, PASSPHRASE), local, lambda: PASSPHRASE):
        provider = LocalKeyProvider(path, passphrase=source)
        with pytest.raises(KeyAccessError, match="cannot be pickled") as caught:
            pickle.dumps(provider)
        assert PASSPHRASE not in str(caught.value)


def test_a_secret_in_the_environment_is_read_each_time(monkeypatch, path):
    source = EnvironmentSecret("LSEC_TEST_X")
    monkeypatch.delenv("LSEC_TEST_X", raising=False)
    with pytest.raises(KeyUnavailableError, match="LSEC_TEST_X"):
        LocalKeyProvider(path, passphrase=source)
    monkeypatch.setenv("LSEC_TEST_X", PASSPHRASE)
    assert LocalKeyProvider(path, passphrase=source).name == "local"


def test_a_secret_in_a_file_must_be_its_owners_alone(tmp_path, path):
    secret = tmp_path / "secret"
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o640)
    source = FileSecret(str(secret))
    with pytest.raises(KeyUnavailableError, match="0640"):
        LocalKeyProvider(path, passphrase=source)
    secret.chmod(0o400)
    provider = LocalKeyProvider(path, passphrase=source)
    assert pickle.loads(pickle.dumps(provider)).key_id == provider.key_id


def test_what_a_failing_source_says_does_not_travel(path):
    def failing() -> str:
        raise RuntimeError(PASSPHRASE)

    for source in (failing, lambda: None, lambda: PASSPHRASE.encode(), lambda: "x" * 70000):
        with pytest.raises(KeyUnavailableError, match="failed or gave none") as caught:
            LocalKeyProvider(path, passphrase=source)
        assert caught.value.__context__ is None
        assert PASSPHRASE not in str(caught.value)
