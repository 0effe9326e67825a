"""What Lightning writes by itself: loggers, checkpoints, configuration, log records, tags."""

from __future__ import annotations

from mutation import Mutation

LOGS = "tests/redaction/test_logs.py"
REDACTING = "tests/loggers/test_redacting.py"
TAGS = "tests/loggers/test_run_tags.py"

CATALOGUE = [
    Mutation(
        "arguments of log records are cut before they are redacted",
        "redaction/logs.py",
        "            args = tuple(map(self._argument, args))",
        "            args = tuple(args)",
        f"{LOGS} -k reaches_a_handler",
    ),
    Mutation(
        "handlers are handed the exception with its locals",
        "redaction/logs.py",
        '"args": (), "exc_info": None}\n        if record',
        '"args": ()}\n        if record',
        f"{LOGS} -k richs_handler",
    ),
    Mutation(
        "a method of an experiment that nobody classified passes",
        "loggers/experiments.py",
        '        raise refusal(f"{type(self._experiment).__name__}.{name}")',
        "        return member",
        f"{REDACTING} -k 'every_other_way and CSV'",
    ),
    Mutation(
        "a logger is handed checkpoints in the clear",
        "loggers/redacting.py",
        "            if not self._may_be_sent(path):\n                if not",
        "            if False:\n                if not",
        f"{REDACTING} -k handed_over",
    ),
    Mutation(
        "a logger logs what is left before it is recorded what was taken out",
        "loggers/redacting.py",
        "        finding_counts.announce()\n        self._logger.log_metrics(",
        "        self._logger.log_metrics(",
        f"{REDACTING} -k 'else_nothing and CSV'",
    ),
    Mutation(
        "an experiment logs what is left before it is recorded what was taken out",
        "loggers/experiments.py",
        "            finding_counts.announce()\n",
        "",
        f"{REDACTING} -k 'else_nothing and CSV'",
    ),
    Mutation(
        "a dataclass goes into a checkpoint with more than its fields",
        "plugins/hyperparameters.py",
        "        made = object.__new__(type(given))",
        "        made = object.__new__(type(given))\n        vars(made).update(vars(given))",
        "tests/plugins/test_hyperparameters.py -k 'found_in_a_checkpoint and database'",
    ),
    Mutation(
        "handlers with a filter method of their own get records as they are",
        "redaction/logs.py",
        '                setattr(logging.Handler, "handle", _handle)  # noqa: B010 # mypy\n',
        "                pass\n",
        f"{LOGS} -k method_of_their_own",
    ),
    Mutation(
        "a method goes into a checkpoint with what it is bound to",
        "plugins/hyperparameters.py",
        "return given if isinstance(given.__self__, ModuleType | type | None) else clean",
        "return given",
        "tests/plugins/test_hyperparameters.py -k 'found_in_a_checkpoint and method'",
    ),
    Mutation(
        "a run that goes on without noise is still called private",
        "loggers/run_tags.py",
        "        if fitting and not self._private:",
        "        if False:",
        f"{TAGS} -k without_privacy",
    ),
]
