"""Column keys, rotation and erasure."""

from __future__ import annotations

from mutation import Mutation

CATALOGUE = [
    Mutation(
        "a sensitive column lies under everybody's key",
        "data/writing/split_layout.py",
        "partition=self._keys[partition],",
        "partition=self._keys[self._split],",
        "tests/data/test_column_keys.py -k 'only_the_keys'",
    ),
    Mutation(
        "groups of columns may hold other rows",
        "crypto/entries.py",
        "            any(\n                [(shard.number",
        "            False\n            and any(\n                [(shard.number",
        "tests/data/test_column_keys.py -k groups_do_not_fit",
    ),
    Mutation(
        "an interruption after the manifest takes its shards away",
        "data/manifests/garbage.py",
        "return [file for file in wanted if file in named or not _removed(root, file)]",
        "return [file for file in wanted if not _removed(root, file)]",
        "tests/data/test_interruptions.py -k right_after",
    ),
    Mutation(
        "a removed recipient's partition key still opens",
        "crypto/rotation.py",
        "new = PartitionKey.generate(manifest.dataset_id, partition)",
        "new = old",
        "tests/data/test_rotation.py -k old_one_opens_nothing",
    ),
    Mutation(
        "rotated rows are not compared",
        "data/key_rotation/rotate.py",
        "if old.decrypt(index, before) != new.decrypt(index, after):",
        "if False:",
        "tests/data/test_rotation.py -k other_rows_than_before",
    ),
    Mutation(
        "old shards go before the manifest that does without them",
        "data/key_rotation/rotate.py",
        "        removals.note(entry.files)\n",
        "        for name in entry.files:\n            (folder / name).unlink()\n",
        "tests/data/test_rotation.py -k cannot_be_recorded",
    ),
    Mutation(
        "an erasure that failed is called a success",
        "data/erasure/erasure_report.py",
        'return any(attempt.outcome != "refused" for attempt in self.attempts)',
        "return False",
        "tests/data/test_erasure.py -k 'live_key or new_kek_alone'",
    ),
    Mutation(
        "an erased shard keeps its partition key",
        "data/erasure/erase.py",
        "        for partition in entry.partitions:\n            changed",
        "        for partition in ():\n            changed",
        "tests/data/test_erasure.py -k do_not_open_the_erased",
    ),
    Mutation(
        "a sealing that waits to be resumed is cleared away",
        "data/manifests/garbage.py",
        "and not os.path.lexists(path / SEALING_JOURNAL_NAME)",
        "and True",
        "tests/data/test_interruptions.py -k waits_to_be_resumed",
    ),
]
