"""The account over forks, roll-backs and crashes, and who may keep a budget."""

from __future__ import annotations

from mutation import Mutation

JOURNAL = "tests/privacy/test_journal.py"
RUNS = "tests/strategies/test_journal.py"
TRANSFORM = "tests/privacy/test_loss_transform.py"

CATALOGUE = [
    Mutation(
        "a run goes on without its journal",
        "strategies/options.py",
        "    attach_journal(ledger, Path(directory))\n",
        "",
        f"{RUNS} -k rolled_back",
    ),
    Mutation(
        "what other branches took is not charged",
        "privacy/accounting/ledger.py",
        "        ledger.add_abandoned(missing)\n",
        "",
        f"{JOURNAL} -k another_branch",
    ),
    Mutation(
        "steps are entered after they were taken",
        "privacy/accounting/journal.py",
        "        if used > self._entered.get(mechanism, 0):",
        "        if used > self._entered.get(mechanism, 0) + 1:",
        f"{JOURNAL} -k before_it_is_taken",
    ),
    Mutation(
        "a journal that was put back to an older state is taken for whole",
        "privacy/accounting/ledger.py",
        "    if short:",
        "    if False:",
        f"{JOURNAL} -k older_state",
    ),
    Mutation(
        "a removed journal is begun anew",
        "privacy/accounting/ledger.py",
        "    if ledger.journaled or path.exists():",
        "    if path.exists():",
        f"{JOURNAL} -k removed",
    ),
    Mutation(
        "the journal's codes are not compared",
        "privacy/accounting/journal.py",
        "        if not hmac.compare_digest(expected, line):",
        "        if False:",
        f"{JOURNAL} -k altered",
    ),
    Mutation(
        "weights of a refused resume get a fresh account",
        "strategies/training.py",
        "        bring_ledger(self._module, checkpoint, load)\n",
        "        load()\n",
        f"{RUNS} -k only_validated",
    ),
    Mutation(
        "a budget is kept by an approximation",
        "privacy/accounting/pld.py",
        "    if bound and name not in BOUNDS:",
        "    if False:",
        "tests/privacy/test_opacus_accounting.py -k by_an_approximation",
    ),
    Mutation(
        "the rounding of a composition is not added",
        "privacy/accounting/loss_transform.py",
        "        total = max(total, 0.0) + self._error + self._total + epsilon * self._turns\n",
        "        total = max(total, 0.0) * (1 - 1e-3)\n",
        f"{TRANSFORM} -k never_below",
    ),
    Mutation(
        "losses are moved down to the lattice",
        "privacy/accounting/loss_transform.py",
        "share = np.expm1(-rest) / math.expm1(-width)",
        "share = 0 * rest",
        f"{TRANSFORM} -k never_below",
    ),
    Mutation(
        "a full batch costs less than the closed form says",
        "privacy/accounting/loss_transform.py",
        "+ doubt) - math.log(delta)",
        "- doubt) - math.log(delta) - 1e-6",
        f"{TRANSFORM} -k full_batches",
    ),
    Mutation(
        "a mass that is no number is left out",
        "privacy/accounting/loss_transform.py",
        "    drawn = ~(mass <= 0)",
        "    drawn = mass > 0",
        f"{TRANSFORM} -k is_not_left_out",
    ),
    Mutation(
        "one sampled step costs less than exactly",
        "privacy/accounting/loss_transform.py",
        "    share = delta / rate * (1 - 4 * _U)\n",
        "    share = delta / rate * 1.01\n",
        f"{TRANSFORM} -k one_step_has",
    ),
    Mutation(
        "lattices follow the full batches",
        "privacy/accounting/loss_transform.py",
        "math.sqrt(times / needed)",
        "math.sqrt(times / variance)",
        f"{TRANSFORM} -k full_batch_cost",
    ),
    Mutation(
        "Opacus' figure keeps a budget where it is below the exact one",
        "privacy/accounting/pld.py",
        "return max(found, epsilon_pld(releases, delta=delta)) if accountant in BOUNDS else found",
        "return found",
        "tests/privacy/test_opacus_accounting.py -k rounds_below",
    ),
    Mutation(
        "more steps are afforded than fit",
        "privacy/accounting/pld.py",
        "    return low\n",
        "    return high\n",
        "tests/privacy/test_accounting.py -k last_that_fit",
    ),
]
