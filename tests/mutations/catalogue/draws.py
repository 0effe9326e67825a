"""How many rows a step drew, and rows that count several times."""

from __future__ import annotations

from mutation import Mutation

EXPECTED = "tests/strategies/test_expected.py"
REPEATS = "tests/privacy/test_repeated_rows.py"

CATALOGUE = [
    Mutation(
        "hooks are given the rows of a step",
        "strategies/training.py",
        "            return required(self._expected)\n",
        "            return batch\n",
        f"{EXPECTED} -k looks_the_same",
        more=(
            ("if not isinstance(batch, ExpectedBatch):", "if not isinstance(batch, LogicalBatch):"),
        ),
    ),
    Mutation(
        "the last chunk stays where self.log finds it",
        "strategies/training.py",
        "            return moved(data)\n",
        "            results.batch = moved(data)\n            return results.batch\n",
        f"{EXPECTED} -k looks_the_same",
    ),
    Mutation(
        "the number of dimensions of a row is told",
        "strategies/expected.py",
        '        _withhold(self._rows, "the number of dimensions")',
        "        return 1",
        f"{EXPECTED} -k looks_the_same",
    ),
    Mutation(
        "a throughput that cannot be computed fails after a charged step",
        "strategies/training.py",
        "            require_public_throughput(trainer, self._expected)\n",
        "            pass\n",
        f"{EXPECTED} -k throughput_that_would_fail",
    ),
    Mutation(
        "the profiler counts chunks",
        "strategies/training.py",
        "with uncounted(self._module.trainer):",
        "if True:",
        f"{EXPECTED} -k profiler_counts",
    ),
    Mutation(
        "a step without rows returns something else",
        "privacy/step.py",
        "            self._told = told\n",
        "            pass\n",
        f"{EXPECTED} -k without_rows",
    ),
    Mutation(
        "MLflow's system metrics go on during a private fit",
        "strategies/training.py",
        "                stop_system_metrics()\n",
        "",
        f"{EXPECTED} -k system_metrics",
    ),
    Mutation(
        "a dataset may list a row several times",
        "strategies/training.py",
        "            require_distinct_rows(loader.dataset)\n",
        "            pass\n",
        f"{REPEATS} -k takes_no_step",
    ),
    Mutation(
        "a row in two parts of a concatenation is two rows",
        "privacy/checks/repeated_rows.py",
        "return id(dataset)\n",
        "return object()\n",
        f"{REPEATS} -k 'refused and concatenated'",
    ),
    Mutation(
        "a wrapper hides repeats",
        "privacy/checks/repeated_rows.py",
        "if inner is None or id(inner)",
        "if not isinstance(dataset, Subset) or id(inner)",
        f"{REPEATS} -k 'refused and augmented'",
    ),
    Mutation(
        "an index from the end is another row",
        "privacy/checks/repeated_rows.py",
        "chosen + rows, chosen)",
        "chosen + 2 * rows, chosen)",
        f"{REPEATS} -k 'refused and end'",
    ),
    Mutation(
        "views of one tensor are different rows",
        "privacy/checks/repeated_rows.py",
        "        if tensors := _dense(dataset):\n",
        "        if (tensors := _dense(dataset)) and False:\n",
        f"{REPEATS} -k 'refused and tensors'",
    ),
    Mutation(
        "a counted number of rows passes for a declared one",
        "privacy/accounting/ledger_state.py",
        'self.mechanism == "poisson" and self.public.dataset_size_declared',
        'self.mechanism == "poisson"',
        "tests/privacy/test_ledger.py -k which_promise",
    ),
    Mutation(
        "a fit begins on a counted number of rows without a word",
        "privacy/run_contract.py",
        "if not (public.dataset_size_declared or ",
        "if not (True or ",
        "tests/privacy/test_ledger.py -k which_promise",
    ),
]
