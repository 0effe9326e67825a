"""Checkpoints."""

from __future__ import annotations

from mutation import Mutation

CHECKPOINT = "tests/plugins/test_checkpoint.py"
ASKING = "tests/plugins/test_asking.py"

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
    Mutation(
        "a strategy that writes checkpoints itself is not met in a Trainer",
        "plugins/entry_point.py",
        "return [Introduction()] if _OURS & sys.modules.keys() else []",
        "return []",
        f"{ASKING} -k 'past_a_checkpoint_io and background'",
    ),
    Mutation(
        "a datamodule sets up before it is known who writes checkpoints",
        "data/datamodule.py",
        "            introduce(self.trainer.strategy)\n",
        "            pass\n",
        f"{ASKING} -k looks_by_itself",
    ),
    Mutation(
        "a strategy that nobody knows counts as one that asks",
        "plugins/asking.py",
        "return owner in known and known[owner](strategy)",
        "return owner not in known or known[owner](strategy)",
        f"{ASKING} -k 'known_which and PassesOn'",
    ),
    Mutation(
        "what a strategy says of itself holds for whoever overrides it",
        "plugins/asking.py",
        "    if vars(owner).get(_DECLARED) is True:",
        "    if getattr(owner, _DECLARED, None) is True:",
        f"{ASKING} -k 'known_which and SaidElsewhere'",
    ),
    Mutation(
        "a run goes on from a checkpoint that nobody has authenticated",
        "plugins/checkpoint.py",
        "        if loaded:\n",
        "        if False:\n",
        f"{ASKING} -k read_past_it",
    ),
    Mutation(
        "a refused run is saved by whoever saves on exceptions",
        "plugins/entry_point.py",
        "        self.on_train_start(trainer, pl_module)\n",
        "        return\n",
        f"{ASKING} -k 'refusal and entry'",
    ),
]
