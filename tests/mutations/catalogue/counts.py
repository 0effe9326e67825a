"""What last bits, and numbers of rows, would tell."""

from __future__ import annotations

from mutation import Mutation

COUNTS = "tests/attacks/test_rounding_and_counts.py"

CATALOGUE = [
    Mutation(
        "last bits tell where a row came",
        "privacy/gradients/engine.py",
        "(parameter, dtype=widened(parameter.dtype))",
        "(parameter, dtype=torch.float32)",
        f"{COUNTS} -k as_fine",
    ),
    Mutation(
        "a loss counts rows in bfloat16",
        "privacy/gradients/engine.py",
        "in (torch.float16, torch.bfloat16):",
        "== torch.float16:",
        f"{COUNTS} -k bfloat16",
    ),
    Mutation(
        "a public metric weighs steps by their rows",
        "strategies/telemetry.py",
        '            kwargs["batch_size"] = 1\n',
        "",
        f"{COUNTS} -k 'public_metric and 8-32'",
    ),
    Mutation(
        "a public metric counts chunks",
        "strategies/telemetry.py",
        "            if self.again:\n",
        "            if False:\n",
        f"{COUNTS} -k 'public_metric and 8-2'",
    ),
    Mutation(
        "a step takes what a release has left",
        "privacy/step.py",
        "        self._require_affordable(ledger)\n        ledger.record()\n",
        "        ledger.record()\n",
        f"{COUNTS} -k leaves_that_step",
    ),
    Mutation(
        "hooks see the gradients of trials",
        "privacy/checks/trial_run.py",
        "            hooks.clear()\n",
        "            pass\n",
        f"{COUNTS} -k hooks",
    ),
]
