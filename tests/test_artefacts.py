"""What every earlier version wrote can still be read."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from lightning_secure import (
    AuditLog,
    EncryptedCheckpointIO,
    EncryptedShardDataset,
    LocalKeyProvider,
    __version__,
    open_artifact,
)

HERE = Path(__file__).parent / "artefacts"
VERSIONS = sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name[0] == "v")

spec = importlib.util.spec_from_file_location("make_artefacts", HERE / "make.py")
assert spec is not None
assert spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_this_version_has_left_something():
    assert f"v{__version__}" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_it_can_be_read(version, tmp_path):
    folder = shutil.copytree(HERE / version, tmp_path / version)
    (folder / "project.kek").chmod(0o600)  # git does not keep it
    keys = LocalKeyProvider(folder / "project.kek")
    data = EncryptedShardDataset(folder / "dataset", split="train", keys=keys)
    x, names = data.__getitems__(range(len(data))).batch()
    assert np.array_equal(x.numpy(), make.X)
    assert names == make.NAMES
    assert len(data.entry.shards) > 1
    state = EncryptedCheckpointIO(keys).load_checkpoint(folder / "x.ckpt")
    assert np.array_equal(state["state_dict"]["w"].numpy(), make.X)
    with open_artifact(folder / "x.bin.encrypted", keys=keys) as stream:
        assert stream.read() == make.X.tobytes()
    log = AuditLog(folder / "audit.jsonl")
    assert log.verify().records == 3
    log.append("still writable")
    assert log.verify().records == 4
