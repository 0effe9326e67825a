"""Names under which secrets stand: ``db_password``, ``apiKey``, ``AWS_SECRET_ACCESS_KEY``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from lightning_secure.redaction.detect.obfuscated import folded

#: One of these stands in every name that is taken for a secret's, once its signs are left out.
STEMS: Final = (
    "pass", "pwd", "secret", "cred", "token", "key", "authorization", "cookie", "connectionstring",
    "connstring",
)  # fmt: skip
_SIGNS: Final = bytes(i for i in range(128) if not chr(i).isalnum())

_PARTS: Final = re.compile(r"[/.\[\]:>()'\",]+")
_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_RUNS: Final = re.compile(r"[a-z]+")

# Secret wherever they stand in a name, unless its last word says that something about the secret
# is meant and not the secret.
_ANYWHERE: Final = frozenset({
    "authorization", "cred", "credential", "credentials", "creds", "pwd", "pwds", "secret",
    "secrets",
})  # fmt: skip
_KEYS_ANYWHERE: Final = frozenset({
    "access", "api", "private", "secret",
})  # fmt: skip
_PASSWORD: Final = re.compile("password|passwd|passwort|passphrase|passcode")
# Written together, in lower case or in camel case that cannot be taken apart (OpenAIAPIKey).
_RUN: Final = re.compile(
    r"(?:(?:api|secret|access|private|auth|encryption|signing)keys?|secrets?|credentials?|pwd"
    r"|(?:auth|access|api|bearer|refresh|session|hub|hf|bot|oauth|sas)tokens?)$"
)
_ABOUT: Final = frozenset({
    "age", "backend", "bits", "bytes", "column", "count", "dim", "dir", "directory", "disabled",
    "enabled", "endpoint", "expiration", "expires", "expiry", "field", "file", "filename", "files",
    "folder", "hint", "host", "id", "ids", "label", "len", "length", "lifetime", "manager", "max",
    "min", "name", "names", "path", "paths", "pattern", "policies", "policy", "prompt", "provider",
    "regex", "required", "rotation", "rule", "rules", "size", "store", "strength", "timeout", "ttl",
    "type", "types", "uri", "url",
})  # fmt: skip

# Secret where they end a name, after such words as "prod" and "2" are taken off its end.
_ENDINGS: Final = frozenset({
    "apikey", "cookie", "cookies",
})  # fmt: skip
_KEYS: Final = frozenset({
    "account", "admin", "aes", "auth", "client", "consumer", "deploy", "encryption", "gpg", "hmac",
    "licence", "license", "master", "pgp", "root", "rsa", "service", "session", "shared", "signing",
    "ssh", "storage", "subscription",
})  # fmt: skip
_PASSES: Final = frozenset({
    "admin", "amqp", "auth", "basic", "database", "db", "email", "ftp", "http", "imap", "keystore",
    "ldap", "login", "mail", "mongo", "my", "mysql", "pg", "postgres", "proxy", "rabbitmq", "redis",
    "root", "sftp", "smtp", "sql", "ssh", "user",
})  # fmt: skip
_QUALIFIERS: Final = frozenset({
    "admin", "alt", "ap", "backup", "bak", "base", "current", "default", "dev", "devel",
    "development", "enc", "encoded", "encrypted", "env", "eu", "hash", "hashed", "hex", "list",
    "live", "local", "main", "new", "next", "old", "plain", "plaintext", "prev", "previous",
    "primary", "prod", "production", "qa", "raw", "read", "remote", "ro", "rw", "sandbox",
    "secondary", "stage", "staging", "str", "string", "temp", "test", "testing", "text", "tmp",
    "txt", "uat", "uk", "us", "v", "val", "value", "values", "write",
})  # fmt: skip

# Names of a tokenizer's tokens, and of counts of tokens.
_VOCABULARY: Final = frozenset({
    "additional", "assistant", "audio", "begin", "blank", "boa", "boi", "bos", "cls", "codec",
    "completion", "context", "decoder", "delay", "delimiter", "draft", "drop", "end",
    "eoa", "eod", "eoi", "eom", "eos", "eot", "extra", "forced", "frame", "generated", "im",
    "image", "img", "input", "lookahead", "mask", "output", "pad", "padding", "prefix",
    "prompt", "question", "reasoning", "register", "seen", "sep", "separator", "soft",
    "special", "start", "stop", "sub", "suffix", "suppress", "text", "timestamp", "train",
    "training", "unk", "unknown", "video", "vision", "visual", "warmup", "word",
})  # fmt: skip
_COUNTS: Final = frozenset({
    "average", "avg", "count", "limit", "max", "maximum", "mean", "min", "minimum", "n", "nb", "no",
    "num", "number", "per", "total",
})  # fmt: skip


class KeyNameDetector:
    """Recognises names of settings whose values are secrets.

    A name may be a path with ``/``, ``.`` or ``[0]``, and each part of it counts: what stands below
    ``secrets/`` is secret. Whole words count, in the singular and the plural: ``hub_token``,
    ``apiKeys``, ``password1``, ``api_key_prod`` and ``aws_secret_access_key`` are secrets;
    ``pad_token_id``, ``max_new_tokens`` and ``use_cls_token`` are settings of a tokenizer, and
    ``password_length`` is something about a password. In doubt it is a secret.

    >>> names = KeyNameDetector()
    >>> [names.matches(n) for n in ("db/passwords/0", "hubToken", "use_cls_token", "num_tokens")]
    [True, True, False, False]
    """

    def matches(self, name: str) -> bool:
        """Return whether a value under this name should not be shown."""
        return _remembered(name) if len(name) <= _SHORT else _names_a_secret(name)


def _names_a_secret(name: str) -> bool:
    if name.isascii():
        joined = name.lower().encode("ascii").translate(None, _SIGNS).decode("ascii")
        if not any(stem in joined for stem in STEMS):
            return False
    return _has_secret_words(name)


def _has_secret_words(name: str) -> bool:
    # As it was meant, and as it stands: a Cyrillic letter before a name is no part of it.
    return any(map(_names_words, {folded(name), name}))


def _names_words(name: str) -> bool:
    parts = [words for part in _PARTS.split(name) if (words := _words(part))]
    joined = [word for words in parts for word in words]
    # {"api": {"key": ...}} becomes api/key.
    return any(map(_secret, parts)) or (len(parts) > 1 and _named_key(joined))


# The same names come at every step.
_SHORT: Final = 64
_remembered = lru_cache(maxsize=4096)(_names_a_secret)


def _words(part: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(part)]


def _secret(words: Sequence[str]) -> bool:
    runs = _RUNS.findall("".join(f" {word}" if word.isdigit() else word for word in words))
    anywhere = (
        any(_PASSWORD.search(run) for run in runs)
        or not _ANYWHERE.isdisjoint(words)
        or any(_RUN.search(run) for run in runs)
        or _named_key(words)
    )
    if anywhere and (words[-1] not in _ABOUT or words[-2:] == ["secret", "id"]):
        return True
    end = len(words)
    while end:
        if _secret_ending(words[:end]):
            return True
        if not (words[end - 1] in _QUALIFIERS or words[end - 1].isdigit()):
            return False
        end -= 1
    return False


def _named_key(words: Sequence[str]) -> bool:
    """Return whether two words together name a key: ``api_key``, but not ``api_keyboard``."""
    if words and words[-1] in _ABOUT:
        return False
    return any(
        first in _KEYS_ANYWHERE and second in ("key", "keys")
        for first, second in itertools.pairwise(words)
    )


def _secret_ending(words: Sequence[str]) -> bool:
    *before, last = words
    second = before[-1] if before else ""
    if last in ("token", "tokens"):
        return second not in _VOCABULARY and _COUNTS.isdisjoint(before)
    if last in ("key", "keys"):
        return second in _KEYS
    if last == "pass":
        return second in _PASSES or not before
    return last in _ENDINGS or (second, last) in (("connection", "string"), ("conn", "string"))
