from __future__ import annotations

import json
import stat

import pytest
from click.testing import CliRunner

from lightning_secure.cli import main
from lightning_secure.crypto.providers import (
    EnvironmentSecret,
    HpkeKeyProvider,
    LocalKeyProvider,
    SigningKey,
)

PASSPHRASE = "correct horse battery staple"


def run(*arguments, status=0, **rest):
    result = CliRunner().invoke(main, ["keys", *map(str, arguments)], **rest)
    assert result.exit_code == status, result.output
    return result.output


def secrets(path):
    record = json.loads(path.read_text())
    return [
        str(record[name]) for name in ("kek", "signing_key", "private", "seed") if name in record
    ]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("local", []), ("hpke", []), ("hpke", ["--kem", "x25519"]), ("signing", [])],
)
def test_what_was_made_is_shown_the_same_and_nothing_secret(tmp_path, kind, options):
    path = tmp_path / "new" / "x.key"
    made = run("generate", kind, path, *options)
    assert run("show", path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secrets(path)
    assert not [secret for secret in secrets(path) if secret in made]
    public = tmp_path / "new" / "x.key.pub"
    if kind != "local":
        assert run("show", public) == made
        assert public.read_text().strip() in made


def test_the_keys_work(tmp_path):
    run("generate", "hpke", tmp_path / "alice")
    run("generate", "signing", tmp_path / "sealer")
    run("generate", "local", tmp_path / "project")
    HpkeKeyProvider(private_key=tmp_path / "alice", signing_key=tmp_path / "sealer")
    assert SigningKey(tmp_path / "sealer").key_id in run("show", tmp_path / "sealer.pub")
    assert LocalKeyProvider(tmp_path / "project").key_id in run("show", tmp_path / "project")


def test_a_passphrase_is_asked_for_and_not_echoed(tmp_path, monkeypatch):
    path = tmp_path / "x.kek"
    made = run("generate", "local", path, "--passphrase", input=f"{PASSPHRASE}\n{PASSPHRASE}\n")
    assert PASSPHRASE not in made
    monkeypatch.setenv("LSEC_TEST_X", PASSPHRASE)
    key_id = LocalKeyProvider(path, passphrase=EnvironmentSecret("LSEC_TEST_X")).key_id
    assert key_id in made
    assert key_id in run("show", path, input=f"{PASSPHRASE}\n")
    assert key_id in run("show", path, "--passphrase-env", "LSEC_TEST_X")
    assert "passphrase is wrong" in run("show", path, input="something else\n", status=1)


def test_a_passphrase_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LSEC_TEST_X", PASSPHRASE)
    run("generate", "local", tmp_path / "x.kek", "--passphrase-env", "LSEC_TEST_X")
    assert "kdf" in json.loads((tmp_path / "x.kek").read_text())
    monkeypatch.delenv("LSEC_TEST_X")
    text = run("generate", "local", tmp_path / "y", "--passphrase-env", "LSEC_TEST_X", status=1)
    assert "LSEC_TEST_X" in text
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("kind", ["local", "hpke", "signing"])
def test_nothing_is_overwritten(tmp_path, kind):
    run("generate", kind, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    text = run("generate", kind, tmp_path / "x", status=1)
    assert text.startswith("Error: ")
    assert "exists" in text
    assert (tmp_path / "x").read_bytes() == before


@pytest.mark.parametrize("text", ["", "hello", "[]", "{}", '{"type": "other"}', "ed25519:AAA"])
def test_what_is_no_key_is_refused(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert "not a public key" in run("show", tmp_path / "x", status=1)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    run("generate", "local", tmp_path / "x")
    (tmp_path / "x").chmod(0o644)
    assert "0644" in run("show", tmp_path / "x", status=1)
