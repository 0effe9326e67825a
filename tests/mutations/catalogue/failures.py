"""The rows of the failure table in docs/privacy.md that no other catalogue brings back."""

from __future__ import annotations

from mutation import Mutation

FAILURES = "tests/strategies/test_failures.py"
PRECISION = "tests/strategies/test_precision.py"
STRATEGY = "tests/strategies/test_private.py"
GRADIENTS = "tests/privacy/test_gradients.py"

CATALOGUE = [
    Mutation(
        "a step is taken with its first chunk only",
        "privacy/step.py",
        "for chunk in chunks:",
        "for chunk in chunks[:1]:",
        f"{STRATEGY} -k 'do_not_change_the_result and 2'",
    ),
    Mutation(
        "noise is added twice",
        "privacy/gradients/engine.py",
        "            noise.add_(sums[parameter], std=std)\n",
        "            noise.add_(sums[parameter], std=std)\n" * 2,
        f"{STRATEGY} -k fresh_noise",
    ),
    Mutation(
        "a draw of nothing is released without noise",
        "privacy/gradients/engine.py",
        "                sums[parameter] = torch.zeros_like("
        "parameter, dtype=widened(parameter.dtype))\n",
        "                sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)\n"
        "                continue\n",
        f"{STRATEGY} -k draw_of_nothing",
    ),
    Mutation(
        "a resumed run repeats the noise",
        "privacy/step.py",
        "GaussianNoise(config.insecure_seed, ",
        "GaussianNoise(torch.initial_seed(), ",
        f"{FAILURES} -k resumed",
    ),
    Mutation(
        "the divisor follows the number of rows",
        "privacy/run_contract.py",
        "    if expected > dataset_size:\n",
        "    expected = int(rows * (expected / dataset_size))\n    if expected > dataset_size:\n",
        f"{FAILURES} -k divisor",
    ),
    Mutation(
        "the steps of an epoch are a rounded fraction",
        "privacy/run_contract.py",
        "steps_per_epoch=-(-dataset_size // expected)",
        "steps_per_epoch=int(1 / (expected / dataset_size))",
        f"{FAILURES} -k rounded",
    ),
    Mutation(
        "hooks outlast a fit",
        "privacy/gradients/recorder.py",
        "            self._handles.pop()()\n",
        "            self._handles.pop()\n",
        f"{FAILURES} -k second_fit",
    ),
    Mutation(
        "clipping of the sum passes for clipping",
        "strategies/options.py",
        "            bool(trainer.gradient_clip_val),\n",
        "            False,\n",
        f"{STRATEGY} -k 'that_break_the_promise and max_grad_norm'",
    ),
    Mutation(
        "rows that are drawn unequally count as drawn alike",
        "strategies/private_loader.py",
        "elif type(dataloader.sampler) not in (RandomSampler, SequentialSampler) or (",
        "elif (",
        f"{STRATEGY} -k 'rate_would_be_wrong and weighted'",
    ),
    Mutation(
        "the scale of float16 is left in the gradients",
        "privacy/gradients/engine.py",
        "factor=self._factor)",
        "factor=self._factor / self._loss_scale)",
        f"{PRECISION} -k 'same_weights and options3'",
    ),
    Mutation(
        "a scaler decides by the rows whether a step is taken",
        "strategies/options.py",
        "        precision.scaler = None\n",
        "        pass\n",
        f"{PRECISION} -k never_changes",
        (("return precision.scaler is None", "return True"),),
    ),
    Mutation(
        "one more row rounds the others anew",
        "privacy/gradients/engine.py",
        "        self._factor = rows * self._loss_scale\n",
        "        self._factor = self._loss_scale\n",
        f"{PRECISION} -k anew",
    ),
    Mutation(
        "a layer that is changed in place leaves no record",
        "privacy/gradients/recorder.py",
        'cast("Any", _not_a_view(output)).register_hook(hook)',
        'cast("Any", output).register_hook(hook)',
        f"{GRADIENTS} -k 'norms_are and in'",
    ),
    Mutation(
        "what a layer makes once for all rows is not told apart",
        "privacy/gradients/recorder.py",
        "        rows = self._rows or 1\n",
        "        rows = 1\n",
        "tests/privacy/zoo -k 'exact and decoder'",
    ),
]
