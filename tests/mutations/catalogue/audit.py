"""Lower bounds on epsilon, and metrics that are published with noise."""

from __future__ import annotations

from mutation import Mutation

CANARY = "tests/privacy/auditing/test_canary.py -k comes_close"
METRICS = "tests/metrics/test_private_metrics.py"
STEPS = "tests/privacy/released/test_steps.py"
RELEASED = "tests/strategies/test_released.py"

CATALOGUE = [
    Mutation(
        "gradients are not clipped, before the eyes of the canary audit",
        "privacy/gradients/formulas.py",
        "factors = (max_grad_norm / norms).clamp(max=1.0)",
        "factors = torch.ones_like(norms)",
        CANARY,
    ),
    Mutation(
        "the gradient gets half its noise, before the eyes of the canary audit",
        "privacy/gradients/engine.py",
        "noise.add_(sums[parameter], std=std)",
        "noise.add_(sums[parameter], std=std / 2)",
        CANARY,
    ),
    Mutation(
        "a mean is published and nobody pays",
        "privacy/released/sums.py",
        "account.charge(self.cost)",
        "pass",
        f"{METRICS} -k charged_once",
    ),
    Mutation(
        "a mean is published without noise",
        "privacy/released/sums.py",
        "std=self.noise_multiplier)",
        "std=0.0)",
        f"{METRICS} -k wide_as_declared",
    ),
    Mutation(
        "one row moves a mean as far as it likes",
        "privacy/released/sums.py",
        "((known - middle) / half).clamp(-1, 1)",
        "(known - middle) / half",
        f"{METRICS} -k 'one_unit or bounds'",
    ),
    Mutation(
        "each rank publishes a mean with noise of its own",
        "privacy/released/sums.py",
        "torch.distributed.broadcast(noised, 0)",
        "pass",
        f"{METRICS} -k ranks_publish",
    ),
    Mutation(
        "metrics of a step's draw cost nothing",
        "privacy/accounting/ledger.py",
        "noise = joint_noise(self.noise_multiplier, *self.beside)",
        "noise = self.noise_multiplier",
        f"{STEPS} -k charged_for_all",
    ),
    Mutation(
        "what is released of one draw is accounted for as draws of their own",
        "privacy/accounting/mechanism.py",
        "sum(noise**-2 for noise in noise_multipliers) ** -0.5",
        "min(noise_multipliers)",
        f"{STEPS} -k 'one_draw or charged_for_all'",
    ),
    Mutation(
        "a released metric mixes rows",
        "privacy/step.py",
        "                entries, model",
        "                [], model",
        f"{RELEASED} -k other_rows",
    ),
    Mutation(
        "a release after the fit is not entered in the journal",
        "privacy/accounting/ledger.py",
        "closed = self._journal is None and self.journaled",
        "closed = False",
        f"{RELEASED} -k release_of_once",
    ),
]
