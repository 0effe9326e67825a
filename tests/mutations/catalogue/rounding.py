"""What rounding may do to norms and sums."""

from __future__ import annotations

from mutation import Mutation

ROUNDING = "tests/privacy/test_rounding.py"

CATALOGUE = [
    Mutation(
        "a vocabulary is one sum, and its worst case clips everybody",
        "privacy/gradients/formulas.py",
        "_BLOCK: Final = 512",
        "_BLOCK: Final = 10**6",
        f"{ROUNDING} -k 'enlarged or every_entry'",
    ),
    Mutation(
        "of two Gram matrices only one is rounded",
        "privacy/gradients/formulas.py",
        "bounds.append(times * (around + error_out * _form(g, inputs.abs_(), others_g)))",
        "bounds.append(times * around)",
        f"{ROUNDING} -k worst_entries",
    ),
    Mutation(
        "parts that cancel are as large as they like",
        "privacy/gradients/formulas.py",
        "    return torch.finfo(dtype).eps / 2\n",
        "    return 0.0\n",
        f"{ROUNDING} -k wipe_out",
    ),
    Mutation(
        "a convolution's bias is summed over rows before what cancels in a row is",
        "privacy/gradients/rules/conv.py",
        "weights.to(grads.dtype) @ grads.flatten(2).sum(2)",
        "scaled.flatten(2).sum((0, 2))",
        f"{ROUNDING} -k channels",
    ),
    Mutation(
        "squares that are lost count as zero",
        "privacy/gradients/formulas.py",
        "return 2 * torch.finfo(dtype).tiny / torch.finfo(dtype).eps",
        "return 0.0",
        f"{ROUNDING} -k too_small",
    ),
    Mutation(
        "norms and sums are rounded like the model",
        "privacy/gradients/float32.py",
        'if setting.fp32_precision not in ("ieee", "none"):',
        "if False:",
        f"{ROUNDING} -k whatever",
    ),
    Mutation(
        "norms are under the autocast that the backward pass is under",
        "privacy/gradients/float32.py",
        "if torch.is_autocast_enabled(device):",
        "if False:",
        f"{ROUNDING} -k autocast",
    ),
    Mutation(
        "trial runs round as the newer settings say",
        "privacy/gradients/float32.py",
        "        _set_exact(stack, _ARITHMETIC)\n",
        "",
        f"{ROUNDING} -k 'whichever and highest'",
    ),
]
