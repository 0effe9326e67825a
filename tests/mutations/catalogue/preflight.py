"""Trial runs, and what they must notice."""

from __future__ import annotations

from mutation import Mutation

ATTACKS = "tests/attacks/test_preflight.py"

CATALOGUE = [
    Mutation(
        "trial runs compare norms instead of gradients",
        "privacy/trial.py",
        "if _square(a[p] - b[p] for p in a) > tolerance**2 * scale + floor * largest:",
        "if abs(_square(a.values()) - _square(b.values())) > tolerance * scale + floor * largest:",
        f"{ATTACKS} -k keeps_every_norm",
    ),
    Mutation(
        "trial runs go backward by another way than the step",
        "privacy/trial.py",
        "            self.backward(self.engine.scaled(loss, rows))\n",
        "            torch.autograd.backward(self.engine.scaled(loss, rows))\n",
        f"{ATTACKS} -k backward_that_mixes",
    ),
    Mutation(
        "a loss may shrink or grow with the number of rows",
        "privacy/preflight.py",
        "_SIZES: Final = (1, 2)",
        "_SIZES: Final = (5,)",
        f"{ATTACKS} -k scales_with",
    ),
    Mutation(
        "trial runs look at the weights only",
        "privacy/preflight.py",
        "return {**given, **written, **added, **own}",
        "return own",
        f"{ATTACKS} -k takes_up_rows",
    ),
    Mutation(
        "a metric carries training rows into validation",
        "strategies/stepping.py",
        "with metrics_kept_apart(self._module):",
        "if True:",
        f"{ATTACKS} -k carry_training_rows",
    ),
    Mutation(
        "a metric hides training rows in attributes that it has not declared",
        "privacy/metrics.py",
        "            restore()\n",
        "            pass\n",
        f"{ATTACKS} -k hides_no_training_rows",
    ),
    Mutation(
        "a transfer hook tells a metric of training rows",
        "strategies/stepping.py",
        "            data = self._on_device(chunk.data)\n            with engine",
        "            pass\n        data = self._on_device(chunk.data)\n"
        "        with metrics_kept_apart(self._module):\n            with engine",
        f"{ATTACKS} -k hides_no_training_rows",
    ),
    Mutation(
        "a row left out is set to zero",
        "privacy/units/base.py",
        "inputs, grads, weights = inputs[keep], grads[keep], weights[keep]",
        "inputs, grads = zero_rows(inputs, keep), zero_rows(grads, keep)\n"
        "            weights = keep.to(grads.dtype)",
        f"{ATTACKS} -k no_way_to_a_sum",
    ),
    Mutation(
        "a fork draws its parent's noise",
        "privacy/noise.py",
        "if self._process != os.getpid():",
        "if False:",
        f"{ATTACKS} -k fork_draws",
    ),
    Mutation(
        "a layer under two parents counts twice",
        "privacy/units/finding.py",
        "    seen.add(id(module))\n",
        "",
        f"{ATTACKS} -k two_parents",
    ),
    Mutation(
        "a factor of rows is taken for rounding where few rows have it",
        "privacy/preflight.py",
        "if gross is not None or draw",
        "if draw",
        "tests/privacy/test_preflight.py -k few_rows",
    ),
    Mutation(
        "a little that depends on the number of rows is always taken for rounding",
        "privacy/preflight.py",
        " or draw == _KINKS - 1",
        "",
        "tests/privacy/test_preflight.py -k a_little",
    ),
    Mutation(
        "trial runs toss one coin only",
        "privacy/preflight.py",
        "if run.drew and kept:",
        "if False:",
        f"{ATTACKS} -k 'half_of_the_steps'",
        more=(("rows=_ROWS, seed=first)", "rows=_ROWS)"),),
    ),
    Mutation(
        "collate functions toss one coin only",
        "privacy/collation.py",
        "        seed_all(seed)  #",
        "        seed_all(0)  #",
        f"{ATTACKS} -k half_of_its_batches",
    ),
    Mutation(
        "released numbers toss one coin only",
        "privacy/released/steps.py",
        "        seed_all(seed)  #",
        "        seed_all(0)  #",
        f"{ATTACKS} -k by_chance",
    ),
    Mutation(
        "a rare class is as rare in trial runs",
        "privacy/rows.py",
        "if places == 1 and",
        "if False and",
        f"{ATTACKS} -k class_is_rare",
    ),
    Mutation(
        "padding to the longest row is not looked at",
        "privacy/collation.py",
        "[] if run.drew or changed.drew else",
        "[] if True else",
        f"{ATTACKS} -k padding_changes",
    ),
    Mutation(
        "rows of one length stand for those of all",
        "privacy/collation.py",
        "_APART: Final = 1_000_003",
        "_APART: Final = 0",
        f"{ATTACKS} -k padding_changes",
    ),
    Mutation(
        "a hook lengthens a gradient after it was measured",
        "privacy/units/base.py",
        "if self._versions not in (None, _versions(self.inputs, self.grads)):",
        "if False:",
        f"{ATTACKS} -k lengthens_it_later",
    ),
    Mutation(
        "trial runs measure what hooks have made of a gradient",
        "privacy/bookkeeping.py",
        "inputs, grads = inputs.clone(), grads.clone()",
        "pass",
        f"{ATTACKS} -k cannot_lengthen",
    ),
    Mutation(
        "class weights are not seen in the call",
        "privacy/preflight.py",
        "if all_rows > divided():",
        "if False:",
        f"{ATTACKS} -k not_in_the_first_batch",
    ),
    Mutation(
        "rows whose losses have class weights, each in a call of its own, are refused",
        "privacy/preflight.py",
        "if all_rows > divided():",
        "if all_rows:",
        f"{ATTACKS} -k divide_by_nothing",
    ),
]
