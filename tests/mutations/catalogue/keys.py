"""Key providers: passphrases, recipients, tokens and key services."""

from __future__ import annotations

from mutation import Mutation

PROVIDERS = "tests/crypto/providers"

CATALOGUE = [
    Mutation(
        "anybody can wrap a key for a recipient in the sealer's name",
        "crypto/providers/hpke.py",
        "public.verify(signature, _signed(info, sealed))",
        "pass",
        f"{PROVIDERS}/test_hpke.py -k strangers_key",
    ),
    Mutation(
        "a key file may ask for any amount of memory",
        "crypto/providers/passphrase.py",
        "if type(kdf[name]) is not int or not lowest <= kdf[name] <= highest:",
        "if False:",
        f"{PROVIDERS}/test_passphrase.py -k 'hostile and 262145'",
    ),
    Mutation(
        "what stands beside an encrypted key is not authenticated",
        "crypto/providers/passphrase.py",
        "sealed[_NONCE_BYTES:], canonical_json(header))",
        "sealed[_NONCE_BYTES:], None)",
        f"{PROVIDERS}/test_passphrase.py -k 'authenticated or only_the'",
        more=(
            (
                "encrypt(nonce, secret, canonical_json(record))",
                "encrypt(nonce, secret, None)",
            ),
        ),
    ),
    Mutation(
        "a passphrase is pickled with its provider",
        "crypto/providers/local.py",
        '        require_portable(self._passphrase, what="the passphrase")\n',
        "",
        f"{PROVIDERS}/test_passphrase.py -k carry",
    ),
    Mutation(
        "keys are logged by botocore",
        "crypto/providers/aws_kms.py",
        "with _unlogged():",
        "with contextlib.nullcontext():",
        f"{PROVIDERS}/test_contract.py -k 'logged and aws'",
    ),
    Mutation(
        "the Vault token follows a redirect",
        "crypto/providers/vault.py",
        "allow_redirects=False",
        "allow_redirects=True",
        f"{PROVIDERS}/test_vault.py -k redirect",
    ),
    Mutation(
        "a key that can be extracted from the token is used",
        "crypto/providers/pkcs11.py",
        "key[pkcs11.Attribute.EXTRACTABLE] is False",
        "True",
        f"{PROVIDERS}/test_pkcs11.py -k could_leave",
    ),
    Mutation(
        "a service that ignores the context is believed",
        "crypto/providers/external.py",
        "if not hmac.compare_digest(digest, _context_digest(context)):",
        "if False:",
        f"{PROVIDERS}/test_aws_kms.py -k did_not_check",
    ),
    Mutation(
        "the folders above a new key are open to others",
        "util/files.py",
        "    make_private_directories(path.parent)\n    # Another process may have made it "
        "meanwhile.\n    path.mkdir(mode=0o700, exist_ok=True)",
        "    path.mkdir(mode=0o700, parents=True, exist_ok=True)",
        "tests/test_files.py -k private_directory",
    ),
]
