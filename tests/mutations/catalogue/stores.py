"""Redaction inside MLflow's stores."""

from __future__ import annotations

from mutation import Mutation

MATRIX = "tests/redaction/test_matrix.py"
METRICS = "tests/redaction/test_metrics.py"

CATALOGUE = [
    Mutation(
        "any number in a place is taken for an experiment's",
        "redaction/mlflow_store/ids.py",
        "(?=/(?:[0-9a-f]{32}|models/m-[0-9a-f]{32}|traces/tr-[0-9a-f]{32})(?:/|$))",
        "",
        f"{MATRIX} -k 'mlflow_puts_one'",
    ),
    Mutation(
        "an experiment with the number of a card registers no model",
        "redaction/mlflow_store/values.py",
        "if not self._is_clean(without_experiment(str(item))):",
        "if not self._is_clean(str(item)):",
        f"{MATRIX} -k 'mlflow_puts_one'",
    ),
    Mutation(
        "a store's method that nobody classified passes",
        "redaction/mlflow_store/guard.py",
        "wrap(name, method) or _refusing(name)",
        "wrap(name, method) or method",
        f"{MATRIX} -k 'method_of_a_newer'",
    ),
    Mutation(
        "an argument that nobody classified passes",
        "redaction/mlflow_store/guard.py",
        '    raise RedactionError(\n        f"argument {name!r}',
        '    return value\n    raise RedactionError(\n        f"argument {name!r}',
        f"{MATRIX} -k 'method_of_a_newer'",
    ),
    Mutation(
        "an entity that nobody classified passes",
        "redaction/mlflow_store/values.py",
        "        if kept is None or not type(value)",
        "        if kept is None:\n            return value\n        if not type(value)",
        f"{MATRIX} -k 'entity_of_a_newer'",
    ),
    Mutation(
        "a second redactor replaces the first",
        "redaction/mlflow_store/values.py",
        "            self.redactors.append(redactor)",
        "            self.redactors[:] = [redactor]",
        f"{MATRIX} -k add_up",
    ),
    Mutation(
        "a collector beside the store is not noticed",
        "redaction/mlflow_store/enforce.py",
        "    if wanted or metrics or traces or both:",
        "    if wanted:",
        f"{MATRIX} -k 'second_place and TRACES'",
    ),
    Mutation(
        "an error about a metric repeats what it was given",
        "redaction/containers.py",
        "    with contextlib.suppress(ValueError, TypeError, OverflowError, RuntimeError):\n"
        "        number = float(value)",
        "    number = float(value)",
        f"{MATRIX} -k error_about_a_metric",
    ),
    Mutation(
        "binaries pass unasked",
        "redaction/policy.py",
        "max(stated, default=-1)",
        "max(stated, default=0)",
        f"{MATRIX} -k binaries_pass",
    ),
    Mutation(
        "a metric passes because its name poses as a known one",
        "redaction/redactor.py",
        "{str}.issuperset(map(type, texts)) and ",
        "",
        "tests/redaction/test_redactor.py -k poses",
    ),
    Mutation(
        "a metric passes because the first redactor knows its name",
        "redaction/clean_metrics.py",
        "for redactor in redactors)",
        "for redactor in redactors[:1])",
        f"{METRICS} -k another_may",
    ),
    Mutation(
        "a metric passes whose name is the text of a container",
        "redaction/clean_metrics.py",
        "            or not name[:1].isalpha()",
        "            or not name",
        f"{METRICS} -k container",
    ),
    Mutation(
        "a metric passes with fields that nobody looked at",
        "redaction/clean_metrics.py",
        "if tuple(fields) != _FIELDS:",
        "if tuple(fields)[:8] != _FIELDS:",
        f"{METRICS} -k 'newer and MLflow'",
        (("= fields.values()", "= tuple(fields.values())[:8]"),),
    ),
    Mutation(
        "a column of passwords is stored if one cell is long",
        "redaction/mlflow_store/delimited.py",
        "        return head + redact(text[len(head) :], next(iter(secret.values())))",
        "        return text",
        f"{MATRIX} -k 'taken_out_of_rows'",
    ),
]
