from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from lightning_secure import cli
from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.key_rotation.rotate import add_recipient
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import AuditWriteError
from lightning_secure.util import events

X = np.arange(60, dtype="int64")


@pytest.fixture
def keys(tmp_path):
    return LocalKeyProvider.generate(tmp_path / "a.kek")


@pytest.fixture
def other(tmp_path, keys):
    LocalKeyProvider.generate(tmp_path / "b.kek")
    return LocalKeyProvider(tmp_path / "b.kek", trusted=[keys.signer.public_key])


@pytest.fixture
def root(tmp_path, keys):
    with EncryptedShardWriter(
        tmp_path / "d", split="train", keys=keys, subject_column="who", shard_bytes=2**20
    ) as writer:
        writer.write_batch({"x": X, "who": [f"patient {i % 3}" for i in X]})
    with EncryptedShardWriter(tmp_path / "d", split="val", keys=keys, subject_column="x") as writer:
        writer.write_batch({"x": X[:4]})
    return tmp_path / "d"


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], input=stdin)


def rows(root, keys, split="train"):
    return len(EncryptedShardDataset(root, split=split, keys=keys))


def test_every_key_is_rotated_from_the_command_line(root, keys, other, tmp_path):
    a, b = tmp_path / "a.kek", tmp_path / "b.kek"
    before = read_manifest(root, trusted=keys.trusted_signers)
    result = run("rotate", "data", root, "train", "--key-file", a)
    assert result.exit_code == 0, result.output
    add_recipient(root, "train", keys=keys, recipient=other)
    result = run("rotate", "partition", root, "train", "--key-file", a)
    assert result.exit_code == 1
    assert "ConfigError" in result.output
    assert other.key_id in result.output
    result = run("rotate", "partition", root, "train", "--key-file", a, "--recipient", b)
    assert result.exit_code == 0, result.output
    after = read_manifest(root, trusted=keys.trusted_signers)
    assert f"generation {after.generation}, manifest {after.digest}" in result.output
    assert not set(after.splits["train"].files) & set(before.splits["train"].files)
    result = run("rotate", "kek", root, "--key-file", a, "--to", b)
    assert result.exit_code == 0, result.output
    assert rows(root, other) == 60
    result = run("rotate", "clean", root, "--key-file", b, "--min-age-days", "0")
    assert result.output == "0 files removed\n"
    (root / "train" / "shard-00000-00000000.lsec").write_bytes(b"x")
    result = run("rotate", "clean", root, "--key-file", b, "--min-age-days", "0")
    assert result.output == "train/shard-00000-00000000.lsec\n1 files removed\n"


def test_an_erased_shard_that_can_come_back_is_not_called_gone(root, keys, tmp_path):
    arguments = ("erase", "shard", root, "train", 0, "--key-file", tmp_path / "a.kek")
    result = run(*arguments, stdin="n\n")
    assert result.exit_code == 1
    assert rows(root, keys) == 60
    result = run(*arguments, "--yes")
    assert result.exit_code == 3, result.output
    assert f"key {keys.key_id} (local): opened" in result.output
    assert rows(root, keys) == 40


def test_a_subject_is_erased_for_good(root, keys, other, tmp_path):
    arguments = (
        "erase", "subject", root, "train", "--key-file", tmp_path / "a.kek",
        "--rotate-kek-to", tmp_path / "b.kek", "--retire-kek",
    )  # fmt: skip
    result = run(*arguments, stdin="patient 1\n")
    assert result.exit_code == 2
    assert rows(root, keys) == 60
    result = run(*arguments, "--yes", stdin="patient 1\n")
    assert result.exit_code == 0, result.output
    assert "20 rows" in result.output
    assert "patient 1" not in result.output
    assert not (tmp_path / "a.kek").exists()
    assert rows(root, other) == 40


@pytest.mark.parametrize(
    ("stdin", "status", "words"),
    [
        ("2\n", 3, "1 rows"),
        ("two\n", 2, "not a whole number"),
        ("9\n", 1, "no rows of this subject"),
    ],
)
def test_a_subject_may_be_a_number(root, keys, tmp_path, stdin, status, words):
    result = run(
        "erase", "subject", root, "val", "--number", "--yes", "--key-file", tmp_path / "a.kek",
        stdin=stdin,
    )  # fmt: skip
    assert result.exit_code == status, result.output
    assert words in result.output


def test_an_erasure_that_breaks_off_says_that_the_rows_are_gone(root, keys, other, tmp_path):
    def refuse(event):
        if event.action == refused:
            raise AuditWriteError("the log is full")

    events.subscribe("refuse", refuse)
    a, b = tmp_path / "a.kek", tmp_path / "b.kek"
    arguments = (
        "erase", "shard", root, "train", 0, "--key-file", a, "--rotate-kek-to", b, "--retire-kek",
        "--yes",
    )  # fmt: skip
    refused = "data.erase"
    result = run(*arguments)
    assert (result.exit_code, rows(root, keys)) == (1, 60)
    refused = "key.retire"
    result = run(*arguments)
    assert result.exit_code == 4
    assert "AuditWriteError" in result.output
    assert "erase finish" in result.output
    assert rows(root, other) == 40
    finish = ("erase", "finish", root, "--key-file", b, "--old-key-file", a)
    assert run(*finish, stdin="n\n").exit_code == 1
    assert run(*finish, "--yes").exit_code == 4
    refused = ""
    result = run(*finish, stdin="y\n")
    assert result.exit_code == 0, result.output
    assert "20 rows" in result.output
    assert not a.exists()
    assert run("erase", "finish", root, "--key-file", b).exit_code == 1


def test_a_record_that_somebody_put_there_says_nothing_of_the_rows(root, keys, other, tmp_path):
    a, b = tmp_path / "a.kek", tmp_path / "b.kek"
    (root / ".erasing").write_bytes(b"{}")
    for arguments in (
        ("shard", root, "train", 0, "--key-file", a, "--min-generation", 9),  # it was rolled back
        ("shard", root, "train", 0, "--key-file", b),
        ("finish", root, "--key-file", a),
    ):
        result = run("erase", *arguments, "--yes")
        assert result.exit_code == 1, arguments
        assert "are erased" not in result.output
    assert rows(root, keys) == 60


def test_no_subject_is_no_subject(root, keys, tmp_path):
    result = run(
        "erase", "subject", root, "train", "--yes", "--key-file", tmp_path / "a.kek", stdin="\n"
    )
    assert (result.exit_code, rows(root, keys)) == (2, 60)


def test_at_a_terminal_the_subject_is_asked_for_and_not_shown(root, keys, tmp_path, monkeypatch):
    asked = []

    def prompt(text, **options):
        asked.append((text, options))
        return "patient 2"

    # A test has no terminal.
    monkeypatch.setattr("click.prompt", prompt)
    monkeypatch.setattr("lightning_secure.cli.erase._at_a_terminal", lambda: True)
    result = run(
        "erase", "subject", root, "train", "--key-file", tmp_path / "a.kek", "--retire-kek",
        "--rotate-kek-to", tmp_path / "a.kek", stdin="n\n",
    )  # fmt: skip
    assert asked == [("Subject", {"hide_input": True})]
    assert "destroy" in result.output
    assert (result.exit_code, rows(root, keys)) == (1, 60)
