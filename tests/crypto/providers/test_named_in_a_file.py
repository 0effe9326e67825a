"""The command line with providers that have a service behind them; its own tests have the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lightning_secure import cli
from lightning_secure.cli.providers import provider_in
from lightning_secure.data.reading.dataset import EncryptedShardDataset


def named(case, kind, path):
    """Write down what a provider was made with, as a configuration has it."""
    arguments = {
        name: value for name, value in case.make()._arguments.items() if value not in (None, False)
    }
    fields = {
        name: {"env": value.name} if callable(value) else value for name, value in arguments.items()
    }
    if isinstance(fields.get("trusted"), tuple):
        del fields["trusted"]
    text = json.dumps({"kind": kind, **fields}, default=str)  # JSON is YAML
    path.write_text(f"keys: {text}\n")
    return path


@pytest.mark.parametrize("kind", ["pkcs11", "vault", "aws-kms"])
def test_a_dataset_is_sealed_and_rotated_under_a_key_that_never_leaves(
    request, kind, tmp_path, monkeypatch
):
    # The command line is given relative paths.
    monkeypatch.chdir(tmp_path)
    case = request.getfixturevalue(kind.partition("-")[0])
    config = named(case, kind, tmp_path / "seal.yaml")
    Path("t.csv").write_text("x\n1\n2\n3\n")
    output = ""
    for command in (
        ["seal", "t.csv", "d", "--config", str(config)],
        ["rotate", "partition", "d", "train", "--key-file", str(config)],
        ["keys", "recipients", "list", "d", "--key-file", str(config)],
        ["keys", "show", str(config)],
    ):
        result = CliRunner().invoke(cli.main, command)
        assert result.exit_code == 0, result.output
        output += result.output
    keys = provider_in(config)
    assert len(EncryptedShardDataset("d", split="train", keys=keys)) == 3
    assert f"train: {keys.name} {keys.key_id}" in output
    assert not [secret for secret in case.secrets() if secret in output + config.read_text()]
