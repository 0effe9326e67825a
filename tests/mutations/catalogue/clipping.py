"""Clipping by layers, to a bound that follows, and noise that later steps take back."""

from __future__ import annotations

from mutation import Mutation

LAYERS = "tests/privacy/clipping/test_layers.py"
RUNS = "tests/strategies/test_clipping.py"

CATALOGUE = [
    Mutation(
        "each layer is clipped to the bound of the whole",
        "privacy/gradients/clipping/layers.py",
        "shares=tuple(weight / whole for weight in weights)",
        "shares=tuple(1.0 for weight in weights)",
        f"{LAYERS} -k no_row_moves",
    ),
    Mutation(
        "layers that share a weight are clipped apart",
        "privacy/gradients/clipping/layers.py",
        "same[other] = one",
        "pass",
        f"{LAYERS} -k 'its_share and None'",
    ),
    Mutation(
        "the noise stays as it was when the bound has moved",
        "privacy/gradients/engine.py",
        "std = noise_multiplier * self._max_grad_norm\n",
        "std = noise_multiplier * 2.0\n",
        f"{RUNS} -k noise_follows",
    ),
    Mutation(
        "the count of clipped rows costs nothing",
        "privacy/accounting/ledger.py",
        "noise = joint_noise(self.noise_multiplier, *self.beside)",
        "noise = self.noise_multiplier",
        f"{RUNS} -k noise_follows",
    ),
    Mutation(
        "the bound follows a count without noise",
        "privacy/released/step_metrics.py",
        "noise.add_(sums[place : place + 1], std=width)",
        "pass",
        f"{RUNS} -k count_is_told",
    ),
    Mutation(
        "a resumed run begins again with its first bound",
        "privacy/accounting/ledger_state.py",
        'clip_bound=state.get("clip_bound"),',
        "clip_bound=None,",
        f"{RUNS} -k goes_on_with_its_bound",
    ),
    Mutation(
        "a row that takes part in every epoch pays for one",
        "privacy/noise/banded/matrix.py",
        "for step in range(0, steps, separation)",
        "for step in range(0, 1)",
        "tests/privacy/banded/test_matrix.py -k 'worst or direction'",
    ),
    Mutation(
        "steps are taken after all that were paid for",
        "privacy/noise/banded/planned.py",
        "if self._left == 0:",
        "if False:",
        "tests/privacy/banded/test_noise.py -k a_plan",
    ),
    Mutation(
        "rows may come again before their turn",
        "privacy/noise/banded/fit.py",
        "if due != found:",
        "if False:",
        "tests/strategies/test_banded.py -k left_early",
    ),
]
