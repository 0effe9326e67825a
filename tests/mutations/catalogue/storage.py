"""Confidentiality and integrity of shards, manifests and keys."""

from __future__ import annotations

from mutation import Mutation

STORAGE = "tests/attacks/test_storage.py"

CATALOGUE = [
    Mutation(
        "segments are not bound to their header",
        "crypto/segments.py",
        "_AAD.pack(self._header_digest, index, records, _TYPE_DATA)",
        "_AAD.pack(bytes(32), index, records, _TYPE_DATA)",
        "tests/crypto/test_segments.py",
    ),
    Mutation(
        "all segments share one nonce",
        "crypto/segments.py",
        "return _NONCE.pack(_TYPE_DATA, index)",
        "return _NONCE.pack(_TYPE_DATA, 0)",
        "tests/crypto/test_segments.py",
    ),
    Mutation(
        "the key commitment is not checked",
        "data/shards/shard.py",
        "if not hmac.compare_digest(keys.commitment, self.header.commitment):",
        "if False:",
        f"{STORAGE} -k commit",
    ),
    Mutation(
        "a reader can rewrite rows before the shard is opened",
        "data/shards/shard.py",
        "if tags_root(self._tags) != entry.merkle_root:",
        "if False:",
        f"{STORAGE} -k rewrites",
    ),
    Mutation(
        "a reader can rewrite rows while the shard is open",
        "data/shards/shard.py",
        "if not (complete and hmac.compare_digest(found, tag)):",
        "if False:",
        f"{STORAGE} -k rewrites",
    ),
    Mutation(
        "a shard's header is not compared with the manifest",
        "data/shards/shard.py",
        "if hashlib.sha256(packed).digest() != entry.header_sha256:",
        "if False:",
        f"{STORAGE} -k exchanged",
    ),
    Mutation(
        "a manifest's signature is not checked",
        "crypto/signing.py",
        "        except InvalidSignature:\n            continue",
        "        except InvalidSignature:\n            pass",
        f"tests/crypto/test_signing.py {STORAGE} -k 'signature or pose or manifest'",
    ),
    Mutation(
        "a manifest of another type passes",
        "crypto/signing.py",
        'if envelope.get("payloadType") != payload_type:',
        "if False:",
        "tests/crypto/test_signing.py",
    ),
    Mutation(
        "pins are ignored",
        "data/reading/dataset.py",
        "        self._pin.check(manifest)\n",
        "",
        f"{STORAGE} -k 'rolled_back or another_dataset'",
    ),
    Mutation(
        "wrapped keys can be moved",
        "crypto/keys.py",
        'return b"lsec/v1/wrap\\0" + canonical_json(dict(context))',
        'return b"lsec/v1/wrap\\0"',
        "tests/crypto/test_keys.py -k context",
    ),
    Mutation(
        "keys are used without a record",
        "crypto/keys.py",
        '        events.announce("key.unwrap", self._event(context))\n        return key',
        "        return key",
        "tests/crypto/test_keys.py",
    ),
    Mutation(
        "keys can be pickled",
        "crypto/keys.py",
        "    def __reduce_ex__(self, protocol: object) -> NoReturn:",
        "    def _unused(self, protocol: object) -> NoReturn:",
        "tests/crypto/test_keys.py -k pickling",
    ),
    Mutation(
        "a key file that everybody can read is used",
        "crypto/providers/keyfiles.py",
        "if status.st_mode & forbidden:",
        "if False:",
        "tests/crypto/providers/test_local.py",
    ),
    Mutation(
        "an existing key file is overwritten",
        "crypto/providers/keyfiles.py",
        "atomic_writer(path, mode=mode, replace=False)",
        "atomic_writer(path, mode=mode)",
        "tests/crypto/providers/test_local.py",
    ),
    Mutation(
        "an interrupted sealing is committed",
        "data/writing/writer.py",
        "        if kind is None:\n            self.close()",
        "        if True:\n            self.close()",
        "tests/data/test_writer_and_dataset.py -k 'error_while or interrupted'",
    ),
    Mutation(
        "NaN rows are sealed",
        "data/format/convert.py",
        "if allow_nonfinite or not tensor.is_floating_point():",
        "if True:",
        "tests/data/test_columns.py -k nan",
    ),
    Mutation(
        "text that nobody decided about is sealed",
        "anonymize/plan.py",
        "if strict and holds_text(values):",
        "if False:",
        "tests/anonymize/test_plan.py -k nobody_decided",
    ),
]
