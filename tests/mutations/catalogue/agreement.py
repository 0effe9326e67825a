"""What the processes of one run agree on, and who writes of them."""

from __future__ import annotations

from mutation import Mutation

AGREE = "tests/strategies/test_agree.py"
ROWS = "tests/strategies/test_same_rows.py"

CATALOGUE = [
    Mutation(
        "of indices only the number is compared",
        "strategies/same_rows.py",
        "hashlib.sha256(numbers.tobytes()).digest()",
        "hashlib.sha256(bytes(len(numbers))).digest()",
        f"{ROWS} -k whole",
    ),
    Mutation(
        "rows of a dataset of the user's own are not read",
        "strategies/processes.py",
        "        if described.complete and not found:\n",
        "        if not found:\n",
        f"{AGREE} -k 'own_order and named'",
    ),
    Mutation(
        "only the first rows are read",
        "strategies/same_rows.py",
        "return list(dict.fromkeys([0, rows - 1, *between.tolist()])) if rows else []",
        "return [0] if rows else []",
        f"{ROWS} -k 'any_form and text'",
    ),
    Mutation(
        "what no seed reaches is compared",
        "strategies/same_rows.py",
        "a if _alike(a, b) else None for",
        "a for",
        f"{ROWS} -k no_seed_reaches",
    ),
    Mutation(
        "a row that differs from itself is not compared in any part",
        "strategies/same_rows.py",
        "    return tuple(a if _alike(a, b) else None for a, b in zip(once, again, strict=True))\n",
        "    return once if all(map(_alike, once, again)) else None\n",
        f"{ROWS} -k no_seed_reaches",
    ),
    Mutation(
        "rows for workers are read before the workers start",
        "strategies/same_rows.py",
        "        num_workers=min(loader.num_workers, 1),\n",
        "        num_workers=0,\n",
        f"{ROWS} -k workers_read",
    ),
    Mutation(
        "models are compared after weights were sent around",
        "strategies/processes.py",
        "        self._agree(lambda: model_statement(self._module))\n",
        "",
        f"{AGREE} -k 'named and extra_layer'",
    ),
    Mutation(
        "which parameters are trainable is not compared",
        "strategies/statements.py",
        'f"{_form(parameter)} {trainable}"',
        'f"{_form(parameter)}"',
        f"{AGREE} -k 'named and frozen'",
    ),
    Mutation(
        "each process has an optimizer of its own",
        "strategies/training.py",
        "        self._require_same_optimizer()\n",
        "",
        f"{AGREE} -k 'named and lr and not sharded'",
    ),
    Mutation(
        "each process trains for as long as it was told",
        "strategies/processes.py",
        "lambda: run_statement(self._module.trainer, self.config, self._public_metrics)",
        "lambda: {}",
        f"{AGREE} -k 'named and epochs'",
    ),
    Mutation(
        "a plain strategy reads whatever each process has opened",
        "data/datamodule.py",
        "            differing = compared(statement)\n",
        "            differing = []\n",
        f"{AGREE} -k other_generation",
    ),
    Mutation(
        "a Trainer of one process waits for the others of a group that is over",
        "data/datamodule.py",
        "        trainer.world_size > 1\n",
        "        True\n",
        f"{AGREE} -k one_process_waits",
        more=(("distributed.get_world_size() == trainer.world_size", "True"),),
    ),
    Mutation(
        "the others are not told that the rows could not be opened",
        "data/datamodule.py",
        "                compared(None)\n",
        "                pass\n",
        f"{AGREE} -k 'cannot_open and other_key'",
    ),
    Mutation(
        "each process reads the rows in an order of its own",
        "data/datamodule.py",
        "self._shared_seed = gathered(_global_seed())[0]",
        "self._shared_seed = _global_seed()",
        f"{AGREE} -k another_order",
    ),
    Mutation(
        "arguments that are not known are passed over",
        "strategies/processes.py",
        "        if unknown:\n",
        "        if len(unknown) > 9:\n",
        "tests/strategies/test_ddp.py -k argument_that_is_not_known",
    ),
    Mutation(
        "a signal to one process is waited with until the others hear of it",
        "strategies/processes.py",
        '            vars(signals)["_sigterm_notifier_fn"] = partial(_note_sigterm, signals)\n',
        "",
        "tests/strategies/test_ddp.py -k is_terminated",
    ),
    Mutation(
        "every process makes the tables of the logger",
        "loggers/mlflow.py",
        "self._connected() if first else None",
        "self._connected()",
        "tests/loggers/test_mlflow.py -k processes_the_first",
    ),
    Mutation(
        "two jobs make the tables of the logger at once",
        "loggers/mlflow.py",
        '                stack.enter_context(exclusive_lock(Path(f"{path}.lock")))\n',
        "                pass\n",
        "tests/loggers/test_mlflow.py -k one_after_the_other",
    ),
    Mutation(
        "epsilon is logged as often as metrics are",
        "loggers/run_tags.py",
        "        if told and self._logged != (step, self._epsilon):\n",
        "        if told:\n",
        "tests/loggers/test_run_tags.py -k logged_twice",
    ),
    Mutation(
        "logs of older versions are taken for broken",
        "audit/log.py",
        "{1: _FIRST, 2: _FIRST | ",
        "{2: _FIRST | ",
        "tests/audit -k older_version",
    ),
    Mutation(
        "every record is of the first process",
        "audit/log.py",
        '"rank": rank_of_process(),',
        '"rank": 0,',
        "tests/audit -k names_rank",
    ),
    Mutation(
        "a block of nulls only has no type",
        "data/sources/arrow.py",
        "        if pa.types.is_null(array.type) and name in nulls:\n",
        "        if len(nulls) > 9:\n",
        "tests/data/test_ray.py -k nulls_only",
    ),
]
