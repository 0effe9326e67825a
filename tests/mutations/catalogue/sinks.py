"""Policies of sinks, what the audit log is told of redaction, and files tracked as ciphertext."""

from __future__ import annotations

from mutation import Mutation

REDACTION = "tests/redaction"

CATALOGUE = [
    Mutation(
        "of several policies the mildest counts",
        "redaction/policy.py",
        "return all(policy.passes(sink, name)",
        "return any(policy.passes(sink, name)",
        f"{REDACTION}/test_policy.py -k strictest_counts",
    ),
    Mutation(
        "what a policy leaves out is stored",
        "redaction/mlflow_store/guard.py",
        "if policy.rules.limits(sinks):",
        "if policy.rules.limits(()):",
        f"{REDACTION}/test_policy.py -k named_passes",
    ),
    Mutation(
        "what is redacted is sent before that is recorded",
        "redaction/mlflow_store/guard.py",
        "        finding_counts.announce()\n        if unsent",
        "        if unsent",
        f"{REDACTION}/test_policy.py -k cannot_be_recorded",
    ),
    Mutation(
        "an encrypted file opens under another file's name",
        "redaction/artifacts/encrypted.py",
        'if place.name != header["name"] + SUFFIX:',
        "if not place.name.endswith(SUFFIX):",
        f"{REDACTION}/test_encrypted.py -k another_name",
    ),
    Mutation(
        "a store speaks to another host in the clear",
        "redaction/mlflow_store/enforce.py",
        '                require_tls(given.get("store_uri"))\n',
        "",
        f"{REDACTION}/test_matrix.py -k 'this_host_or_for_all'",
    ),
    Mutation(
        "a secret in HTML's entities is not read",
        "redaction/detect/obfuscated.py",
        'if "&" in text:',
        'if "&&" in text:',
        f"{REDACTION}/test_disguises.py -k found_at_its_place",
    ),
    Mutation(
        "base64 that begins as no UTF-8 does is not read as UTF-16",
        "redaction/detect/obfuscated.py",
        "if word[0] in _INSIDE and word.islower():",
        "if word[0] in _INSIDE:",
        f"{REDACTION}/test_disguises.py -k begins_oddly",
    ),
    Mutation(
        "base64 of letters beyond ASCII is not read",
        "redaction/detect/obfuscated.py",
        r"|[\xc2-\xdf][\x80-\xbf]",
        "",
        f"{REDACTION}/test_disguises.py -k base64_is_found_whole",
    ),
    Mutation(
        "a param passes any policy if it is called like a tag of ours",
        "redaction/mlflow_store/sinks.py",
        'ours = "tags" in sinks',
        "ours = True",
        f"{REDACTION}/test_policy.py -k open_no_other",
    ),
    Mutation(
        "an encrypted file is given a number after its name was bound",
        "redaction/artifacts/copy.py",
        "while target.exists() or target.with_name(target.name + SUFFIX).exists():",
        "while target.exists():",
        f"{REDACTION}/test_policy.py -k ciphertext_opens",
    ),
    Mutation(
        "a logger's client sends a file before its redaction is recorded",
        "loggers/client.py",
        "            finding_counts.announce()\n            self._client.log_artifact(",
        "            self._client.log_artifact(",
        "tests/loggers/test_client.py -k no_file_is_sent",
    ),
    Mutation(
        "a container in a metric's name is taken for words",
        "loggers/mlflow.py",
        " and all(n[:1].isalpha() for n in numbers)",
        "",
        "tests/loggers/test_mlflow.py -k its_brackets_go",
        (
            (
                "Policy(self._redactor).argument(dict.fromkeys(numbers))",
                "self._redactor.redact(dict.fromkeys(numbers))",
            ),
        ),
    ),
]
