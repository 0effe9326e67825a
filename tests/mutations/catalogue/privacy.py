"""Differential privacy."""

from __future__ import annotations

from mutation import Mutation

STRATEGY = "tests/strategies/test_private.py"
GRADIENTS = "tests/privacy/test_gradients.py"
UNITS = "tests/privacy/test_units.py"

CATALOGUE = [
    Mutation(
        "gradients are not clipped",
        "privacy/gradients/formulas.py",
        "factors = (max_grad_norm / norms).clamp(max=1.0)",
        "factors = torch.ones_like(norms)",
        f"{GRADIENTS} -k 'bound or clipping'",
    ),
    Mutation(
        "a sample that overflows takes the batch with it",
        "privacy/gradients/clipped_sums.py",
        "if not bool(finite.all()):",
        "if False:",
        f"{GRADIENTS} -k overflows",
    ),
    Mutation(
        "the norm of a reused layer is that of its parts",
        "privacy/gradients/clipped_sums.py",
        "alone = all(uses[id(p)] == 1 for p in record.unit.parameters)",
        "alone = True",
        f"{GRADIENTS} -k 'reused or tied'",
    ),
    Mutation(
        "the rows of a shared projection are mistaken",
        "privacy/gradients/rules/attention.py",
        "whole[:, self._rows] = grads",
        "whole[:, : grads.shape[1]] = grads",
        f"{GRADIENTS} -k 'exact and memory'",
    ),
    Mutation(
        "ways are timed with as many rows as there are",
        "privacy/gradients/rules/layer_rule.py",
        "few = [item.contiguous() for item in _few(inputs, grads, rows=rows)]",
        "few = [inputs, grads]",
        f"{UNITS} -k whatever_the_number",
    ),
    Mutation(
        "the padding's vector is trained",
        "privacy/gradients/rules/embedding.py",
        "if self.padding is not None:",
        "if False:",
        f"{GRADIENTS} -k 'norms and embedding'",
    ),
    Mutation(
        "no noise is added",
        "privacy/noise/gaussian.py",
        "        if std == 0:",
        "        if True:",
        "tests/privacy/test_noise.py",
    ),
    Mutation(
        "the noise follows seed_everything",
        "privacy/noise/gaussian.py",
        "Keystream(None if self._seed is None else _key_of(self._seed))",
        "Keystream(_key_of(torch.initial_seed() if self._seed is None else self._seed))",
        "tests/privacy/test_noise.py",
    ),
    Mutation(
        "a copy repeats the noise",
        "privacy/noise/gaussian.py",
        "    def __getstate__(self) -> dict[str, Any]:",
        "    def __getstate__(self) -> dict[str, Any]:\n        self._seed = self._seed or 7\n"
        "        self._begin()",
        "tests/privacy/test_noise.py -k copy",
    ),
    Mutation(
        "draws follow seed_everything",
        "privacy/sampling.py",
        "else np.random.default_rng(self._seed)",
        "else np.random.default_rng(np.random.randint(2**31))",
        "tests/privacy/test_sampling.py -k seed",
    ),
    Mutation(
        "empty draws are left out",
        "privacy/sampling.py",
        "            yield (self._part",
        "            if len(drawn):\n                yield (self._part",
        "tests/privacy/test_sampling.py -k empty",
    ),
    Mutation(
        "a row is in two chunks of one step",
        "privacy/sampling.py",
        "samples[start : start + self._limit] for start",
        "samples[start : start + self._limit + 1] for start",
        "tests/privacy/test_sampling.py -k chunks",
    ),
    Mutation(
        "steps are not accounted for",
        "privacy/step.py",
        "        ledger.record()\n",
        "",
        f"{STRATEGY} -k 'boring or calibrated'",
    ),
    Mutation(
        "the sum is divided by what was drawn",
        "privacy/step.py",
        "expected_batch_size=ledger.public.expected_batch_size,\n            combine",
        "expected_batch_size=self._rows,\n            combine",
        f"{STRATEGY} -k by_hand",
        (
            (
                "engine.begin_step(bound)",
                "engine.begin_step(bound)\n"
                "        self._rows = max(1, sum(chunk.size for chunk in drawn.chunks))",
            ),
        ),
    ),
    Mutation(
        "hooks see gradients before the noise",
        "strategies/training.py",
        "        self.precision_plugin.pre_backward(closure_loss, self._module)\n",
        "        self.precision_plugin.post_backward(closure_loss, self._module)\n",
        f"{STRATEGY} -k no_hook",
    ),
    Mutation(
        "training metrics are logged",
        "strategies/telemetry.py",
        "if name in self._public:",
        "if True:",
        f"{STRATEGY} -k withheld",
    ),
    Mutation(
        "a run resumes without its account",
        "strategies/training.py",
        "            self._restored = require_account(checkpoint)\n",
        "            self._restored = None\n",
        f"{STRATEGY} -k 'goes_on_with or without_an_account'",
    ),
    Mutation(
        "a negative number of steps gives epsilon back",
        "privacy/accounting/ledger_state.py",
        "            positive_int(steps=steps)\n",
        "",
        "tests/privacy/test_ledger.py -k damaged",
    ),
    Mutation(
        "checkpoints have no account",
        "privacy/accounting/carried_ledger.py",
        '        checkpoint[CHECKPOINT_KEY] = {"privacy": ledger.state_dict()}\n',
        "        pass\n",
        f"{STRATEGY} -k every_checkpoint",
    ),
    Mutation(
        "the budget may be exceeded",
        "privacy/accounting/ledger.py",
        "        return steps < self._certified[target_epsilon]",
        "        return True",
        "tests/privacy/test_ledger.py -k budget",
    ),
    Mutation(
        "nothing is checked before the first step",
        "privacy/step.py",
        "self._preflight_due, self._repeats = True, ",
        "self._preflight_due, self._repeats = False, ",
        f"{STRATEGY} -k preflight",
    ),
    Mutation(
        "rows that are mixed pass the preflight",
        "privacy/checks/mixed_rows.py",
        "    layer = differing(run, changed, kept, tolerance=_TOLERANCE)\n",
        "    layer = None\n",
        "tests/privacy/test_preflight.py -k mixes",
    ),
    Mutation(
        "a parameter is trained past the noise",
        "privacy/gradients/engine.py",
        "if parameter.requires_grad and id(parameter) not in self._covered:",
        "if False:",
        f"{STRATEGY} -k 'later or outside'",
    ),
    Mutation(
        "un-noised records are in a pickle of the model",
        "privacy/gradients/recorder.py",
        "return {**self.__dict__, **nothing, ",
        'return {**self.__dict__, "_handles": [], ',
        f"{GRADIENTS} -k pickled",
    ),
    Mutation(
        "a step is released before it is charged",
        "privacy/step.py",
        "            self._charge(around)\n        self._add_noise(around)\n",
        "            pass\n        self._add_noise(around)\n        self._charge(around)\n",
        "tests/privacy/test_step.py -k cannot_be_charged",
    ),
    Mutation(
        "one process releases a sum without the noise that is due",
        "privacy/collective.py",
        "        self._require_noised(noises, 0, int(noised))\n",
        "        pass\n",
        "tests/privacy/test_step.py -k forgets_the_noise",
    ),
]
