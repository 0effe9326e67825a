"""Checkpoints."""

from __future__ import annotations

from mutation import Mutation

CHECKPOINT = "tests/plugins/test_checkpoint.py"

CATALOGUE = [
    Mutation(
        "a truncated stream is parsed",
        "crypto/stream.py",
        "        self._load(full, rest - _TAG)\n        return full",
        "        return full",
        "tests/crypto/test_stream.py -k truncated",
    ),
    Mutation(
        "a checkpoint's header is not bound to it",
        "plugins/checkpoint.py",
        "context=prefix, start=len(prefix))",
        'context=b"", start=len(prefix))',
        CHECKPOINT,
    ),
    Mutation(
        "a checkpoint can run code",
        "plugins/checkpoint.py",
        "map_location=map_location or _to_cpu, weights_only=True",
        "map_location=map_location or _to_cpu, weights_only=False",
        f"{CHECKPOINT} -k code",
    ),
    Mutation(
        "a plaintext checkpoint is taken",
        "plugins/checkpoint.py",
        "with opened(path, keys=self._keys) as stream, self._allowed():",
        "from pathlib import Path as P\n"
        "        known = P(path).read_bytes().startswith(CHECKPOINT.magic)\n"
        "        source = opened(path, keys=self._keys) if known else P(path).open('rb')\n"
        "        with source as stream, self._allowed():",
        f"{CHECKPOINT} -k plaintext",
    ),
]
