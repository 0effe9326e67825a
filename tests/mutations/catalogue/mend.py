"""What is left when something breaks off, and what travels along with what was meant."""

from __future__ import annotations

from mutation import Mutation

CATALOGUE = [
    Mutation(
        "a sealing's journal goes on behind half a line",
        "data/journal.py",
        "        if self._broken:\n",
        "        if False:\n",
        "tests/data/test_resume.py -k not_written_whole",
        more=(("                os.ftruncate(self._fd, whole)\n", "                pass\n"),),
    ),
    Mutation(
        "a process that was forked meanwhile keeps a lock",
        "files.py",
        "        if os.getpid() == owner:\n",
        "        if False:\n",
        "tests/test_files.py -k forked_meanwhile",
    ),
    Mutation(
        "a forked process opens its parent's lock",
        "files.py",
        "        if os.getpid() == owner:\n",
        "        if True:\n",
        "tests/test_files.py -k parents_lock",
    ),
    Mutation(
        "a fork leaves a closed lock",
        "forks.py",
        "        lock._lock = threading.Lock()\n",
        "        pass\n",
        "tests/audit/test_log.py -k stops_neither",
    ),
    Mutation(
        "a split is put into the manifest under a key that is gone",
        "crypto/keys.py",
        "            self._require_kept()\n",
        "",
        "tests/data/test_interruptions.py -k destroyed_while",
    ),
    Mutation(
        "a checkpoint chooses how much memory a resumed run takes",
        "data/loader/loader.py",
        "if position.window_bytes > max(self._window_bytes, _TRUSTED_WINDOW_BYTES):",
        "if False:",
        "tests/data/loader/test_resume.py -k 'choose and 2147483648'",
    ),
    Mutation(
        "a checkpoint holds the rows beside a row that it names",
        "plugins/checkpoint.py",
        'save_named(checkpoint, cast("IO[bytes]", stream))',
        'torch.save(checkpoint, cast("IO[bytes]", stream))',
        "tests/plugins/test_compact.py -k that_a_module_keeps",
    ),
    Mutation(
        "nobody knows of an erasure that broke off",
        "data/unfinished.py",
        "        self.write(root, signer)\n",
        "",
        "tests/data/test_erasure.py -k old_key_went_is_finished",
    ),
    Mutation(
        "a key is destroyed that a late split needs",
        "data/recovery.py",
        "return not held(manifest) and keys.retire()",
        "return keys.retire()",
        "tests/data/test_erasure.py -k sealed_under_meanwhile",
    ),
    Mutation(
        "names of classes stand in the manifest",
        "data/sources/images.py",
        'f"{ENCRYPTED}classes.label"',
        '"classes.label"',
        "tests/data/sources/test_images.py -k names_of_classes",
    ),
    Mutation(
        "tied weights that are views come apart in a checkpoint",
        "plugins/compact.py",
        "if stretch and start >= end:",
        "if stretch:",
        "tests/plugins/test_compact.py -k share_them_afterwards",
    ),
    Mutation(
        "the record of another dataset's erasure destroys a key",
        "data/unfinished.py",
        "current.dataset_id == self.before.dataset_id and ",
        "",
        "tests/data/test_erasure.py -k of_another_dataset",
    ),
    Mutation(
        "a file beside the manifest says that rows are erased",
        "cli/erase.py",
        "return record is not None and record.happened(read_manifest(root, trusted=trusted))",
        "pass\n    return (root / '.erasing').exists()",
        "tests/cli/test_rotate_and_erase.py -k somebody_put_there",
    ),
    Mutation(
        "a row of a class of its own takes its neighbours with it",
        "plugins/compact.py",
        "not isinstance(value, Tensor)\n",
        "type(value) is not Tensor\n",
        "tests/plugins/test_compact.py -k another_kind",
    ),
    Mutation(
        "an erasure is finished without the key that it was to destroy, and forgets that it was",
        "data/finishing.py",
        "if ordered and old is None and not old_is_gone:",
        "if False:",
        "tests/data/test_erasure.py -k counts_as_alive",
    ),
]
