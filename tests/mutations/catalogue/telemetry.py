"""Redaction and audit."""

from __future__ import annotations

from mutation import Mutation

PRIVACY = "tests/attacks/test_privacy.py"

CATALOGUE = [
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
        "clean = self._redactor.redact(_convert_params(params))",
        "clean = _convert_params(params)",
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
        "privacy/noise/gaussian.py",
        "else _key_of(self._seed))",
        "else _key_of(self._seed % 2**32))",
        f"{PRIVACY} -k 32_bits",
    ),
    Mutation(
        "rounding hides a row's norm",
        "privacy/gradients/formulas.py",
        "clamp(min=0) + error",
        "clamp(min=0)",
        f"{PRIVACY} -k cancellation",
    ),
    Mutation(
        "a checkpoint takes up rows",
        "privacy/checks/preflight.py",
        "        require_unchanged(before, lambda: Snapshot.of(hold, uncopied), outcome=NO_STEP)\n",
        "",
        f"{PRIVACY} -k takes_up",
    ),
    Mutation(
        "what a checkpoint would hold is compared with itself",
        "privacy/checks/snapshot.py",
        "copy = _clone(tensor)",
        "copy = tensor.detach()",
        f"{PRIVACY} -k takes_up",
    ),
    Mutation(
        "a part of a weight passes for all of it",
        "privacy/checks/snapshot.py",
        "tensor.dtype, tensor.shape, tensor.stride()",
        "tensor.device",
        "tests/privacy/test_leftovers.py -k part",
    ),
    Mutation(
        "an embedding writes down which tokens it met",
        "privacy/gradients/rules/find_units.py",
        'if getattr(module, "max_norm", None) is not None:',
        "if False:",
        f"{PRIVACY} -k embeddings",
    ),
    Mutation(
        "the collate function mixes rows",
        "privacy/checks/collate_fn.py",
        "    if row_differs(run, changed, kept, tolerance=_TOLERANCE):",
        "    if False:",
        f"{PRIVACY} -k mixed_by_the_collate",
    ),
    Mutation(
        "a fit after a resume begins a new account",
        "strategies/training.py",
        "            keep_ledger(self._module, ledger, covers=trainable_names(self._module))\n",
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
        "privacy/step.py",
        "drawn, self.drawn = self.drawn, None",
        "drawn = self.drawn",
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
        "audit/event_recorder.py",
        '        self.log.append(event.action, {"run": self.run, **event.details}, '
        "outcome=event.outcome)",
        "        try:\n"
        '            self.log.append(event.action, {"run": self.run, **event.details})\n'
        "        except Exception:\n            pass",
        "tests/callbacks/test_callbacks.py -k refuses",
    ),
    Mutation(
        "what stands below a secret name is shown",
        "redaction/detect/secret_names.py",
        "any(map(_secret, parts))",
        "_secret(parts[-1] if parts else ())",
        "tests/redaction/test_names.py -k names_of_secrets",
    ),
    Mutation(
        "secrets in free text are known by their format only",
        "redaction/redactor.py",
        "            AssignmentDetector(),\n",
        "",
        "tests/redaction/test_assignments.py -k free_text",
    ),
    Mutation(
        "a dataclass becomes text before its secrets are looked for",
        "redaction/containers.py",
        "    elif dataclasses.is_dataclass(value):",
        "    elif False:",
        "tests/redaction/test_containers.py -k beside",
    ),
    Mutation(
        "what a search could not open counts as clean",
        "redaction/leak_search/search.py",
        "            if not part.whole:",
        "            if False:",
        "tests/redaction/test_canary.py -k opened_to_its_end",
    ),
    Mutation(
        "a search looks into the first member of a stream only",
        "redaction/leak_search/unpack.py",
        "if kind not in _STARTS or not _STARTS[kind].match(data, end):",
        "if True:",
        "tests/redaction/test_canary.py -k packed_is_searched",
    ),
    Mutation(
        "a missing audit log is sound",
        "audit/log.py",
        "if number == 0 and not allow_empty:",
        "if False:",
        "tests/audit/test_log.py -k removed_or_emptied",
    ),
    Mutation(
        "an audit log is begun anew under the process that writes it",
        "audit/log.py",
        "            self._require_kept(log)\n",
        "",
        "tests/audit/test_log.py -k begun_anew",
    ),
    Mutation(
        "a minimum of the Trainer's outlasts the budget",
        "strategies/training.py",
        "    trainer.fit_loop.min_epochs = None\n",
        "",
        "tests/callbacks/test_callbacks.py -k 'minimum_of_the and minimum0'",
    ),
    Mutation(
        "the error of half a character carries the text along",
        "crypto/encoding.py",
        """    data = None
    with contextlib.suppress(UnicodeEncodeError):
        data = text.encode()
    if data is None:
        raise DataError(""",
        """    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(""",
        "tests/crypto/test_encoding.py -k utf8_form",
        (("        )\n    return data\n\n\ndef canonical", "        )\n\n\ndef canonical"),),
    ),
]
