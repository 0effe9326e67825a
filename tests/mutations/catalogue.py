"""Known weaknesses, as changes that would bring them back, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One weakness.

    Attributes:
        name: What goes wrong.
        file: Where, below ``lightning_secure``.
        old: Text that stands there exactly once.
        new: What takes its place.
        tests: Which must turn red: arguments of pytest.
        more: Further texts and replacements.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    more: tuple[tuple[str, str], ...] = ()


STORAGE = "tests/attacks/test_storage.py"
STRATEGY = "tests/strategies/test_private.py"
CHECKPOINT = "tests/plugins/test_checkpoint.py"
GRADIENTS = "tests/privacy/test_gradients.py"
PRIVACY = "tests/attacks/test_privacy.py"

CATALOGUE = [
    # ------------------------------------------------------------ confidentiality and integrity
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
        "data/shard.py",
        "if not hmac.compare_digest(keys.commitment, self.header.commitment):",
        "if False:",
        f"{STORAGE} -k commit",
    ),
    Mutation(
        "a reader can rewrite rows before the shard is opened",
        "data/shard.py",
        "if merkle_root(_chunks(self._tags)) != entry.merkle_root:",
        "if False:",
        f"{STORAGE} -k rewrites",
    ),
    Mutation(
        "a reader can rewrite rows while the shard is open",
        "data/shard.py",
        "if not hmac.compare_digest(sealed[-TAG_BYTES:], tag):",
        "if False:",
        f"{STORAGE} -k rewrites",
    ),
    Mutation(
        "a shard's header is not compared with the manifest",
        "data/shard.py",
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
        "data/dataset.py",
        "        check_pins(manifest, self._min_generation, self._manifest_digest)\n",
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
        "crypto/providers.py",
        "if status.st_mode & 0o077:",
        "if False:",
        "tests/crypto/test_providers.py",
    ),
    Mutation(
        "an existing key file is overwritten",
        "crypto/providers.py",
        "atomic_writer(target, mode=0o600, replace=False)",
        "atomic_writer(target, mode=0o600)",
        "tests/crypto/test_providers.py",
    ),
    Mutation(
        "an interrupted sealing is committed",
        "data/writer.py",
        "        if kind is None:\n            self.close()",
        "        if True:\n            self.close()",
        "tests/data/test_writer_and_dataset.py -k 'error_while or interrupted'",
    ),
    Mutation(
        "NaN rows are sealed",
        "data/columns.py",
        "if allow_nonfinite or not tensor.is_floating_point():",
        "if True:",
        "tests/data/test_columns.py -k nan",
    ),
    Mutation(
        "text that nobody decided about is sealed",
        "redaction/anonymize.py",
        "if _holds_text(values):",
        "if False:",
        "tests/redaction/test_anonymize.py",
    ),
    # ------------------------------------------------------------ checkpoints
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
        "        known = P(path).read_bytes().startswith(MAGIC)\n"
        "        source = opened(path, keys=self._keys) if known else P(path).open('rb')\n"
        "        with source as stream, self._allowed():",
        f"{CHECKPOINT} -k plaintext",
    ),
    # ------------------------------------------------------------ privacy
    Mutation(
        "gradients are not clipped",
        "privacy/layers.py",
        "factors = (max_grad_norm / norms).clamp(max=1.0)",
        "factors = torch.ones_like(norms)",
        f"{GRADIENTS} -k 'bound or clipping'",
    ),
    Mutation(
        "a sample that overflows takes the batch with it",
        "privacy/bookkeeping.py",
        "    if not bool(finite.all()):",
        "    if False:",
        f"{GRADIENTS} -k overflows",
    ),
    Mutation(
        "the norm of a reused layer is that of its parts",
        "privacy/bookkeeping.py",
        "alone = all(uses[id(p)] == 1 for p in record.unit.parameters)",
        "alone = True",
        f"{GRADIENTS} -k 'reused or tied'",
    ),
    Mutation(
        "no noise is added",
        "privacy/noise.py",
        "        if std == 0:",
        "        if True:",
        "tests/privacy/test_noise.py",
    ),
    Mutation(
        "the noise follows seed_everything",
        "privacy/noise.py",
        "default_rng(self._seed)",
        "default_rng(torch.initial_seed() if self._seed is None else self._seed)",
        "tests/privacy/test_noise.py",
    ),
    Mutation(
        "a copy repeats the noise",
        "privacy/noise.py",
        "    def __getstate__(self) -> dict[str, int | None]:",
        "    def __getstate__(self) -> dict[str, int | None]:\n        self._seed = self._seed "
        "or 7\n        self._on_cpu = None",
        "tests/privacy/test_noise.py -k copy",
    ),
    Mutation(
        "draws follow seed_everything",
        "privacy/sampling.py",
        "self._rng = np.random.default_rng(seed)",
        "self._rng = np.random.default_rng(np.random.randint(2**31))",
        "tests/privacy/test_sampling.py -k seed",
    ),
    Mutation(
        "empty draws are left out",
        "privacy/sampling.py",
        "        for _ in range(self._steps):\n            yield "
        "poisson_draw(self._dataset_size, self._sample_rate, self._rng).tolist()",
        "        for _ in range(self._steps):\n            rows = "
        "poisson_draw(self._dataset_size, self._sample_rate, self._rng).tolist()\n            if "
        "rows:\n                yield rows",
        "tests/privacy/test_sampling.py -k empty",
    ),
    Mutation(
        "a row is in two chunks of one step",
        "privacy/sampling.py",
        "samples[start : start + self._limit] for start",
        "samples[start : start + self._limit + 1] for start",
        "tests/privacy/test_sampling.py -k chunks",
    ),
    Mutation(
        "steps are not accounted for",
        "strategies/private.py",
        "        ledger.record()\n",
        "",
        f"{STRATEGY} -k 'boring or calibrated'",
    ),
    Mutation(
        "the sum is divided by what was drawn",
        "strategies/private.py",
        "expected_batch_size=ledger.public.expected_batch_size,",
        "expected_batch_size=self._drawn,",
        f"{STRATEGY} -k by_hand",
        (("engine.begin_step()", "engine.begin_step()\n        self._drawn = max(1, batch.size)"),),
    ),
    Mutation(
        "hooks see gradients before the noise",
        "strategies/private.py",
        "        self.precision_plugin.pre_backward(closure_loss, self._module)\n",
        "        self.precision_plugin.post_backward(closure_loss, self._module)\n",
        f"{STRATEGY} -k no_hook",
    ),
    Mutation(
        "training metrics are logged",
        "strategies/telemetry.py",
        "if name in self._public:",
        "if True:",
        f"{STRATEGY} -k withheld",
    ),
    Mutation(
        "a run resumes without its account",
        "strategies/private.py",
        "            if self._restored is None:\n",
        "            self._restored = None\n            if False:\n",
        f"{STRATEGY} -k 'goes_on_with or without_an_account'",
    ),
    Mutation(
        "a negative number of steps gives epsilon back",
        "privacy/ledger.py",
        "            positive_int(steps=steps)\n",
        "",
        "tests/privacy/test_ledger.py -k damaged",
    ),
    Mutation(
        "checkpoints have no account",
        "strategies/private.py",
        "        if ledger is not None:\n            checkpoint[",
        "        if False:\n            checkpoint[",
        f"{STRATEGY} -k every_checkpoint",
    ),
    Mutation(
        "the budget may be exceeded",
        "privacy/ledger.py",
        "        return steps < self._certified[target_epsilon]",
        "        return True",
        "tests/privacy/test_ledger.py -k budget",
    ),
    Mutation(
        "nothing is checked before the first step",
        "strategies/private.py",
        "        self._preflight_due = True\n        self._results =",
        "        self._preflight_due = False\n        self._results =",
        f"{STRATEGY} -k preflight",
    ),
    Mutation(
        "rows that are mixed pass the preflight",
        "privacy/preflight.py",
        "    if not moved[:, kept].any():",
        "    if True:",
        "tests/privacy/test_preflight.py -k mixes",
    ),
    Mutation(
        "a parameter is trained past the noise",
        "privacy/engine.py",
        "if parameter.requires_grad and id(parameter) not in self._covered:",
        "if False:",
        f"{STRATEGY} -k 'later or outside'",
    ),
    Mutation(
        "the optimizer sees the loss",
        "strategies/private.py",
        "without_loss(closure)",
        "closure",
        f"{STRATEGY} -k told",
    ),
    Mutation(
        "un-noised records are in a pickle of the model",
        "privacy/bookkeeping.py",
        'return {**self.__dict__, "_pending": [], "_active": False}',
        "return dict(self.__dict__)",
        f"{GRADIENTS} -k pickled",
    ),
    # ------------------------------------------------------------ redaction and audit
    Mutation(
        "an unknown client method passes",
        "loggers/client.py",
        '        raise RedactionError(\n            f"MlflowClient.{name} sends',
        "        return member\n"
        '        raise RedactionError(\n            f"MlflowClient.{name} sends',
        "tests/loggers/test_mlflow.py -k every_way",
    ),
    Mutation(
        "hyperparameters are cut before they are redacted",
        "loggers/mlflow.py",
        "super().log_hyperparams(self._redactor.redact(flat))",
        "super().log_hyperparams(flat)",
        "tests/loggers/test_mlflow.py -k half",
    ),
    Mutation(
        "a detector that fails lets everything through",
        "redaction/redactor.py",
        '        if found is None:\n            return self._dropped("detector")',
        "        if found is None:\n            return text",
        "tests/redaction/test_redactor.py -k checked",
    ),
    Mutation(
        "the audit chain is not checked",
        "audit/log.py",
        'if record["seq"] != number or record["prev"] != head:',
        'if record["seq"] != number:',
        "tests/audit/test_log.py -k changed",
    ),
    Mutation(
        "the audit log holds the text of exceptions",
        "callbacks/audit_trail.py",
        'name = f"{kind.__module__}.{kind.__qualname__}"',
        "name = str(exception)",
        "tests/callbacks/test_callbacks.py -k by_type",
    ),
    Mutation(
        "the noise of a run hangs on 32 bits",
        "privacy/noise.py",
        "default_rng(self._seed)",
        "default_rng(self._seed and self._seed % 2**32)",
        f"{PRIVACY} -k 32_bits",
    ),
    Mutation(
        "rounding hides a row's norm",
        "privacy/layers.py",
        ".clamp(min=0) + error",
        ".clamp(min=0)",
        f"{PRIVACY} -k cancellation",
    ),
    Mutation(
        "a checkpoint takes up rows",
        "privacy/preflight.py",
        "        _require_unchanged(before, _state(model))\n",
        "",
        f"{PRIVACY} -k takes_up",
    ),
    Mutation(
        "an embedding writes down which tokens it met",
        "privacy/engine.py",
        'if getattr(module, "max_norm", None) is not None:',
        "if False:",
        f"{PRIVACY} -k embeddings",
    ),
    Mutation(
        "the transfer hooks mix rows",
        "strategies/private.py",
        "loss, chunk.data, size",
        "lambda data: loss_of(self._module.training_step(data, *rest, **kwargs)), "
        "self._on_device(chunk.data), size",
        f"{PRIVACY} -k transfer_hook",
    ),
    Mutation(
        "the collate function mixes rows",
        "privacy/preflight.py",
        "            if moved[kept]:",
        "            if False:",
        f"{PRIVACY} -k mixed_by_the_collate",
    ),
    Mutation(
        "a fit after a resume begins a new account",
        "strategies/private.py",
        "                keep_ledger(module, self._ledger)\n",
        "",
        f"{PRIVACY} -k after_a_resume",
    ),
    Mutation(
        "a loaded module forgets its account",
        "plugins/checkpoint.py",
        "        keep_ledger(module, ledger)",
        "        pass",
        f"{PRIVACY} -k brings",
    ),
    Mutation(
        "two releases are taken from one draw",
        "strategies/private.py",
        "        batch.spent = True\n",
        "",
        f"{PRIVACY} -k one_draw",
    ),
    Mutation(
        "an exception's text reaches the log when the trail is torn",
        "callbacks/audit_trail.py",
        'log.error("the end of the run could not be recorded: %s", error)',
        'log.exception("the end of the run could not be recorded: %s", error)',
        "tests/callbacks/test_callbacks.py -k end_that_cannot",
    ),
    Mutation(
        "a full audit log is passed over",
        "callbacks/audit_trail.py",
        '        self._log.append(event.action, {"run": self._run, **event.details}, '
        "outcome=event.outcome)",
        "        try:\n"
        '            self._log.append(event.action, {"run": self._run, **event.details})\n'
        "        except Exception:\n            pass",
        "tests/callbacks/test_callbacks.py -k refuses",
    ),
]
