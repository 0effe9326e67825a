"""Writes what this version writes, to be kept for good: ``python tests/artefacts/make.py FOLDER``.

Run once a release; nothing that is here is ever written again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from lightning_secure import (
    AuditLog,
    Column,
    EncryptedCheckpointIO,
    EncryptedShardWriter,
    LocalKeyProvider,
    Schema,
)
from lightning_secure.redaction.artifacts.encrypted import encrypted

ROWS = 20
X = (np.arange(ROWS * 3, dtype="float32") / 7).reshape(ROWS, 3)
NAMES = [f"row {i}" for i in range(ROWS)]


def main(folder: Path) -> None:
    keys = LocalKeyProvider.generate(folder / "project.kek")
    schema = Schema((Column("x", "tensor", "float32", (3,)), Column("name", "string")))
    with EncryptedShardWriter(
        folder / "dataset", split="train", keys=keys, schema=schema,
        segment_bytes=96, shard_bytes=192,
    ) as writer:  # fmt: skip
        writer.write_batch({"x": X, "name": NAMES})
    EncryptedCheckpointIO(keys).save_checkpoint(
        {"state_dict": {"w": torch.from_numpy(X)}, "global_step": 3}, folder / "x.ckpt"
    )
    (folder / "x.bin.encrypted").write_bytes(encrypted(X.tobytes(), name="x.bin", keys=keys))
    log = AuditLog(folder / "audit.jsonl")
    for number in range(3):
        log.append("test", {"number": number})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
