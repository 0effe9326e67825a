from __future__ import annotations

import json
import os
import pickle
import stat

import pytest

from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.errors import ConfigError, KeyUnavailableError

CONTEXT = {"purpose": "test"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "secrets" / "project.kek"


def test_a_new_key_file_is_its_owners_alone(path):
    LocalKeyProvider.generate(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_every_directory_that_is_made_for_a_key_is_its_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        LocalKeyProvider.generate(tmp_path / "a" / "b" / "c" / "project.kek")
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700, name


def test_the_same_file_gives_the_same_keys(path):
    first = LocalKeyProvider.generate(path)
    second = LocalKeyProvider(str(path))
    key = DataKey.generate()
    assert second.unwrap(first.wrap(key, context=CONTEXT), context=CONTEXT) == key
    assert first.key_id == second.key_id
    assert first.signer.key_id == second.signer.key_id
    assert list(first.trusted_signers) == [first.signer.key_id]
    assert first.derive("a") == second.derive("a") != first.derive("b")
    assert first.name == "local"


def test_two_files_have_nothing_in_common(tmp_path):
    first = LocalKeyProvider.generate(tmp_path / "a")
    second = LocalKeyProvider.generate(tmp_path / "b")
    assert first.key_id != second.key_id
    assert first.signer.key_id != second.signer.key_id


def test_a_key_is_never_overwritten(path):
    LocalKeyProvider.generate(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="not overwritten"):
        LocalKeyProvider.generate(path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KeyUnavailableError, match="could not be written"):
        LocalKeyProvider.generate(tmp_path / "file" / "project.kek")


def test_a_missing_key_file_is_reported(path):
    with pytest.raises(KeyUnavailableError, match="cannot be opened"):
        LocalKeyProvider(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_a_key_file_that_others_can_use_is_refused(path, mode):
    LocalKeyProvider.generate(path)
    path.chmod(mode)
    with pytest.raises(KeyUnavailableError, match=f"{mode:04o}"):
        LocalKeyProvider(path)


def test_a_key_file_of_another_user_is_refused(path, monkeypatch):
    LocalKeyProvider.generate(path)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # nobody else's files can be made without being root
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(KeyUnavailableError, match="another user"):
        LocalKeyProvider(path)


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_key_file_must_be_a_file(tmp_path, kind):
    place = tmp_path / "thing"
    if kind == "folder":
        place.mkdir(mode=0o700)
    else:
        os.mkfifo(place, 0o600)
    with pytest.raises(KeyUnavailableError, match="not a regular file"):
        LocalKeyProvider(place)


def test_a_linked_key_file_is_judged_by_what_it_points_to(path, tmp_path):
    LocalKeyProvider.generate(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert LocalKeyProvider(link).key_id == LocalKeyProvider(path).key_id
    path.chmod(0o644)
    with pytest.raises(KeyUnavailableError):
        LocalKeyProvider(link)


@pytest.mark.parametrize(
    "damage",
    ["", "garbage", "{}", "cut", "version", "type", "short kek", "long", "more fields"],
)
def test_a_damaged_key_file_is_refused_and_not_shown(path, damage):
    LocalKeyProvider.generate(path)
    record = json.loads(path.read_text())
    text = {
        "": "",
        "garbage": "hunter2",
        "{}": "{}",
        "cut": json.dumps(record)[:-20],
        "version": json.dumps({**record, "version": 3}),
        "type": json.dumps({**record, "type": "other"}),
        "short kek": json.dumps({**record, "kek": record["kek"][:-8]}),
        "long": json.dumps(record) + " " * 70000,
        "more fields": json.dumps({**record, "comment": "x"}),
    }[damage]
    path.write_text(text)
    with pytest.raises(KeyUnavailableError, match="or it is damaged") as caught:
        LocalKeyProvider(path)
    error: BaseException | None = caught.value
    while error is not None:
        shown = str(error) + repr(error.args) + str(getattr(error, "doc", ""))
        assert record["kek"][:12] not in shown
        error = error.__context__


def test_a_provider_shows_its_place_and_id_only(path):
    provider = LocalKeyProvider.generate(path)
    record = json.loads(path.read_text())
    assert repr(provider) == f"LocalKeyProvider({str(path)!r}, key_id={provider.key_id!r})"
    assert record["kek"] not in repr(vars(provider))


def test_a_provider_is_pickled_without_its_keys(path):
    provider = LocalKeyProvider.generate(path)
    data = pickle.dumps(provider)
    record = json.loads(path.read_text())
    for secret in (record["kek"], record["signing_key"]):
        assert secret.encode() not in data
    assert pickle.loads(data).key_id == provider.key_id
