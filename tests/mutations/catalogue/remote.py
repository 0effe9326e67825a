"""Remote storage and its cache."""

from __future__ import annotations

from mutation import Mutation

STORAGE = "tests/data/storage"

CATALOGUE = [
    Mutation(
        "a redirect to plain HTTP is followed",
        "data/storage/transport.py",
        '{**options, "allow_redirects": False}',
        '{**options, "allow_redirects": True}',
        f"{STORAGE}/test_transport.py -k 'redirect_to_plain_http and 307'",
    ),
    Mutation(
        "a plain HTTP endpoint is spoken to",
        "data/storage/transport.py",
        'if isinstance(value, str) and "proxies" not in name and _plain_http(value):',
        "if False:",
        f"{STORAGE}/test_transport.py -k option_that_turns",
    ),
    Mutation(
        "the client that S3 is really spoken to with is not looked at",
        "data/storage/transport.py",
        "    if _plain_http(endpoint) or (",
        "    if False and (",
        f"{STORAGE}/test_transport.py -k 'profile or certificates_is'",
    ),
    Mutation(
        "storage credentials are pickled",
        "data/storage/remote.py",
        "if not callable(self._options) and (names := secret_options(self._options)):",
        "if names := []:",
        f"{STORAGE}/test_s3.py -k no_error_log_repr",
    ),
    Mutation(
        "an altered copy in the cache is not fetched again",
        "data/shards/shard.py",
        "            if not self._file.distrust():\n                raise",
        "            raise",
        f"{STORAGE}/test_cache.py -k altered_is_fetched",
    ),
    Mutation(
        "the cache goes by the name of a shard alone",
        "data/storage/cache.py",
        "hashlib.sha256(described)",
        "hashlib.sha256(entry.file.encode())",
        f"{STORAGE}/test_cache.py -k another_sealing",
    ),
    Mutation(
        "the cache grows beyond its limit",
        "data/storage/cache.py",
        "            if room < 0:\n                return False\n            os.posix_fallocate",
        "            os.posix_fallocate",
        f"{STORAGE}/test_cache.py -k half_download",
        more=(
            (
                "                if room >= 0:\n                    break\n",
                "                break\n",
            ),
        ),
    ),
    Mutation(
        "a manifest is put over one that another writer put there",
        "data/storage/remote.py",
        'options["IfMatch"] = replacing',
        "pass",
        f"{STORAGE}/test_upload.py -k two_writers_at_once",
    ),
    Mutation(
        "an upload leaves columns under other keys behind",
        "data/writing/upload.py",
        "for group in new.entry.all_groups for entry in group.shards]",
        "for group in [new.entry] for entry in group.shards]",
        f"{STORAGE}/test_upload.py -k all_groups",
    ),
    Mutation(
        "a split that is sent again with new keys loses its files",
        "data/writing/upload.py",
        "_remove(storage, older - manifest.files)",
        "_remove(storage, older)",
        f"{STORAGE}/test_upload.py -k keys_or_rows_went",
    ),
]
