"""Norms and sums of the engine's shorter ways."""

from __future__ import annotations

from mutation import Mutation

GRADIENTS = "tests/privacy/test_gradients.py"
UNITS = "tests/privacy/test_units.py"
TIED = "tests/privacy/test_tied.py"

CATALOGUE = [
    Mutation(
        "a tied weight's norm is that of its two uses",
        "privacy/gradients/rules/tied.py",
        "self.head.squares() + 2 * scale * cross",
        "self.head.squares()",
        f"{TIED} -k exact",
    ),
    Mutation(
        "uses of a tied weight that cancel are rounded away",
        "privacy/gradients/rules/tied.py",
        "parts.clamp(min=0).to(error.dtype) + 2 * scale * error",
        "parts.clamp(min=0).to(error.dtype)",
        f"{TIED} -k cancel",
    ),
    Mutation(
        "what stands beside a Gram matrix's diagonal counts once",
        "privacy/gradients/formulas.py",
        "times = 1 if row == column else 2",
        "times = 1",
        f"{UNITS} -k quarters",
    ),
    Mutation(
        "inputs are held until the graph goes",
        "privacy/gradients/recorder.py",
        "inputs, grads = handed.pop(), grads.detach()",
        "inputs, grads = handed[0], grads.detach()",
        f"{UNITS} -k 'let_go or second_backward'",
    ),
    Mutation(
        "the last rows of a layer are left out of its norms",
        "privacy/gradients/rules/layer_rule.py",
        "for start in range(0, len(grads), size)]",
        "for start in range(0, len(grads) - len(grads) % size, size)]",
        f"{UNITS} -k pieces",
    ),
]
