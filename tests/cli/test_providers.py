"""Providers as files name them. Those with a service behind them: tests/crypto/providers."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from lightning_secure import cli
from lightning_secure.cli.providers import provider_in
from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.crypto.providers import (
    EnvironmentSecret,
    HpkeKeyProvider,
    HpkePrivateKey,
    LocalKeyProvider,
    SigningKey,
)
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.errors import ConfigError, KeyAccessError, KeyUnavailableError

EXAMPLE = Path(__file__).parents[2] / "examples" / "seal.yaml"
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def here(tmp_path, monkeypatch):
    # Configurations name files by relative paths, and a secret by its variable.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSEC_TEST_X", PASSPHRASE)
    Path("t.csv").write_text("x,y\n" + "".join(f"{i}.5,{i}\n" for i in range(20)))
    return tmp_path


def run(*arguments, status=0, stdin=None):
    result = CliRunner().invoke(cli.main, [str(one) for one in arguments], input=stdin)
    assert result.exit_code == status, result.output
    assert PASSPHRASE not in result.output
    return " ".join(result.output.split())


def rows(keys, root="d", **pins):
    return len(EncryptedShardDataset(root, split="train", keys=keys, **pins))


def write(name, text):
    Path(name).write_text(text)
    return name


@pytest.fixture
def protected(here):
    """A key under a passphrase, which the environment, a file and somebody at a terminal know."""
    Path("secret").write_text(PASSPHRASE)
    Path("secret").chmod(0o600)
    return LocalKeyProvider.generate("p.kek", passphrase=EnvironmentSecret("LSEC_TEST_X"))


def named(how):
    return write("seal.yaml", f"keys: {{kind: passphrase, path: p.kek, passphrase: {how}}}\n")


@pytest.mark.parametrize("how", ["{file: secret}", "prompt"])
def test_a_passphrase_comes_from_a_file_or_is_asked_for(protected, how):
    config, stdin = named(how), f"{PASSPHRASE}\n" if how == "prompt" else None
    assert "generation 2" in run("seal", "t.csv", "d", "--config", config, stdin=stdin)
    assert rows(protected) == 20


def test_one_file_names_the_provider_for_every_command(protected):
    config = named("{env: LSEC_TEST_X}")
    run("seal", "t.csv", "d", "--config", config)
    assert "generation 3" in run("rotate", "partition", "d", "train", "--key-file", config)
    assert protected.key_id in run("keys", "show", config)
    erased = run("erase", "shard", "d", "train", "0", "--yes", "--key-file", config, status=3)
    assert "20 rows" in erased


def test_whoever_seals_for_public_keys_cannot_open(here):
    for name in ("alice", "bob"):
        HpkePrivateKey.generate(name)
    sealer = SigningKey.generate("sealer")
    config = write(
        "seal.yaml", "keys:\n  kind: hpke\n  recipients: [alice.pub]\n  signing_key: sealer\n"
    )
    run("seal", "t.csv", "d", "--config", config)
    alice = HpkeKeyProvider(private_key="alice", trusted=[sealer.public])
    assert rows(alice) == 20
    with pytest.raises(KeyUnavailableError):
        rows(provider_in(Path(config)))
    assert alice.key_id in run("keys", "show", config)
    # Who can open it may let others in.
    one = write("a.yaml", "{kind: hpke, private_key: alice, signing_key: sealer}")
    two = write("b.yaml", "{kind: hpke, recipients: [bob.pub], signing_key: sealer}")
    bob = HpkeKeyProvider(private_key="bob", trusted=[sealer.public])
    with pytest.raises(KeyAccessError):
        rows(bob)
    run("keys", "recipients", "add", "d", "train", "--key-file", one, "--recipient", two)
    assert rows(bob) == 20


# ---------------------------------------------------------------- recipients


def test_recipients_are_added_shown_and_removed(here):
    mine = LocalKeyProvider.generate("a.kek")
    LocalKeyProvider.generate("b.kek")
    theirs = LocalKeyProvider("b.kek", trusted=[mine.signer.public_key])
    write("seal.yaml", "keys: {kind: local, path: a.kek}")
    run("seal", "t.csv", "d", "--config", "seal.yaml")
    added = ("keys", "recipients", "add", "d", "train", "--key-file", "a.kek")
    assert "generation 3" in run(*added, "--recipient", "b.kek")
    assert rows(theirs) == 20
    listed = run("keys", "recipients", "list", "d", "--key-file", "a.kek")
    assert f"train: local {mine.key_id} train: local {theirs.key_id} generation 3" in listed
    removed = ("keys", "recipients", "remove", "d", "train", theirs.key_id, "--key-file", "a.kek")
    assert "generation 4" in run(*removed)
    with pytest.raises(KeyAccessError):
        rows(theirs)
    assert "its recipients are" in run(*removed, status=1)
    assert "no partition 'val'" in run(
        *added[:4], "val", *added[5:], "--recipient", "b.kek", status=1
    )


# ---------------------------------------------------------------- pins


def test_no_command_writes_to_a_dataset_that_was_rolled_back(here):
    keys = LocalKeyProvider.generate("a.kek")
    other = LocalKeyProvider.generate("b.kek")
    write("seal.yaml", "keys: {kind: local, path: a.kek}")
    run("seal", "t.csv", "d", "--config", "seal.yaml")
    run("keys", "recipients", "add", "d", "train", "--key-file", "a.kek", "--recipient", "b.kek")
    old = Path("d/manifest.json").read_bytes()
    run("rotate", "partition", "d", "train", "--key-file", "a.kek", "--recipient", "b.kek")
    pin = read_manifest(Path("d"), trusted=keys.trusted_signers)
    Path("d/manifest.json").write_bytes(old)
    write("more.yaml", "keys: {kind: local, path: a.kek}\nsplit: more")
    both = ("--key-file", "a.kek", "--recipient", "b.kek")
    for command in (
        ("seal", "t.csv", "d", "--config", "more.yaml"),
        ("rotate", "kek", "d", "--key-file", "a.kek", "--to", "b.kek"),
        ("rotate", "partition", "d", "train", *both),
        ("rotate", "data", "d", "train", "--key-file", "a.kek"),
        ("rotate", "clean", "d", "--key-file", "a.kek", "--min-age-days", "0"),
        ("erase", "shard", "d", "train", "0", "--yes", *both),
        ("keys", "recipients", "list", "d", "--key-file", "a.kek"),
        ("keys", "recipients", "add", "d", "train", *both),
        ("keys", "recipients", "remove", "d", "train", other.key_id, "--key-file", "a.kek"),
    ):
        for pinned in (
            ("--min-generation", pin.generation),
            ("--manifest-digest", pin.digest),
        ):
            assert "was rolled back" in run(*command, *pinned, status=1).replace(
                "changed or rolled", "was rolled"
            )
            assert Path("d/manifest.json").read_bytes() == old


# ---------------------------------------------------------------- what is refused


def test_the_example_names_every_other_kind_rightly(here):
    """They fail for want of a file, a secret or a server, and not for how they are written."""
    lines = EXAMPLE.read_text().splitlines()
    named = [line.removeprefix("#   ") for line in lines if line.startswith("#   {kind:")]
    assert {line.partition(",")[0] for line in named} == {
        f"{{kind: {kind}" for kind in ("passphrase", "hpke", "pkcs11", "vault", "aws-kms")
    }
    for line in named:
        path = Path(write("k.yaml", line.replace("prompt", "{env: NONE}")))
        with pytest.raises(KeyAccessError):
            provider_in(path).derive("anything")


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"kind: {SECRET}", "needs kind: local, passphrase, hpke"),
        ("{path: p.kek}", "needs kind"),
        ("{kind: [local]}", "needs kind"),
        ("{kind: passphrase, path: p.kek}", "needs passphrase"),
        (f"{{kind: passphrase, path: p.kek, passphrase: {SECRET}}}", "never the secret itself"),
        (f"{{kind: passphrase, path: p.kek, passphrase: {{value: {SECRET}}}}}", "env: NAME"),
        (f"{{kind: passphrase, path: p.kek, passphrase: {{{SECRET}}}}}", "env: NAME"),
        (f"{{kind: passphrase, path: p.kek, passphrase:{SECRET}}}", "(not shown)"),
        (f"{{kind: passphrase, path: p.kek, {SECRET}: 1}}", "(not shown)"),
        (f"{{kind: vault, url: u, key: k, token: {SECRET}}}", "token takes"),
        (f"{{kind: pkcs11, module: m, token: t, key: k, pin: {SECRET}}}", "pin takes"),
        ("{kind: pkcs11, module: m, token: t, key: k, pin: 4711}", "pin takes"),
        ("{kind: vault, url: u, key: k, insecure_allow_http: true}", "'insecure_allow_http'"),
        (f"{{kind: vault, url: [{SECRET}], key: k}}", "url must be str"),
        ("{kind: vault, url: 'http://vault.example', key: k}", "in the clear"),
        ("{kind: vault, url: 'https://v', key: k, timeout: soon}", "timeout must be int or float"),
        ("{kind: aws-kms, key_arn: alias/x}", "not the ARN"),
        ("{kind: hpke, recipients: alice.pub}", "a list of texts"),
        ("{kind: hpke, recipients: [1]}", "a list of texts"),
        ("{kind: hpke}", "needs recipients"),
        ("keys: 7", "must be of type dict"),
        (f"? [{SECRET}]\n: c", "not what its form says"),
        (f"x: !!int {SECRET}", "not what its form says"),
        ("x: 2001-99-99", "not what its form says"),
        ('{kind: local, path: "a\\0b"}', "NUL character"),
        (f"{{kind: vault, url: 'https://v', key: {SECRET}=}}", "not the name"),
        (f"{{kind: aws-kms, key_arn: {SECRET}}}", "not the ARN"),
    ],
)
def test_what_makes_no_provider_is_refused_without_repeating_it(here, text, words):
    with pytest.raises(ConfigError) as refused:
        provider_in(Path(write("k.yaml", text)))
    assert words in str(refused.value)
    chain = [refused.value, refused.value.__context__, refused.value.__cause__]
    assert not [error for error in chain if SECRET in str(error)]


def test_a_wrong_passphrase_is_not_shown(here):
    LocalKeyProvider.generate("p.kek", passphrase=lambda: PASSPHRASE + "!")
    write("k.yaml", "{kind: passphrase, path: p.kek, passphrase: {env: LSEC_TEST_X}}")
    assert "passphrase is wrong" in run("keys", "show", "k.yaml", status=1)


@pytest.mark.parametrize("mode", [0o664, 0o666])
def test_a_file_that_others_could_have_written_names_no_recipients(here, mode):
    HpkePrivateKey.generate("alice")
    LocalKeyProvider.generate("a.kek")
    for text in (
        "{kind: hpke, recipients: [alice.pub]}",
        "{kind: local, path: a.kek, trusted: []}",
    ):
        path = Path(write("k.yaml", text))
        path.chmod(mode)
        with pytest.raises(KeyUnavailableError, match="others than its owner"):
            provider_in(path)
        path.chmod(0o644)
        provider_in(path)
