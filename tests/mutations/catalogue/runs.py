"""What a whole run offers around its noise and its account."""

from __future__ import annotations

from mutation import Mutation

RUNS = "tests/attacks/test_runs.py"

CATALOGUE = [
    Mutation(
        "masks follow from the user's seed",
        "privacy/step.py",
        "with self._randomness.apart(around.device):",
        "if True:",
        f"{RUNS} -k dropout",
    ),
    Mutation(
        "augmentation in the process follows from the user's seed",
        "strategies/private_loader.py",
        "        with self._randomness.apart():\n",
        "        if True:\n",
        f"{RUNS} -k 'augmentation and 0'",
    ),
    Mutation(
        "a worker's own function brings the seed back",
        "privacy/randomness.py",
        "            self._user(worker)\n            randomness.seed_all()\n",
        "            self._user(worker)\n",
        f"{RUNS} -k workers_own",
    ),
    Mutation(
        "the loss without noise is handed out",
        "privacy/step.py",
        '    loss = torch.full((), float("nan"), device=device)\n',
        "    loss = loss_of(output).detach()\n",
        f"{RUNS} -k nobody_is_told",
    ),
    Mutation(
        "a checkpoint gets the account of the last fit",
        "strategies/training.py",
        "        step.ledger = restored or account_of(module)\n        if fitting:\n",
        "        if fitting:\n            step.ledger = restored or account_of(module)\n",
        f"{RUNS} -k own_weights",
    ),
    Mutation(
        "training without noise in between is not noticed",
        "strategies/training.py",
        "                    require_same_weights(module, step.ledger)\n",
        "",
        f"{RUNS} -k in_between",
    ),
    Mutation(
        "accumulation that begins later passes",
        "strategies/training.py",
        "            require_no_accumulation(trainer)\n",
        "",
        f"{RUNS} -k begins_later",
    ),
    Mutation(
        "autograd's own gradient stays where the optimizer finds it",
        "privacy/step.py",
        "                parameter.grad = None\n",
        "                pass\n",
        "tests/strategies/test_private.py -k thawed_within",
    ),
    Mutation(
        "one row that is not finite ends the run",
        "strategies/options.py",
        "bool(options._detect_anomaly)",
        "False",
        f"{RUNS} -k 'by_name and detect_anomaly'",
    ),
    Mutation(
        "a file that begins like a sealed one is sent as it is",
        "redaction/artifacts/recognise.py",
        "body is not None and _TEXT.search(body) is None",
        "True",
        "tests/loggers/test_client.py -k 'begins_like and data0'",
    ),
]
