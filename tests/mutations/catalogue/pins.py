"""Writers and what is pinned, uploads of damaged shards, and providers named in files."""

from __future__ import annotations

from mutation import Mutation

ROLLBACK = "tests/attacks/test_rollback.py"
UPLOAD = "tests/data/storage/test_upload.py"

CATALOGUE = [
    Mutation(
        "a split is committed to a dataset that was rolled back while it was sealed",
        "data/manifests/commit.py",
        "        pins.check(current, root)\n        joined = current",
        "        joined = current",
        f"{ROLLBACK} -k 'while_rows_are_sealed and not remote'",
    ),
    Mutation(
        "a pin counts at the start of a rotation only",
        "data/key_rotation/rotate.py",
        "        pins.check(current, root)\n        manifest = rotation.successor",
        "        manifest = rotation.successor",
        f"{ROLLBACK} -k while_data_is_rotated",
    ),
    Mutation(
        "leftovers of a newer generation are cleared away from an older one",
        "data/key_rotation/rotate.py",
        "        pins.check(read_manifest(root, trusted=keys.trusted_signers), root)\n"
        "        _sweep(root, keys, pins)",
        "        RemovalList(root).sweep(read_manifest(root, trusted=keys.trusted_signers))",
        f"{ROLLBACK} -k not_garbage",
    ),
    Mutation(
        "a remote manifest is replaced whatever was pinned",
        "data/writing/upload.py",
        "        pins.check(current, storage)\n        if current is None:",
        "        if current is None:",
        f"{ROLLBACK} -k remote_roll_back",
    ),
    Mutation(
        "a dataset is begun where another was pinned",
        "data/manifests/rollback_pins.py",
        "if self._pin.min_generation or self._pin.manifest_digest is not None:",
        "if False:",
        f"{ROLLBACK} -k begun_where",
    ),
    Mutation(
        "a refused sealing removes shards that only the manifest before a roll-back names",
        "data/writing/writer.py",
        "if keep or self.complete else",
        "if keep else",
        f"{ROLLBACK} -k takes_no_rows",
    ),
    Mutation(
        "what a sealing returns to be pinned is from before it",
        "data/writing/spool.py",
        "there, _, _ = current_manifest(self._storage, self._keys)",
        "there = self._there",
        f"{UPLOAD} -k 'in_place_at_its_end and url'",
    ),
    Mutation(
        "shards are sent unseen",
        "data/writing/upload.py",
        "        verify_shard(LocalStorage(here), entry)\n",
        "        pass\n",
        f"{UPLOAD} -k 'replaces_nothing'",
    ),
    Mutation(
        "the tags of a shard are not compared before it is sent",
        "data/shards/verify.py",
        "if tags_root(read_tags(file, header, entry.size)) != entry.merkle_root:",
        "if False:",
        f"{UPLOAD} -k 'replaces_nothing and tag'",
    ),
    Mutation(
        "a secret that stands in a configuration is repeated in the error",
        "cli/providers.py",
        'f"{what} takes {{env: NAME}}, {{file: PATH}} or prompt',
        'f"{what}: {value} takes {{env: NAME}}, {{file: PATH}} or prompt',
        "tests/cli/test_providers.py -k without_repeating",
    ),
]
