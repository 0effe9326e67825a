"""A run that fails in the middle: every byte that it has written is searched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from leaking_run import ADDRESS, PASSWORD, TOKEN

from lightning_secure import CanarySearch

CANARIES = {"password": PASSWORD, "address": ADDRESS, "token": TOKEN}
FILES = {"train.log", "rich.log", "output.txt", "config.yaml", "hparams.yaml", "metrics.csv"}


def test_a_run_that_fails_leaves_no_secret_anywhere(tmp_path):
    script = Path(__file__).with_name("leaking_run.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=120)
    search = CanarySearch(CANARIES)
    leaking = {Path(hit.path.partition("!")[0]).name for hit in search.search([tmp_path / "plain"])}
    assert leaking >= FILES  # each of them would have told
    assert any(name.endswith(".ckpt") for name in leaking)

    folder = tmp_path / "redacted"
    outside = json.loads((folder / "outside.json").read_text())
    assert search.search([folder, *map(Path, outside)]) == []
    names = {path.name for path in folder.rglob("*")}
    assert names >= FILES
    assert any(name.endswith(".ckpt") for name in names)
    assert "ConnectionError" in (folder / "train.log").read_text()
    assert "RuntimeError: REDACTED cannot be read" in (folder / "output.txt").read_text()
