"""What rounding may do to norms and sums."""

from __future__ import annotations

from mutation import Mutation

ROUNDING = "tests/privacy/test_rounding.py"
SHORT = "tests/privacy/test_bfloat16.py"

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
        "    return unit_roundoff(dtype)\n",
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
        "a gradient that is rounded is not measured again",
        "privacy/gradients/clipped_sums.py",
        "new.squares() if new is not old else square * weight.square()",
        "square * weight.square()",
        f"{SHORT} -k cancel",
    ),
    Mutation(
        "a row that came out too long is halved once only",
        "privacy/gradients/clipped_sums.py",
        "torch.where(factors > 0, torch.ldexp(torch.ones_like(factors), exponents - 1), 0.0)",
        "torch.where(factors < 1, 0.5, 1.0)",
        f"{SHORT} -k cancel",
    ),
    Mutation(
        "a rounded row has no room, and half of it is lost",
        "privacy/gradients/clipped_sums.py",
        "_MARGIN: Final = 1 - 2.0**-8",
        "_MARGIN: Final = 1.0",
        f"{SHORT} -k hardly_any",
    ),
    Mutation(
        "a rounded sum is taken unmeasured",
        "privacy/gradients/rules/layer_rule.py",
        "        if self.rounds:\n            raise",
        "        if False:\n            raise",
        f"{SHORT} -k without_its_norms",
    ),
    Mutation(
        "tensor cores round to nearest",
        "privacy/gradients/products.py",
        "return eps if dtype == torch.bfloat16 else eps / 2",
        "return eps / 2",
        f"{SHORT} -k truncating",
    ),
    Mutation(
        "on a GPU ways are timed, which waits for it",
        "privacy/gradients/rules/layer_rule.py",
        "elif is_short(grads) or on_device(grads):",
        "elif False:",
        f"{SHORT} -k ways_follow",
    ),
    Mutation(
        "the way decides how much room a row is left",
        "privacy/gradients/clipped_sums.py",
        "    short = any(record.short for record in records)\n",
        "    short = any(part.rounds for part in parts)\n",
        f"{SHORT} -k same_room",
    ),
    Mutation(
        "one more row has all others rounded",
        "privacy/gradients/rules/layer_rule.py",
        "some = _few(inputs, grads, rows=_ROWS)",
        "some = [inputs, grads]",
        f"{SHORT} -k one_more_row",
    ),
    Mutation(
        "layers whose norms are taken together have the first one's error",
        "privacy/gradients/formulas.py",
        "errors = max(g.error_in for g in grams), max(g.error_out for g in grams)",
        "errors = first.error_in, first.error_out",
        f"{SHORT} -k together",
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
